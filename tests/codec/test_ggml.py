"""Blocks whose scales ggml searches for: their error as gguf-py decodes them, and what there is without a library."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dconv.codec import ggml, gguf
from dconv.errors import Refused, ToolMissing

theirs = pytest.importorskip("gguf", reason="gguf is not installed")

#: Root mean square of the error over that of normal weights, at most: a third above what a uniform grid of as many
#: bits, fitted to each block, would leave.
BOUNDS = {"Q2_K": 0.33, "Q3_K": 0.17, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02, "IQ4_NL": 0.085, "IQ4_XS": 0.085}


def installed() -> bool:
    try:
        ggml.library()
    except ToolMissing:
        return False
    return True


needs_library = pytest.mark.skipif(not installed(), reason="no library of llama.cpp (pip install xllamacpp)")


@pytest.fixture
def none_kept() -> Iterator[None]:
    ggml.library.cache_clear()
    yield
    ggml.library.cache_clear()


@needs_library
@pytest.mark.parametrize("kind", ggml.KINDS)
def test_error(kind: str) -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (16, 1024)).astype(np.float32)
    found = ggml.encode(weights, kind)
    back = theirs.quants.dequantize(found, theirs.GGMLQuantizationType[kind])
    assert back.shape == weights.shape
    assert np.sqrt(np.mean((back - weights) ** 2)) <= BOUNDS[kind] * np.sqrt(np.mean(weights**2))
    assert not ggml.encode(np.zeros((1, 256), np.float32), kind)[0, : gguf.BLOCKS[kind][1]].astype(bool).all()


@needs_library
@pytest.mark.parametrize("kind", ggml.KINDS)
def test_a_block_keeps_to_itself(kind: str) -> None:
    """However rows are cut between ranks, the bytes are the same."""
    weights = np.random.default_rng(1).standard_normal((3, 1024)).astype(np.float32)
    size, stored = gguf.BLOCKS[kind]
    whole = ggml.encode(weights, kind)
    assert whole.shape == (3, 1024 // size * stored)
    for row in range(3):
        for at in range(1024 // size):
            part = ggml.encode(weights[row, at * size : (at + 1) * size], kind)
            np.testing.assert_array_equal(part, whole[row, at * stored : (at + 1) * stored])
    assert ggml.encode(np.zeros((0, 512), np.float32), kind).shape == (0, 512 // size * stored)


@needs_library
@pytest.mark.parametrize("kind", ggml.KINDS)
def test_what_has_no_form_is_refused(kind: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        weights = np.zeros((2, 256), np.float32)
        weights[1, 3] = value
        with pytest.raises(Refused, match="NaN or infinity"):
            ggml.encode(weights, kind)
    with pytest.raises(Refused, match="whole blocks"):
        ggml.encode(np.zeros((2, 257), np.float32), kind)
    for sign in (-1, 1):
        with pytest.raises(Refused, match="too large"):
            ggml.encode(np.full(256, sign * 65536, np.float32), kind)
    large = np.linspace(-65504, 65504, 256, dtype=np.float32)
    back = gguf.decode(ggml.encode(large, kind), kind, "f32").view(np.float32)
    assert np.abs(back - large).max() <= 65504 / 2


def test_no_library(none_kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    monkeypatch.setattr(ggml, "find_library", lambda name: None)
    monkeypatch.delenv(ggml.VARIABLE, raising=False)
    with pytest.raises(ToolMissing, match="pip install xllamacpp"):
        ggml.encode(np.zeros((1, 256), np.float32), "Q4_K")


def test_another_library_is_passed_over(none_kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without ggml's functions, or of before they took rows, is never called."""
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    monkeypatch.setattr(ggml, "find_library", lambda name: None)
    for name in ("libc.so.6", "/no/such/library.so"):
        ggml.library.cache_clear()
        monkeypatch.setenv(ggml.VARIABLE, name)
        with pytest.raises(ToolMissing) as caught:
            ggml.library()
        assert name in str(caught.value.where)
        assert caught.value.exit_code == 7
