"""``--verify logits`` of outputs in codes: weights within their scheme's bound, logits measured; a fault is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dconv import logits, verify
from dconv.describe import describe_model
from dconv.errors import Refused, VerifyFailed
from dconv.export.prompt import prompt_for
from dconv.pipeline import Job, Request, convert, prepare
from dconv.quantise import VARIANTS
from dconv.sharding.coords import Parallel
from tests.cli.conftest import Dconv, dconv
from tests.models import write_random
from tests.oracles import hf
from tests.quant.whole import write_awq, write_gptq

__all__ = ["dconv"]

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
DATA_FREE = [(form, name) for form, known in VARIANTS.items() for name, kind in known.items() if not kind.repacks]
PROJ = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            _, net = hf.tiny(family, **SIZES, **MORE.get(family, {}))
            made[family] = hf.save(net, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return model


def written(request: Request) -> Job:
    job = prepare(request)
    logits.require(job)
    convert(request)
    return job


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A tensor of the files changed, whatever the receipt says."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path, {"format": "pt"})


def at(index: tuple[int, ...], change: Callable[[Any], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor.clone()
        whole[index] = change(whole[index])
        return whole.view(tensor.dtype)

    return changed


@pytest.mark.parametrize(
    ("family", "form", "quant"),
    [*(("llama", *known) for known in DATA_FREE), ("qwen3_moe", "fp8", "fp8_block"), ("qwen3_moe", "mx", "nvfp4")],
)
def test_what_is_written_passes(
    models: Callable[[str], Path], tmp_path: Path, family: str, form: str, quant: str
) -> None:
    """And what is told of it: errors from the dense copy's weights, logits of transformers on that copy."""
    source, out = models(family), tmp_path / "out"
    job = written(Request(source, form, out, quant=quant))
    found: Any = logits.compare(job, out)
    held = found["weights"]
    assert 0 < held["error"] <= held["bound"] == VARIANTS[form][quant].worst
    convert(Request(out, "hf", tmp_path / "dense", dtype="f32"))
    model = describe_model(source)
    tokens = torch.from_numpy(prompt_for(model.family, model.facts, model.config).tokens)
    before, after = (hf.logits(folder, tokens).double() for folder in (source, tmp_path / "dense"))
    largest, apart = before.abs().max(), (after - before).abs()
    assert found["difference"] == pytest.approx(float(apart.max() / largest), rel=1e-3)
    assert found["mean"] == pytest.approx(float(apart.mean() / largest), rel=1e-3)
    divergence = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
    )
    assert found["divergence"] == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-3)


