"""AWQ tensors: as GPTQModel 7.7.0 packs and dequantises them, and as compressed-tensors' converter reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dconv.codec import awq, integer, packed
from dconv.errors import Damaged
from tests.codec.record_gptq import COUNT, cases, digest

RECORDED = json.loads((Path(__file__).parent / "recorded" / "gptq.json").read_text())


def test_as_gptqmodel_has_it() -> None:
    dequantised = 0
    for case in cases("awq", top=True):
        qweight, qzeros = awq.pack(case.codes, case.bits), awq.pack(case.zeros, case.bits)
        assert digest(qweight.view("<i4")) == RECORDED["gptqmodel awq qweight"][case.number]
        assert digest(qzeros.view("<i4")) == RECORDED["gptqmodel awq qzeros"][case.number]
        codes = awq.unpack(qweight.view("<i4"), case.rows, case.bits)
        zeros = awq.unpack(qzeros.view("<i4"), case.rows, case.bits)
        np.testing.assert_array_equal(codes, case.codes)
        np.testing.assert_array_equal(zeros, case.zeros)
        if (recorded := RECORDED["gptqmodel awq weight"][case.number]) is not None:
            groups = integer.groups_of(case.columns, case.group)
            found = integer.decode(codes, case.scales, zeros, groups, source="f16", target="f16", bits=case.bits)
            assert digest(found) == recorded
            dequantised += 1
    assert dequantised > COUNT // 3


def test_repacked_as_the_converter_of_compressed_tensors_does() -> None:
    """AWQ → pack-quantized without a new rounding."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    rng = np.random.default_rng(5)
    for _ in range(200):
        rows, groups, size = 8 * int(rng.integers(1, 9)), int(rng.integers(1, 4)), 8 * int(rng.integers(1, 5))
        words = rng.integers(-(2**31), 2**31, (groups * size, rows // 8), dtype=np.int32)
        zeros = rng.integers(-(2**31), 2**31, (groups, rows // 8), dtype=np.int32)
        scales = rng.random((groups, rows)).astype(np.float16)
        given = {"qweight": words, "qzeros": zeros, "scales": scales}
        tensors = {f"a.b.{name}": torch.from_numpy(array) for name, array in given.items()}
        made = AutoAWQConverter(group_size=size).process(tensors)
        found = packed.pack_weight(awq.unpack(words, rows), 4).view("<i4")
        np.testing.assert_array_equal(found, made["a.b.weight_packed"].numpy())
        found = packed.pack_zeros(awq.unpack(zeros, rows), 4).view("<i4")
        np.testing.assert_array_equal(found, made["a.b.weight_zero_point"].numpy())


def test_the_obvious_way() -> None:
    word = np.array([[0x7531_6420]], np.uint32)
    assert awq.unpack(word, 8)[:, 0].tolist() == list(range(8))
    rng = np.random.default_rng(6)
    for _ in range(200):
        words = rng.integers(0, 2**32, rng.integers(0, 5, 2), dtype=np.uint32)
        rows = words.shape[1] * 8
        expected = np.zeros((rows, words.shape[0]), np.uint8)
        for (column, at), value in np.ndenumerate(words):
            for nibble, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                expected[8 * at + row, column] = (int(value) >> (4 * nibble)) & 15
        found = awq.unpack(words, rows)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(awq.pack(found), words)


def test_rows_that_do_not_fill_a_word_are_damage() -> None:
    with pytest.raises(Damaged, match="eight output rows"):
        awq.unpack(np.zeros((4, 2), np.uint32), 12)
    with pytest.raises(Damaged, match="eight output rows"):
        awq.pack(np.zeros((12, 4), np.uint8))
    with pytest.raises(Damaged, match="wrong size"):
        awq.unpack(np.zeros((4, 2), np.uint32), 24)
