"""T5's function: megatron-core's T5Model against transformers; where the two differ, the refusal says in what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.errors import Refused  # noqa: E402
from dconv.export import megatron_runtime as megatron  # noqa: E402
from dconv.pipeline import Request, convert, prepare  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.oracles import hf  # noqa: E402

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(5))
ANSWERS = TOKENS.flip(1)[:, :17]
CONTAINERS = ("torch_dist", "legacy")
#: transformers takes ``tie_word_embeddings`` false for "logits are not scaled", and ties them all the same
KINDS: dict[str, dict[str, Any]] = {
    kind: {"feed_forward_proj": kind, "tie_word_embeddings": False, "num_decoder_layers": 3, "vocab_size": 301}
    for kind in ("gated-gelu", "gated-silu", "gelu", "relu")
}
#: The first T5, whose logits are scaled: megatron-core computes the rest of it.
FIRST: dict[str, Any] = {"feed_forward_proj": "relu", "num_decoder_layers": 3, "vocab_size": 301}


def close(ours: torch.Tensor, others: torch.Tensor) -> bool:
    width = min(ours.shape[-1], others.shape[-1])
    return bool((ours[..., :width] - others[..., :width]).abs().max() <= 1e-4 * others.abs().max())


def run(rank: int, world: int, init_method: str, checkpoints: list[Path], saved: Path) -> list[torch.Tensor]:
    """Logits of each checkpoint; the last one's weights are then replaced, saved by megatron-core, and run as well."""
    found = []
    with megatron.parallel_world(world, 1, rank=rank, world=world, init_method=init_method):
        for path in checkpoints:
            source = open_source(path)
            assert source.args is not None
            models: Any = megatron.build_t5({**source.args, "scale_decoder_outputs": None})
            (megatron.load_legacy if source.format.endswith("legacy") else megatron.load_torch_dist)(models, path)
            found.append(megatron.t5_logits(models, TOKENS, ANSWERS))
        args = {**source.args, "vocab_size": None}
        megatron.seed_weights(models, seed=3)
        megatron.save_torch_dist(models, saved / "torch_dist", args)
        megatron.save_legacy(models, saved / "legacy", args)
        found.append(megatron.t5_logits(models, TOKENS, ANSWERS))
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_computes_what_transformers_does_both_ways(tp: int, tmp_path: Path) -> None:
    made, expected = [], []
    for kind, keys in {"first": FIRST, **KINDS}.items():
        config, model = hf.tiny("t5", **keys)
        source = hf.save(model, tmp_path / kind)
        for container in CONTAINERS:
            made.append(tmp_path / f"{kind}-{container}")
            convert(Request(source, "megatron", made[-1], parallel=Parallel(tp=tp, etp=tp), megatron_format=container))
            logits = hf.logits(model, TOKENS, decoder_input_ids=ANSWERS)
            expected.append(logits * config.d_model**0.5 if kind == "first" else logits)
    answers = megatron.spawn(run, tp, made, tmp_path / "saved")[0]
    assert [close(ours, theirs) for ours, theirs in zip(answers, expected, strict=False)] == [True] * len(expected)
    for container in CONTAINERS:  # args and names of tensors alone describe it
        out = tmp_path / f"back-{container}"
        job = prepare(Request(tmp_path / "saved" / container, "hf", out))
        assert job.family.name == "t5"
        convert(job.request)
        assert close(answers[-1], hf.logits(out, TOKENS, decoder_input_ids=ANSWERS))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"feed_forward_proj": "gated-relu", "tie_word_embeddings": False}, "feed_forward_proj gated-relu"),
        ({"feed_forward_proj": "silu"}, "feed_forward_proj silu"),
    ],
)
def test_what_megatron_s_t5_does_not_compute_is_refused_by_name(
    keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    _, model = hf.tiny("t5", **keys)
    with pytest.raises(Refused) as caught:
        prepare(Request(hf.save(model, tmp_path / "hf"), "megatron"))
    assert named in caught.value.found


def test_the_first_t5_says_what_megatron_core_lacks_and_comes_back(tmp_path: Path) -> None:
    from dconv.arch.t5 import T5
    from dconv.export.megatron_config import as_dict

    _, model = hf.tiny("t5", **FIRST)
    source = hf.save(model, tmp_path / "hf")
    job = prepare(Request(source, "megatron", tmp_path / "m"))
    assert any(line.startswith("scale_decoder_outputs") for line in job.needs)
    assert any("ReLU" in line for line in job.needs)
    convert(job.request)
    args = open_source(tmp_path / "m").args
    assert args is not None and args["scale_decoder_outputs"] is True
    with pytest.raises(Refused, match="does not compute this model"):
        as_dict(args)
    out = tmp_path / "again"  # config.json from the args alone
    config = T5.config.to_hf(args)
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "config.json").write_text(json.dumps(config))
    convert(Request(tmp_path / "m", "hf", out, hf_config=tmp_path / "said"))
    expected = hf.logits(model, TOKENS, decoder_input_ids=ANSWERS)
    assert torch.equal(hf.logits(out, TOKENS, decoder_input_ids=ANSWERS), expected)


def test_two_stacks_stay_in_one_stage(tmp_path: Path) -> None:
    _, model = hf.tiny("t5", **KINDS["gelu"])
    with pytest.raises(Refused, match="one pipeline stage"):
        prepare(Request(hf.save(model, tmp_path / "hf"), "megatron", parallel=Parallel(pp=2)))


def test_a_megatron_t5_with_tied_output_has_a_bias_that_huggingface_lacks(tmp_path: Path) -> None:
    from dconv.arch.t5 import T5

    args = T5.config.to_args(hf.tiny("t5", **KINDS["gelu"])[0].to_dict())
    for odd in ({"untie_embeddings_and_output_weights": False}, {"position_embedding_type": "learned_absolute"}):
        with pytest.raises(Refused) as caught:
            T5.config.to_hf({**args, **odd})
        assert next(iter(odd)) in caught.value.found
