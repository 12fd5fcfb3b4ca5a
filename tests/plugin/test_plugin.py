"""What another package adds is known wherever a FORMAT, a family or a compiler is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from tests.models import config_of, write_random

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip leaves it: its modules, and beside them what its entry points are."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(HERE / "dconv_house", site / "dconv_house", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    info = site / "dconv_house-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("plugin") / "llama", LLAMA, config_of(LLAMA))


def dconv(site: Path, *words: object, code: int = 0) -> str:
    """What the command prints, in a process that has the package, or has it not where ``site`` is another folder."""
    path = os.pathsep.join([str(site), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", "dconv", *map(str, words)], env=env, cwd=site, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, check=False, timeout=120)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_planned_is_converted(site: Path, llama: Path, tmp_path: Path) -> None:
    """The plan counts what then is there, and writes nothing."""
    before = sorted(llama.parent.iterdir())
    said = json.loads(dconv(site, "plan", llama, "npz", "-o", tmp_path / "arrays", "--json"))
    assert not (tmp_path / "arrays").exists() and sorted(llama.parent.iterdir()) == before
    assert (said["format"], said["engine"], said["source"]) == ("npz", "dconv_house.npz:ENGINE", "huggingface, llama")
    header = safetensors.read_header(llama / "model.safetensors")
    assert said["read"] == sum(stored.spec.nbytes for stored in header.values())
    dconv(site, "convert", llama, "npz", "-o", tmp_path / "arrays")
    with np.load(tmp_path / "arrays" / "model.npz") as arrays:
        assert len(arrays.files) == said["tensors"] == len(header)


def test_a_plan_refuses_a_source_that_is_not_whole(site: Path, tmp_path: Path) -> None:
    broken = write_random(tmp_path / "broken", LLAMA, config_of(LLAMA))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-8])
    assert "damaged (4)" in dconv(site, "plan", broken, "npz", code=4)
    for words in (("--world", "2"), ("--trace", "*")):
        assert "its own engine" in dconv(site, "plan", broken, "npz", *words, code=2)


def test_an_engine_may_plan_itself(site: Path, llama: Path, tmp_path: Path) -> None:
    """The options that were given reach it, and no others."""
    own = shutil.copytree(site, tmp_path / "own")
    with (own / "dconv_house" / "npz.py").open("a") as file:
        file.write("\n\ndef _plan(model, **options):\n    return {'model': str(model), 'options': options}\n\n\n")
        file.write("ENGINE.plan = _plan\n")
    said = json.loads(dconv(own, "plan", llama, "npz", "--quant", "q", "--json"))
    assert said == {"format": "npz", "model": str(llama), "options": {"quant": "q"}}


def test_its_names_are_listed(site: Path, tmp_path: Path) -> None:
    """Where the package is, and nowhere else."""
    for command, line in (
        (("formats",), "writes (FORMAT)  npz, by dconv_house.npz:ENGINE, an entry point"),
        (("formats",), "hands over       housechip --platform H1"),
        (("archs",), "house"),
        (("archs", "--markdown"), "| HouseForCausalLM | `house` |"),
    ):
        assert line in dconv(site, *command), command
        assert line not in dconv(tmp_path, *command), command
    assert json.loads(dconv(site, "formats", "--json"))["outside"] == {"npz": "dconv_house.npz:ENGINE"}
    assert json.loads(dconv(tmp_path, "formats", "--json"))["outside"] == {}


def test_its_family_format_and_chip_are_in_the_table(site: Path) -> None:
    """A family stands where its tables say; of the others a plan tells."""
    table = dconv(site, "archs", "--format", "md")
    heads, *rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    (row,) = (row for row in rows if row[1] == "`house`")
    llama = next(row for row in rows if row[1] == "`llama`")
    at = {head: place for place, head in enumerate(heads)}
    assert row[at["to<br>`megatron`"]] == row[at["to<br>`huggingface`"]] == "="
    assert row[at["to<br>`gguf`"]] == row[at["to<br>`mlx`"]] == "" != llama[at["to<br>`gguf`"]]
    for each in (row, llama):
        assert each[at["to<br>`npz`"]] == each[at["for<br>`housechip`"]] == "?"


def test_an_unknown_format_is_refused_as_before(site: Path, llama: Path) -> None:
    assert "no format is called npy" in dconv(site, "plan", llama, "npy", code=3)


def test_where_no_engine_from_outside_works_the_way_is_told(site: Path, llama: Path, tmp_path: Path) -> None:
    """By many ranks, and from Python's own functions."""
    code = "import sys, dconv\ndconv.plan(sys.argv[1], 'npz')"
    for words in (("-m", "dconv.launch", llama, "npz", "-o", tmp_path / "out"), ("-c", code, llama)):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}, check=False)  # fmt: skip
        assert "dconv.engine('npz').convert(MODEL, OUT)" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
