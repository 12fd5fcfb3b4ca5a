"""What a rank may take while it calibrates a layer, and how much of it there is for what.

Three times the layer, in the float32 that it is computed with, and the budget of memory. Once the layer is there; its
codes are a quarter of it at most. In what is left are the blocks under way, the sums, and outputs that are kept: there
the budget decides how many blocks are computed at once, and how often they are for a stage's sums. What follows a
stage's passes (factors, rounding) takes no more than they did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Layers, the one at hand included.
_LAYERS: Final = 3
#: Of a block under way there are at once so many tensors as wide as the hidden states, and so many of the widest.
_HIDDEN, _WIDEST = 4, 3
#: Libraries' own buffers and code, messages between ranks, the source's bytes on their way into float32.
_OTHER: Final = 96 << 20
#: Passes for one stage at most, if it came to that: each computes most of the layer once more.
_PASSES: Final = 8


@dataclass(frozen=True)
class Room:
    """What a layer's passes may take.

    Attributes:
        threads: blocks that are computed at once.
        sums: bytes of sums at a time.
        kept: bytes of outputs that stay for the next pass.
    """

    threads: int
    sums: int
    kept: int

    @classmethod
    def of(cls, layer: int, budget: int, block: int, needs: Sequence[int], threads: int) -> Room:
        """Divide what there is between blocks under way, sums, and outputs that are kept.

        Args:
            layer: bytes of the layer's weights.
            budget: bytes beside three times a layer.
            block: bytes of a block under way (`block_bytes`).
            needs: bytes of all sums of each stage.
            threads: that there are.
        """
        need = max(needs, default=0)
        free = (_LAYERS - 1) * layer - layer // 4 + budget - _OTHER
        threads = max(1, min(threads, (free - need // 4) // block))
        free -= threads * block
        return cls(threads, max(free, -(-need // _PASSES)), max(0, min(budget, free - need)))


def block_bytes(tokens: int, hidden: int, widest: int) -> int:
    """Bytes that computing a layer takes beside its weights, about.

    Args:
        tokens: of a block.
        hidden: channels of the hidden states.
        widest: the most that a linear layer takes or gives of a token.
    """
    return 4 * tokens * (_HIDDEN * hidden + _WIDEST * widest)
