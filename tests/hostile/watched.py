"""dconv on hostile checkpoints, each in a forked process that an audit hook watches; started by `test_attacks`.

The process first converts the good twins, so that everything is imported that dconv needs, then forks once an attack:
a child has a memory and a time of its own, and what happens to it happens to nobody else.

Standard input: JSON, see `main`. Standard output: one line of JSON an attack, see `Seen`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attacks import make
from attacks.corpus import ALIVE, RAN, Attack, Canary, records, root_of
from attacks.twins import make_canary
from dconv.cli import main as dconv

#: Seconds of computing and bytes of address space that an attack may take beside what the process has.
SECONDS, SPACE = 20, 4 << 30
#: What nothing here has a reason to do.
NEVER = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "os.kill",
    "os.killpg", "os.putenv", "subprocess.Popen", "pty.spawn", "ctypes.", "socket.", "urllib.", "http.", "ftplib.",
    "smtplib.", "sqlite3.", "webbrowser.", "pickle.find_class", "code.__new__", "builtins.input", "sys.addaudithook",
    "sys.settrace", "sys.setprofile", "import.antigravity", "import.runpy", "import.torch", "import.transformers",
)  # fmt: skip
#: Asking for the machine's own name reaches nobody.
FINE = ("socket.gethostname",)
#: Events that name paths, and where those stand among the arguments, each with its directory's descriptor (or None).
PATHS = {
    "open": ((0, None),), "os.listdir": ((0, None),), "os.scandir": ((0, None),), "os.chdir": ((0, None),),
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "shutil.rmtree": ((0, None),),
    "shutil.move": ((0, None), (1, None)), "shutil.copyfile": ((0, None), (1, None)),
}  # fmt: skip
#: Those that only look.
LOOKS = ("os.listdir", "os.scandir", "os.chdir")
#: What Python and dconv read of the machine.
MACHINE = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo/")
#: Who makes code of text: classes of the standard library that are made so, and imports.
MAKERS = ("dataclasses.py", "collections/__init__.py", "enum.py", "functools.py", "typing.py")
LIBRARIES = tuple(os.path.realpath(path) + "/" for path in (
    sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), *Path(make.__file__).parents[1].glob("dconv*"),
))  # fmt: skip


class Forbidden(BaseException):
    """Of a kind that nobody catches by accident."""


@dataclass
class Seen:
    """What an attack came to.

    Attributes:
        said: of each command its exit code, standard output and standard error.
        forbidden: events that the hook saw and should not have.
        left: what lies where the output was to be made.
        canary: what happened to it.
        signal: that ended the process; 0 for none.
        seconds, peak: of computing; of memory in MB, beside what the process has.
    """

    name: str
    said: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    forbidden: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    canary: list[str] = field(default_factory=list)
    signal: int = 0
    seconds: float = 0.0
    peak: int = 0


def watch(at: Path, work: Path, found: list[str], *, refuse: bool) -> None:
    """Adds the hook, which stays until the process ends.

    Args:
        at: the attack's directory, which may be read.
        work: where output may be written.
        refuse: raise at once; else only note down.
    """
    written = (os.path.realpath(work) + "/",)
    read = (os.path.realpath(at) + "/", *written, *LIBRARIES, *MACHINE)

    def note(what: str) -> None:
        found.append(what[:300])
        if refuse:
            raise Forbidden(what)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "import":
            event = f"import.{args[0].partition('.')[0]}"
        if event.startswith(NEVER) and event not in FINE:
            note(f"{event} {args!r}")
        elif event in ("exec", "compile", "marshal.loads"):
            maker = sys._getframe(1).f_code.co_filename
            if not maker.startswith("<frozen importlib") and not (
                maker.startswith(LIBRARIES) and maker.endswith(MAKERS)
            ):
                note(f"{event} by {maker} {args!r}")
        elif event in PATHS:
            only_read = event in LOOKS or (event == "open" and not _writes(args))
            for index, folder in PATHS[event]:
                path = args[index]
                if not isinstance(path, int | None) and not _inside(path, args, folder, read if only_read else written):
                    note(f"{event} {path!r}")

    sys.addaudithook(hook)


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2]
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _inside(path: Any, args: tuple[Any, ...], folder: int | None, places: tuple[str, ...]) -> bool:
    text = os.fsdecode(path)
    if folder is not None and len(args) > folder and args[folder] not in (-1, None):
        text = os.path.join(f"/proc/self/fd/{args[folder]}", text)
    return os.path.realpath(text).startswith(places) or f"{os.path.realpath(text)}/".startswith(places)


@contextmanager
def _caught(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Standard output and error, whoever writes to them."""
    files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")]
    kept = [os.dup(fd) for fd in (1, 2)]
    for fd, file in zip((1, 2), files, strict=True):
        os.dup2(file, fd)

    def read() -> tuple[str, str]:
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (os.pread(fd, 1 << 20, 0).decode(errors="replace") for fd in files)
        for fd in files:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        return out, err

    yield read
    for fd, before in zip((1, 2), kept, strict=True):
        os.dup2(before, fd)


