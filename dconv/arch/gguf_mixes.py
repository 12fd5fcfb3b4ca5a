"""Which tensor of a model gets which type in llama-quantize's mixes: Q4_K_M, Q5_K_S and their like.

A mix has a type, and tensors that do more of the work a better one: the output, values, down projections, by where
their layer stands. Source: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's
``src/llama-quant.cpp`` of 2026-10, without an importance matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.sharding.region import Index

#: Mix -> its type, and its number in ``enum llama_ftype``.
MIXES: Final[dict[str, tuple[str, int]]] = {
    "Q2_K": ("Q2_K", 10), "Q3_K_S": ("Q3_K", 11), "Q3_K_M": ("Q3_K", 12), "Q3_K_L": ("Q3_K", 13),
    "Q4_K_S": ("Q4_K", 14), "Q4_K_M": ("Q4_K", 15), "Q5_K_S": ("Q5_K", 16), "Q5_K_M": ("Q5_K", 17),
    "Q6_K": ("Q6_K", 18), "IQ4_NL": ("IQ4_NL", 25), "IQ4_XS": ("IQ4_XS", 30),
}  # fmt: skip
#: What llama-quantize also calls them.
ALIASES: Final = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
#: What a row is stored as that is not whole blocks of 256; f16 where it is not whole blocks of 32 either.
_SMALLER: Final = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
#: Parts of names that say what a tensor does; the first that is found counts.
_DOES: Final = (
    ("attn_qkv.weight", "values"), ("attn_kv_b.weight", "values"), ("attn_v.weight", "values"),
    ("attn_k.weight", "keys"), ("attn_q.weight", ""), ("attn_output.weight", "attention"), ("ffn_up", ""),
    ("ffn_gate", ""), ("ffn_down", "down"),
)  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """What of a model decides."""

    mix: str
    layers: int
    values: int
    queries: int
    experts: int
    largest: bool


def types(mix: str, shapes: Mapping[str, Index], said: Mapping[str, Any]) -> dict[str, str]:
    """The type of each tensor.

    Args:
        mix: one of `MIXES`.
        shapes: of the tensors that are to be in blocks, rows last but one.
        said: the metadata.
    """
    arch = said["general.architecture"]
    layers, heads, kv_heads = (
        int(said[f"{arch}.{key}"]) for key in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    of = _Model(
        mix,
        layers,
        sum(_does(name) == "values" for name in shapes),
        heads // max(kv_heads, 1),
        int(said.get(f"{arch}.expert_count") or 1),
        layers == 80 and (arch == "qwen2" or (arch == "llama" and heads != kv_heads)),  # as its 70B is told
    )
    base, tied = MIXES[mix][0], "output.weight" not in shapes
    counts = {"values": 0, "down": 0}
    found: dict[str, str] = {}
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        does = _does(name)
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            kind = "Q6_K"
        elif does == "values":
            kind = _of_values(of, base, counts["values"])
        elif does == "keys":
            kind = "Q8_0" if of.experts == 8 else base
        elif does == "down":
            kind = _of_down(of, base, _layer(name) if of.experts > 1 else counts["down"])
        else:
            kind = _of_attention(of, base) if does == "attention" else base
        if does in counts:
            counts[does] += 1
        found[name] = _that_fits(kind, shapes[name][-1])
    return found


def _does(name: str) -> str:
    return next((does for part, does in _DOES if part in name), "")


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _more_bits(at: int, count: int) -> bool:
    """The first and the last eighth, and every third between."""
    return at < count // 8 or at >= 7 * count // 8 or (at - count // 8) % 3 == 2


def _of_values(of: _Model, base: str, at: int) -> str:
    kind = base
    if of.mix == "Q2_K":
        kind = "Q4_K" if of.queries >= 4 else "Q3_K"
    elif of.mix == "Q3_K_M":
        kind = "Q5_K" if at < 2 else "Q4_K"
    elif of.mix == "Q3_K_L" or (of.mix.startswith("IQ4") and of.queries >= 4) or (of.mix == "Q4_K_S" and at < 4):
        kind = "Q5_K"
    elif of.mix in ("Q4_K_M", "Q5_K_M") and _more_bits(at, of.values):
        kind = "Q6_K"
    if of.largest and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if of.experts == 8 else kind


def _of_down(of: _Model, base: str, at: int) -> str:
    if of.mix == "Q2_K":
        return "Q3_K"
    if of.mix == "Q3_K_M":
        return "Q5_K" if at < of.layers // 16 else "Q4_K"
    if of.mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(at, of.layers) else base
    early = at < of.layers // 8 and (of.mix == "Q4_K_S" or of.mix.startswith("IQ4"))
    return "Q5_K" if of.mix == "Q3_K_L" or early else base


def _of_attention(of: _Model, base: str) -> str:
    if of.experts == 8:
        return base if of.mix in ("Q3_K_L", "Q5_K_S", "Q5_K_M", "Q6_K") else "Q5_K"
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(of.mix, base)


def _that_fits(kind: str, row: int) -> str:
    if kind not in ("IQ4_NL", "Q8_0") and row % 256:
        kind = _SMALLER[kind]
    return "F16" if row % 32 else kind
