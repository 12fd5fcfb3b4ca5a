"""Models that see: the language model is calibrated as it is alone, all else stays, and loaders are told so."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")
transformers = pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from dconv.cli import main  # noqa: E402
from dconv.pipeline import Request, prepare, run  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from tests.models import tensors  # noqa: E402
from tests.oracles import hf, minicpmv  # noqa: E402

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 320}
#: What the language model's names begin with in the one that sees, and the blocks of which nothing is in codes.
SEEING = {
    "llava": ("language_model.", {"vision_tower", "multi_modal_projector"}),
    "minicpmv": ("llm.", {"vpm", "resampler"}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each model that sees, and its language model alone."""
    folder = tmp_path_factory.mktemp("seeing")
    _, llama = hf.tiny("llama", **SIZES)
    _, llava = hf.tiny("llava", text_config={**hf.SIZES, **SIZES, "model_type": "llama"})
    words: Any = llava.get_submodule("model.language_model")
    words.load_state_dict(llama.model.state_dict())
    llava.lm_head.load_state_dict(llama.lm_head.state_dict())
    config, sees = minicpmv.tiny(**SIZES)
    return {
        "llava": (hf.save(llava, folder / "llava"), hf.save(llama, folder / "llama")),
        "minicpmv": (minicpmv.save(config, sees, folder / "minicpmv"), hf.save(sees.llm, folder / "qwen2")),
    }


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (12, 64)))
    return path


def coded(source: Path, ids: Path, out: Path, form: str, **said: Any) -> dict[str, Any]:
    """A calibrated output's tensors. Samples are asked for that are longer than the model's context."""
    settings = json.dumps({"bits": 4, "group_size": 32, "nsamples": 8, "seqlen": 128, **said})
    run(prepare(Request(source, form, out, calibration=str(ids), quantization_config=settings)), Settings())
    return tensors(out)


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("name", SEEING)
def test_codes_are_those_of_the_language_model_alone(
    name: str, form: str, pairs: dict[str, tuple[Path, Path]], ids: Path, tmp_path: Path
) -> None:
    seeing, reading = pairs[name]
    prefix, outside = SEEING[name]
    ours, theirs = (coded(source, ids, tmp_path / source.name, form) for source in (seeing, reading))
    assert sum(part.endswith(".qweight") for part in theirs) == 14
    assert {part: value for part, value in ours.items() if part.startswith(prefix)} == {
        prefix + part: value for part, value in theirs.items()
    }
    plain = {part: value for part, value in tensors(seeing).items() if not part.startswith(prefix)}
    if name == "llava":  # under the names of the hub
        plain = {part.replace("vision_tower.", "vision_tower.vision_model."): it for part, it in plain.items()}
    assert {part.split(".")[0] for part in plain} == outside
    assert {part: value for part, value in ours.items() if not part.startswith(prefix)} == plain
    report = json.loads((tmp_path / seeing.name / "calibration.json").read_text())
    assert len(report["weights"]) == 14


def linear_modules(name: str, source: Path) -> tuple[set[str], set[str]]:
    """Linear layers of the model in memory: those of the decoder's layers, and all others but the output layer."""
    if name == "llava":
        config = transformers.AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        model = minicpmv.tiny(**SIZES)[1]
    every = {at for at, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"llm.lm_head"}
    inside = {at for at in every if re.search(r"(language_model|llm)\.(model\.)?layers\.", at)}
    return inside, every - inside - {"lm_head"}


