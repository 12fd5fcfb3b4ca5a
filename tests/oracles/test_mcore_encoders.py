"""BERT and T5 of megatron-core against themselves: every layout and every container is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.export import megatron_runtime as megatron

BERT: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 8,
    "padded_vocab_size": 320,
    "max_position_embeddings": 64,
}
T5 = BERT | {
    "kv_channels": 16,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "swiglu": True,
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "softmax_scale": 1.0,
}
TOKENS = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(24) < torch.tensor([[24], [19]])).long()
TYPES = (torch.arange(24) >= 9).long().expand(2, -1)
TOLERANCE = 2e-5  # fp32, logits around 1; tensor parallelism only changes the order of sums


def run(
    rank: int, init_method: str, build: Any, args: dict[str, Any], tp: int, pp: int, save: str, load: str
) -> torch.Tensor | None:
    """Logits in a layout, of seeded weights (saved to ``save``) or of those in ``load``; containers by folder name."""
    if rank >= tp * pp:
        return None
    with megatron.parallel_world(tp, pp, rank=rank, world=tp * pp, init_method=init_method):
        models = build(args)
        if load:
            (megatron.load_legacy if "legacy" in load else megatron.load_torch_dist)(models, load)
        else:
            megatron.seed_weights(models, seed=1)
        if save:
            (megatron.save_legacy if "legacy" in save else megatron.save_torch_dist)(models, save, args)
        if build is megatron.build_t5:
            return megatron.t5_logits(models, TOKENS, TOKENS.flip(1)[:, :17])
        found = megatron.bert_logits(models, TOKENS, MASK, TYPES)
        return None if found is None else torch.cat([found[0][MASK.bool()].flatten(), found[1].flatten()])


def everywhere(rank: int, world: int, init_method: str, root: str) -> dict[str, list[torch.Tensor | None]]:
    found: dict[str, list[torch.Tensor | None]] = {}
    for name, build, args, layouts in (
        ("bert", megatron.build_bert, BERT, [(2, 1), (1, 2), (2, 2)]),
        ("t5", megatron.build_t5, T5, [(2, 1)]),
    ):
        found[name] = [run(rank, init_method, build, args, 1, 1, "", "")]
        for tp, pp in layouts:
            for container in ("torch_dist", "legacy"):
                place = f"{root}/{name}-{container}-{tp}-{pp}"
                found[name].append(run(rank, init_method, build, args, tp, pp, place, ""))
                found[name].append(run(rank, init_method, build, args, tp, pp, "", place))
        found[name].append(run(rank, init_method, build, args, 1, 1, "", f"{root}/{name}-torch_dist-2-1"))
    return found


@pytest.mark.long  # `test_bert`, `test_t5` and `test_mcore_classic` have one layout each
def test_encoders_are_the_same_model_in_every_layout_and_container(tmp_path: Path) -> None:
    results = megatron.spawn(everywhere, 4, str(tmp_path), timeout=300)
    for name in ("bert", "t5"):
        expected = results[0][name][0]
        assert expected.isfinite().all()
        for case in zip(*(result[name] for result in results), strict=True):
            answers = [answer for answer in case if answer is not None]
            assert answers
            for answer in answers:
                assert (answer - expected).abs().max() < TOLERANCE, name
