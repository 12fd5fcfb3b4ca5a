"""The rows of the duel about how a run ends: killed, on a full disk, beside another, from a source that changes.

Nothing waits for a time: a process is stopped or killed when what it has written shows that it has come so far.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import duel_inputs as inputs
from duel_rows import CONSOLIDATION, SAVE, Row, Stage
from duel_stage import Ending, Running, Seen, Tensors, difference, files_in, judged, read_back, size_of

#: What is killed, stopped, or has no room; and what stands for it in dconv.
MOVED: Final = "the same tensors in a torch_dist (DCP) directory"
SAVED: Final = "the same bytes"
#: Shares of the result that are on disk when a run is killed.
KILLED_AT: Final = (0.01, 0.3, 0.6, 0.8)


def _large(seed: int, stage: Stage) -> Path:
    return stage.made(f"large-{seed}", lambda to: inputs.llama(to, seed, inputs.LARGE))


def _matrices(seed: int, stage: Stage) -> dict[str, object]:
    held = inputs.tensors_of(_large(seed, stage))
    return {name: tensor for name, tensor in held.items() if tensor.ndim == 2}


def _shards(seed: int, stage: Stage) -> Path:
    """Its matrices as DCP's shards of four ranks, cut by columns."""
    return stage.made(
        f"large-shards-{seed}",
        lambda to: inputs.dcp_shards(to, *inputs.by_columns(_matrices(seed, stage), 4)),  # type: ignore[arg-type]
    )


def _dist(seed: int, stage: Stage) -> Path:
    return stage.made(f"large-dist-{seed}", lambda to: inputs.torch_dist(_large(seed, stage), to))


def _truth(seed: int, stage: Stage) -> Tensors:
    return inputs.truth_of(_large(seed, stage))


def _matrix_truth(seed: int, stage: Stage) -> Tensors:
    return {name: it for name, it in _truth(seed, stage).items() if len(it[1]) == 2}


class Contender:
    """A way to write a large result: what is started, and where it shows how far it is."""

    def __init__(self, stage: Stage, out: Path) -> None:
        self.stage = stage
        self.out = out
        self.total = sum(len(it[2]) for it in self.truth(0).values())

    def start(self, seed: int = 0) -> Running:
        raise NotImplementedError

    def truth(self, seed: int) -> Tensors:
        return _truth(seed, self.stage)

    def done(self) -> float:
        """The share of the result that is written."""
        return size_of(self.out) / self.total

    def reach(self, share: float, seed: int = 0) -> Running:
        """Start, and come so far."""
        running = self.start(seed)
        running.until(lambda: self.done() >= share)
        return running

    def source(self, seed: int) -> Path:
        return _large(seed, self.stage)


