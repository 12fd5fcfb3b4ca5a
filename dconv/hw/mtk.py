"""MediaTek: by the closed ``mtk_cloud`` repository, or in public by LiteRT."""

from __future__ import annotations

from typing import Final

from dconv.hw.litert import Litert
from dconv.hw.mtk_cloud import MtkCloud
from dconv.hw.toolkits import Toolkits

ADAPTER: Final = Toolkits("MediaTek", {"mtk_cloud": MtkCloud(), "litert": Litert()}, lambda _: "mtk_cloud")
