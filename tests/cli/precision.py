"""Models in block FP8, and what `inspect` says of their precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dconv.examine import inspect
from tests.fp8 import write_fp8

#: MiniMax-M2's own list, as it is released.
RELEASED = ["gate", "e_score_correction_bias", "lm_head"]
Q = "model.layers.0.self_attn.q_proj.weight"


def report(path: Path) -> dict[str, Any]:
    """The precision report, as JSON has it."""
    said = inspect(path).to_dict()["precision"]
    return json.loads(json.dumps(said))


def listing(path: Path, listed: object, **options: Any) -> Path:
    """A model whose config.json leaves these modules out."""
    return write_fp8(path, quantization={"modules_to_not_convert": listed}, **options)