def excluded_from_fp8(source: Path, folder: Path) -> list[str]:
    """``modules_to_not_convert`` of FORMAT fp8, as transformers renames it to its own modules."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    assert main(["convert", str(source), "fp8", "-o", str(folder / "fp8"), "--quiet"]) == 0
    said = json.loads((folder / "fp8" / "config.json").read_text())["quantization_config"]
    config = transformers.FineGrainedFP8Config(modules_to_not_convert=said["modules_to_not_convert"])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(source))
    FineGrainedFP8HfQuantizer(config)._normalize_modules_to_not_convert(model)
    return config.modules_to_not_convert


@pytest.mark.parametrize("name", SEEING)
def test_loaders_are_told_what_is_in_codes(
    name: str, pairs: dict[str, tuple[Path, Path]], ids: Path, tmp_path: Path
) -> None:
    """By the names of the model in memory: GPTQModel's rule for ``dynamic``, and transformers' own for AWQ's list."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    inside, others = linear_modules(name, pairs[name][0])
    assert len(inside) == 14
    assert len(others) > 6
    for form in ("gptq", "awq"):
        coded(pairs[name][0], ids, tmp_path / form, form)
    said = {form: json.loads((tmp_path / form / "config.json").read_text()) for form in ("gptq", "awq")}
    skips = [rule[2:] for rule in said["gptq"]["quantization_config"]["dynamic"] if rule.startswith("-:")]
    assert {at for at in inside | others if any(re.match(rule, at) for rule in skips)} == others
    listed = said["awq"]["quantization_config"]["modules_to_not_convert"]
    assert {at for at in inside | others if not should_convert_module(at, listed)} == others
    assert len(listed) <= 6
    if name == "llava":
        theirs = excluded_from_fp8(pairs[name][0], tmp_path)
        assert {at for at in inside | others if not should_convert_module(at, theirs)} == others
    assert main(["convert", str(pairs[name][0]), "mx", "--quant", "mxfp4", "-o", str(tmp_path / "mx"), "--quiet"]) == 0
    exclude = json.loads((tmp_path / "mx" / "config.json").read_text())["quantization_config"]["exclude"]
    for at in inside | others:  # vLLM's reading, and amd-quark's
        plain = any(re.match(entry[3:], at) if entry.startswith("re:") else entry == at for entry in exclude)
        assert plain == (at in others) == any(fnmatch.fnmatch(at, entry) for entry in exclude), at
    stored = {part.removesuffix(".weight") for part in tensors(tmp_path / "awq") if part.endswith(".weight")}
    older = {at for at in stored if any(entry in at for entry in listed)}  # transformers 4 looks inside of names
    assert not any(re.search(r"layers\.\d+\.(self_attn|mlp)\.", at) for at in stored - older)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "minicpmv")) for name in SEEING]
)
def test_any_number_of_ranks(name: str, pairs: dict[str, tuple[Path, Path]], ids: Path, tmp_path: Path) -> None:
    told = json.dumps({"group_size": 32, "nsamples": 8, "seqlen": 64})
    words = ["gptq", "--calibration", str(ids), "--quantization-config", told, "--quiet"]
    for ranks in ("1", "2"):
        assert main(["convert", str(pairs[name][0]), *words, "-o", str(tmp_path / ranks), "--nproc", ranks]) == 0
    assert tensors(tmp_path / "1") == tensors(tmp_path / "2")
    assert main(["check", str(tmp_path / "1")]) == 0


def test_what_is_decoded_is_near(pairs: dict[str, tuple[Path, Path]], ids: Path, tmp_path: Path) -> None:
    """transformers loads the decoded model, which computes nearly what it did; with 8 bits, very nearly."""
    source, _ = pairs["llava"]
    tokens = torch.from_numpy(np.load(ids)[:2])
    right = hf.logits(source, tokens)
    errors = []
    for bits in (4, 8):
        coded(source, ids, tmp_path / f"{bits}", "gptq", bits=bits)
        run(prepare(Request(tmp_path / f"{bits}", "hf", tmp_path / f"{bits}-plain", dtype="f32")), Settings())
        found = hf.logits(tmp_path / f"{bits}-plain", tokens)
        errors.append(float((found - right).square().mean() / right.square().mean()))
    assert errors[1] < 1e-3 < errors[0] < 0.5
