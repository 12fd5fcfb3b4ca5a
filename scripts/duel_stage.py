"""The stage of the duel: one program at a time in a process of its own, with a time limit, and what it left behind.

A process is forked from a server that has imported what the peers import, so that each costs a fraction of a second.
It can be stopped, continued and killed at a moment that its files show. What it wrote is read back here, by this
file's own few lines, and compared with the tensors that went in; a program's own word that all went well counts only
as its exit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

#: Seconds. What takes longer hangs.
PATIENCE: Final = 90
#: What the server imports before it forks; the second part only where the whole table is made, for it takes longer.
PRELOADED: Final = (
    "torch", "numpy", "safetensors.torch", "torch.distributed.checkpoint",
    "torch.distributed.checkpoint._consolidate_hf_safetensors", "dconv.cli", "dconv.pipeline", "dconv.api",
)  # fmt: skip
PRELOADED_TOO: Final = (
    "transformers", "transformers.models.llama.modeling_llama", "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch", "dconv.export.huggingface", "gguf",
)  # fmt: skip
#: The word of each row. `whole`: right. `error`: a refusal, nothing under the final name. `late`: an error after bytes
#: are under it. `half`: killed, and a half result is under it. `silent`: a wrong result, and success. `runs`: it
#: executed, or read outside of, what it was given. The last stands for a peer that is not here.
VERDICTS: Final = ("whole", "error", "late", "half", "silent", "runs", "not installed")
#: dtype, shape, bytes.
Tensor = tuple[str, tuple[int, ...], bytes]
Tensors = Mapping[str, Tensor]

_DTYPES: Final = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What one program did with one input."""

    verdict: str
    words: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"no such verdict: {self.verdict}")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        ok: it says that all went well.
        value: what its function returned.
        error: one line, where it does not.
        said: its standard output and error.
        wrote: bytes that it handed to the system to write.
    """

    ok: bool
    value: Any
    error: str
    said: str
    wrote: int


def serve(*modules: str) -> None:
    """Say what the server imports; before the first process."""
    _context().set_forkserver_preload([*modules])


def _context() -> Any:
    return multiprocessing.get_context("forkserver")


class Running:
    """A function of `duel_peers` at work."""

    def __init__(self, folder: Path, action: str, *arguments: object, limit: int = 0) -> None:
        """Start it.

        Args:
            folder: where its log goes.
            limit: the most bytes that a file may grow to; 0 is any.
        """
        self._log = folder / f"{action}-{time.monotonic_ns()}.log"
        self._answer, theirs = multiprocessing.Pipe(duplex=False)
        self._process = _context().Process(target=_work, args=(theirs, self._log, limit, action, arguments))
        self._process.start()
        theirs.close()

    def until(self, moment: Callable[[], bool]) -> bool:
        """Whether the moment came before the end of the process; looked for as often as can be."""
        while self._process.is_alive():
            if moment():
                return True
            time.sleep(0.0002)
        return False

    def signal(self, number: signal.Signals) -> None:
        """Kill, stop or continue it; a stop has come into effect on return."""
        try:
            os.kill(self._process.pid, number)
            status = Path(f"/proc/{self._process.pid}/stat")
            while number is signal.SIGSTOP and status.read_text().rpartition(")")[2].split()[0] not in "TtZ":
                time.sleep(0.0005)
        except (ProcessLookupError, FileNotFoundError):
            pass

    def end(self) -> Ending:
        """Wait for it; what hangs is killed, and that is an error, too."""
        value: Any = None
        try:
            if self._answer.poll(PATIENCE):
                value = self._answer.recv()
        except EOFError:
            pass
        self._process.join(5 if value else 0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        said = self._log.read_text(errors="replace") if self._log.exists() else ""
        if value is None:
            return Ending(False, None, f"ended by signal {-(self._process.exitcode or 0)}", said, 0)
        ok, result, error, wrote = value
        return Ending(ok, result, error, said, wrote)


def _work(answer: Connection, log: Path, limit: int, action: str, arguments: tuple[object, ...]) -> None:
    """In the forked process."""
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ |= {"HF_HUB_OFFLINE": "1", "DCONV_HISTORY": "off", "OMP_NUM_THREADS": "1"}
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    before = _written()
    try:
        import duel_peers

        result = getattr(duel_peers, action)(*arguments)
        message = (True, result, "", _written() - before)
    except BaseException as fault:
        traceback.print_exc()
        message = (False, None, _one_line(fault), _written() - before)
    sys.stdout.flush()
    sys.stderr.flush()
    answer.send(message)
    answer.close()
    os._exit(0)  # no thread of a peer's keeps it alive


def _written() -> int:
    found = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


def _one_line(fault: BaseException) -> str:
    for inner, _ in getattr(fault, "failures", {}).values():  # torch's CheckpointException has one a rank
        fault = inner
    first = re.sub(r"/\S*/", "", (str(fault).strip() or "no words").splitlines()[0])
    first = first if len(first) < 100 else first[:97].rpartition(" ")[0] + " …"
    return first if isinstance(fault, DconvSaid) else f"{type(fault).__name__}: {first}"


class DconvSaid(Exception):
    """An exit code of dconv, and the first line of its error."""


def peer(folder: Path, action: str, *arguments: object, limit: int = 0) -> Ending:
    """A function of `duel_peers`, from start to end."""
    return Running(folder, action, *arguments, limit=limit).end()


# ------------------------------------------------------------------------------------------------ what is left behind


def read_back(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors.

    Raises:
        ValueError: a file that its own header does not fit, as safetensors' library would find it.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        end = 8 + length
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            body = data[8 + length + low : 8 + length + high]
            if entry["dtype"] not in _DTYPES or len(body) != high - low:
                raise ValueError(f"{path.name} cannot be opened: {name} is not there")
            found[name] = _DTYPES[entry["dtype"]], tuple(entry["shape"]), body
            end = max(end, 8 + length + high)
        if end != len(data):
            raise ValueError(f"{path.name} cannot be opened: it has {len(data)} bytes, not {end}")
    return found


def difference(truth: Tensors, got: Tensors) -> str:
    """What is wrong with a result, in a few words; empty where nothing is."""
    for name, (dtype, shape, data) in truth.items():
        short = name.removeprefix("model.")
        if name not in got:
            return f"{short} is not in it"
        its_dtype, its_shape, its_data = got[name]
        if its_shape != shape:
            return f"{short} has shape {list(its_shape)}, not {list(shape)}"
        if its_dtype != dtype:
            return f"{short} is {its_dtype}, not {dtype}"
        if its_data == data:
            continue
        size = len(data) // max(1, _count(shape))
        wrong = [at for at in range(0, len(data), size) if data[at : at + size] != its_data[at : at + size]]
        zero = all(its_data[at : at + size] == bytes(size) for at in wrong)
        return f"{len(wrong)} of {len(data) // size} values of {short} are {'0' if zero else 'wrong'}"
    return ""


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def files_in(out: Path) -> list[Path]:
    """The files under a final name."""
    return sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out] if out.exists() else []


def size_of(out: Path) -> int:
    """Bytes of them; 0 while they come and go."""
    try:
        return sum(path.stat().st_size for path in files_in(out))
    except FileNotFoundError:
        return 0


def judged(ending: Ending, truth: Tensors, out: Path | None = None, *, unknown: str = "") -> Seen:
    """A verdict by what came out.

    Args:
        truth: the tensors that went in.
        out: where they were written to; None where the process gave back what it had loaded.
        unknown: why nobody can know what is right, so that any success is a guess.
    """
    left = files_in(out) if out else []
    if not ending.ok:
        if not left:
            return Seen("error", ending.error)
        return Seen("late", f"{ending.error}; {len(left)} {'file' if len(left) == 1 else 'files'} left in the output")
    warned = " with a warning" if _warns(ending.said) else ""
    try:
        wrong = difference(truth, read_back(out) if out else ending.value)
    except (ValueError, KeyError) as fault:
        wrong = str(fault)
    if unknown:
        return Seen("silent", f"success{warned}; {unknown}" + (f", {wrong}" if wrong else ""))
    return Seen("silent", f"success{warned}; {wrong}") if wrong else Seen("whole", f"right{warned}")


def _warns(said: str) -> bool:
    return re.search(r"MISSING|UNEXPECTED|newly initialized", said) is not None
