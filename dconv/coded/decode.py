"""``quantization_config`` of a source: which scheme its codes are in, and the dense tensors that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final

from dconv.arch.args import dtype_of
from dconv.coded.decoded import Decoded
from dconv.errors import Refused
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: ``quant_method`` -> the module of this room that decodes it, imported for a source that says so.
METHODS: Final = {
    "fp8": "fp8",
    "compressed-tensors": "compressed_tensors",
    "mxfp4": "gpt_oss",
    "quark": "quark",
    "gptq": "gptq",
    "awq": "awq",
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed"), "modelopt"),
}
#: dtype of FP8's codes.
_FP8: Final = "f8_e4m3"
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
    if not config.get(KEY) and any(stored.spec.dtype == _FP8 for stored in tensors.values()):
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
    import_module(f"dconv.coded.{known}").decode(found, config, dtype_of(config))
    return found
