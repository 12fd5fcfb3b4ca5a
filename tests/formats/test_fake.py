"""``--fake-weight``: a checkpoint of a config alone, of the right shapes and of values that say where they belong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.arch.registry import by_name, families
from dconv.cli import main
from dconv.codec.fill import Fill, filled
from dconv.compare import diff
from dconv.errors import Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.arch.moe_published import V3
from tests.models import config_of, tensors, tree_digest, write_random


def config_alone(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    known = by_name(family)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(known, **sizes)))
    return folder


def wishes(folder: Path, **said: Any) -> Path:
    path = folder / "wishes.json"
    path.write_text(json.dumps(said))
    return path


def fake(model: Path, out: Path, format: str = "hf", file: Path | None = None, **options: Any) -> dict[str, Any]:
    convert(Request(model, format, out, fake_weight=True, fake_weight_config=file, **options))
    return tensors(out) if format == "hf" else {}


@pytest.mark.parametrize("family", families().values(), ids=families())
def test_every_family(tmp_path: Path, family: Any) -> None:
    """The shapes are those of a real model of that config; all is zero, and no byte of it takes room."""
    real = tensors(write_random(tmp_path / "real", family, config_of(family)))
    model = config_alone(tmp_path / "model", family.name)
    if family.either:  # blocks of any shape, in any layer
        with pytest.raises(Refused, match="does not say the shapes"):
            fake(model, tmp_path / "out", model_type=family.name)
        return
    if family.marks:
        with pytest.raises(Refused, match="does not tell the family"):
            fake(model, tmp_path / "out")
    made = fake(model, tmp_path / "out", model_type=family.name if family.marks else None)
    assert {name: shape for name, (_, shape, _) in made.items()} == {
        name: shape for name, (_, shape, _) in real.items()
    }
    assert not any(any(data) for _, _, data in made.values())
    receipt = json.loads((tmp_path / "out" / "dconv.json").read_text())
    assert "zeros" in receipt["source"]["made"]


def test_zeros_are_holes(tmp_path: Path) -> None:
    model = config_alone(tmp_path / "model", hidden_size=512, intermediate_size=2048, vocab_size=4096)
    fake(model, tmp_path / "out")
    found = (tmp_path / "out" / "model.safetensors").stat()
    assert found.st_size > 4_000_000
    assert found.st_blocks * 512 < 100_000


@pytest.mark.parametrize("fill", ["position", {"normal": {"std": 0.5, "seed": 1}}, {"constant": -2.5}], ids=str)
def test_a_megatron_layout_has_the_same_values(tmp_path: Path, fill: object) -> None:
    """Made up for tp 2, pp 2 and experts apart, or for HuggingFace: `diff` sees no difference; from any world."""
    model = config_alone(tmp_path / "model", "qwen3_moe", vocab_size=301)
    file = wishes(tmp_path, fill=fill)
    fake(model, tmp_path / "hf", file=file)
    options: dict[str, Any] = {"fake_weight": True, "fake_weight_config": file, "parallel": Parallel(tp=2, pp=2, ep=2)}
    convert(Request(model, "megatron", tmp_path / "one", **options))
    assert diff(tmp_path / "hf", tmp_path / "one").equal
    for world in (2, 3):
        request = Request(model, "megatron", tmp_path / f"world{world}", **options)
        launched = time.time()
        for rank in range(world):
            settings = Settings(
                rank=rank, world=world, launched=launched, max_memory=(64 << 10) * world, threads=rank + 1
            )
            run(prepare(request), settings)
        assert tree_digest(request.output) == tree_digest(tmp_path / "one")


def test_another_fill_is_another_plan(tmp_path: Path) -> None:
    model = config_alone(tmp_path / "model")
    ids = set()
    for seed in range(3):
        file = wishes(tmp_path, fill={"normal": {"seed": seed}})
        ids.add(prepare(Request(model, "hf", tmp_path / "out", fake_weight=True, fake_weight_config=file)).plan.id)
    assert len(ids) == 3


# ---------------------------------------------------------------------------------------------------------- values


def _mixed(number: int) -> int:
    """SplitMix64 in Python's own numbers."""
    mask = (1 << 64) - 1
    number = number * 0x9E3779B97F4A7C15 & mask
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
    return number ^ number >> 31


