"""megatron-core 0.19.2 loads a torch_dist checkpoint, computes logits, and saves it again in its own form.

Not imported by any test, and imports no dconv: run with the python of ``scripts/bridge_env.sh``'s environment, since
megatron-core 0.19.2 and the 0.16.1 of dconv's own environment cannot be installed side by side.

    .venvs/bridge/bin/python tests/oracles/newer_core.py CHECKPOINT TOKENS.npy LOGITS.npy AGAIN

CHECKPOINT is an iteration's directory. Its own ``args`` say what model it is, as Megatron-LM would take them; the model
is a GPTModel of local layers with fp32 weights, all NaN before the loader fills them; tp 1, pp 1, on a CPU. AGAIN is
made anew: ``iter_0000001`` in it is the same model as 0.19.2 saves it, ``latest_checkpointed_iteration.txt`` names it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bridge_peer  # the shims without which 0.19.2 cannot be imported here


def build(args: Namespace) -> Any:
    """A dense decoder from Megatron arguments, in evaluation mode, its weights NaN."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    assert args.swiglu
    assert args.position_embedding_type == "rope"
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model.eval()


def load(model: Any, checkpoint: str) -> None:
    """Fill the model by ``dist_checkpointing.load``; no weight may be left over or lacking."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # in its words, missing: saved but not asked for; unexpected: asked for but not saved
    loaded: Any = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, checkpoint, strict=StrictHandling.RETURN_ALL
    )
    state, missing, unexpected = loaded
    left = {key for key in missing if "_extra_state" not in key and not key.startswith("common_state")}
    if left or unexpected:
        raise SystemExit(f"{checkpoint}: not in the model {sorted(left)}, not in the checkpoint {sorted(unexpected)}")
    weights = {key: value for key, value in state["model"].items() if not key.endswith("_extra_state")}
    model.load_state_dict(weights, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens", help="integers [batch, sequence], .npy")
    parser.add_argument("logits", help="float32 [batch, sequence, padded vocabulary], .npy; written")
    parser.add_argument("again", type=Path, help="a directory to make")
    given = parser.parse_args()

    bridge_peer.before_core()
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    bridge_peer.on_cpu()
    with tempfile.TemporaryDirectory(prefix="newer-core-") as scratch:
        bridge_peer.world_of_one(scratch)
        common: Any = load_common_state_dict(given.checkpoint)
        model = build(common["args"])
        load(model, given.checkpoint)
        tokens = torch.from_numpy(np.load(given.tokens))
        length = tokens.shape[1]
        positions = torch.arange(length).expand_as(tokens)
        later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.no_grad():
            np.save(given.logits, model(tokens, positions, later).float().numpy())
        directory = given.again / "iter_0000001"
        directory.mkdir(parents=True)
        state = {"args": common["args"], "checkpoint_version": 3.0, "iteration": 1, "model": model.sharded_state_dict()}
        dist_checkpointing.save(state, str(directory))
        (given.again / "latest_checkpointed_iteration.txt").write_text("1")


if __name__ == "__main__":
    main()
