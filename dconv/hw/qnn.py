"""Qualcomm: any graph by onnxruntime-qnn, decoders that Genie is to run by the QAIRT SDK where they are asked for."""

from __future__ import annotations

from typing import Final

from dconv.hw.onnxruntime_qnn import OnnxruntimeQnn
from dconv.hw.qairt import Qairt
from dconv.hw.toolkits import Toolkits

ADAPTER: Final = Toolkits("Qualcomm QNN", {"onnxruntime": OnnxruntimeQnn(), "qairt": Qairt()}, lambda _: "onnxruntime")
