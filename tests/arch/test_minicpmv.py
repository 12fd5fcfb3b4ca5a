"""MiniCPM-V 2.6: tensors are those of its parts, the language model is a Qwen2 on both sides, others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from dconv.arch.registry import detect, families  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from dconv.cli import main  # noqa: E402
from dconv.errors import Damaged, Refused  # noqa: E402
from dconv.pipeline import Request, convert, prepare  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.models import tensors  # noqa: E402
from tests.oracles import hf, minicpmv  # noqa: E402

FAMILY = families()["minicpmv"]
#: MiniCPM-V 2.6 in its sizes, under the keys of its configuration class.
PUBLISHED: dict[str, Any] = {
    "version": 2.6, "architectures": ["MiniCPMV"], "attention_dropout": 0.0, "batch_vision_input": True,
    "bos_token_id": 151643, "drop_vision_last_layer": False, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 3584, "image_size": 448, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "minicpmv", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "patch_size": 14, "query_num": 64, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
    "slice_mode": True, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_image_id": True, "use_sliding_window": False, "vision_batch_size": 16,
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "siglip",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
    "vocab_size": 151666,
}  # fmt: skip
OF_SEEING = (
    "version", "vision_config", "query_num", "slice_config", "drop_vision_last_layer", "image_size", "patch_size",
    "slice_mode", "batch_vision_input", "use_image_id", "vision_batch_size",
)  # fmt: skip


def test_published() -> None:
    args = json.loads(json.dumps(FAMILY.config.to_args(PUBLISHED)))
    assert detect(None, args) is FAMILY
    back = FAMILY.config.to_hf(args)
    assert {key: back[key] for key in OF_SEEING} == {key: PUBLISHED[key] for key in OF_SEEING}
    assert FAMILY.config.facts(back) == FAMILY.config.facts(PUBLISHED)
    assert FAMILY.config.to_args(back) == args
    assert FAMILY.config.check_pair(PUBLISHED, args) == []
    assert FAMILY.config.check_pair({**PUBLISHED, "query_num": 96}, args) != []
    words = {key: value for key, value in PUBLISHED.items() if key not in OF_SEEING}
    as_qwen2 = families()["qwen2"].config.to_args({**words, "architectures": ["Qwen2ForCausalLM"]})
    own = {key: value for key, value in args.items() if key not in ("vision_model_type", "minicpmv_vision")}
    assert own == as_qwen2  # Megatron's part of it is that Qwen2
    assert families()["qwen2"].config.matches_args(args)
    without = {**args, "minicpmv_vision": None}
    assert "minicpmv_vision" in " ".join(FAMILY.config.matches_args(without))
    specs = expected_specs(FAMILY, FAMILY.config.facts(PUBLISHED))
    assert specs["vpm.embeddings.position_embedding.weight"].shape == (4900, 1152)
    assert specs["resampler.kv_proj.weight"].shape == (3584, 1152)
    assert specs["resampler.attn.in_proj_weight"].shape == (10752, 3584)
    assert sum(name.startswith("vpm.encoder.layers.26.") for name in specs) == 16


@pytest.mark.parametrize(
    "keys",
    [{}, {"drop": True}, {"vision": {"hidden_size": 128}}, {"vision": {"image_size": 50}}, {"vocab_size": 301},
     {"tie_word_embeddings": True}],
    ids=str,
)  # fmt: skip
def test_the_table_is_the_model(keys: dict[str, Any], tmp_path: Path) -> None:
    config, model = minicpmv.tiny(**keys)
    saved = tensors(minicpmv.save(config, model, tmp_path / "hf"))
    specs = expected_specs(FAMILY, FAMILY.config.facts(config))
    assert {name: spec.file_shape for name, spec in specs.items()} == {name: it[1] for name, it in saved.items()}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"version": 2.5}, "MiniCPM-V 2.5"), ({"version": "4.5"}, "Qwen3"), ({"version": 3.1}, "MiniCPM-V 3.1"),
        ({"version": None}, "Llama 3"),
        ({"version": None, "hidden_size": 2304, "num_attention_heads": 36, "num_key_value_heads": 36}, "MiniCPM-V 2.0"),
    ],
)  # fmt: skip
def test_another_version_is_refused_by_its_name(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, model = minicpmv.tiny()
    source = minicpmv.save({**PUBLISHED, **keys}, model, tmp_path / "hf")
    with pytest.raises(Refused, match=words):
        prepare(Request(source, "megatron", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert FAMILY.config.facts({**config, "version": "2.6"}) == FAMILY.config.facts(config)


def test_what_makes_no_sense_is_damaged() -> None:
    for keys in ({"query_num": 0}, {"vision_config": {"hidden_size": "wide"}}, {"vision_config": [1]}):
        with pytest.raises(Damaged):
            FAMILY.config.facts({**PUBLISHED, **keys})


@pytest.mark.parametrize("container", [pytest.param("torch_dist", marks=pytest.mark.long), "legacy"])
def test_the_language_model_is_a_qwen2(container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """megatron-core computes of what was converted what transformers' Qwen2 does; and dconv's own of the checkpoint."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    from dconv.export import huggingface, megatron
    from dconv.export.prompt import Prompt

    config, model = minicpmv.tiny(num_hidden_layers=2)
    source = minicpmv.save(config, model, tmp_path / "hf")
    out = tmp_path / "out"
    tp = 2 if container == "legacy" else 1
    convert(Request(source, "megatron", out, parallel=Parallel(tp=tp, etp=tp), megatron_format=container))
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = hf.logits(model.llm, tokens)
    prompt = Prompt("decoder", tokens.numpy())
    for ours in (megatron.answers_of(out, prompt)[0], huggingface.answers_of(source, prompt)[0]):
        found = torch.from_numpy(ours)[..., : expected.shape[-1]]
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    capsys.readouterr()
    assert main(["check", str(source)]) == 0
    assert "with words alone" in " ".join(capsys.readouterr().out.split())
    assert "modeling_minicpmv.py" not in {path.name for path in out.iterdir()}
    convert(Request(out, "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(source)
    assert not (tmp_path / "back" / "modeling_minicpmv.py").exists()


def test_megatron_has_of_it_what_it_has_of_that_qwen2(tmp_path: Path) -> None:
    """The same tensors bit for bit, in every shard; what is beside the model lies outside of it."""
    config, model = minicpmv.tiny()
    seeing = minicpmv.save(config, model, tmp_path / "seeing")
    reading = hf.save(model.llm, tmp_path / "reading")
    parallel = Parallel(tp=2, pp=2, etp=2)
    for source in (seeing, reading):
        out = source.with_name(f"{source.name}-megatron")
        convert(Request(source, "megatron", out, parallel=parallel, megatron_format="legacy", divisor=8))
    shards = sorted((tmp_path / "reading-megatron").rglob("*.pt"))
    assert len(shards) == 4
    for path in shards:
        twin = tmp_path / "seeing-megatron" / path.relative_to(tmp_path / "reading-megatron")
        theirs, ours = (torch.load(it, weights_only=False)["model"] for it in (path, twin))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items() if value is not None)


def test_a_model_that_sees_is_not_traced(tmp_path: Path) -> None:
    source = minicpmv.save(*minicpmv.tiny(num_hidden_layers=1), tmp_path / "hf")
    for form in ("torch_export", "torchscript", "onnx"):
        with pytest.raises(Refused, match="models that see are not traced"):
            prepare(Request(source, form, tmp_path / "out"))
