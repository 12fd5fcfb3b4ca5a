"""Packed codes: against one big number a row, and exact both ways. Other packages' packers are in the next files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.codec import bitpack
from dconv.errors import Damaged, Refused

LAYOUTS = ("stream", "padded", "planar")


def obvious(codes: list[int], bits: int, layout: str) -> list[int]:
    """Words of one row, bit by bit."""
    length = bitpack.words_for(len(codes), bits, layout)
    number = 0
    for at, code in enumerate(codes):
        if layout == "stream" or 32 % bits == 0:
            number |= code << (at * bits)
        elif layout == "padded":
            number |= code << (at // (32 // bits) * 32 + at % (32 // bits) * bits)
        else:
            low = 0
            for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]:
                field = (code >> low) & ((1 << width) - 1)
                number |= field << (at // 32 * 32 * bits + low * 32 + at % 32 * width)
                low += width
    return [(number >> (32 * word)) & 0xFFFF_FFFF for word in range(length)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", bitpack.BITS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_both_ways_against_one_number_a_row(bits: int, layout: bitpack.Layout, data: st.DataObject) -> None:
    rows, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 100))
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    words = bitpack.pack(codes, bits, layout)
    assert words.dtype == np.uint32
    assert words.tolist() == [obvious(row, bits, layout) for row in codes.tolist()]
    found = bitpack.unpack(words.view("<i4"), bits, count, layout)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", bitpack.BITS)
def test_a_period_stands_alone(bits: int, layout: bitpack.Layout) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 32 * 3 * 32, dtype=np.uint8)
    words = bitpack.pack(codes, bits, layout)
    count, size = bitpack.period(bits, layout)
    for part in range(3):
        found = bitpack.unpack(words[part * size : (part + 1) * size], bits, count, layout)
        np.testing.assert_array_equal(found, codes[part * count : (part + 1) * count])


def test_every_word_of_four_bits() -> None:
    words = np.arange(1 << 16, dtype=np.uint32) * np.uint32(0x0001_0001)
    np.testing.assert_array_equal(bitpack.pack(bitpack.unpack(words, 4, 8 << 16), 4), words)


def test_a_view_is_as_good_as_a_copy() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (6, 5), dtype=np.uint32)
    np.testing.assert_array_equal(bitpack.unpack(words.T, 3, 64), bitpack.unpack(words.T.copy(), 3, 64))
    codes = np.random.default_rng(1).integers(0, 8, (64, 5), dtype=np.uint8)
    np.testing.assert_array_equal(bitpack.pack(codes.T, 3), bitpack.pack(codes.T.copy(), 3))


@pytest.mark.parametrize("bits", bitpack.BITS)
def test_the_layout_is_told_from_the_shape(bits: int) -> None:
    for count in range(1, 200):
        for layout in ("stream", "padded"):
            words = bitpack.words_for(count, bits, layout)
            codes = np.full(count, (1 << bits) - 1, np.uint8)
            if np.array_equal(bitpack.pack(codes, bits, "stream"), bitpack.pack(codes, bits, "padded")):
                told = bitpack.layout_of(count, words, bits)
                np.testing.assert_array_equal(
                    bitpack.unpack(bitpack.pack(codes, bits, layout), bits, count, told), codes
                )
            elif bitpack.words_for(count, bits) == bitpack.words_for(count, bits, "padded"):
                assert count <= 150 and count % 32
                with pytest.raises(Refused, match="both layouts"):
                    bitpack.layout_of(count, words, bits)
            else:
                assert bitpack.layout_of(count, words, bits) == layout
        with pytest.raises(Damaged, match="wrong size"):
            bitpack.layout_of(count, bitpack.words_for(count, bits, "padded") + 1, bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_sizes_are_damage(layout: bitpack.Layout) -> None:
    for words in (11, 14):
        with pytest.raises(Damaged, match="wrong size"):
            bitpack.unpack(np.zeros((2, words), np.uint32), 3, 128, layout)


def test_what_does_not_fit_is_not_cut_off() -> None:
    with pytest.raises(ValueError, match="4 bits"):
        bitpack.pack(np.full(8, 16, np.uint8), 4)
    with pytest.raises(ValueError, match="8 bytes"):
        bitpack.unpack(np.zeros(1, np.int64), 4, 16)
    with pytest.raises(ValueError, match="9 bits"):
        bitpack.words_for(1, 9)