def limited() -> None:
    """Sets the process's limits."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * os.sysconf("SC_PAGE_SIZE") + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _commands(words: list[str], work: Path) -> dict[str, list[str]]:
    model, form, *options = words
    found = {"convert": ["convert", model, form, *options, "-o", str(work / "out"), "--quiet"]}
    if not options or form == "onnx":  # those of convert alone are what is hostile
        found |= {"inspect": ["inspect", model], "check": ["check", model, "--no-run"]}
    return found


def _in_child(
    seen: Seen, at: Path, work: Path, notes: Path, commands: dict[str, list[str]] | None, heavy: float
) -> None:
    """Runs the commands, or where there are none, the reader that believes everything.

    Args:
        heavy: seconds; where the conversion computes longer, nothing else is run.
    """
    limited()
    os.chdir(work)
    with _caught(notes) as read:
        watch(at, work, seen.forbidden, refuse=commands is not None)
        try:
            heavy += time.process_time()
            if commands is None:
                believe(at, work)
            for name, command in (commands or {}).items():
                seen.said[name] = (dconv(command), *read())
                if time.process_time() > heavy:
                    break
        except Forbidden:
            pass
        except BaseException as fault:
            seen.said["fault"] = (-1, "", f"{type(fault).__name__}: {fault}"[:2000])


def believe(at: Path, work: Path) -> None:
    """A reader as many are: opens what an index names, copies what lies beside the weights, unpickles."""
    if (index := at / "model.safetensors.index.json").is_file():
        for name in set(json.loads(index.read_text())["weight_map"].values()):
            (at / name).read_bytes()
    for name in ("README.md", "model.pt"):
        if (at / name).is_symlink():
            (work / name).write_bytes((at / name).read_bytes())
            return
    if index.is_file():
        return

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("torch"):  # the good rest; to import it takes seconds
                raise ValueError(module)
            return super().find_class(module, name)

        def persistent_load(self, pid: object) -> object:
            return pid

    path = next(path for path in sorted(at.rglob("*")) if path.name in (
        "pytorch_model.bin", "model.pt", "model_optim_rng.pt", ".metadata"))  # fmt: skip
    data = path.read_bytes()
    if data[:2] == b"PK":
        held = records(path)
        data = held[root_of(held) + "/data.pkl"]
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        try:
            Reader(stream).load()
        except Exception:  # the good rest
            return


def forked(attack: Attack, corpus: Path, canary: Canary, *, believing: bool = False, heavy: float = 1e9) -> Seen:
    """One attack, from its making to its removal."""
    at = make.one(corpus, attack, canary)
    work, notes = corpus / "work", corpus / "notes"
    for folder in (work, notes):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    seen = Seen(attack.name)
    commands = None if believing else _commands(make.words(attack, at), work)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    child = os.fork()
    if child == 0:
        file = os.open(notes / "seen", os.O_WRONLY | os.O_CREAT)
        try:
            _in_child(seen, at, work, notes, commands, heavy)
        except BaseException as fault:
            seen.said["fault"] = (-1, "", repr(fault)[:2000])
        finally:
            os.write(file, json.dumps(asdict(seen)).encode())
            os._exit(0)
    _, status, used = os.wait4(child, 0)
    if text := (notes / "seen").read_text() if (notes / "seen").exists() else "":
        seen = Seen(**json.loads(text))
    seen.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    seen.seconds = round(used.ru_utime + used.ru_stime, 2)
    seen.peak = max(0, used.ru_maxrss - pages * os.sysconf("SC_PAGE_SIZE") // 1024) // 1024
    seen.left = sorted(path.relative_to(work).as_posix() for path in work.rglob("*"))
    seen.canary = _canary(canary, [work, notes])
    shutil.rmtree(at)
    return seen


def _canary(canary: Canary, folders: list[Path]) -> list[str]:
    """What happened to it, and whether the secret has got anywhere; afterwards it is as before."""
    happened = []
    if (canary.folder / RAN).exists():
        happened.append("ran")
        (canary.folder / RAN).unlink()
    if not (canary.folder / ALIVE).exists():
        happened.append("not alive")
    secret = canary.secret.read_bytes()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if secret in path.read_bytes():
            happened.append(f"the secret is in {path.name}")
    make_canary(canary.folder, secret.decode())
    return happened


def main() -> None:
    """Reads ``{"corpus", "secret", "heavy", "twins": [], "attacks": [], "believing": []}`` and does it in order."""
    asked = json.load(sys.stdin)
    corpus = Path(asked["corpus"])
    out = os.fdopen(os.dup(1), "w")
    canary = make.write(corpus, (), asked["secret"], asked["twins"])
    os.environ["DCONV_HISTORY"] = "off"
    os.environ["TMPDIR"] = str(corpus / "work")
    by_name = {attack.name: attack for attack in make.ATTACKS}
    for name in asked["twins"]:
        attack = Attack(f"good/{name}", "", "", name, lambda _at, _canary: None)
        at = make.one(corpus, attack, canary)
        work = corpus / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        said = {}
        (corpus / "notes").mkdir(exist_ok=True)
        with _caught(corpus / "notes") as read:
            for command, words in _commands(make.words(attack, at), work).items():
                said[command] = (dconv(words), *read())
        out.write(json.dumps(asdict(Seen(attack.name, said))) + "\n")
        shutil.rmtree(at)
    for name in asked["believing"]:
        out.write(json.dumps(asdict(forked(by_name[name], corpus, canary, believing=True))) + "\n")
    for name in asked["attacks"]:
        out.write(json.dumps(asdict(forked(by_name[name], corpus, canary, heavy=asked["heavy"]))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
