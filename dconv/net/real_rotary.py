"""DeepSeek-V2's rotary embedding in real numbers: transformers has it in complex ones, which ONNX does not know.

The same products and sums: (a + bi)(cos + i sin) = (a cos - b sin) + (a sin + b cos)i, of neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def real_rotary() -> Generator[None, None, None]:
    """Have transformers' class compute so, for a while."""
    import torch
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

    def angles(self: Any, x: Any, position_ids: Any) -> Any:
        found = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return torch.stack([found.cos(), found.sin()]) * self.attention_scaling

    def rotated(x: Any, turn: Any) -> Any:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turn[0].unsqueeze(1), turn[1].unsqueeze(1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).type_as(x)

    def apply(xq: Any, xk: Any, turn: Any) -> Any:
        return rotated(xq, turn), rotated(xk, turn)

    kind: Any = theirs.DeepseekV2RotaryEmbedding
    before = kind.forward, theirs.apply_rotary_emb
    kind.forward, theirs.apply_rotary_emb = angles, apply
    try:
        yield
    finally:
        kind.forward, theirs.apply_rotary_emb = before
