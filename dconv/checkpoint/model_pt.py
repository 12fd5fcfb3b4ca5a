"""A directory of ``model.pt`` and ``metadata.json``: Megatron's whole model at TP 1 and PP 1 as one plain state dict.

``metadata.json`` has the fields of Megatron-LM's ``tools/checkpoint`` loaders (``linear_bias``, ``output_layer``). They
leave out what the function depends on: either more keys stand there (under config.json's names), or a config.json comes
from elsewhere. What a tensor's shape says exactly is read off the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.fields import flag, heads, whole
from dconv.arch.layouts import Facts
from dconv.checkpoint import legacy, megatron, state_dict
from dconv.checkpoint.files import read_json
from dconv.checkpoint.names import HEAD
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.shards import Holder, Shard, locate
from dconv.checkpoint.signs import MODEL_PT
from dconv.checkpoint.source import Located, Source, side_bytes
from dconv.errors import Damaged, DconvError, Refused
from dconv.sharding.plan import Target
from dconv.sharding.tensor import Stored

METADATA: Final = "metadata.json"
#: Its key -> Megatron's arg.
_ARGS: Final = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "position_embedding_type": "position_embedding_type",
    "swiglu": "swiglu",
    "linear_bias": "add_bias_linear",
    "output_layer": "untie_embeddings_and_output_weights",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "rotary_percent": "rotary_percent",
    "normalization": "normalization",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
}
#: Without these nobody knows what the model computes.
_NEEDED: Final = (
    "num_layers", "hidden_size", "num_attention_heads", "position_embedding_type", "swiglu", "linear_bias",
    "output_layer", "rms_norm_eps", "rope_theta",
)  # fmt: skip
#: Args that `_shown` finds in the tensors, and those that do not matter for what the model computes.
_SHOWN: Final = ("qk_layernorm", "add_qkv_bias", "group_query_attention", "vocab_size", "bf16", "fp16", "params_dtype")
_NOT_OF_THE_FUNCTION: Final = ("init_method_std", "attention_dropout")
_EMBEDDING: Final = "embedding.word_embeddings.weight"
_LAYER: Final = "decoder.layers.0."
#: Norms of queries and keys: of each head, or of what latent attention expands.
_NORMS: Final = ("q_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")


def open_source(path: Path, *, own_config: bool = True, rename: Renaming = AS_STORED) -> Source:
    """Describe such a directory, or its ``model.pt`` by name, from headers alone.

    Args:
        path: the directory, or the file.
        own_config: False leaves the config to ``--hf-config``; ``metadata.json`` is then not needed.
        rename: gives the stored tensors other names before they are looked at.

    Raises:
        Damaged: no ``model.pt``, one that is torn, or a ``metadata.json`` that says another model than its tensors.
        Refused: ``rename`` gives two tensors one name.
    """
    found = state_dict.read(path / MODEL_PT if (path / MODEL_PT).exists() else path, rename)
    folder, file = found.path.parent, found.path.name
    weights = found.tensors
    marker = folder / METADATA
    said = read_json(marker, what=METADATA) if own_config and marker.exists() else {}
    if "sharded_backend" in said:
        raise Damaged(
            "metadata.json is that of another container",
            where=str(marker),
            expected=f"what describes {file}",
            found=f"sharded_backend {said['sharded_backend']!r:.40}",
        )
    config, side = megatron.sides(folder)
    words = {name.removeprefix("language_model."): tensor for name, tensor in weights.items()}
    args = _args(said, words, str(marker)) if said else None
    lacks = _lacks(said, args) if config is None else ""

    def lay(family: Family, facts: Facts) -> Located:
        shards = {name: [Shard(stored, Holder(0, 1))] for name, stored in weights.items()}
        return locate(shards, family, facts)

    return Source(
        format="megatron model_pt",
        root=folder,
        config=config,
        args=None if lacks else args,
        side=side,
        files={file: found.stamp},
        parallel=None,
        locate=lay,
        stored_bytes=sum(stored.spec.nbytes for stored in weights.values()),
        shapes={name: stored.spec.shape for name, stored in weights.items()},
        lacks=lacks,
        stored=weights.values,
    )


def _args(said: Mapping[str, object], weights: Mapping[str, Stored], where: str) -> dict[str, object]:
    """Megatron's args: what ``metadata.json`` says, and what the tensors show.

    Raises:
        Damaged: the two disagree, or a value is of the wrong type.
    """
    args = {arg: said[key] for key, arg in _ARGS.items() if said.get(key) is not None}
    if "norm_epsilon" in args:  # under the name rms_norm_eps
        args.setdefault("normalization", "RMSNorm")
    for key, value in _shown(args, weights, where).items():
        if args.setdefault(key, value) != value:
            raise _lies(where, key, args[key], value)
    vocabulary = _shape(weights, _EMBEDDING)
    if vocabulary and said.get("vocab_size") is not None:
        if (rows := whole(said, "vocab_size", where)) > vocabulary[0]:
            raise _lies(where, "vocab_size", rows, vocabulary[0])
        # a size that is the tensor's own may be the padded one
        args["vocab_size" if rows < vocabulary[0] else "padded_vocab_size"] = rows
    return args


def _shown(args: Mapping[str, object], weights: Mapping[str, Stored], where: str) -> dict[str, object]:
    """The args that follow exactly from which tensors there are, and from their shapes."""
    found: dict[str, object] = {
        "qk_layernorm": any(f"{_LAYER}self_attention.{name}" in weights for name in _NORMS),
        "group_query_attention": True,
    }
    biased = f"{_LAYER}self_attention.linear_qkv.bias" in weights
    if not flag(args, "add_bias_linear", where):
        found["add_qkv_bias"] = biased
    if args.get("untie_embeddings_and_output_weights") and HEAD not in weights:
        raise _lies(where, "output_layer", True, False)
    if stored := weights.get(_EMBEDDING):
        found |= {"bf16": stored.spec.dtype == "bf16", "fp16": stored.spec.dtype == "f16"}
    fc2, proj, qkv = (
        _shape(weights, _LAYER + name)
        for name in ("mlp.linear_fc2.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight")
    )
    if len(fc2) == 2:
        found["ffn_hidden_size"] = fc2[1]
    if len(proj) == len(qkv) == 2 and "num_attention_heads" in args:
        queries = heads(args, "num_attention_heads", where)
        size = proj[1] // queries
        rest = qkv[0] - queries * size
        if not size or proj[1] % queries or rest <= 0 or rest % (2 * size):
            raise _lies(where, "num_attention_heads", queries, f"projections of {qkv} and {proj}")
        found |= {"kv_channels": size, "num_query_groups": rest // (2 * size)}
    return found


def _shape(weights: Mapping[str, Stored], name: str) -> tuple[int, ...]:
    return weights[name].spec.shape if name in weights else ()


def _lies(where: str, key: str, said: object, found: object) -> Damaged:
    return Damaged(
        "metadata.json describes another model than its tensors",
        where=f"{key} in {where}",
        expected=f"{found!r:.80}",
        found=f"{said!r:.80}",
        do="--hf-config DIR supplies a config.json",
    )


def _lacks(said: Mapping[str, object], args: Mapping[str, object] | None) -> str:
    """Why this alone does not say what the model computes; "" where it does."""
    missing = [key for key in _NEEDED if said.get(key) is None]
    if missing or args is None:
        return f"{METADATA} without {', '.join(missing)}"
    named = str(said.get("model_type") or "gpt").lower()
    if named == "gpt":
        return ""
    if named not in registry.families():
        return f"{METADATA} of model_type {named:.60}, which is no family known here"
    return "\n".join(registry.by_name(named).config.matches_args(args))


def lay_out(model: megatron.Model) -> Target:
    """``model.pt`` and ``metadata.json`` to be written, with the side files under ``huggingface/``.

    Raises:
        Refused: a layout of several ranks.
    """
    if model.parallel.world != 1:
        raise Refused(
            "model_pt is the whole model in one file, nothing was written",
            where="--megatron-format model_pt",
            expected="tp 1 x pp 1",
            found=model.parallel.described,
            do="leave the sizes out, or --megatron-format legacy",
        )
    made = legacy.lay_out(model)
    states = [f"{module}._extra_state" for module in legacy.stateful(t.spec.name for t in made.tensors)]
    named = [replace(tensor, key=tensor.spec.name) for tensor in made.tensors]
    file, tensors = state_dict.lay_out_file(MODEL_PT, named, owner=0, also=states)

    def closing() -> Iterable[tuple[str, bytes]]:
        yield METADATA, (json.dumps(_metadata(model), indent=2) + "\n").encode()
        for name, data in side_bytes(model.config, model.side):
            yield f"{megatron.SIDE_FOLDER}/{name}", data

    return Target((file,), tuple(tensors), closing, model.seal, 1, model.left_out)


def _metadata(model: megatron.Model) -> dict[str, object]:
    """The loaders' fields, and those that describe the model in full, or else none of these."""
    said = {key: model.args[arg] for key, arg in _ARGS.items() if model.args.get(arg) is not None}
    kept = {arg: model.args[arg] for key, arg in _ARGS.items() if key in said}
    translate = model.family.config.to_hf
    kept |= {arg: model.args.get(arg) for arg in (*_SHOWN, *_NOT_OF_THE_FUNCTION)}
    try:
        whole_model = translate(kept) == translate(model.args)
    except DconvError:
        whole_model = False
    if not whole_model:  # a scaled rope, a sliding window: what is half said would be taken for all
        said = {key: value for key, value in said.items() if key not in ("rms_norm_eps", "rope_theta")}
    return {"model_type": model.family.name, **said, "vocab_size": int(model.facts["vocab"])}
