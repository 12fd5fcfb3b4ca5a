"""GPTQ tensors: as GPTQModel 7.7.0 and auto-gptq 0.7.1 pack and dequantise them (`record_gptq`), exact both ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.codec import bitpack, gptq, integer
from dconv.errors import Damaged, Refused
from tests.codec.record_gptq import COUNT, Case, cases, digest

RECORDED = json.loads((Path(__file__).parent / "recorded" / "gptq.json").read_text())
LAYOUTS = ("stream", "planar")


def weight(case: Case, codes: NDArray[np.uint8], zeros: NDArray[np.uint8], scales: NDArray[np.float16]) -> str:
    found = integer.decode(codes, scales, zeros, case.g_idx, source="f16", target="f16", bits=case.bits)
    return digest(found)


def test_the_record_is_of_the_versions_that_we_name() -> None:
    assert RECORDED["versions"]["gptqmodel"] == "7.7.0"
    assert RECORDED["versions"]["auto-gptq"] == "0.7.1"
    assert len(cases()) == COUNT >= 200


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_as_gptqmodel_packs(layout: bitpack.Layout) -> None:
    for case in cases(layout):
        qweight, qzeros = (
            gptq.pack_weight(case.codes, case.bits, layout),
            gptq.pack_zeros(case.zeros, case.bits, "v2", layout),
        )
        assert digest(qweight.view("<i4")) == RECORDED[f"gptqmodel {layout} qweight"][case.number]
        assert digest(qzeros.view("<i4")) == RECORDED[f"gptqmodel {layout} qzeros"][case.number]
        np.testing.assert_array_equal(gptq.unpack_weight(qweight, case.bits, case.columns, layout), case.codes)
        np.testing.assert_array_equal(gptq.unpack_zeros(qzeros, case.bits, case.rows, "v2", layout), case.zeros)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantised_as_gptqmodel_does(layout: bitpack.Layout) -> None:
    for case in cases(layout):
        assert weight(case, case.codes, case.zeros, case.scales) == RECORDED[f"gptqmodel {layout} weight"][case.number]
        assert weight(case, case.codes, case.zeros, case.wild) == RECORDED[f"gptqmodel {layout} wild"][case.number]


def test_the_first_format_as_gptqmodel_and_auto_gptq_have_it() -> None:
    old_layer = 0
    for case in cases():
        qweight, qzeros = gptq.pack_weight(case.codes, case.bits), gptq.pack_zeros(case.zeros, case.bits, "v1")
        assert digest(qweight.view("<i4")) == RECORDED["auto-gptq qweight"][case.number]
        assert digest(qzeros.view("<i4")) == RECORDED["auto-gptq qzeros"][case.number]
        assert digest(qzeros.view("<i4")) == RECORDED["gptqmodel v1 qzeros"][case.number]
        for carry in (False, True):
            zeros = gptq.unpack_zeros(qzeros.view("<i4"), case.bits, case.rows, "v1", carry=carry)
            np.testing.assert_array_equal(zeros, case.zeros)
        found = weight(case, case.codes, case.zeros, case.scales)
        assert found == RECORDED["gptqmodel v1 weight"][case.number]
        assert found == RECORDED["auto-gptq qlinear_cuda weight"][case.number]
        if (recorded := RECORDED["auto-gptq qlinear_cuda_old weight"][case.number]) is not None:
            assert found == recorded
            old_layer += 1
    assert old_layer > COUNT // 3


def written_by_gptqmodel(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """One is taken from each field of a word at once, borrows and all; of 3 bits from each field by itself."""
    if bits == 3:
        return bitpack.pack(((zeros.T.astype(np.int16) - 1) & 7).astype(np.uint8), 3)
    rows = bitpack.pack(np.ascontiguousarray(zeros.T), bits).tolist()
    ones = sum(1 << at for at in range(0, 32, bits))
    return np.array([[(word - ones) & 0xFFFF_FFFF for word in row] for row in rows], np.uint32)


def test_zeros_of_0_that_gptqmodel_wrote_come_back() -> None:
    for case in cases(top=True):
        qzeros = written_by_gptqmodel(case.zeros, case.bits)
        assert digest(qzeros.view("<i4")) == RECORDED["gptqmodel v1 qzeros with 0"][case.number]
        zeros = gptq.unpack_zeros(qzeros, case.bits, case.rows, "v1", carry=True)
        np.testing.assert_array_equal(zeros, case.zeros)
        found = weight(case, case.codes, zeros, case.scales)
        assert found == RECORDED["gptqmodel v1 weight with 0"][case.number]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_that_readers_do_not_agree_on_is_refused(bits: int) -> None:
    seen = RECORDED["zero stored as all ones"][str(bits)]
    assert len({tuple(zeros) for zeros in seen.values()}) > 1
    qzeros = np.full((1, bits), (1 << bits) - 1, np.uint32)
    with pytest.raises(Refused, match="leaves open"):
        gptq.unpack_zeros(qzeros, bits, 32, "v1")
    assert gptq.unpack_zeros(qzeros, bits, 32, "v1", carry=True)[:2, 0].tolist() == seen["gptqmodel"]
    assert gptq.unpack_zeros(qzeros, bits, 32, "v2")[:2, 0].tolist() == [(1 << bits) - 1, 0]
    with pytest.raises(Refused, match="zero point of 0"):
        gptq.pack_zeros(np.zeros((32, 1), np.uint8), bits, "v1")


def test_part_of_a_layer() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (64, 96), dtype=np.uint8)
    qweight = gptq.pack_weight(codes, 3)
    np.testing.assert_array_equal(gptq.unpack_weight(qweight[3:6, 5:9], 3, 32), codes[5:9, 32:64])
    with pytest.raises(Damaged):
        gptq.unpack_weight(qweight[3:6], 3, 64)


@pytest.mark.parametrize("shape", [(0, 0), (0, 32), (32, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    codes = np.zeros(shape, np.uint8)
    assert gptq.unpack_weight(gptq.pack_weight(codes, 4), 4, shape[1]).shape == shape
    assert gptq.unpack_zeros(gptq.pack_zeros(codes, 4, "v2"), 4, shape[0], "v2").shape == shape
