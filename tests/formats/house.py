"""What the tests of state dicts as teams keep them share: sources, and torch's own reading of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dconv.arch.registry import by_name
from dconv.errors import DconvError
from dconv.pipeline import Request, convert
from tests.models import config_of, tensors, tree_digest, write_random

FAMILIES = ("llama", "qwen3", "phi3")
Weights = dict[str, Tensor]


def source(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    known = by_name(family)
    return write_random(folder, known, config_of(known, **sizes))


def load(path: Path) -> Weights:
    """What torch makes of a file."""
    found = torch.load(path, weights_only=True)
    return {name: value for name, value in found.items() if value is not None}


def weights_of(folder: Path) -> Weights:
    """A HuggingFace directory's tensors, its bytes read by the test's own few lines."""
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    return {
        name: torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        for name, (dtype, shape, data) in tensors(folder).items()
    }


def same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].shape == weight.shape, name
        assert torch.equal(got[name].contiguous().view(torch.int16), weight.contiguous().view(torch.int16)), name


def refused(kind: type[DconvError], message: str, request: Request) -> DconvError:
    """Expect an error that leaves nothing behind."""
    before = tree_digest(request.output.parent)
    with pytest.raises(kind, match=message) as caught:
        convert(request)
    assert tree_digest(request.output.parent) == before
    return caught.value


def edit(path: Path, change: Callable[[Weights], object]) -> None:
    held = torch.load(path)
    change(held)
    torch.save(held, path)
