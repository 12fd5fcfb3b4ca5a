"""Linear layers in MXFP4, MXFP6, MXFP8 and NVFP4 as compressed-tensors stores them, for it and for vLLM.

Codes and scales equal those of llm-compressor's data-free recipes MXFP4A16, MXFP8 and NVFP4A16 bit by bit where the
weight is finite and in fp32 or bf16. A block with a NaN or an infinity has scale NaN here, and leaves others as they
are; in fp16 llm-compressor loses blocks whose scale fp16 cannot hold, which are kept here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import mx, nvfp4, qparams
from dconv.codec.minifloat import E2M1, E2M3, E4M3
from dconv.coded.compressed_encode import config, group_of
from dconv.coded.compressed_floats import Mx, Nv, groups_in
from dconv.coded.encode import Coded, kept
from dconv.coded.fp8 import FP8, Decode
from dconv.coded.fp8_encode import Amax, weights_of
from dconv.coded.places import FUSED_PARTS
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MX_ARGS: Final = {
    "type": "float",
    "symmetric": True,
    "group_size": mx.BLOCK,
    "strategy": "group",
    "scale_dtype": "torch.uint8",
}
_FORMATS: Final = {4: E2M1, 6: E2M3, 8: E4M3}
_NAMES: Final = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}


@dataclass(frozen=True)
class MicroMX:
    """MXFP4, MXFP6 (e2m3) or MXFP8.

    Attributes:
        bits: 4, 6 or 8.
        rule: how a block's power of two is found (`dconv.codec.mx.encode`); compressed-tensors' is ``even``.
        activations: whether those of MXFP8 are rounded alike as they come.
    """

    bits: int
    rule: mx.Rule = "even"
    activations: bool = True
    columns: int = field(default=mx.BLOCK, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"MXFP{self.bits}, for compressed-tensors"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """Codes u8 [out, bytes], or e4m3 [out, in] for MXFP8; E8M0 scales u8 [out, in / 32]."""
        rows, columns = spec.shape
        packed = self.bits < 8
        bytes_ = columns * self.bits // 8
        codes = TensorSpec(f"{spec.name}_packed", (rows, bytes_), "u8") if packed else spec_as(spec, FP8)
        scale = TensorSpec(f"{spec.name}_scale", (rows, columns // mx.BLOCK), "u8")
        if found := kept(dense, logical, Mx(self.bits) if packed else Decode((1, mx.BLOCK), FP8), [codes, scale]):
            return found
        made = Coded()
        dtype, bits = qparams.own(dense.dtype), 8 * ITEMSIZE[dense.dtype]
        fmt = _FORMATS[self.bits]
        words = f"rounded once to {fmt.name}, a power of two by rule {self.rule} for its scale"
        recipe = MxPart(self.bits, self.rule, dtype, "codes")
        made.make(codes, Derived(codes.shape, (dense,), recipe, How(words, False, bits * 8 / self.bits)))
        recipe = MxPart(self.bits, self.rule, dtype, "scale")
        how = How(f"power of two by rule {self.rule}", False, bits * mx.BLOCK)
        made.make(scale, Derived(scale.shape, (dense,), recipe, how, mx.BLOCK))
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`: FP4 and FP6 weights alone; FP8 with activations rounded alike, or alone."""
        del coded
        weights = {"num_bits": self.bits, **_MX_ARGS}
        rounded = {**weights, "dynamic": True} if self.bits == 8 and self.activations else None
        return config([group_of(_NAMES[self.bits], weights, rounded)], plain)


