"""``quantization_config`` of a source: which scheme its codes are in, and the dense tensors that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from dconv.arch.args import dtype_of
from dconv.coded import awq, compressed_tensors, fp8, gpt_oss, gptq, gptq_config, modelopt, modelopt_config, quark
from dconv.coded.compressed_config import METHOD
from dconv.coded.decoded import Decoded
from dconv.errors import Refused
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: ``quant_method`` -> what decodes it.
METHODS: Final[dict[str, Callable[[Decoded, Mapping[str, object], str], None]]] = {
    "fp8": fp8.decode,
    METHOD: compressed_tensors.decode,
    gpt_oss.METHOD: gpt_oss.decode,
    quark.METHOD: quark.decode,
    gptq_config.METHOD: gptq.decode,
    awq.METHOD: awq.decode,
    **dict.fromkeys(modelopt_config.METHODS, modelopt.decode),
}
KEY: Final = "quantization_config"


def method_of(config: Mapping[str, object]) -> str:
    """``quant_method`` of a config.json; "" where it says none."""
    return str(mapping_or_empty(config.get(KEY)).get("quant_method") or "")


def decode(
    tensors: Mapping[str, Stored],
    config: Mapping[str, object] | None,
    values: Callable[[Stored], NDArray[np.generic]],
) -> Decoded:
    """The stored tensors of a source with those in codes decoded.

    Args:
        tensors: as they are stored, by name.
        config: config.json, whose ``quantization_config`` names the scheme; None where there is none.
        values: reads a small one, whole.

    Raises:
        Refused: a scheme that is not known.
        Damaged: codes without what they need, or the reverse.
    """
    found = Decoded(dict(tensors), values)
    config = config or {}
    method = method_of(config)
    if not config.get(KEY) and any(stored.spec.dtype == fp8.FP8 for stored in tensors.values()):
        method = "fp8"  # a cast without a word in the config: what the scales of released models are called tells
    if not config.get(KEY) and not method:
        return found
    known = METHODS.get(method)
    if known is None:
        raise Refused(
            "the source is quantised in a way that this version does not decode, nothing was written",
            where=f"config.json: {KEY}.quant_method",
            found=f"{method!r:.80}",
            expected=f"one of {', '.join(METHODS)}, or bf16, f16, f32 weights",
        )
    known(found, config, dtype_of(config))
    return found
