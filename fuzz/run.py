"""Feed parsers with libFuzzer, by atheris:

    python fuzz/run.py [TARGET…] [--seconds 600 | --runs N]

What reaches something new is added to ``work/fuzz/TARGET/corpus/``, and read again by the next run together with what
git keeps in ``fuzz/corpus/TARGET/`` (``fuzz/keep.py`` takes from one to the other). Inputs that a parser does not
survive are written beside, one for each place, with their tracebacks in ``log.txt``; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT)]
os.environ |= {"DCONV_HISTORY": "off", "RUST_BACKTRACE": "0"}

CORPUS = _ROOT / "fuzz" / "corpus"
#: Seconds that one input may take, with every line traced, and MiB that the process may hold.
_LONGEST, _MOST_MEMORY = 20, 2048
#: MiB of address space beyond what is held at the start: what is asked for and never touched counts as well.
_MOST_ASKED = 4096
_COUNT = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_LAST = re.compile(r"^#(\d+)\t", re.MULTILINE)
#: A run that libFuzzer ends, for time or memory, is begun again as often.
_MOST_ENDS = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them where none is named")
    parser.add_argument("--seconds", type=int, default=0, help="for each target; 60 where no number of runs is given")
    parser.add_argument("--runs", type=int, default=0, help="inputs for each target, the kept ones among them")
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer; 0 draws one")
    parser.add_argument("--out", type=Path, default=_ROOT / "work" / "fuzz", help="where findings and logs are put")
    args = parser.parse_args(argv)
    targets = instrumented()
    if unknown := [name for name in args.targets if name not in targets]:
        parser.error(f"no target is called {', '.join(unknown)}; there are {', '.join(targets)}")
    chosen = [targets[name] for name in args.targets or targets]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # a limit that is there already stays
    asked = held + (_MOST_ASKED << 20)
    resource.setrlimit(resource.RLIMIT_AS, (asked if most < 0 else min(asked, most), most))
    _warm(chosen)
    return max([one(args, target) for target in chosen])


def instrumented() -> dict[str, Any]:
    """The targets; whatever of dconv they import tells libFuzzer where it has been. To be called before any is."""
    import atheris

    if "dconv" not in sys.modules:
        atheris.instrument_imports(include=["dconv"]).__enter__()  # pyright: ignore - for good: parsers import on their way
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # a line for each module
        from fuzz.targets import TARGETS
    return TARGETS


def _warm(targets: Iterable[Any]) -> None:
    """Import what targets import on their way, and make what they are given, once for all processes to come."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        for target in targets:
            for path in sorted((CORPUS / target.name).glob("*"))[:1]:
                before = signal.signal(signal.SIGALRM, _late)
                signal.alarm(_LONGEST)
                try:
                    with contextlib.suppress(Exception):  # it will be fed again
                        target.run(path.read_bytes())
                finally:
                    signal.alarm(0)
                    signal.signal(signal.SIGALRM, before)


def _late(*_: object) -> None:
    raise TimeoutError


def one(args: argparse.Namespace, target: Any) -> int:
    """Feed a target, in processes of their own: libFuzzer ends the one that it is in. 1 where something was found."""
    out: Path = args.out / target.name
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    (CORPUS / target.name).mkdir(parents=True, exist_ok=True)
    before, began, count, ends = set(out.glob("*-*")), time.monotonic(), 0, 0
    (out / "log.txt").write_text("")
    while ends < _MOST_ENDS:
        left = max(args.seconds - int(time.monotonic() - began), 1) if args.seconds else 0
        at = (out / "log.txt").stat().st_size
        child = os.fork()
        if not child:
            try:
                _feed(args, target, out, left)
            finally:
                os._exit(70)  # libFuzzer has not ended it
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = (out / "log.txt").read_bytes()[at:].decode(errors="replace")
        counts = _COUNT.findall(said) or _LAST.findall(said)
        count += int(counts[-1]) if counts else 0
        if not code:
            break
        ends += 1
        if args.runs or left <= 1:
            break
    found = sorted(path.name for path in set(out.glob("*-*")) - before)
    words = f"{len(found)} found, in {out}: {' '.join(found)}" if found else "nothing found"
    if ends and not found:
        words = f"ended by itself, see {out / 'log.txt'}"
    print(f"{target.name:<20} {count:>9,} executions {time.monotonic() - began:>5.0f} s   {words}", flush=True)
    return int(bool(found or ends))


def _feed(args: argparse.Namespace, target: Any, out: Path, seconds: int) -> None:
    import atheris

    log = os.open(out / "log.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    words = out / "words.txt"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words()))
    options = [
        f"-dict={words}", f"-artifact_prefix={out}/", f"-timeout={_LONGEST}", f"-rss_limit_mb={_MOST_MEMORY}",
        f"-max_len={target.most}", "-print_final_stats=1", f"-seed={args.seed}",
        f"-runs={args.runs or -1}", f"-max_total_time={seconds if args.seconds or args.runs else 60}",
    ]  # fmt: skip
    form = target.mutator()
    more: dict[str, Any] = {}
    if form is not None:
        more["custom_mutator"] = lambda data, most, seed: form(data, most, seed, atheris.Mutate)
    atheris.Setup(
        [sys.argv[0], *options, str(out / "corpus"), str(CORPUS / target.name)], _watched(target.run, out), **more
    )
    atheris.Fuzz()


def _watched(run: Callable[[bytes], None], out: Path) -> Callable[[bytes], None]:
    """Keeps the first input that fails at a place, and goes on."""
    seen = set[str]()

    def watched(data: bytes) -> None:
        try:
            run(data)
        except KeyboardInterrupt:
            raise
        except BaseException as fault:
            place = f"{type(fault).__name__} {_place(fault)}"
            if place not in seen:
                seen.add(place)
                name = f"crash-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
                (out / name).write_bytes(data)
                os.write(2, f"\nfound {name}: {place}\n{traceback.format_exc()[-4000:]}\n".encode(errors="replace"))

    return watched


def _place(fault: BaseException) -> str:
    """The innermost line of dconv that it went through."""
    lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(fault.__traceback__)]
    return next((line for line in reversed(lines) if "/dconv/" in line), lines[-1])


def _escaped(word: str) -> str:
    return "".join(
        chr(c) if 32 < c < 127 and chr(c) not in '"\\' else f"\\x{c:02x}" for c in word.encode("utf-8", "replace")
    )


if __name__ == "__main__":
    sys.exit(main())
