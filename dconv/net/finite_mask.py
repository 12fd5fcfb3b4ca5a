"""Masks of attention as compilers of NPUs take them: finite numbers that are added, and no truth values.

transformers makes a mask by looking each token up in ``attention_mask``, asks whether it is true, and takes the dtype's
smallest number where it is not. fp16, which NPUs compute in, makes an infinity of the one of fp32, and 0 times that is
no number. What a mask hides by its places alone (the future, what left a window) is a constant where lengths are.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

#: Added to a score it leaves a weight of 0 in every dtype. What is hidden twice has twice as much: half of what fp16
#: reaches, so that the sum with a score is finite in it.
HIDDEN: Final = -(2.0**14)
#: The same where scores get codes, which have to reach as far: of 8 bits `HIDDEN` would leave them one value. A weight
#: of exp(-128) is 0 in fp32, too; two layers of SmolLM2 in RKNN's w8a8 then correlate 0.97 with fp32, and not 0.84.
HIDDEN_IN_CODES: Final = -(2.0**7)


@contextmanager
def finite_mask(value: float = HIDDEN) -> Generator[None, None, None]:
    """Have transformers make its masks so, for a while. A mask that it is given has ones and zeros.

    Args:
        value: what is added to a score that is hidden.
    """
    import torch

    theirs = import_module("transformers.masking_utils")

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        attention_mask: Any = None,
        dtype: Any = torch.float32,
        **options: Any,
    ) -> Any:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        seen = theirs.sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
        hidden = torch.where(seen, torch.zeros((), dtype=dtype), value)
        padding = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is None:
            return hidden
        there = padding[:, None, None, kv_offset : kv_offset + kv_length].to(dtype)
        return hidden + (1 - there) * value

    known: Any = theirs.ALL_MASK_ATTENTION_FUNCTIONS
    before = known["eager"]
    known["eager"] = mask
    try:
        yield
    finally:
        known["eager"] = before
