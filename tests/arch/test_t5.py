"""T5's function: megatron-core's T5Model against transformers; where the two differ, the refusal says in what."""

from __future__ import annotations

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
    for kind in ("gated-gelu", "gated-silu", "gelu")
}


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
            models: Any = megatron.build_t5(source.args)
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
    for kind, keys in KINDS.items():
        _, model = hf.tiny("t5", **keys)
        source = hf.save(model, tmp_path / kind)
        for container in CONTAINERS:
            made.append(tmp_path / f"{kind}-{container}")
            convert(Request(source, "megatron", made[-1], parallel=Parallel(tp=tp, etp=tp), megatron_format=container))
            expected.append(hf.logits(model, TOKENS, decoder_input_ids=ANSWERS))
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
        ({"feed_forward_proj": "relu", "tie_word_embeddings": False}, "feed_forward_proj relu"),
        ({"feed_forward_proj": "gated-gelu"}, "scale_decoder_outputs"),
    ],
)
def test_what_megatron_s_t5_does_not_compute_is_refused_by_name(
    keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    _, model = hf.tiny("t5", **keys)
    with pytest.raises(Refused) as caught:
        prepare(Request(hf.save(model, tmp_path / "hf"), "megatron"))
    assert named in caught.value.found


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