@dataclass(frozen=True)
class MicroNV:
    """NVFP4, weights alone: activations in FP4 need a scale that only samples give."""

    columns: int = field(default=nvfp4.BLOCK, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return "NVFP4, for compressed-tensors"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """Codes u8 [out, in / 2]; e4m3 scales [out, in / 16]; one divisor, the same for weights that runtimes fuse."""
        rows, columns = spec.shape
        codes = TensorSpec(f"{spec.name}_packed", (rows, columns // 2), "u8")
        scale = TensorSpec(f"{spec.name}_scale", (rows, columns // nvfp4.BLOCK), FP8)
        whole = TensorSpec(f"{spec.name}_global_scale", (1,), "f32")
        if found := kept(dense, logical, Nv(1), [codes, scale, whole]):
            return found
        made = Coded()
        dtype, bits = qparams.own(dense.dtype), 8 * ITEMSIZE[dense.dtype]
        amaxes = tuple(_amax(made, logical, name, dtype) for name in fused_with(spec.name, logical))
        words = "rounded once to e2m1, absmax / 6 in e4m3 of the tensor's for its scale"
        recipe = NvPart(dtype, len(amaxes), "codes")
        made.make(codes, Derived(codes.shape, (dense, *amaxes), recipe, How(words, False, bits * 2)))
        how = How("absmax / 6 x the tensor's, in e4m3", False, bits * nvfp4.BLOCK)
        made.make(scale, Derived(scale.shape, (dense, *amaxes), NvPart(dtype, len(amaxes), "scale"), how, nvfp4.BLOCK))
        how = How("448 x 6 / absmax of it and those that it is fused with", False, bits * rows * columns)
        made.make(whole, Derived(whole.shape, amaxes, Whole(dtype, len(amaxes)), how))
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """One group of ``nvfp4-pack-quantized``, activations left as they are."""
        del coded
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": nvfp4.BLOCK,
            "strategy": "tensor_group",
            "scale_dtype": "torch.float8_e4m3fn",
        }
        return config([group_of("nvfp4-pack-quantized", weights, None)], plain)


def spec_as(spec: TensorSpec, dtype: str) -> TensorSpec:
    """A tensor of the same name and shape in another dtype."""
    return TensorSpec(spec.name, spec.shape, dtype)


def fused_with(name: str, logical: Logical) -> list[str]:
    """The weights that share a tensor's scale with one, itself among them, in an order that all of them give.

    Source: llm-compressor 0.14, ``FUSED_LAYER_NAMES`` in ``observers/helpers.py``.
    """
    module, _, end = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    for group in FUSED_PARTS:
        names = [f"{parent}.{part}.{end}" for part in group]
        if last in group and all(it in logical.specs for it in names):
            return names
    return [name]


def _amax(made: Coded, logical: Logical, name: str, dtype: str) -> Array:
    spec = logical.specs[name]
    dense = Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
    recipe = Amax((spec.shape[0], spec.shape[1]), spec.shape, dtype)
    cost = spec.shape[0] * spec.shape[1]
    return made.help(f"{name}//amax", Derived((1, 1), (dense,), recipe, How("absmax", False, 0), cost, True), "f32")


@dataclass(frozen=True, slots=True)
class MxPart:
    """Codes, or scales; input: the weight."""

    bits: int
    rule: mx.Rule
    rounded: str
    part: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the whole blocks that the box touches, and cut it out."""
        del dtype, factor
        fmt = _FORMATS[self.bits]
        region, columns = _elements(box, mx.BLOCK, mx.BLOCK * self.bits // 8 if self.part == "codes" else 1)
        weights = weights_of(read, region, self.rounded)
        if self.part == "scale":
            return mx.scales(weights, fmt, self.rule)
        codes, _ = mx.encode(weights, fmt, self.rule, positive_zeros=self.bits != 6)  # whose packing keeps the sign
        return codes[:, columns]


@dataclass(frozen=True, slots=True)
class NvPart:
    """Codes, or scales; inputs: the weight, then the absmax of each weight that shares the tensor's scale."""

    rounded: str
    fused: int
    part: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the whole blocks that the box touches by the tensor's scale, and cut it out."""
        del dtype, factor
        region, columns = _elements(box, nvfp4.BLOCK, nvfp4.BLOCK // 2 if self.part == "codes" else 1)
        whole = nvfp4.global_scale(_largest(read, 1, self.fused), self.rounded)
        weights = weights_of(read, region, self.rounded)
        if self.part == "scale":
            return nvfp4.scales(weights, whole, self.rounded)
        codes, _ = nvfp4.encode(weights, whole, self.rounded, positive_zeros=True)
        return codes[:, columns]


@dataclass(frozen=True, slots=True)
class Whole:
    """What a tensor's scales are divided by; inputs: the absmax of each weight that shares it."""

    rounded: str
    fused: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The divisor of the largest absmax, in the shape of the box."""
        del dtype, factor
        return np.full(box.shape, nvfp4.global_scale(_largest(read, 0, self.fused), self.rounded), np.float32)


def _largest(read: Read, first: int, count: int) -> float:
    return max(float(read(number, Region((0, 0), (1, 1)), "")[0, 0]) for number in range(first, first + count))


def _elements(box: Region, block: int, width: int) -> tuple[Region, slice]:
    """The whole groups of a weight that a box of its codes or scales touches, and where the box's columns are in them.

    Args:
        box: of codes or scales.
        block: columns of the weight that are a group.
        width: columns of the box that a group takes.
    """
    first, number, inside = groups_in(box, width)
    return Region((box.start[0], first * block), (box.shape[0], number * block)), inside
