"""The command's manners: help, exit codes, plans that add up, refusals that leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dconv import __version__
from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from dconv.cli import COMMANDS
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv, listing
from tests.models import config_of, tensors, write_random


def test_quick_to_import() -> None:
    slow = ("torch", "numpy", "yaml", "transformers", "rich", "argcomplete")
    code = f"import sys, dconv.cli; dconv.cli.main(['--help']); print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_overview(dconv: Dconv) -> None:
    assert dconv("--version").out.strip() == f"dconv {__version__}"
    overview = dconv("--help")
    assert overview.code == 0
    assert all(name in overview.out for name in COMMANDS)
    module = subprocess.run([sys.executable, "-m", "dconv", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout.strip() == f"dconv {__version__}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_each_command(dconv: Dconv, name: str) -> None:
    shown = dconv(name, "--help")
    assert shown.code == 0
    assert "examples:" in shown.out
    assert f"dconv {name}" in shown.out.split("examples:")[1]


@pytest.mark.parametrize("words", [(), *((name,) for name in sorted(COMMANDS))], ids=str)
def test_help_fits_80_columns(dconv: Dconv, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert [line for line in dconv(*words, "--help").out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("frobnicate",),
        ("convert", "--tensor-parallel", "2"),
        ("diff", "only-one"),
        ("plan", "m", "hf", "--tp", "x"),
    ],
)
def test_usage_errors(dconv: Dconv, words: tuple[str, ...]) -> None:
    ran = dconv(*words)
    assert ran.code == 2
    assert "usage" in ran.err
    assert len(ran.err.splitlines()) <= 3, "what is wrong is not to be looked for under all options"


def test_missing_words_and_paths(dconv: Dconv, tmp_path: Path) -> None:
    assert dconv("convert").code == 2
    assert "expected   dconv convert MODEL FORMAT [-o OUT] [options]" in dconv("convert", tmp_path).err
    ran = dconv("inspect", tmp_path / "nowhere")
    assert ran.code == 2
    assert "no such checkpoint" in ran.err


def test_names_that_are_nearly_right(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = dconv("convert", hf, "megatrom", "-o", out)
    assert ran.code == 3 and "did you mean megatron?" in ran.err
    ran = dconv("convert", hf, "megatron", "-o", out, "--from", "safetensor")
    assert ran.code == 2 and "did you mean safetensors?" in ran.err
    ran = dconv("convert", hf / "config.json", "megatron", "-o", out)
    assert ran.code == 3 and str(hf) in ran.err.split("do ")[1]
    assert not out.exists()


def test_a_config_without_weights_is_said_as_such(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    ran = dconv("convert", hf, "megatron", "-o", tmp_path / "out")
    assert ran.code == 4 and "a config without weights" in ran.err and "--fake-weight" in ran.err
    assert dconv("plan", hf, "megatron").code == 0


def test_lists(dconv: Dconv) -> None:
    assert "llama" in dconv("archs").out
    assert {"family": "qwen2", "architecture": "Qwen2ForCausalLM"}.items() <= dconv("archs", "--json").json[2].items()
    assert "torch_dist" in dconv("formats").out
    assert "hf" in dconv("formats", "--json").json["write"]["huggingface"]


def test_convert_there_and_back(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    there = dconv("convert", hf, "megatron", "--tp", 2, "--pp", 2, "-o", tmp_path / "m")
    assert there.code == 0, there.err
    assert "bit-exact" in there.out
    back = dconv("convert", tmp_path / "m", "hf", "-o", tmp_path / "b", "--json", "--verify", "digest")
    assert back.code == 0, back.out
    assert back.json["verified"]["tensors"] == back.json["tensors"]
    assert tensors(tmp_path / "b") == tensors(hf)


def test_several_ranks_write_the_same(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    for nproc in (1, 3):
        words = ["convert", hf, "megatron", "--tp", "2", "-o", tmp_path / str(nproc), "--nproc", str(nproc), "--quiet"]
        subprocess.run([sys.executable, "-m", "dconv", *words], check=True)
    files = [name for name in listing(tmp_path / "1") if (tmp_path / "1" / name).is_file() and name != "dconv.json"]
    assert listing(tmp_path / "1") == listing(tmp_path / "3")
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_two_launchers_are_refused(dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    ran = dconv("convert", hf, "megatron", "--nproc", 2, "-o", tmp_path / "m")
    assert ran.code == 2
    assert "rank 1 of 4" in ran.err


def test_one_config_file_for_plan_convert_and_a_launchers_ranks(
    dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model": str(hf), "format": "megatron", "nproc": 2, "max_memory": "32MiB", "verify": "digest"}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(values))
    plan = dconv("plan", "--config", config, "--json").json["plan"]
    command = [sys.executable, "-m", "dconv", "convert", "--config", config, "--json", "-o", tmp_path / "a"]
    made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert made["ranks"] == 2
    assert made["plan"] == plan
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "dconv.launch", "--config", config, "--json", "-o", tmp_path / "b"]
    alone = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert alone["ranks"] == 1
    assert alone["plan"] == plan


@pytest.mark.parametrize("wrong", [{"nproc": 0}, {"nproc": "many"}, {"max_memory": "lots"}, {"resume": 1}, {"tpp": 2}])
def test_a_wrong_value_in_the_config_file_is_refused_wherever_it_is_read(
    dconv: Dconv, hf: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": str(hf), "format": "megatron", **wrong}))
    for command in ("plan", "convert"):
        ran = dconv(command, "--config", tmp_path / "run.json")
        assert ran.code == 2
        assert next(iter(wrong)) in ran.err


@pytest.mark.parametrize(
    ("options", "world", "ranks"),
    [(["--tp", 2, "--pp", 2], None, 4), (["--tp", 2], 3, 3), (["--megatron-format", "legacy", "--pp", 4], 1, 1)],
)
def test_plan_adds_up(
    dconv: Dconv, hf: Path, options: list[object], world: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hf.parent)
    before = listing(hf.parent)
    asked = ["--world", world] if world else []
    plan = dconv("plan", hf, "megatron", *options, *asked, "--json").json
    assert len(plan["ranks"]) == plan["world"] == ranks
    assert sum(rank["written"] for rank in plan["ranks"]) == plan["bytes_written"]
    assert sum(rank["read"] for rank in plan["ranks"]) == plan["bytes_read"]
    assert plan["parameters"] * 2 == sum(len(data) for _, _, data in tensors(hf).values())
    assert plan["rounded"] == 0
    assert listing(hf.parent) == before


def test_plan_for_a_person(dconv: Dconv, hf: Path) -> None:
    shown = dconv("plan", hf, "megatron", "--tp", 2, "--pp", 4)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].startswith("llama  4 layers  ")
    assert lines[1].endswith("->  Megatron torch_dist, tp 2 x pp 4")
    assert "8 shards of" in lines[2]
    assert f"exact: all {len(tensors(hf))} tensors" in lines[2]
    assert [line.split()[1:3] for line in lines if line[:4].strip().isdigit()][:3] == [
        ["tp0", "pp0"], ["tp1", "pp0"], ["tp0", "pp1"],
    ]  # fmt: skip
    assert "floor at 2 GB/s a rank" in shown.out
    more = dconv("plan", hf, "megatron", "--world", 20).out
    assert "12 more ranks" in more
    cast = dconv("plan", hf, "hf", "--dtype", "f16").out
    assert f"exact: 0 of {len(tensors(hf))} tensors" in cast


def test_refusals_leave_nothing_behind(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    ran = dconv("convert", hf, "megatron", "--tp", 3, "-o", tmp_path / "m")
    assert ran.code == 3
    assert ran.err.startswith("refused (3)  ")
    assert "nothing was written" in ran.err
    fields = [line.split()[0] for line in ran.err.splitlines()[1:] if line.startswith("  ") and line[2] != " "]
    assert fields == ["where", "expected", "found", "do"]
    assert listing(tmp_path) == before
    told = dconv("convert", hf, "megatron", "--tp", 3, "-o", tmp_path / "m", "--json")
    assert told.code == told.json["exit_code"] == 3
    assert told.json["error"] == "refused"


def test_unknown_tensors_are_named(dconv: Dconv, tmp_path: Path) -> None:
    model = write_random(tmp_path / "model", LLAMA, config_of(LLAMA))
    header = safetensors.read_header(model / "model.safetensors")
    odd = [TensorSpec(f"model.layers.{i}.mlp.surprise.weight", (4,), "bf16") for i in range(4)]
    size, first, _ = safetensors.lay_out([*(stored.spec for stored in header.values()), *odd])
    (model / "model.safetensors").write_bytes(first + bytes(size - len(first)))
    before = listing(tmp_path)
    ran = dconv("convert", model, "megatron", "-o", tmp_path / "m")
    assert ran.code == 3
    assert "model.layers.{0..3}.mlp.surprise.weight" in ran.err
    assert "--drop" in ran.err
    assert listing(tmp_path) == before
    dropped = dconv("convert", model, "megatron", "-o", tmp_path / "m", "--drop", "*.surprise.weight")
    assert dropped.code == 0
    assert "left out" in dropped.out


def test_an_output_that_exists(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert dconv("convert", hf, "megatron", "-o", tmp_path / "m").code == 2
    assert dconv("convert", hf, "megatron", "-o", tmp_path / "m", "--overwrite").code == 0
    assert "--overwrite" in dconv("convert", hf, "hf", "-o", tmp_path / "m").err


def test_overwrite_is_not_advised_where_it_would_be_refused(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    ran = dconv("convert", hf, "megatron", "-o", tmp_path / "mine")
    assert ran.code == 2 and "--overwrite" not in ran.err
    assert dconv("convert", hf, "megatron", "-o", tmp_path / "mine", "--overwrite").code == 2


def test_what_nobody_expected(dconv: Dconv, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("dconv.compare.diff", fail)
    ran = dconv("diff", hf, hf)
    assert ran.code == 1
    assert ran.err == "internal error: ZeroDivisionError: seven, --debug shows where\n"
    assert "Traceback" in dconv("diff", hf, hf, "--debug").err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dconv.compare.diff", interrupt)
    assert dconv("diff", hf, hf).code == 130
