"""Options that contradict each other, mean nothing or are of the wrong type are usage, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dconv as api
from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from dconv.errors import Refused, UsageError, VerifyFailed
from dconv.pipeline import Request, prepare
from dconv.sharding.coords import Parallel
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv, listing
from tests.models import config_of, write_random

LONG = "9" * 400


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A model with two tensors that no row knows."""
    model = write_random(tmp_path / "odd", LLAMA, config_of(LLAMA))
    header = safetensors.read_header(model / "model.safetensors")
    more = [TensorSpec(f"model.{name}.weight", (4,), "bf16") for name in ("surprise", "wonder")]
    size, first, _ = safetensors.lay_out([*(stored.spec for stored in header.values()), *more])
    (model / "model.safetensors").write_bytes(first + bytes(size - len(first)))
    return model


@pytest.mark.parametrize(
    "options",
    [
        ["--make-vocab-size-divisible-by", "0"],
        ["--make-vocab-size-divisible-by=-4"],
        ["--make-vocab-size-divisible-by", "0.5"],
        ["--make-vocab-size-divisible-by", LONG],
        ["--pp", LONG],
        ["--tp", "1.0"],
        ["--threads", "0"],
        ["--first-stage-layers", "0", "--pp", "2"],
        ["--last-stage-layers=-1", "--pp", "2"],
        ["--max-memory", LONG],
        ["--shard-size", LONG + "GB"],
        ["--pp-layout", "2|2", "--pp", "1"],
        ["--pp-layout", "2|2", "--pp", "4"],
        ["--pp-layout", "2|2", "--vpp", "2"],
        ["--pp-layout", "1|1|1|1", "--pp", "2", "--vpp", "1"],
        ["--pp-layout", "2|2", "--first-stage-layers", "2"],
        ["--pp-layout", "2|2", "--count-loss"],
        ["--last-stage-layers", "1", "--count-embedding", "--pp", "2"],
        ["--megatron", "legacy"],  # no abbreviations: a later option of that beginning would change what they mean
        ["--hf-config", "nowhere"],
        ["--hf-config", __file__],
    ],
)
def test_options_without_a_meaning(dconv: Dconv, hf: Path, tmp_path: Path, options: list[str]) -> None:
    before = listing(tmp_path)
    for command in ("convert", "plan"):
        run_only = command == "plan" and options[0] in ("--threads", "--max-memory")
        ran = dconv(command, hf, "megatron", "-o", tmp_path / "out", *options)
        assert ran.code == 2, (command, ran.out, ran.err)
        assert run_only or options[0].split("=")[0].lstrip("-") in ran.err
    assert listing(tmp_path) == before