def test_experts_that_are_one_tensor_for_all(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks of gpt-oss run along another axis than the weight's last: a scale of one is found all the same."""
    job = written(Request(models("gpt_oss"), "mx", tmp_path / "out"))
    found: Any = logits.compare(job, tmp_path / "out")
    assert 0 < found["weights"]["error"] <= 2**-2 and found["weights"]["coded"] == 4
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        spoil(tmp_path / "out", f"{name}_scales", at((3, 1, 1), lambda byte: byte + 1))
        with pytest.raises(VerifyFailed) as caught:
            logits.compare(job, tmp_path / "out")
        assert name in caught.value.where
        spoil(tmp_path / "out", f"{name}_scales", at((3, 1, 1), lambda byte: byte - 1))


FAULTS: dict[str, tuple[str, dict[str, Any], str, Any]] = {
    "scale": ("fp8", {"block_size": (32, 32)}, f"{PROJ}.weight_scale_inv", at((1, 2), lambda s: s * 1.25)),
    "scale of a tensor": ("fp8", {"quant": "fp8_tensor"}, f"{PROJ}.weight_scale_inv", lambda s: s * 0.9),
    "scale of a row": ("fp8", {"quant": "fp8_channel"}, f"{PROJ}.weight_scale", at((7, 0), lambda s: -s)),
    "reciprocals": ("fp8", {"block_size": (32, 32)}, f"{PROJ}.weight_scale_inv", lambda s: 1 / s),
    "blocks in another order": ("fp8", {"block_size": (32, 32)}, f"{PROJ}.weight_scale_inv", lambda s: s.flip(0)),
    "power of two": ("mx", {}, f"{PROJ}.weight_scale", at((3, 1), lambda byte: byte - 1)),
    "power of MXFP8": ("mx", {"quant": "mxfp8"}, f"{PROJ}.weight_scale", at((3, 1), lambda byte: byte + 1)),
    "global scale": ("mx", {"quant": "nvfp4"}, f"{PROJ}.weight_global_scale", lambda s: s * 2),
    "no global scale": ("mx", {"quant": "nvfp4"}, f"{PROJ}.weight_global_scale", lambda s: s * 0),
    "one code": ("fp8", {"block_size": (32, 32)}, f"{PROJ}.weight", at((5, 5), lambda byte: byte ^ 0x80)),
    "rows of codes": ("mx", {"quant": "mxfp6_e2m3"}, f"{PROJ}.weight", lambda codes: codes.flip(0)),
    "NaN": ("fp8", {}, f"{PROJ}.weight", at((0, 0), lambda byte: byte * 0 + 0x7F)),
    "plain": ("fp8", {}, "model.norm.weight", at((3,), lambda value: value * (1 + 2**-20))),
    "cast": ("fp8", {"dtype": "bf16"}, "lm_head.weight", at((3, 3), lambda value: value * (1 + 2**-6))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_files_is_found(models: Callable[[str], Path], tmp_path: Path, fault: str) -> None:
    form, options, name, change = FAULTS[fault]
    job = written(Request(models("llama"), form, tmp_path / "out", **options))
    logits.compare(job, tmp_path / "out")
    spoil(tmp_path / "out", name, change)
    with pytest.raises(VerifyFailed, match="1 tensor is farther") as caught:
        logits.compare(job, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert name.removesuffix("_inv").removesuffix("_global_scale").removesuffix("_scale") in caught.value.where


def test_a_config_of_other_codes_is_found(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Scales that lie in blocks of 32 rows, told as of 33: as many, and all of them wrong by a row or two."""
    job = written(Request(models("llama"), "fp8", tmp_path / "out", block_size=(32, 64)))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = [33, 64]
    path.write_text(json.dumps(config))
    with pytest.raises(VerifyFailed):
        logits.compare(job, tmp_path / "out")


@pytest.mark.parametrize("by", ["fp8", "megatron"])
def test_whatever_the_source_is(models: Callable[[str], Path], tmp_path: Path, by: str) -> None:
    """Codes anew from codes, codes that are kept, and codes of a Megatron checkpoint that transformers cannot load."""
    options: dict[str, Any] = {"parallel": Parallel(tp=2)} if by == "megatron" else {"block_size": (32, 32)}
    convert(Request(models("llama"), by, tmp_path / "source", **options))
    for form, more in (("mx", {}), ("fp8", {"block_size": (32, 32)})):
        job = written(Request(tmp_path / "source", form, tmp_path / form, **more))
        found: Any = logits.compare(job, tmp_path / form)
        kept = (by, form) == ("fp8", "fp8")
        assert (found["weights"]["error"] == 0) == kept and (found["difference"] == 0) == kept


def test_folded_weights_are_compared_with_the_fold(models: Callable[[str], Path], tmp_path: Path) -> None:
    """muP scalars are in the output's weights, each a factor in the source's; plain tensors are rounded once more."""
    job = written(Request(models("granite"), "fp8", tmp_path / "out", mup2llama=True, dtype="bf16"))
    found: Any = logits.compare(job, tmp_path / "out")
    assert 0 < found["weights"]["error"] <= 2**-4 and found["divergence"] < 0.01
    spoil(tmp_path / "out", "lm_head.weight", lambda head: head * 1.01)
    with pytest.raises(VerifyFailed, match="1 tensor is farther"):
        logits.compare(job, tmp_path / "out")


@pytest.mark.parametrize(("form", "target", "quant"), [("gptq", "awq", None), ("awq", "gptq", "gptq_v2")])
def test_whole_numbers_packed_anew_are_worth_the_same(
    tmp_path: Path, form: str, target: str, quant: str | None
) -> None:
    model = (write_gptq if form == "gptq" else write_awq)(tmp_path / "source", num_hidden_layers=2)
    out = tmp_path / "out"
    job = written(Request(model.folder, target, out, quant=quant))
    found: Any = logits.compare(job, out)
    assert (found["weights"]["error"], found["weights"]["bound"], found["difference"]) == (0, 0, 0)
    for part in ("qweight", "qzeros"):
        spoil(out, f"{PROJ}.{part}", at((0, 2), lambda word: word ^ 1))
        with pytest.raises(VerifyFailed, match="1 tensor is farther"):
            logits.compare(job, out)
        spoil(out, f"{PROJ}.{part}", at((0, 2), lambda word: word ^ 1))
    spoil(out, f"{PROJ}.scales", at((0, 2), lambda scale: scale * 1.001))
    with pytest.raises(VerifyFailed) as caught:
        logits.compare(job, out)
    assert "no change at all" in caught.value.expected


def test_on_the_command_line(
    dconv: Dconv, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", models("llama"), "fp8", "--block-size", "32x32", "--verify", "logits"]
    ran = dconv(*words, "-o", tmp_path / "a")
    assert ran.code == 0, ran.err
    assert "(bound 0.062)" in ran.out and "told, not judged" in ran.out
    found = dconv(*words, "-o", tmp_path / "b", "--json").json["verified"]["logits"]
    assert set(found) == {"weights", "difference", "mean", "divergence"}
    real = verify.digest

    def spoiling(out: Path) -> verify.Reread:
        """A writer whose digests are of a wrong scale."""
        read = real(out)
        spoil(out, f"{PROJ}.weight_scale_inv", at((0, 0), lambda scale: scale * 2))
        return read

    monkeypatch.setattr(verify, "digest", spoiling)
    ran = dconv(*words, "-o", tmp_path / "c")
    assert ran.code == 6 and PROJ in ran.err and (tmp_path / "c" / "dconv.json").is_file()


def test_what_no_runtime_computes_is_refused_before_a_byte(tmp_path: Path) -> None:
    from dconv.arch.registry import by_name
    from tests.models import config_of

    family = by_name("minicpm_blockffn")
    source = write_random(tmp_path / "source", family, config_of(family))
    with pytest.raises(Refused, match="could not be compared"):
        logits.require(prepare(Request(source, "fp8", tmp_path / "out")))


def test_blocks_of_no_number_ask_nothing(tmp_path: Path) -> None:
    """A NaN of the source takes its block's bound along, and no other's."""
    from dconv.bounds import _share

    before = np.ones((2, 64))
    after = before * 1.2
    assert _share(before, after, (1, 32), 0.25, 0.0) == pytest.approx(0.2)
    before[0, 3], after[0, :32] = np.nan, np.nan
    assert _share(before, after, (1, 32), 0.25, 0.0) == pytest.approx(0.2)
    after[1, 3] = np.nan
    assert _share(before, after, (1, 32), 0.25, 0.0) == np.inf
    assert _share(before, before.copy(), (1, 32), 0.0, 0.0) == 0
    assert _share(before, after, (1, 32), 0.0, 0.0) == np.inf