def test_normal_is_what_it_says() -> None:
    """Mean and deviation of a million; value by value the sum of eight parts of two hashes."""
    import xxhash

    fill = Fill("normal", std=0.02, seed=5)
    index = np.arange(1 << 20, dtype=np.uint64)
    values = filled(fill, "a.weight", index, "f64").astype(np.float64)
    assert abs(values.mean()) < 1e-4
    assert values.std() == pytest.approx(0.02, rel=5e-3)
    assert 4 * 0.02 < np.abs(values).max() < 5 * 0.02
    key = xxhash.xxh64_intdigest(b"a.weight", 5)
    for at in (0, 1, 77, 1 << 19):
        parts = [_mixed((2 * at + half + key) % (1 << 64)) >> 16 * i & 0xFFFF for half in (0, 1) for i in range(4)]
        expected = (2 * sum(parts) - 8 * 0xFFFF) / (2 * 65536 * (8 / 12) ** 0.5) * 0.02
        assert values[at] == pytest.approx(expected, rel=1e-12)
    assert not np.array_equal(values, filled(Fill("normal", std=0.02, seed=6), "a.weight", index, "f64"))


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_position_tells_places_apart(dtype: str) -> None:
    """Two slices of one size, at any distance that a wrong cut has, differ; so do two tensors. All are finite."""
    values = filled(Fill("position"), "a.weight", np.arange(1 << 16, dtype=np.uint64), dtype)
    wide = values.astype(np.float64) if dtype != "bf16" else (values.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(wide).all()
    assert np.abs(wide).min() >= 0.25 and np.abs(wide).max() < 2
    for distance in (1, 2, 8, 128, 4096, 1 << 15):
        same = (wide[distance : distance + 4096] == wide[:4096]).mean()
        assert same < 0.01, distance
    other = filled(Fill("position"), "b.weight", np.arange(1 << 16, dtype=np.uint64), dtype)
    assert (values == other).mean() < 0.01


def test_constant_is_rounded_once(tmp_path: Path) -> None:
    """0.1 in bf16 is 0x3DCD; in a file as in the arithmetic."""
    made = fake(config_alone(tmp_path / "model"), tmp_path / "out", file=wishes(tmp_path, fill={"constant": 0.1}))
    assert all({data[i : i + 2] for i in range(0, len(data), 2)} == {b"\xcd\x3d"} for _, _, data in made.values())


# ---------------------------------------------------------------------------------------------------------- shapes


def test_dimensions_and_shapes_change_the_config(tmp_path: Path) -> None:
    """A size by its key; and by the shape of a tensor, whose key is found. The config of the output says both."""
    model = config_alone(tmp_path / "model", vocab_size=500, intermediate_size=96)
    hidden = config_of(by_name("llama"))["hidden_size"]
    file = wishes(
        tmp_path,
        dimensions={"num_hidden_layers": 2},
        shapes={"model.layers.*.mlp.down_proj.weight": [hidden, 40], "lm_head.weight": [321, hidden]},
    )
    made = fake(model, tmp_path / "out", file=file)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]) == (2, 40, 321)
    assert made["model.layers.1.mlp.gate_proj.weight"][1] == (40, hidden)
    assert "model.layers.2.mlp.gate_proj.weight" not in made
    assert made["model.embed_tokens.weight"][1] == (321, hidden)


def test_a_list_with_an_entry_a_layer_is_cut(tmp_path: Path) -> None:
    model = config_alone(tmp_path / "model", "qwen3", layer_types=["full_attention"] * 4, num_hidden_layers=4)
    fake(model, tmp_path / "out", file=wishes(tmp_path, dimensions={"num_hidden_layers": 3}))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == ["full_attention"] * 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"shapes": {"model.norm.weight": [8, 8]}}, "it has 1 axes"),
        ({"shapes": {"*.input_layernorm.weight": [33]}}, "hidden_size 32"),
        ({"shapes": {"*.k_proj.weight": [16, 32]}}, "num_key_value_heads 4"),
        ({"shapes": {"*.q_proj.weight": [64, 32]}}, "axis 1 is 64: hidden_size 64"),
        ({"shapes": {"nothing.like.it": [4]}}, "gives a shape to no tensor"),
        ({"dimensions": {"intermediate_size": 50}, "shapes": {"*.up_proj.weight": [40, 32]}}, "intermediate_size 50"),
        ({"dimensions": {"no_such_size": 5}}, "config.json does not have"),
        ({"dimensions": {"num_hidden_layers": "two"}}, "num_hidden_layers in "),
        ({"dimensions": {"num_hidden_layers": 10**9}}, "at most"),
        ({"fills": {"nothing.like.it": "zeros"}}, "fills no tensor"),
        ({"fill": "noise"}, "is wrong"),
        ({"fill": {"normal": {"mean": 1}}}, "is wrong"),
        ({"fill": {"normal": {"std": -1}}}, "is wrong"),
        ({"fill": {"constant": "1"}}, "is wrong"),
        ({"fill": {"constant": True}}, "is wrong"),
        ({"fill": {"constant": []}}, "is wrong"),
        pytest.param({"fill": {"constant": 10**400}}, "is wrong", id="a constant that no float is"),
        ({"shapes": {"a": [0]}}, "is wrong"),
        ({"shapes": ["a"]}, "is wrong"),
        ({"sizes": {}}, "does not know"),
    ],
    ids=str,
)
def test_wishes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], said: Any, words: str) -> None:
    model = config_alone(
        tmp_path / "model",
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        head_dim=None,
    )
    file = wishes(tmp_path, **said)
    before = tree_digest(tmp_path)
    argv = [
        "convert",
        str(model),
        "hf",
        "--fake-weight",
        "--fake-weight-config",
        str(file),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 2
    assert words in capsys.readouterr().err
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ("fill: &a [1]\nfills: {x: *a}", "aliases", 2),
        ("fill: !!python/object/apply:os.system [true]", "a tag that asks for more", 4),
        ("[1, 2]", "no mapping", 2),
        ("{" * 5000, "implausibly deep", 4),
        (": :", "", 2),
    ],
    ids=["alias", "tag", "list", "deep", "odd"],
)
def test_yaml_that_is_no_file_of_wishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str, code: int
) -> None:
    model = config_alone(tmp_path / "model")
    (tmp_path / "wishes.yaml").write_text(text)
    file = str(tmp_path / "wishes.yaml")
    assert main(["plan", str(model), "hf", "--fake-weight", "--fake-weight-config", file]) == code
    assert words in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- command line