class Consolidation(Contender):
    def start(self, seed: int = 0) -> Running:
        self.out.mkdir(exist_ok=True)
        names = list(_matrices(seed, self.stage))
        files = {name: 1 + (2 * at // len(names)) for at, name in enumerate(names)}
        return Running(self.stage.root, "consolidate", str(self.source(seed)), str(self.out), files)

    def truth(self, seed: int) -> Tensors:
        return _matrix_truth(seed, self.stage)

    def source(self, seed: int) -> Path:
        return _shards(seed, self.stage)


class Saved(Contender):
    """Loaded, and saved again as files of at most 5 MB."""

    def start(self, seed: int = 0) -> Running:
        return Running(self.stage.root, "transformers_save", str(self.source(seed)), str(self.out), "5MB")


class Dconv(Contender):
    """Out of torch_dist, with a small buffer, so that there is a way to be killed on."""

    words: Sequence[str] = ("--max-memory", "64KiB")

    def start(self, seed: int = 0) -> Running:
        source = str(self.source(seed))
        return Running(self.stage.root, "dconv", "convert", source, "hf", "-o", str(self.out), *self.words)

    def source(self, seed: int) -> Path:
        return _dist(seed, self.stage)

    def partial(self) -> list[Path]:
        return sorted(self.out.parent.glob(f"{self.out.name}.partial-*"))

    def done(self) -> float:
        """Files have their size from the beginning: what counts is their blocks, and in the end also the journal.

        What is not journaled yet is not known to be finished; a kill before that shows nothing of a next run.
        """
        with contextlib.suppress(FileNotFoundError):
            found = [path for folder in self.partial() for path in folder.rglob("*.safetensors")]
            share = sum(path.stat().st_blocks for path in found) * 512 / self.total
            return share if share < 0.5 or self._journaled() else 0.5
        return 0.0

    def _journaled(self) -> bool:
        return any(
            path.stat().st_size for folder in self.partial() for path in (folder / ".dconv" / "journal").glob("*")
        )


class DconvSaved(Dconv):
    words = ("--max-memory", "64KiB", "--shard-size", "5MB")

    def source(self, seed: int) -> Path:
        return _large(seed, self.stage)


Kind = Callable[[Stage, Path], Contender]

# ----------------------------------------------------------------------------------------------------------------- kill


def _killed(kind: Kind, stage: Stage) -> Seen:
    """Kill it at several moments, look, and run it once more."""
    left, readable, again = [], [], []
    undisturbed = kind(stage, stage.fresh("undisturbed"))
    needed = undisturbed.start().end().wrote
    shutil.rmtree(undisturbed.out)
    for share in KILLED_AT:
        contender = kind(stage, stage.fresh("killed"))
        running = contender.reach(share)
        running.signal(signal.SIGKILL)
        if running.end().ok:
            continue
        left.append(len(files_in(contender.out)))
        readable.append(_is_whole(contender))
        before = _inodes(contender)
        ending = contender.start().end()
        seen = judged(ending, contender.truth(0), contender.out)
        if seen.verdict != "whole":
            return Seen(seen.verdict, f"the second run: {seen.words}")
        again.append((ending.wrote / needed, before <= _inodes(contender)))
        shutil.rmtree(contender.out)
    if not left:
        return Seen("whole", "it was done before it could be killed")
    kept = all(same for _, same in again) and min(share for share, _ in again) < 0.95
    then = "a next run kept what was finished" if kept else "a next run wrote all of it again"
    if not any(left):
        return Seen("whole", f"killed {len(left)} times: nothing under the final name; {then}")
    opened = "some would be taken for it" if any(readable) else "none is a whole result"
    return Seen("half", f"killed {len(left)} times: up to {max(left)} files under final names, {opened}; {then}")


def _inodes(contender: Contender) -> set[int]:
    """The files of weights, wherever they are now; those of a run that starts anew have other ones."""
    folders = [contender.out, *(contender.partial() if isinstance(contender, Dconv) else [])]
    places = [path for folder in folders for path in folder.rglob("*.safetensors")]
    return {path.stat().st_ino for path in places} if isinstance(contender, Dconv) else {-1}


def _is_whole(contender: Contender) -> bool:
    """Whether what is there can be opened, and is another thing than the result."""
    try:
        return not difference(contender.truth(0), read_back(contender.out))
    except (ValueError, KeyError):
        return False


# ------------------------------------------------------------------------------------------------------------ full disk


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes; False where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def _full(action: str, arguments: Callable[[Stage], Sequence[object]], stage: Stage) -> Seen:
    """Room for a third of the small model; where nothing may be mounted, no file may grow beyond that."""
    size = sum(len(it[2]) for it in stage.truth.values()) // 3 >> 12 << 12
    place = stage.fresh("full")
    with small_disk(place, size) as mounted:
        out = place / "out"
        if action == "consolidate":
            out.mkdir()
        more = [str(word) if word is not OUT else str(out) for word in arguments(stage)]
        given = [_files(stage)] if action == "consolidate" else []
        ending = stage.peer(action, *more, *given, limit=0 if mounted else size)
        seen = judged(ending, stage.truth, out)
        beside = any(path != out for path in place.iterdir())
        return Seen(seen.verdict, f"{seen.words}; what is finished is kept for the next run") if beside else seen


OUT: Final = object()


def _files(stage: Stage) -> Mapping[str, int]:
    return dict.fromkeys(inputs.tensors_of(stage.model), 1)


def _model_shards(stage: Stage) -> Path:
    return stage.made("shards", lambda to: inputs.dcp_shards(to, *inputs.by_rows(inputs.tensors_of(stage.model), 4)))


def full(key: str, name: str, ours: str, action: str, arguments: Callable[[Stage], Sequence[object]],
         source: Callable[[Stage], Path]) -> Row:  # fmt: skip
    us = partial(_full, "dconv", lambda stage: ("convert", source(stage), "hf", "-o", OUT))
    return Row(f"full disk, {key}", "moment", "the disk has room for a third of the result", name, ours,
               partial(_full, action, arguments), us)  # fmt: skip


# ------------------------------------------------------------------------------------------- two writers, a new source


def _both(kind: Kind, stage: Stage) -> Seen:
    """The first is stopped half way, the second, of other weights, runs through; then the first goes on."""
    contender = kind(stage, stage.fresh("both"))
    first = contender.reach(0.4, 0)
    first.signal(signal.SIGSTOP)
    second = contender.start(1).end()
    first.signal(signal.SIGCONT)
    endings = [first.end(), second]
    ends = "; ".join(f"the {name} ends with {one.error}" for name, one in zip(("first", "second"), endings, strict=True)
                     if not one.ok) or "both end with success"  # fmt: skip
    try:
        got = read_back(contender.out)
    except (ValueError, KeyError) as fault:
        return Seen("silent" if endings[0].ok else "late", f"{ends}; {fault}")
    truths = [contender.truth(seed) for seed in (0, 1)]
    for seed, name in enumerate(("first's", "second's")):
        if not difference(truths[seed], got):
            return Seen("whole", f"the result is the {name}; {ends}")
    of_first = sum(got.get(key) == value for key, value in truths[0].items())
    mixed = f"{of_first} of {len(truths[0])} tensors are the first's, the others not"
    return Seen("silent" if any(one.ok for one in endings) else "late", f"{ends}; {mixed}")


def _changed(kind: Kind, stage: Stage) -> Seen:
    """Half way, each file of the source gets the content of another model's, of the same size."""
    contender = kind(stage, stage.fresh("changed"))
    source = contender.source(0)
    kept = inputs.copied(source, stage.fresh("kept"))
    try:
        running = contender.reach(0.4)
        running.signal(signal.SIGSTOP)
        _overwrite(source, contender.source(1))
        running.signal(signal.SIGCONT)
        ending = running.end()
    finally:
        _overwrite(source, kept)
    return _after_change(contender, ending)


def _overwrite(folder: Path, other: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".safetensors", ".distcp"):
            with open(path, "r+b") as file:
                file.write((other / path.relative_to(folder)).read_bytes())


def _after_change(contender: Contender, ending: Ending) -> Seen:
    if ending.ok:
        got = read_back(contender.out)
        for seed in (0, 1):
            if not difference(contender.truth(seed), got):
                return Seen("whole", "right")
        of_first = sum(got.get(key) == value for key, value in contender.truth(0).items())
        return Seen("silent", f"success; {of_first} of {len(got)} tensors are the old ones, the others not")
    seen = judged(ending, contender.truth(0), contender.out)
    if seen.verdict == "error" and isinstance(contender, Dconv) and contender.partial():
        return Seen("late", f"{seen.words}; a partial result is left")
    return seen


MOMENTS: Final = [
    Row("killed, consolidation", "moment", "SIGKILL at four moments of the writing", CONSOLIDATION, MOVED,
        partial(_killed, Consolidation), partial(_killed, Dconv)),
    Row("killed, transformers", "moment", "SIGKILL at four moments of the writing", SAVE, SAVED,
        partial(_killed, Saved), partial(_killed, DconvSaved)),
    full("consolidation", CONSOLIDATION, "the same tensors in a torch_dist (DCP) directory", "consolidate",
         lambda stage: (_model_shards(stage), OUT), lambda stage: stage.release.parent),
    full("transformers", SAVE, SAVED, "transformers_save", lambda stage: (stage.model, OUT, "100KB"),
         lambda stage: stage.model),
    Row("two writers, consolidation", "moment", "two runs of other weights into one output at once", CONSOLIDATION,
        MOVED, partial(_both, Consolidation), partial(_both, Dconv)),
    Row("two writers, transformers", "moment", "two runs of other weights into one output at once", SAVE, SAVED,
        partial(_both, Saved), partial(_both, DconvSaved)),
    Row("source changed, consolidation", "moment", "the source's files get other weights half way", CONSOLIDATION,
        MOVED, partial(_changed, Consolidation), partial(_changed, Dconv)),
]  # fmt: skip
