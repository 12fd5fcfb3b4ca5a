"""Chips of Qualcomm that Genie runs on: QNN's number of each, the architecture of its HTP, and what that computes.

The pairs are those of ``drivers/qnn_driver.py``, which says where they are from. Genie takes v73 and newer, and so
does the sharing of weights between graphs (quic/ai-hub-apps, ``tutorials/llm_on_genie/README.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Chip:
    """A chip.

    Attributes:
        model: ``soc_model``, QNN's number.
        arch: of the HTP, 79 for v79.
        half: whether it computes in half precision.
    """

    model: int
    arch: int
    half: bool = True


CHIPS: Final[Mapping[str, Chip]] = {
    "SM8850": Chip(87, 81), "SM8845": Chip(97, 81), "SM8750": Chip(69, 79), "SM8650": Chip(57, 75),
    "SM8550": Chip(43, 73), "SA8255": Chip(52, 73), "SA8620P": Chip(67, 75), "SA8797": Chip(72, 81),
    "SXR2330P": Chip(75, 79), "QCS8300": Chip(82, 75), "QCS8550": Chip(66, 73), "QCS9100": Chip(77, 73),
    "SC8380XP": Chip(60, 73), "SC8480XP": Chip(88, 81),
    "SAR2230P": Chip(95, 81, False), "SW6100": Chip(96, 81, False), "SM7550": Chip(64, 73, False),
    "SM7635": Chip(73, 73, False), "SM7675": Chip(70, 73, False), "SM8635": Chip(68, 73, False),
    "SM8735": Chip(85, 73, False),
}  # fmt: skip
