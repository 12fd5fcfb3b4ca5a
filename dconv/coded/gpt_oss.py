"""gpt-oss as released: the experts' weights in MXFP4 ``_blocks`` and ``_scales``, all experts in one, the rest plain.

``X_blocks`` is uint8 [experts, out, in / 32, 16], two codes a byte, the lower four bits first; ``X_scales`` uint8
[experts, out, in / 32]. The dense ``X`` is [experts, in, out], and of ``gate_up_proj`` out alternates between gate and
up. Source: ``convert_moe_packed_tensors`` in transformers' ``integrations/mxfp4.py``, which takes a scale of 255 for
2^128 where the MX specification, and this, has NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dconv.codec.minifloat import E2M1
from dconv.codec.mx import BLOCK, Rule
from dconv.coded import mx
from dconv.coded.decoded import Decoded, dense
from dconv.coded.encode import Coded
from dconv.coded.pairs import pairs_of
from dconv.errors import Damaged
from dconv.sharding.derived import Array
from dconv.sharding.tensor import Logical, TensorSpec

METHOD: Final = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_RECIPE: Final = mx.Decode(E2M1, blocked=True)
_WORDS: Final = f"e2m1 code x the power of two of its {BLOCK} neighbours"
#: What the released models name; the attention's linear layers are not in codes.
_PLAIN: Final = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in blocks, each proved to have its scales, and every scale its blocks.

    Raises:
        Damaged: blocks without scales, the reverse, or of other shapes than they make.
    """
    del config
    tensors = found.tensors
    for name in pairs_of(tensors, (_BLOCKS, _SCALES), "MXFP4"):
        parts = {name + suffix: tensors[name + suffix] for suffix in (_BLOCKS, _SCALES)}
        codes, of = (part.spec for part in parts.values())
        whole = len(codes.shape) == 4 and codes.shape[-1] == mx.width(E2M1) and of.shape == codes.shape[:-1]
        if not whole or codes.dtype != "u8" or of.dtype not in mx.SCALES:
            raise Damaged(
                "blocks and scales of shapes that do not belong together",
                where=f"{codes.name} in {parts[codes.name].extents[0].file}",
                expected="u8[experts, out, in / 32, 16] and u8[experts, out, in / 32]",
                found=f"{codes.dtype}{list(codes.shape)} and {of.dtype}{list(of.shape)}",
            )
        shape = (*codes.shape[:2], codes.shape[2] * BLOCK)
        weight = dense(shape, parts, _RECIPE, _WORDS, 8 * (mx.width(E2M1) + 1) / BLOCK)
        found.put(name, dtype, parts, weight, _WORDS, order=(0, 2, 1))


@dataclass(frozen=True)
class GptOss:
    """The same as output. Codes and scales that the source has are kept, bit by bit.

    A weight whose values MXFP4 has becomes codes of the same values, whatever the rule; they are the released codes
    too, but in blocks whose largest is below 4 (of 6): those have a smaller scale and larger codes here, as floor and
    the other rules give them.
    """

    rule: Rule = "floor"
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return "MXFP4 blocks and scales, as gpt-oss is released"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """See `dconv.coded.encode.Scheme`: [experts, in, out], or [experts, in, ffn, 2]."""
        rows = dense.in_order((0, *range(2, len(spec.shape)), 1))
        shape = (spec.shape[0], spec.file_shape[2], spec.shape[1])
        codes, scales = mx.encoded(rows, shape, E2M1, self.rule, blocked=True, pairs=len(spec.shape) == 4)
        blocks = TensorSpec(spec.name + _BLOCKS, codes.shape, "u8")
        exponents = TensorSpec(spec.name + _SCALES, scales.shape, "u8")
        if there := mx.kept(rows, logical.derived, _RECIPE):
            return Coded([(blocks, there[0]), (exponents, there[1])], kept=True)
        made = Coded()
        made.make(blocks, codes)
        made.make(exponents, scales)
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, object]:
        """gpt-oss's own: the method, and the modules that are never in codes."""
        del plain, coded
        return {"modules_to_not_convert": list(_PLAIN), "quant_method": METHOD}