def test_the_file_itself_and_a_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MODEL may be config.json; a fold and a cast work on made-up weights; what quantised weights need is left out."""
    model = config_alone(tmp_path / "model", "granite", quantization_config={"quant_method": "fp8"})
    argv = ["convert", str(model / "config.json"), "hf", "--fake-weight", "--mup2llama", "--dtype", "f32", "--quiet"]
    assert main([*argv, "-o", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert main(["plan", str(model), "megatron", "--tp", "2", "--fake-weight"]) == 0
    told = capsys.readouterr().out
    assert "quantization_config of config.json is left out" in told
    assert "config alone, made-up weights  ->  Megatron" in told  # no files that nobody has


@pytest.mark.parametrize(
    "options",
    [["--fake-weight-config", "FILE"], ["--fake-weight", "--rename", "x.json"], ["--fake-weight", "--verify", "logits"],
     ["--fake-weight", "--submodel", "student"], ["--fake-weight", "--from", "hf"]],
    ids=" ".join,
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path: Path, options: list[str]) -> None:
    model = config_alone(tmp_path / "model")
    assert main(["convert", str(model), "hf", "-o", str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()


def test_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), "hf", "--fake-weight", "-o", str(tmp_path / "out")]) == 2
    assert "need a config.json" in capsys.readouterr().err


def test_transformers_loads_it(tmp_path: Path) -> None:
    """Every parameter of the real class is there, of its shape."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")
    from tests.oracles import hf

    for family in ("llama", "qwen3_moe", "gemma3_text"):
        config, _ = hf.tiny(family)
        config.save_pretrained(tmp_path / family)
        data = json.loads((tmp_path / family / "config.json").read_text())
        data["architectures"] = [hf.FAMILIES[family].model]
        (tmp_path / family / "config.json").write_text(json.dumps(data))
        fake(tmp_path / family, tmp_path / f"{family}-out", file=wishes(tmp_path, fill="position"))
        cls = getattr(transformers, hf.FAMILIES[family].model)
        _, told = cls.from_pretrained(tmp_path / f"{family}-out", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]


@pytest.mark.long  # `scripts/bench.py` does it, too
def test_a_model_of_the_size_of_deepseek_v3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """600 B parameters and more in less than 1 GB of memory and 100 MB of disk; inspected, and planned for Megatron."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**V3, "torch_dtype": "bfloat16"}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dconv", "convert", str(tmp_path / "model"), "hf", "--fake-weight", "-o", str(out)]
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert max(told["peak_memory"].values()) < 1e9
    assert sum(path.stat().st_blocks * 512 for path in out.iterdir()) < 100e6
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 600e9
    assert main(["plan", str(out), "megatron", "--tp", "8", "--pp", "61", "--ep", "64", "--etp", "1"]) == 0
    assert "tp 8 x pp 61 x ep 64" in capsys.readouterr().out


def test_a_config_whose_dtype_is_that_of_codes(tmp_path: Path) -> None:
    """As block FP8 checkpoints have it, of what is stored: made-up weights are plain."""
    model = config_alone(tmp_path / "model", dtype="float8_e4m3fn", torch_dtype="float8_e4m3fn")
    made = fake(model, tmp_path / "out", file=wishes(tmp_path, fill="position"))
    assert {dtype for dtype, _, _ in made.values()} == {"BF16"}
