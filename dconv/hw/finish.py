"""The last of a hand-off, by one process: compile what was prepared, judge what came out, put it in its place.

Or, where the compiler is elsewhere, a bundle: the work folder itself, with a list of its files. Either appears under
its name whole or not at all; of a compiler that failed its log is kept, and nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.errors import Damaged, DconvError, Preempted, StorageFault, UsageError
from dconv.hw import manifest, process
from dconv.hw.target import OUT, SCRIPT, Adapter, Ask, Handing, Terms, Tool
from dconv.sharding.finish import aside_of, remove, require_parent
from dconv.sharding.journal import sync_folder
from dconv.sharding.parsed import is_dict
from dconv.sharding.receipt import RECEIPT

LOG: Final = "compile.log"


@dataclass(frozen=True)
class Finish:
    """Where a hand-off ends, and how.

    Attributes:
        target: FORMAT of the compiler, for the manifest.
        out: the result's place.
        work: the folder that holds the artifacts.
        source: for the manifest: what was handed over.
        timeout: seconds that a compiler may take.
        overwrite: whether an older result of dconv's is replaced.
        told: gets each line that it prints.
        stopped: whether this process was asked to leave.
    """

    target: str
    out: Path
    work: Path
    source: Mapping[str, object]
    timeout: float
    overwrite: bool
    told: Callable[[str], None]
    stopped: Callable[[], bool]

    @property
    def log(self) -> Path:
        """Where the compiler's words are kept: beside the result, until there is one."""
        return self.out.with_name(f"{self.out.name}.{LOG}")


def require_place(out: Path, overwrite: bool) -> None:
    """Raise where a result cannot be put.

    Raises:
        StorageFault: there is no directory for it to be in.
        UsageError: something is there.
    """
    require_parent(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError("the output exists, nothing was written", where=str(out),
                         do="-o another directory, or --overwrite")  # fmt: skip
    if not (manifest.is_here(out) or (out / RECEIPT).is_file()):
        raise UsageError("what is there is not of dconv, and is not replaced", where=str(out),
                         expected=f"a directory with {manifest.NAME} or {RECEIPT}",
                         do="-o another directory")  # fmt: skip


def compiled(adapter: Adapter, handing: Handing, tool: Tool, ask: Ask, how: Finish) -> dict[str, Any]:
    """Compile, judge, and put the result in its place; returns its manifest.

    Raises:
        ToolMissing: the compiler failed.
        VerifyFailed: it says that all is well, and it is not.
        StorageFault: no room.
        Preempted: this process was asked to leave; what was prepared stays.
    """
    out = how.work / OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        _require_room(how.work)
        adapter.lay_out(handing, how.work, ask)
        ran = process.run(
            ["bash", SCRIPT], how.log, cwd=how.work, environment=tool.environment, timeout=how.timeout, told=how.told,
            stopped=how.stopped, words=tool.words,
        )  # fmt: skip
        evidence = adapter.judge(handing.terms, out, ran.log)
        os.replace(how.log, out / LOG)
        said = {**_said("compiled", handing.terms, how), "toolchain": {"words": tool.words, **tool.details},
                "evidence": dict(evidence), "seconds": round(ran.seconds, 3)}  # fmt: skip
        manifest.write(out, said)
        _place(out, how)
    except Preempted:
        shutil.rmtree(out, ignore_errors=True)
        how.log.unlink(missing_ok=True)
        raise
    except (DconvError, OSError):
        if not how.log.exists() and (out / LOG).exists():  # it was to be listed with the rest
            os.replace(out / LOG, how.log)
        shutil.rmtree(how.work, ignore_errors=True)
        raise
    shutil.rmtree(how.work, ignore_errors=True)
    return manifest.read(how.out)


def bundled(adapter: Adapter, handing: Handing, ask: Ask, how: Finish) -> dict[str, Any]:
    """Put the work folder itself in the result's place, ready to be compiled elsewhere; returns its manifest.

    Raises:
        VerifyFailed: what was prepared is not what was planned.
        UsageError: something is in the result's place by now.
    """
    shutil.rmtree(how.work / OUT, ignore_errors=True)
    try:
        adapter.lay_out(handing, how.work, ask)
        for lock in how.work.glob("*.partial-*.lock"):  # of ranks that came late to a step
            lock.unlink()
        manifest.write(how.work, _said("bundle", handing.terms, how))
        _place(how.work, how)
    except (DconvError, OSError):
        shutil.rmtree(how.work, ignore_errors=True)
        raise
    return manifest.read(how.out)


def again(adapter: Adapter, source: Path, how: Finish, adopted: Terms | None = None) -> dict[str, Any]:
    """A hand-off's folder once more: judged anew, and put together anew; returns the new manifest.

    Args:
        adapter: of the compiler that made it.
        source: the folder.
        how: where the new one is put.
        adopted: what is known of it where it has no manifest.

    Raises:
        Damaged: it is not as it was written.
        VerifyFailed: what was compiled is not what it should be.
    """
    if adopted is None:
        said = rejudged(adapter, source)
        names = list(said["files"])
    else:
        said = {**_said("compiled", adopted, how), "evidence": dict(adapter.judge(adopted, source, ""))}
        names = [path.relative_to(source).as_posix() for path in manifest.files_of(source)]
    shutil.rmtree(how.work, ignore_errors=True)  # of a run that was killed
    how.work.mkdir()
    try:
        for name in names:
            path = how.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, path)
        manifest.write(how.work, {key: value for key, value in said.items() if key not in ("files", "dconv")})
        _place(how.work, how)
    except (DconvError, OSError):
        shutil.rmtree(how.work, ignore_errors=True)
        raise
    return manifest.read(how.out)


def rejudged(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """A folder's manifest, where its files are as they were written and what was compiled still passes.

    Raises:
        Damaged, VerifyFailed: see `again`.
    """
    said = manifest.checked(folder)
    if said["kind"] == "compiled":
        facts = said.get("facts")
        if not is_dict(facts):
            raise Damaged(f"{manifest.NAME} does not say what was expected", where=str(folder))
        log = folder / LOG
        text = log.read_text(errors="replace") if log.is_file() else ""
        try:
            adapter.judge(Terms(said["platform"], said["settings"], facts), folder, text)
        except KeyError as lacking:
            raise Damaged(f"{manifest.NAME} does not say what was expected", where=str(folder),
                          expected=f"{lacking} among its settings and facts") from lacking  # fmt: skip
    return said


def _said(kind: str, terms: Terms, how: Finish) -> dict[str, Any]:
    return {
        "kind": kind,
        "target": how.target,
        "platform": terms.platform,
        "settings": dict(terms.settings),
        "facts": dict(terms.facts),
        "source": dict(how.source),
    }


def _require_room(work: Path) -> None:
    """A compiled model is about as large as what it is compiled of.

    Raises:
        StorageFault: there is less on the disk.
    """
    needed = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise StorageFault("there is no room for what is compiled", where=str(work.parent),
                           expected=f"about {needed:,} bytes", found=f"{free:,} bytes")  # fmt: skip


def _place(folder: Path, how: Finish) -> None:
    """Rename a folder to the result's place, an older result out of the way first, and back where that fails."""
    old = aside_of(how.out, how.work)
    if replaced := os.path.lexists(how.out):
        require_place(how.out, how.overwrite)
        remove(old)
        os.replace(how.out, old)
    try:
        os.replace(folder, how.out)
    except OSError:
        if replaced:
            os.replace(old, how.out)
        raise
    remove(old)
    sync_folder(how.out.parent)
