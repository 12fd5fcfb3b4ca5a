"""Runs a page as a new user would: in an empty folder, command after command, in one shell's words."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tests.docs.commands import ROOT, Command, Page, matches
from tests.docs.models import MODELS
from tests.processes import LAUNCHERS

#: Seconds. What takes longer hangs.
_PATIENCE: Final = 300
_MADE: Final = Path(tempfile.mkdtemp(prefix="dconv-docs-"))


#: One command of a session: bash keeps its variables and its place from the one before.
_SHELL: Final = """
if [[ -f {state} ]]; then . {state}; fi
set -o pipefail
{typed}
code=$?
{{ declare -px; printf 'cd -- %q\\n' "$PWD"; }} >{state}
exit $code
"""


@dataclass(frozen=True)
class Ran:
    """What became of a command."""

    command: Command
    printed: str
    code: int


@cache
def _model(name: str) -> Path:
    MODELS[name](_MADE / name)
    return _MADE / name


def prepare(page: Page, folder: Path) -> None:
    """Put the models of a page, and the repository's own folders that it names, into the folder that it runs in."""
    for name in page.models:
        made = _model(name)
        (shutil.copytree if made.is_dir() else shutil.copyfile)(made, folder / name)
    for name in ("scripts", "slurm", "launch"):  # commands are typed at the root of a clone
        (folder / name).symlink_to(ROOT / name)


def run(command: Command, folder: Path, state: Path, variables: Mapping[str, str]) -> Ran:
    """A command, with the repository's own dconv first on PATH.

    Args:
        state: a file by which what a command exports, and where it goes, is there for the next one.
        variables: that say where a cluster is.
    """
    folders = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    environment = {
        **kept, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT), "DCONV_HISTORY": str(folder / "history"),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120",
        "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
        **variables,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", _SHELL.format(state=shlex.quote(str(state)), typed=command.typed)],
        cwd=folder, env=environment, timeout=_PATIENCE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return Ran(command, done.stdout, done.returncode)


def run_page(page: Page, folder: Path, variables: Mapping[str, str] | None = None) -> list[Ran]:
    """All of its commands that are run, in their order; files that blocks are the content of are written on the way.

    Args:
        variables: see `run`.
    """
    prepare(page, folder)
    ran: list[Ran] = []
    state = Path(tempfile.mkdtemp(dir=_MADE)) / "state"
    for block in page.blocks:
        if block.file:
            (folder / block.file).write_text(f"{block.text}\n")
        elif not block.excuse:
            ran += [run(command, folder, state, variables or {}) for command in block.commands]
    return ran


def require_as_printed(ran: Iterable[Ran]) -> None:
    """Fail with what ended or printed otherwise than its page says."""
    wrong = []
    for one in ran:
        typed = f"{one.command}\n$ {one.command.typed}\n"
        if one.code != one.command.code:
            wrong.append(f"{typed}ended with {one.code}, and not {one.command.code}:\n{one.printed}")
        elif one.command.said and not matches(one.command.said, one.printed):
            wrong.append(f"{typed}printed\n{one.printed}\nand not\n" + "\n".join(one.command.said))
    assert not wrong, "\n\n".join(wrong)
