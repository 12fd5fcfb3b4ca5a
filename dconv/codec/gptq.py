"""GPTQ's integer tensors ↔ codes and zeros: ``qweight`` packed along the input, ``qzeros`` along the output.

Checkpoints in the first format (``checkpoint_format`` ``gptq``, v1) store each zero less one, the second (``gptq_v2``)
and the planar one (``gptq_p``) as it is. A v1 zero whose field is all ones has no meaning that readers agree on:

* auto-gptq 0.7.1 takes ``2**bits`` in one of its layers (``qlinear_cuda``) and 0 in the other
  (``qlinear_cuda_old``, but ``2**bits`` for 3 bits), and vLLM's kernels take ``2**bits``;
* GPTQModel 7.7.0 adds ...0001 0001 to the whole word, so that the field becomes 0 *and carries into the next one*
  (3 bits: 0, no carry). That undoes what its writer did, which had subtracted the same number from words of zeros.

So such a field is refused, unless the caller knows GPTQModel to be the writer (``carry``), and a zero of 0 is not
written as v1. Sources: those packages' code, run; vLLM's ``csrc/quantization/gptq/q_gemm.cu``, read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from dconv.codec import bitpack
from dconv.errors import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dconv.codec.bitpack import Layout

Version = Literal["v1", "v2"]


def unpack_weight(
    qweight: NDArray[np.generic], bits: int, columns: int, layout: Layout = "stream"
) -> NDArray[np.uint8]:
    """``qweight`` [words of the input, out] → codes u1 [out, in]; ``columns`` is in, or a part that begins a word.

    Raises:
        Damaged: another number of words than ``columns`` codes take.
    """
    return bitpack.unpack(qweight.T, bits, columns, layout)


def pack_weight(codes: NDArray[np.uint8], bits: int, layout: Layout = "stream") -> NDArray[np.uint32]:
    """Codes u1 [out, in] → ``qweight`` [words of the input, out]."""
    return np.ascontiguousarray(bitpack.pack(codes, bits, layout).T)


def unpack_zeros(
    qzeros: NDArray[np.generic],
    bits: int,
    rows: int,
    version: Version,
    layout: Layout = "stream",
    *,
    carry: bool = False,
) -> NDArray[np.uint8]:
    """``qzeros`` [groups, words of the output] → zeros u1 [out, groups], as they are subtracted from codes.

    ``rows`` is out, or a part that begins a word; ``carry`` says that GPTQModel wrote v1 zeros, so that its reading of
    them is the right one.

    Raises:
        Damaged: another number of words than ``rows`` codes take.
        Refused: a v1 zero whose field is all ones, and not ``carry``.
    """
    if version == "v2":
        return np.ascontiguousarray(bitpack.unpack(qzeros, bits, rows, layout).T)
    if carry and 32 % bits == 0:
        whole = qzeros.view(np.uint32) + np.uint32(_ones(bits))
        return np.ascontiguousarray(bitpack.unpack(whole, bits, rows, layout).T)
    stored = bitpack.unpack(qzeros, bits, rows, layout)
    top = (1 << bits) - 1
    if not carry and (stored == top).any():
        raise Refused(
            f"a zero point is stored as {top}, which GPTQ's first format leaves open",
            expected=f"zeros of 1 to {top}, each stored less one",
            found=f"{int((stored == top).sum())} of {stored.size} whose readers take 0 or {top + 1}",
            do="quantise again as gptq_v2, or symmetrically",
        )
    return np.ascontiguousarray(((stored + np.uint8(1)) & np.uint8(top)).T)


def pack_zeros(zeros: NDArray[np.uint8], bits: int, version: Version, layout: Layout = "stream") -> NDArray[np.uint32]:
    """Zeros u1 [out, groups] → ``qzeros`` [groups, words of the output].

    Unused fields of the last word are stored as 0.

    Raises:
        Refused: a zero of 0 in the first format.
    """
    if version == "v2":
        return bitpack.pack(np.ascontiguousarray(zeros.T), bits, layout)
    if not zeros.all():
        raise Refused(
            "a zero point of 0 cannot be written in GPTQ's first format, whose readers would not agree on it",
            found=f"{int((zeros == 0).sum())} of {zeros.size}",
            do="write gptq_v2",
        )
    return bitpack.pack(np.ascontiguousarray(zeros.T) - np.uint8(1), bits, layout)


def _ones(bits: int) -> int:
    return sum(1 << at for at in range(0, 32, bits))
