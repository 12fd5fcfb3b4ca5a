"""Linear layers in FP8 as compressed-tensors stores them: ``weight`` in e4m3, ``weight_scale`` in the weight's dtype.

Codes and scales equal those of llm-compressor's data-free recipes FP8_DYNAMIC and FP8_BLOCK bit by bit where the weight
is finite (`dconv.codec.qparams`). A NaN or an infinity becomes NaN and leaves the rest as it would be without it, where
llm-compressor's scale, and with it all that shares it, becomes NaN or zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import qparams
from dconv.codec.cast import cast
from dconv.codec.minifloat import E4M3, nearest
from dconv.coded.compressed_config import METHOD, MIXED
from dconv.coded.encode import Coded, kept
from dconv.coded.fp8 import FP8, Decode, scales_shape
from dconv.coded.fp8_encode import Amax, weights_of
from dconv.coded.places import experts_of
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ARGS: Final = {"num_bits": 8, "type": "float", "symmetric": True}
#: Activations in FP8 with a scale for each token. It is what vLLM's kernels need but for weights in blocks.
BY_TOKEN: Final = {**_ARGS, "group_size": None, "strategy": "token", "dynamic": True}


def group_of(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None, targets: Sequence[str] = ("Linear",)
) -> dict[str, Any]:
    """One entry of ``config_groups``, in compressed-tensors' spelling.

    Args:
        form: the format's name, as `dconv.coded.compressed_config.FORMATS` has it.
        weights: the arguments of weights.
        activations: those of activations that are rounded as they come; None leaves them as they are.
        targets: the modules that it is for.
    """
    return {
        "targets": list(targets),
        "weights": {**weights, "dynamic": False},
        "input_activations": activations,
        "output_activations": None,
        "format": form,
    }


def targets_of(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Targets that mean these modules, and none of ``others``, to all that read them.

    Each is named, since vLLM takes the class of a fused layer (qkv_proj) for a target before it looks at the names of
    what was fused. Experts have an expression: transformers 5.23 knows their group by one that says ``experts``
    (``get_experts_scheme``), and vLLM asks for names of its own, whatever the projections are called in files.
    """
    modules = list(modules)
    layers = dict.fromkeys(layer for layer in map(experts_of, modules) if layer)
    torn = set(map(experts_of, others))
    if layers and torn <= {""}:
        experts = ["re:.*[.]experts[.]"]
    else:
        experts = [f"re:{re.escape(layer).replace(chr(92) + '.', '[.]')}[.]" for layer in layers if layer not in torn]
    whole = {layer for layer in layers if layer not in torn}
    return [*experts, *(module for module in modules if experts_of(module) not in whole)]


def config(groups: Sequence[Mapping[str, Any]], plain: list[str]) -> dict[str, Any]:
    """``quantization_config`` of groups that have every linear layer but ``plain``.

    Args:
        groups: entries of ``config_groups``, in order.
        plain: whole parts of modules' names, which leave out what is inside of these modules, too.
    """
    forms = {str(group["format"]) for group in groups}
    return {
        "quant_method": METHOD,
        "format": MIXED if len(forms) > 1 else forms.pop(),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": one for number, one in enumerate(groups)},
        "ignore": [f"re:(.*[.])?{entry.replace('.', '[.]')}([.]|$)" for entry in plain],
    }


@dataclass(frozen=True)
class CompressedFP8:
    """See the module.

    Attributes:
        strategy: ``tensor``, ``channel`` or ``block``.
        block: rows and columns of a block, where that is the strategy.
        activations: whether they are rounded, too, as they come.
    """

    strategy: str
    block: tuple[int, int] = (128, 128)
    activations: bool = True
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        of = {"block": f"{self.block[0]} x {self.block[1]} block", "channel": "row"}.get(self.strategy, self.strategy)
        return f"FP8 (e4m3) with a scale for each {of}, for compressed-tensors"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """Codes in e4m3 [out, in]; scales [1], [out, 1] or one for each block, in the dtype of the weight."""
        rows, columns = spec.shape
        block = {"block": self.block, "channel": (1, columns)}.get(self.strategy, (rows, columns))
        grid = scales_shape(spec.shape, block)
        dtype = qparams.own(dense.dtype)
        codes = TensorSpec(spec.name, spec.shape, FP8)
        scale = TensorSpec(f"{spec.name}_scale", (1,) if self.strategy == "tensor" else grid, dtype)
        if found := kept(dense, logical, Decode(block, FP8), [codes, scale], qparams.DTYPES):
            return found
        made = Coded()
        cost, bits = prod(block), 8 * ITEMSIZE[dense.dtype]
        how = How("absmax", False, 0)
        largest = Derived(grid, (dense,), Amax(block, spec.shape, dtype), how, cost, remembered=True)
        amax = made.help(f"{spec.name}//amax", largest, "f32")
        words = f"rounded once to e4m3 with absmax / 448 in {dtype} for its scale"
        made.make(codes, Derived(spec.shape, (dense, amax), Codes(block, dtype), How(words, False, bits)))
        how = How(f"absmax / 448 in {dtype}", False, bits * cost)
        made.make(scale, Derived(scale.shape, (amax,), Scale(dtype), how))
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`; activations have a scale for each token, or for each block's columns."""
        del coded
        weights: dict[str, Any] = {**_ARGS, "group_size": None, "strategy": self.strategy}
        rounded = BY_TOKEN
        if self.strategy == "block":
            weights["block_structure"] = list(self.block)
            rounded = {**BY_TOKEN, "strategy": "group", "group_size": self.block[1]}
        return config([group_of("float-quantized", weights, rounded if self.activations else None)], plain)


@dataclass(frozen=True, slots=True)
class Codes:
    """The weight's codes; inputs: the weight, its blocks' `Amax`."""

    block: tuple[int, int]
    dtype: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Divide the weights of the box by the scales of their blocks, and round."""
        del dtype, factor
        (m, n), (row, column) = self.block, box.start
        blocks = Region((row // m, column // n), (-(-box.stop[0] // m) - row // m, -(-box.stop[1] // n) - column // n))
        scale = qparams.scale(read(1, blocks, "").view(np.float32), E4M3.largest, self.dtype)
        rows, columns = (np.arange(a, b) // n - a // n for a, b, n in zip(box.start, box.stop, self.block, strict=True))
        each = scale[rows][:, columns]
        return nearest(E4M3, qparams.divided(weights_of(read, box, self.dtype), each, self.dtype), saturate=False)


@dataclass(frozen=True, slots=True)
class Scale:
    """What multiplies the codes; input: the blocks' `Amax`, of which there is one where the scales have one axis."""

    dtype: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The scales of the blocks in the box, rounded as the weights are."""
        del dtype, factor
        single = len(box.shape) == 1
        largest = read(0, Region((0, 0), (1, 1)) if single else box, "").view(np.float32)
        return cast(qparams.scale(largest, E4M3.largest, self.dtype), "f32", self.dtype).reshape(box.shape)
