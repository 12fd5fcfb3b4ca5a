"""BERT's function: megatron-core's BertModel against transformers; Google's BERT against older Megatron's layer."""

from __future__ import annotations

from argparse import Namespace
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
TYPES = (torch.arange(24) >= 9).long().expand(2, -1)
CONTAINERS = ("torch_dist", "legacy")
Answer = tuple[torch.Tensor, torch.Tensor]


def theirs(source: Path) -> Answer:
    with torch.no_grad():
        answer = hf.load(source)(input_ids=TOKENS, token_type_ids=TYPES)
    return answer.prediction_logits, answer.seq_relationship_logits


def close(ours: Answer, others: Answer) -> bool:
    return all(
        bool((a[..., : b.shape[-1]] - b[..., : a.shape[-1]]).abs().max() <= 1e-4 * b.abs().max())
        for a, b in zip(ours, others, strict=True)
    )


def run(
    rank: int, world: int, init_method: str, tp: int, pp: int, checkpoints: list[Path], saved: Path
) -> list[Answer | None]:
    """Logits of each checkpoint; the last one's weights are then replaced, saved by megatron-core, and run as well."""
    found: list[Any] = []
    with megatron.parallel_world(tp, pp, rank=rank, world=world, init_method=init_method):
        for path in checkpoints:
            source = open_source(path)
            assert source.args is not None
            models: Any = megatron.build_bert(source.args)
            (megatron.load_legacy if source.format.endswith("legacy") else megatron.load_torch_dist)(models, path)
            found.append(megatron.bert_logits(models, TOKENS, token_types=TYPES))
        args = {**source.args, "vocab_size": None}
        megatron.seed_weights(models, seed=3)
        megatron.save_torch_dist(models, saved / "torch_dist", args)
        megatron.save_legacy(models, saved / "legacy", args)
        found.append(megatron.bert_logits(models, TOKENS, token_types=TYPES))
    return found


@pytest.mark.parametrize(("tp", "pp"), [pytest.param(1, 1, marks=pytest.mark.long), (2, 2)])
def test_megatron_core_computes_what_transformers_does_both_ways(tp: int, pp: int, tmp_path: Path) -> None:
    _, model = hf.tiny("megatron-bert", vocab_size=301)
    source = hf.save(model, tmp_path / "hf")
    made = []
    for container in CONTAINERS:
        made.append(tmp_path / container)
        convert(
            Request(source, "megatron", made[-1], parallel=Parallel(tp=tp, pp=pp, etp=tp), megatron_format=container)
        )
    results = megatron.spawn(run, tp * pp, tp, pp, made, tmp_path / "saved")
    answers = next(found for found in results if found[0] is not None)
    for ours in answers[:-1]:
        assert close(ours, theirs(source))
    for container in CONTAINERS:  # args and names of tensors alone describe it
        out = tmp_path / f"back-{container}"
        job = prepare(Request(tmp_path / "saved" / container, "hf", out))
        assert job.family.name == "megatron-bert"
        convert(job.request)
        assert close(answers[-1], theirs(out))


def norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}weight"], weights[f"{name}bias"], 1e-12)


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def post_residual(w: dict[str, torch.Tensor]) -> torch.Tensor:
    """What Megatron-LM's ``ParallelTransformerLayer`` does with ``apply_residual_connection_post_layernorm``."""
    places = torch.arange(24)
    x = w["embedding.word_embeddings.weight"][TOKENS] + w["embedding.position_embeddings.weight"][places]
    x = x + w["embedding.tokentype_embeddings.weight"][TYPES]
    for number in range(4):
        layer = f"encoder.layers.{number}."
        residual = norm(x, w, f"{layer}self_attention.linear_qkv.layer_norm_")
        fused = linear(residual, w, f"{layer}self_attention.linear_qkv").view(2, 24, 8, 3, 16)
        query, key, value = (fused[:, :, :, part].transpose(1, 2) for part in range(3))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 24, -1)
        x = residual + linear(mixed, w, f"{layer}self_attention.linear_proj")
        residual = norm(x, w, f"{layer}mlp.linear_fc1.layer_norm_")
        wide = torch.nn.functional.gelu(linear(residual, w, f"{layer}mlp.linear_fc1"))
        x = residual + linear(wide, w, f"{layer}mlp.linear_fc2")
    return norm(x, w, "encoder.final_layernorm.")


def test_the_norm_that_closes_a_layer_of_google_s_bert_opens_megatron_s_next(tmp_path: Path) -> None:
    _, model = hf.tiny("bert")
    convert(Request(hf.save(model, tmp_path / "hf"), "megatron", tmp_path / "m", megatron_format="legacy"))
    said = open_source(tmp_path / "m").args
    assert said is not None
    assert said["apply_residual_connection_post_layernorm"] is True
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]
    with torch.no_grad():
        expected = model.bert(input_ids=TOKENS, token_type_ids=TYPES).last_hidden_state
        assert (post_residual(state) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_one_bert_is_not_taken_for_the_other(tmp_path: Path) -> None:
    _, model = hf.tiny("bert")
    with pytest.raises(Refused, match="in no row of megatron-bert") as caught:
        prepare(Request(hf.save(model, tmp_path / "hf"), "megatron", model_type="megatron-bert"))
    assert "bert.embeddings.LayerNorm" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hidden_act": "gelu_new"}, "gelu_new"),
        ({"type_vocab_size": 3}, "type_vocab_size 3"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_what_megatron_s_bert_does_not_compute_is_refused_by_name(
    keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    _, model = hf.tiny("megatron-bert", **keys)
    with pytest.raises(Refused) as caught:
        prepare(Request(hf.save(model, tmp_path / "hf"), "megatron"))
    assert named in caught.value.found


def test_tanh_in_the_layers_and_not_in_the_head_is_refused_by_name() -> None:
    from dconv.arch.bert import MEGATRON_BERT

    args = MEGATRON_BERT.config.to_args(hf.tiny("megatron-bert")[0].to_dict())
    for odd in ({"bias_gelu_fusion": True}, {"bert_binary_head": False}):
        with pytest.raises(Refused) as caught:
            MEGATRON_BERT.config.to_hf({**args, **odd})
        assert next(iter(odd)) in caught.value.found
