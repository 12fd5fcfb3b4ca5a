"""Every launcher makes (rank, size) of its own and ends with the same bytes; what a person sees is said once."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import UsageError
from dconv.launch.__main__ import main
from dconv.launch.place import place
from tests.launched import OPTIONS, by_one_rank, small_llama
from tests.models import config_of, tree_digest, write_random
from tests.processes import call, ended, local, one_rank, start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What one rank makes of `model` with `OPTIONS`."""
    return by_one_rank(model)


# ------------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun(model: Path, expected: dict[str, str], tmp_path: Path, ranks: int) -> None:
    """As many ranks as shards, and another number: the same bytes, one summary, no litter."""
    words = one_rank(model, "megatron", "-o", tmp_path / "out", *OPTIONS)
    code, out, err = call(*TORCHRUN, "--nproc-per-node", str(ranks), *words[1:])
    assert code == 0, err
    assert tree_digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out + err).count("wrote ") == 1
    assert f"with {ranks} ranks, bit-exact" in out
    assert "Traceback" not in err


def test_torchrun_with_a_config_file(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Everything from run.yaml but --tp: the line that the contract names."""
    (tmp_path / "work").mkdir()
    values = {"model": str(model), "format": "megatron", "out": str(tmp_path / "work" / "out"), "json": True}
    config = tmp_path / "run.yaml"
    config.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in values.items()) + "\nmegatron-format: legacy\n")
    code, out, err = call(*TORCHRUN, "--nproc-per-node", "2", *one_rank("--tp", 2, "--config", config)[1:])
    assert code == 0, err
    result = json.loads(out)
    assert result["ranks"] == 2
    assert set(result["peak_memory"]) <= {"0", "1"}
    assert tree_digest(tmp_path / "work" / "out") == expected


def test_torchrun_says_a_refusal_once(model: Path, tmp_path: Path) -> None:
    words = one_rank(model, "megatron", "-o", tmp_path / "out", "--tp", 3)
    code, out, err = call(*TORCHRUN, "--nproc-per-node", "3", *words[1:])
    assert code != 0
    said, _, table = (out + err).partition("ChildFailedError")  # torchrun's own, and the last that it prints
    assert said.count("refused (3)") == 1, err
    assert table.count("refused (3)") == 1, err
    assert "Root Cause" in table.partition("refused (3)")[0]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- config file


def test_config_file_and_command_line(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """The command line overrides the file; underscores and dashes both name an option."""
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\nformat: gguf\ntp: 7\nmegatron_format: legacy\nmax-memory: 64KiB\nquiet: true\n")
    assert main(["--config", str(config), str(model), "megatron", "-o", str(tmp_path / "out"), "--tp", "2"]) == 0
    assert tree_digest(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("megatron_fromat: legacy", ["megatron_fromat", "megatron"]),
        ("tpp: 2", ["tpp", "did you mean"]),
        ("tp: two", ["tp"]),
        ("megatron-format: zarr", ["zarr", "legacy"]),
        ("overwrite: perhaps", ["overwrite"]),
        ("max-memory: lots", ["max", "256MiB"]),
        ("- tp", ["mapping"]),
        ("tp: [1", ["config file"]),
    ],
)
def test_bad_config_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    """Exit 2 with the file, and the nearest name for a key that is none."""
    config = tmp_path / "run.yaml"
    config.write_text(text + "\n")
    assert main([str(model), "megatron", "-o", str(tmp_path / "out"), "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage (2)  ")
    assert "run.yaml" in said
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_missing_config_file_and_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["--tp", "2"]) == 2
    assert "MODEL" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- local ranks


@pytest.mark.parametrize("count", [2, 3])
def test_local_ranks(model: Path, expected: dict[str, str], tmp_path: Path, count: int) -> None:
    """``--nproc``: this process is rank 0, the others are its children; one JSON result in all."""
    code, out, err = call(*local(count, model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--json"))
    assert code == 0, err
    result = json.loads(out)
    assert (result["ranks"], result["out"]) == (count, str(tmp_path / "out"))
    assert result["bytes_written"] > 100_000
    assert all(16 << 20 < peak < 1 << 30 for peak in result["peak_memory"].values())
    assert tree_digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "code", "label"),
    [
        (["--tp", "3"], 3, "refused (3)"),
        (["--model-type", "lama"], 3, "refused (3)"),
        (["-o", "exists"], 2, "usage (2)"),
        (["-o", "nowhere/out"], 5, "storage (5)"),
    ],
)
def test_local_ranks_say_a_refusal_once(model: Path, tmp_path: Path, options: list[str], code: int, label: str) -> None:
    """Also what is only found when the run begins: the output exists, or there is no place for it."""
    (tmp_path / "exists").mkdir()
    words = [str(tmp_path / word) if word in ("exists", "nowhere/out") else word for word in options]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out")]
    got, out, err = call(*local(3, model, "megatron", *words))
    assert got == code, err
    assert (out + err).count(label) == 1, err
    assert "[rank" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["exists"]


def test_error_as_json(model: Path, tmp_path: Path) -> None:
    got, out, _ = call(*local(2, model, "megatron", "-o", tmp_path / "out", "--tp", 3, "--json"))
    error = json.loads(out)
    assert (got, error["exit_code"], error["error"]) == (3, 3, "refused")
    assert error["what"]


# ---------------------------------------------------------------------------------------------------------- SLURM


def test_slurm_ranks(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """What srun sets for two tasks."""
    words = one_rank(model, "megatron", "-o", tmp_path / "out", *OPTIONS)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    ranks = [start(*words, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step) for rank in range(2)]
    ends = [ended(rank) for rank in ranks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "".join(out for _, out, _ in ends).count("wrote ") == 1
    assert tree_digest(tmp_path / "out") == expected


def test_slurm_batch_script_is_one_process(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """In a batch script SLURM says rank 0 of all tasks, yet there is one process: it must do everything."""
    words = one_rank(model, "megatron", "-o", tmp_path / "out", *OPTIONS)
    code, _, err = call(*words, SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_LOCALID="0")
    assert code == 0, err
    assert tree_digest(tmp_path / "out") == expected


def test_place() -> None:
    """Torchrun's variables come before SLURM's: torchrun under srun is the usual way on a cluster."""
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    for environment, wanted in (
        ({}, (0, 1, 0)),
        (torchrun, (5, 8, 1)),
        (slurm, (1, 2, 0)),
        (torchrun | slurm, (5, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),
    ):
        found = place(environment)
        assert (found.rank, found.world, found.local) == wanted
    assert place({}).launched == float("inf")
    assert 0 < place(torchrun).launched <= time.time()


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", ""), ("0", "0"), ("1.5", "2")])
def test_variables_that_are_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: str, world: str
) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": world}
    with pytest.raises(UsageError):
        place(environment)
    for key, value in environment.items():
        monkeypatch.setitem(os.environ, key, value)
    assert main([str(tmp_path), "megatron"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what a rank pays for

#: Runs the launch module and then says what it cost: modules that are loaded, and peak memory by the kernel's count.
PROBE = """
import json, sys
from dconv.launch.__main__ import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"modules": sorted(m for m in sys.modules if "." not in m), "peak": peak * 1024}))
sys.exit(code)
"""


def probe(*words: object) -> dict[str, object]:
    code, out, err = call(sys.executable, "-c", PROBE, *map(str, words), "--quiet")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


HEAVY = {"torch", "transformers", "safetensors", "huggingface_hub", "yaml", "scipy", "hypothesis"}


def test_relayout_does_not_import_torch(model: Path, tmp_path: Path) -> None:
    """All four directions: nothing heavy is loaded to move bytes."""
    for source, target, options in (
        (model, "a", ["megatron", "--tp", 2]),
        (model, "b", ["megatron", *OPTIONS]),
        (tmp_path / "a", "c", ["hf"]),
        (tmp_path / "b", "d", ["hf"]),
        (tmp_path / "a", "e", ["megatron", "--pp", 2, "--megatron-format", "legacy"]),
    ):
        modules = probe(source, *options, "-o", tmp_path / target)["modules"]
        assert isinstance(modules, list)
        assert "numpy" in modules
        assert not HEAVY & set(modules)


@pytest.mark.parametrize(
    "threads", [1, pytest.param(3, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)]
)
def test_peak_memory(tmp_path: Path, threads: int) -> None:
    """About 200 MB through 32 MiB of buffers: the kernel's peak stays within buffers and 128 MiB, in all directions."""
    family = by_name("llama")
    config = config_of(family, hidden_size=1024, intermediate_size=4096, vocab_size=32_000, num_hidden_layers=5,
                       num_attention_heads=16, num_key_value_heads=4, head_dim=64)  # fmt: skip
    source = write_random(tmp_path / "model", family, config)
    size = (source / "model.safetensors").stat().st_size
    assert size > 180e6
    run_options = ["--max-memory", "32MiB", "--threads", threads]
    limit = (64 + 32 + 64) << 20
    for model, target, options in (
        (source, "dist", ["megatron", "--tp", 2, "--pp", 5]),
        (source, "legacy", ["megatron", "--tp", 4, "--megatron-format", "legacy"]),
        (tmp_path / "dist", "back", ["hf"]),
        (tmp_path / "legacy", "wide", ["hf", "--dtype", "f32"]),
    ):
        peak = probe(model, *options, "-o", tmp_path / target, *run_options)["peak"]
        assert isinstance(peak, int)
        assert peak <= limit, f"{target}: {peak >> 20} MiB"
    assert tree_digest(tmp_path / "back")["model.safetensors"] == tree_digest(source)["model.safetensors"]
