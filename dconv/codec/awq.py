"""AWQ's integer tensors (``version`` ``gemm``) ↔ codes and zeros: both packed along the output, zeros as they are.

The nibbles of a word are interleaved for the kernel's sake. GPTQModel's AWQ of other widths is not. Sources: AutoAWQ
0.2.9 ``awq/modules/linear/gemm.py``; GPTQModel 7.7.0 ``quantization/awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import bitpack
from dconv.errors import Damaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Which column each nibble of a word holds, the lowest first; and the nibble that holds each column.
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE: Final = tuple(ORDER.index(column) for column in range(8))


def unpack(words: NDArray[np.generic], rows: int, bits: int = 4) -> NDArray[np.uint8]:
    """``qweight`` [in, words of the output] → codes u1 [out, in], and ``qzeros`` [groups, …] → zeros u1 [out, groups].

    ``rows`` is out, or a part that begins a word.

    Raises:
        Damaged: another number of words than ``rows`` codes take; 4-bit rows that do not fill their words.
    """
    if bits == 4:
        _check_rows(rows)
        codes = bitpack.unpack(words, 4, rows)
        codes = codes.reshape(len(words), rows // 8, 8).take(_NIBBLE, axis=-1).reshape(len(words), rows)
    else:
        codes = bitpack.unpack(words, bits, rows)
    return np.ascontiguousarray(codes.T)


def pack(codes: NDArray[np.uint8], bits: int = 4) -> NDArray[np.uint32]:
    """Codes u1 [out, in] → ``qweight`` [in, words of the output]; zeros u1 [out, groups] → ``qzeros``.

    Raises:
        Damaged: 4-bit rows that do not fill their words.
    """
    across = np.ascontiguousarray(codes.T)
    if bits == 4:
        _check_rows(rows := codes.shape[0])
        across = across.reshape(len(across), rows // 8, 8).take(ORDER, axis=-1).reshape(across.shape)
    return bitpack.pack(across, bits)


def _check_rows(rows: int) -> None:
    if rows % 8:
        raise Damaged("AWQ packs eight output rows into each word", expected="a multiple of 8", found=str(rows))
