"""Rockchip: language models by RKLLM, everything else (and what is asked for as a graph) by RKNN."""

from __future__ import annotations

from typing import Final

from dconv.export.prompt import kind_of
from dconv.hw.rkllm import Rkllm
from dconv.hw.rknn import Rknn
from dconv.hw.toolkits import Toolkits

ADAPTER: Final = Toolkits(
    "Rockchip",
    {"rkllm": Rkllm(), "rknn": Rknn()},
    lambda model: "rkllm" if kind_of(model.family) == "decoder" else "rknn",
)
