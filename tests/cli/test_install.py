"""scripts/install.sh reports what is wrong, whatever an earlier call that was cut short has left."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stamp", [None, "", "0123", "0123\n", "0123\ntest\n"])
def test_a_torn_stamp_is_no_obstacle(tmp_path: Path, stamp: str | None) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("scripts/install.sh", "scripts/venv.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    if stamp is not None:
        (tmp_path / ".venv" / "dconv-installed").write_text(stamp)
    command = ["env", "PYTHON=/nowhere/python", "bash", tmp_path / "scripts" / "install.sh"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "install: no /nowhere/python on PATH" in ran.stderr  # it came to where the environment is made
