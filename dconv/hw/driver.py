"""Compilers with a Python interface: a driver file that their own interpreter runs, here and in a bundle alike.

A driver knows nothing of dconv. ``python NAME_driver.py probe`` says in a line of JSON what it found, ``compile
JOB.json`` compiles, and ``run JOB.json`` runs the artifact in the vendor's simulator where there is one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import parse_json
from dconv.errors import DconvError, ToolMissing, UsageError, VerifyFailed
from dconv.hw.target import OUT, SCRIPT, Ask, Handing, Tool
from dconv.sharding.parsed import is_dict, is_texts

FOLDER: Final = Path(__file__).with_name("drivers")
JOB: Final = "job.json"
RESULT: Final = "result.json"
#: Says to compile.sh which interpreter has the toolchain.
VARIABLE: Final = "TOOLCHAIN_PYTHON"
#: A probe imports at most a few packages.
_PROBING: Final = 300.0


@dataclass(frozen=True)
class Driver:
    """A driver file.

    Attributes:
        name: of the file, and of the environment in ``.venvs`` that ``scripts/toolchains.sh`` makes for it.
        install: how to get the toolchain.
    """

    name: str
    install: str

    @property
    def path(self) -> Path:
        """The file itself, which is copied into a work folder."""
        return FOLDER / f"{self.name}_driver.py"  # under the toolchain's own name it would be imported for it

    def find(self, ask: Ask) -> Tool:
        """The toolchain, as its own interpreter sees it.

        Raises:
            UsageError: the interpreter that was named is none.
            ToolMissing: it has no toolchain, or half of one.
        """
        python = self._python(ask)
        try:
            done = subprocess.run(
                [python, str(self.path), "probe"], capture_output=True, text=True, timeout=_PROBING,
                stdin=subprocess.DEVNULL, env={**ask.environment},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as fault:
            raise ToolMissing("the toolchain's interpreter does not answer", where=str(python), found=str(fault)[:300],
                              do=self.install) from fault  # fmt: skip
        said = _last_mapping(done.stdout)
        if done.returncode or said is None:
            lines = [*(done.stderr or done.stdout).strip().splitlines(), f"exit code {done.returncode}"]
            raise ToolMissing("the toolchain's interpreter does not answer", where=str(python),
                              found="\n".join(lines[-2:])[:300], do=self.install)  # fmt: skip
        if not said.get("complete"):
            raise ToolMissing(
                f"{said.get('tool', self.name)} is not here, or not all of it, nothing was written",
                where=str(python),
                found=str(said.get("lacks") or "incomplete")[:600],
                do=f"{self.install}\n--bundle writes what it compiles, for where it is",
            )
        words = f"{said.get('tool', self.name)} {said.get('version', '')}".strip()
        return Tool(words, {VARIABLE: str(python)}, {**said, "python": str(python)})

    def _python(self, ask: Ask) -> Path:
        if (named := named_python(ask)) is not None:
            return named
        own = Path(__file__).parents[2] / ".venvs" / self.name / "bin" / "python"
        return own if own.exists() else Path(sys.executable)

    def lay_out(self, handing: Handing, work: Path, source: Mapping[str, str], settings: Mapping[str, object]) -> None:
        """Write the driver, its job and ``compile.sh``.

        Args:
            handing: whose terms name the chip.
            work: the work folder.
            source: role -> path in the work folder.
            settings: of the job, checked.
        """
        shutil.copyfile(self.path, work / self.path.name)
        job = {"source": dict(source), "out": OUT, "platform": handing.terms.platform, "settings": dict(settings)}
        (work / JOB).write_text(f"{json.dumps(job, indent=2)}\n")
        write_script(work, f'"${{{VARIABLE}:-python3}}" {self.path.name} compile {JOB}', self.install)

    def result(self, out: Path) -> dict[str, Any]:
        """What a driver says of its work, which every file that it lists must bear out.

        Raises:
            VerifyFailed: it says nothing, lists nothing, or a file that is empty or not there.
        """
        try:
            said = parse_json((out / RESULT).read_bytes(), where=RESULT, what="the driver's answer")
        except (OSError, DconvError) as fault:
            raise VerifyFailed("the compiler ended well and said nothing of its work", where=RESULT,
                               found=str(fault)[:300]) from fault  # fmt: skip
        files = said.get("files")
        if not is_texts(files) or not files:
            raise VerifyFailed("the compiler ended well and wrote nothing", where=RESULT, found=f"{files!r:.80}")
        require_files(out, files)
        if not isinstance(said.get("evidence"), dict):
            raise VerifyFailed("the compiler ended well and gave no evidence of it", where=RESULT)
        return said


def named_python(ask: Ask) -> Path | None:
    """The interpreter that ``--toolchain-python`` names, absolute, since ``compile.sh`` runs in a folder of its own.

    Raises:
        UsageError: it is none.
    """
    if ask.python is None:
        return None
    found = shutil.which(ask.python, path=ask.environment.get("PATH"))
    if found is None:
        raise UsageError("this is no interpreter, nothing was written", where=f"--toolchain-python {ask.python}")
    return Path(found).absolute()


def require_files(out: Path, names: list[str]) -> None:
    """Raise where a file is not there, lies outside, or has no bytes.

    Raises:
        VerifyFailed: with all such.
    """
    wrong: list[str] = []
    for name in names:
        path = out / name
        if not path.resolve().is_relative_to(out.resolve()) or not path.is_file():
            wrong.append(f"{name}: not there")
        elif not path.stat().st_size:
            wrong.append(f"{name}: 0 bytes")
    if wrong:
        raise VerifyFailed("the compiler ended well, but its artifact is none", found="\n".join(wrong))


def write_script(work: Path, command: str, install: str) -> None:
    """Write ``compile.sh``, which runs a command in its own folder once what it compiles is proved whole.

    Args:
        work: the folder.
        command: of bash; lines of it end the script when they fail.
        install: how to get what it needs, for who reads the script.
    """
    needs = "".join(f"#   {line}\n" for line in install.splitlines())
    (work / SCRIPT).write_text(
        f"""#!/usr/bin/env bash
# Compiles what lies beside it into {OUT}/. It needs
{needs}set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
if [[ -f SHA256SUMS ]]; then
    sha256sum --check --quiet SHA256SUMS
fi
mkdir -p {OUT}
{command}
"""
    )
    (work / SCRIPT).chmod(0o755)


def _last_mapping(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                said: object = json.loads(line)
            except ValueError:
                return None
            return said if is_dict(said) else None
    return None