def test_the_size_of_a_file_is_huggingfaces(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    """Elsewhere it would be taken without effect."""
    (tmp_path / "run.yaml").write_text("shard_size: 1MB\n")
    for options in (["--shard-size", "1MB"], ["--config", str(tmp_path / "run.yaml")]):
        for target, code in (("megatron", 2), ("pt", 2), ("bmtrain", 2), ("hf", 0), ("safetensors", 0)):
            ran = dconv("plan", hf, target, *options)
            assert ran.code == code, ran.err
            assert code == 0 or "--shard-size" in ran.err


@pytest.mark.parametrize(
    "options", [["--pp-layout", "2|2", "--pp", "2", "--vpp", "1"], ["--pp-layout", "1|1|1|1", "--vpp", "2"]]
)
def test_options_that_agree(dconv: Dconv, hf: Path, options: list[str]) -> None:
    plan = dconv("plan", hf, "megatron", *options, "--json")
    assert plan.code == 0
    assert "pp 2" in plan.json["target"]["layout"]


@pytest.mark.parametrize("options", [["--tp", "7"], ["--pp-layout", "2|2"], ["--megatron-format", "legacy"]])
def test_a_layout_is_megatrons(dconv: Dconv, hf: Path, tmp_path: Path, options: list[str]) -> None:
    for target in ("hf", "safetensors"):
        ran = dconv("plan", hf, target, *options)
        assert ran.code == 2
        assert options[0] in ran.err
    (tmp_path / "run.json").write_text(json.dumps({options[0].lstrip("-"): 7 if options[1] == "7" else options[1]}))
    assert dconv("plan", hf, "hf", "--config", tmp_path / "run.json").code == 2
    assert dconv("plan", hf, "hf", "--tp", "1", "--megatron-format", "torch_dist").code == 0  # as they are anyway


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("hf", ["--gguf-pretokenizer", "llama-bpe"]),
        ("hf", ["--strict"]),
        ("hf", ["--platform", "RK3588"]),
        ("gguf", ["--bundle"]),
        ("megatron", ["--task", "text-generation"]),
        ("neuron", ["--max-host-memory", "1GB"]),  # a compiler's with --platform alone
        ("neuron", ["--toolchain-python", "python3"]),
        ("fp8", ["--toolchain-timeout", "90"]),
        ("megatron", ["--teacher", "MODEL", "--quant", "q4_0"]),
        ("megatron", ["--teacher", "MODEL", "--scale-rule", "even"]),
        ("megatron", ["--teacher", "MODEL", "--neuron-scale", "reciprocal"]),
        ("megatron", ["--teacher", "MODEL", "--calibration", "texts.txt"]),
        ("rk", ["--platform", "RK3588", "--trace", "*"]),
        ("rk", ["--platform", "RK3588", "--world", "2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_no_option_is_passed_over_in_silence(dconv: Dconv, hf: Path, format: str, options: list[str]) -> None:
    ran = dconv("plan", hf, format, *(str(hf) if word == "MODEL" else word for word in options))
    assert ran.code == 2, ran.out
    assert next(word for word in reversed(options) if word.startswith("--")) in ran.err
    assert "nothing was written" in ran.err


@pytest.mark.parametrize(
    "wrong",
    [
        {"tp": True},
        {"tp": 2.0},
        {"tp": [2]},
        {"make_vocab_size_divisible_by": 0.5},
        {"make-vocab-size-divisible-by": -1},
        {"threads": 1.5},
        {"max_memory": int(LONG)},
        {"pp_layout": [2, 2]},
        {"out": 5},
        {"model_type": ["llama"]},
        {"from": True},
        {"dtype": 16},
        {"digest": ["xxh3"]},
        {"drop": 5},
        {"drop": ["a", 5]},
        {"drop": {"a": 1}},
        {"count_loss": "yes"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_in_the_config_file(
    dconv: Dconv, hf: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"model": str(hf), "format": "megatron", **wrong}))
    before = listing(tmp_path)
    ran = dconv("convert", "--config", config, *(() if "out" in wrong else ("-o", tmp_path / "out")))
    assert ran.code == 2, ran.out
    assert "usage (2)" in ran.err
    assert "run.json" in ran.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp: 2\nformat: hf\ntp: 4\n", "tp stands there twice"),
        ('{"tp": 2, "tp": 4}', "tp stands there twice"),
        ("from: hf\nsource_format: pt\n", "given twice"),
        ("tp: 2\nconfig: other.yaml\n", "names no other one"),
    ],
)
def test_nothing_of_a_config_file_is_passed_over(dconv: Dconv, hf: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    ran = dconv("plan", hf, "megatron", "--config", tmp_path / "run.yaml")
    assert ran.code == 2 and words in ran.err
    if "config" not in text:
        assert dconv("config", "set", tmp_path / "run.yaml", "tp", "8").code == 2, "one of the two would be left"
    assert (tmp_path / "run.yaml").read_text() == text


def test_null_in_the_config_file_is_not_given(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    words = ["drop", "tp", "etp", "max_memory", "resume", "dtype", "megatron_format", "verify", "hf_config"]
    (tmp_path / "run.json").write_text(json.dumps(dict.fromkeys(words)))
    ran = dconv("convert", hf, "megatron", "--config", tmp_path / "run.json", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_one_pattern_is_one_pattern(dconv: Dconv, tmp_path: Path, odd: Path) -> None:
    """A text is not its characters, one of which may be ``*``; the line's ``--drop`` adds to the file's."""
    config = tmp_path / "run.json"
    for patterns in ("*.surprise.weight", ["*.surprise.weight"]):
        config.write_text(json.dumps({"drop": patterns}))
        assert dconv("plan", odd, "hf", "--config", config).code == 3
        ran = dconv("plan", odd, "hf", "--config", config, "--drop", "*.wonder.weight", "--json")
        assert set(ran.json["left_out"].values()) == {"--drop *.surprise.weight", "--drop *.wonder.weight"}
    assert "--drop" in api.inspect(odd, drop="*.surprise.weight").refused
    assert not api.inspect(odd, drop="*.[sw]*.weight").refused
    assert api.check(odd, drop="*.[sw]*.weight", run=False).report.left_out
    assert api.diff(odd, odd, drop="*.[sw]*.weight").equal
    assert prepare(Request(odd, "hf", drop="*.[sw]*.weight")).plan.target.left_out


def test_a_config_file_from_python(hf: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"tp": 2, "megatron_format": "legacy"}))
    job = api.plan(hf, "megatron", tmp_path / "m", config=config, megatron_format="torch_dist")
    assert (job.request.parallel.tp, job.request.megatron_format) == (2, "torch_dist")
    config.write_text(json.dumps({"tpp": 2}))
    with pytest.raises(UsageError, match="tpp"):
        api.plan(hf, "megatron", config=config)


def test_python_calls_end_in_errors_and_nothing_else(hf: Path, tmp_path: Path) -> None:
    for words, options in (
        (("-m", "megatron"), {}),
        (("--tp=2", "megatron"), {}),
        ((hf, "megatron"), {"resume": "no"}),
        ((hf, "megatron"), {"tp": [1, 2]}),
        ((hf, "megatron"), {"pp_layout": "2|2", "pp": 1}),
        ((hf, "megatron"), {"hf_config": str(tmp_path / "none")}),
    ):
        with pytest.raises(UsageError):
            api.convert(*words, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()
    for run in (api.inspect, api.check, lambda path, hf_config: api.diff(path, path, hf_config=hf_config)):
        with pytest.raises(UsageError, match="--hf-config"):
            run(hf, hf_config=str(hf / "config.json"))
    assert api.inspect(str(hf), hf_config=str(hf)).config_from.endswith(str(hf))
    assert api.check(str(hf), hf_config=str(hf), run=False)
    assert api.diff(str(hf), str(hf), hf_config=str(hf)).equal


@pytest.mark.parametrize(
    ("request_options", "where"),
    [
        ({"divisor": 0}, "divisible"),
        ({"divisor": -128}, "divisible"),
        ({"divisor": 10**30}, "divisible"),
        ({"parallel": Parallel(tp=2, etp=4)}, "--etp"),
        ({"parallel": Parallel(tp=2, ep=2)}, "--ep"),
    ],
)
def test_requests_that_no_command_line_made(hf: Path, request_options: dict[str, object], where: str) -> None:
    for container in ("torch_dist", "legacy"):
        with pytest.raises(Refused) as caught:
            prepare(Request(hf, "megatron", megatron_format=container, **request_options))  # type: ignore[arg-type]
        assert where in caught.value.where


def test_expert_tensor_parallelism_of_a_dense_model_is_one_or_all(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    for etp in (1, 2):
        api.convert(hf, "megatron", tmp_path / str(etp), tp=2, etp=etp)
        assert dconv("diff", hf, tmp_path / str(etp)).code == 0
        assert prepare(Request(hf, "megatron", parallel=Parallel(tp=2, etp=etp)))
    ran = dconv("convert", hf, "megatron", "-o", tmp_path / "m", "--tp", 2, "--etp", 4)
    assert ran.code == 3
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("size", ["--tp", "--pp", "--vpp", "--ep", "--etp"])
def test_sizes_of_less_than_one_rank_are_refused(dconv: Dconv, hf: Path, size: str) -> None:
    for count in (0, -2):
        for layout in ((), ("--pp-layout", "2|2")):
            ran = dconv("plan", hf, "megatron", f"{size}={count}", *layout)
            assert ran.code in (2, 3)
            assert size in ran.err


def test_a_layout_of_another_depth_sizes_nothing(dconv: Dconv, hf: Path) -> None:
    for layout in ("99999999999|1", "Et*9999|(t|)*9999tL"):
        assert dconv("plan", hf, "megatron", "--pp-layout", layout).code == 3
    for options in (["--first-stage-layers", "1"], ["--vpp", "999999999999", "--last-stage-layers", "1"]):
        assert dconv("plan", hf, "megatron", "--pp", "999999999999", *options).code == 3


def test_verify_looks_at_what_was_already_there(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    words = ["convert", hf, "hf", "-o", tmp_path / "out", "--verify", "digest"]
    assert dconv(*words).code == 0
    again = dconv(*words, "--resume", "--json")
    assert again.json["already_done"]
    assert again.json["verified"]["tensors"] > 0
    assert "verified: " in dconv(*words, "--resume").out
    (tmp_path / "out" / "tokenizer.json").write_text('{"version": "2.0"}')
    ran = dconv(*words, "--resume")
    assert ran.code == 6, ran.out
    assert "already done" not in ran.out
    with pytest.raises(VerifyFailed, match="changed"):
        api.convert(hf, "hf", tmp_path / "out", resume=True, verify="digest")


@pytest.mark.parametrize("pattern", ["*.surprize.weight", "model.layers.*.mlp.gate_proj.weight"])
def test_a_drop_of_nothing(dconv: Dconv, tmp_path: Path, odd: Path, pattern: str) -> None:
    """A pattern that leaves nothing out is no good, whatever else there is to leave out."""
    before = listing(tmp_path)
    words = (odd, "megatron", "--drop", "*.[sw]*.weight", "--drop", pattern)
    for command in (("plan", *words), ("convert", *words, "-o", tmp_path / "out")):
        ran = dconv(*command)
        assert ran.code == 2 and pattern in ran.err
        assert ("did you mean model.surprise.weight?" in ran.err) == ("surprize" in pattern)
        assert ("model.layers.{0..3}.mlp.gate_proj.weight" in ran.err) == ("gate" in pattern)
    for command in ("inspect", "check"):
        assert dconv(command, odd, "--drop", "*.[sw]*.weight", "--drop", pattern).code == 2
    assert listing(tmp_path) == before


def test_a_drop_of_what_is_left_out_anyway(dconv: Dconv, tmp_path: Path, hf: Path, odd: Path) -> None:
    """And of one side of two."""
    header = safetensors.read_header(odd / "model.safetensors")
    more = [TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "f32")]
    size, first, _ = safetensors.lay_out([*(stored.spec for stored in header.values()), *more])
    (odd / "model.safetensors").write_bytes(first + bytes(size - len(first)))
    words = ("--drop", "*.[sw]*.weight", "--drop", "*rotary_emb*")
    assert dconv("plan", odd, "hf", *words).code == 0
    assert dconv("diff", odd, hf, *words, "--json").code == 1
    assert dconv("diff", odd, hf, *words, "--drop", "*.nothing").code == 2
    api.convert(hf, "megatron", tmp_path / "m", megatron_format="legacy")
    assert dconv("plan", tmp_path / "m", "hf", "--drop", "*_extra_state").code == 0
