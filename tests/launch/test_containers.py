"""The container files copy what an install needs, and nothing that is not there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def copied(name: str) -> list[str]:
    text = (ROOT / "launch" / name).read_text()
    if name == "Containerfile":
        return [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    (files,) = re.findall(r"^%files\n((?:    .+\n)+)", text, re.MULTILINE)
    return [line.split()[0] for line in files.splitlines()]


@pytest.mark.parametrize("name", ["Containerfile", "dconv.def"])
def test_copies_what_an_install_needs(name: str) -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, data = said["project"], said["tool"]["setuptools"]["data-files"]
    needed = {"pyproject.toml", "dconv", "constraints.txt", project["readme"], *project["license-files"]}
    needed |= {pattern.split("/")[0] for patterns in data.values() for pattern in patterns}
    assert set(copied(name)) == needed
    assert all((ROOT / one).exists() for one in needed)
    assert "all-cpu" in project["optional-dependencies"]
