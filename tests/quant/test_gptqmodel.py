"""Checkpoints that GPTQModel 7.7.0 wrote (`record_gptqmodel`), against the weights that its own layers make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dconv.errors import Refused
from dconv.pipeline import Request, convert
from tests.quant.record_gptqmodel import digest
from tests.quant.whole import tensors_of

RECORDED = Path(__file__).parent / "recorded"
CASES = ("gptq", "gptq_v2", "gptq_3_bits", "awq")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through", ["", "gptq", "gptq_v2", "awq", "pack-quantized"])
def test_its_own_weights_bit_by_bit(tmp_path: Path, case: str, through: str) -> None:
    """Directly, and packed anew on the way where that form holds the numbers."""
    format = "awq" if through == "awq" else "gptq"
    # columns in another order, and codes of 8 or 3 bits
    if (through == "awq" and case != "awq") or (through, case) == ("pack-quantized", "gptq"):
        with pytest.raises(Refused, match="do not fit"):
            convert(Request(RECORDED / case, format, tmp_path / "out", quant=through))
        return
    source = RECORDED / case
    if through:
        source = tmp_path / through
        convert(Request(RECORDED / case, format, source, quant=through))
    convert(Request(source, "hf", tmp_path / "dense", dtype="f16"))
    ours = tensors_of(tmp_path / "dense")
    wanted = json.loads((RECORDED / case / "weights.json").read_text())
    assert wanted
    for module, value in wanted.items():
        assert digest(np.ascontiguousarray(ours[f"{module}.weight"]).tobytes()) == value, module
