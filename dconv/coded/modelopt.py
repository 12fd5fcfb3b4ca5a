"""NVIDIA's ModelOpt (TensorRT-LLM, vLLM, SGLang) as a source: which stored tensors make a weight.

A module's codes are its ``weight``. ``weight_scale`` multiplies them, and so does NVFP4's ``weight_scale_2``: both are
what a weight was divided by. ``pre_quant_scale`` multiplies a layer's inputs, so the columns of the plain weight that
gives the same; ModelOpt folds it into what is before the layer where it can, and stores none then.

Layouts by algorithm, for a weight [out, in]: FP8 e4m3, ``weight_scale`` fp32 of the tensor, or [out], or
[out / 128, 1, in / 128, 1] for blocks; MXFP8 e4m3 with E8M0 [out, in / 32]; NVFP4 and MXFP4 two codes a byte along in,
the lower four bits first, with e4m3 [out, in / 16] and fp32 of the tensor, or E8M0 [out, in / 32]; INT8 with fp32
[out]; INT4 (W4A16_AWQ) two signed codes a byte along *out*, [out / 2, in], the even row in the lower four bits, with
fp32 [out, in / group]. Source: ModelOpt 0.47.0, ``torch/export/quant_utils.py`` and ``unified_export_hf.py``, run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import integer, mx, nvfp4
from dconv.codec.cast import cast
from dconv.codec.pack import unpack
from dconv.codec.packed import middle
from dconv.coded import compressed_bytes, compressed_floats, fp8
from dconv.coded.compressed_config import Args, Group
from dconv.coded.compressed_parts import SCALES, Made, Module, blocks_of, matrix, of_words, parts_of
from dconv.coded.decoded import Decoded, dense
from dconv.coded.modelopt_config import Form, config_of
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.derived import Read, Recipe
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.region import Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CODES: Final[dict[str, tuple[str, ...]]] = {"weight": (fp8.FP8, "f8_e5m2", "i8", "u8")}
_SMOOTH: Final = "pre_quant_scale"
_BESIDE: Final = ("weight_scale", "weight_scale_2", _SMOOTH)
_ACTIVATIONS: Final = ("input_scale", "output_scale", "k_scale", "v_scale")
#: What an affine cache is shifted by; no projection has a second bias.
_SHIFTS: Final = ("k_proj.k_bias", "v_proj.v_bias")
#: How a weight is called that is no module's only one: a layer's experts in one tensor.
_STACKED: Final = ("_weight_scale", "_weight_scale_2")
#: Rows and columns of FP8's blocks, of which no config says the size; vLLM has it as a constant as well.
_BLOCK: Final = (128, 128)


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in codes, each proved to be whole, and every part to belong to one.

    Raises:
        Damaged: a part is missing, of another shape than its algorithm makes, or of no use; a weight that the config
            does not speak of.
        Refused: an algorithm or a layout that is not known.
    """
    said, tensors = config["quantization_config"], found.tensors
    known = config_of(mapping_or_empty(said), _FORMS)
    for name in [name for name in tensors if name.rpartition(".")[2] in _ACTIVATIONS or name.endswith(_SHIFTS)]:
        del tensors[name]
        found.left_out[name] = "a scale of activations or of a cache, which dense weights have no use for"
    _refuse_stacked(tensors)
    for name, parts in parts_of(tensors, _CODES, _BESIDE).items():
        weight = parts["weight"].spec.name
        form = known.form_of(name, weight)
        args, make = _FORMS[form.algo]
        plain = {part: stored for part, stored in parts.items() if part != _SMOOTH}
        module = Module(name, Group(form.algo, (), _sized(args, form, weight), form.algo), plain)
        made = make(module, found)
        if _SMOOTH in parts:
            made = _smoothed(replace(module, parts=parts), made)
        named = {stored.spec.name: stored for stored in made.inputs}
        whole = dense(made.shape, named, made.recipe, made.words, made.bits)
        found.put(weight, dtype, {stored.spec.name: stored for stored in parts.values()}, whole, made.words)


def _sized(args: Args, form: Form, where: str) -> Args:
    """What an algorithm is, with the group size that the config says.

    Raises:
        Refused: another size than the algorithm's only one.
    """
    if args.strategy not in ("group", "tensor_group") or form.group in (0, args.group):
        return args
    if args.group:
        raise Refused(
            f"{form.algo} has one scale for {args.group} columns, nothing was written",
            where=f"{where}\nconfig.json: quantization_config.group_size",
            found=str(form.group),
        )
    return replace(args, group=form.group)


def _refuse_stacked(tensors: Mapping[str, Stored]) -> None:
    """Refuse experts in one tensor, whose scales have no place here.

    Raises:
        Refused: scales of weights that are in one tensor for all experts.
    """
    stacked = sorted(name for name in tensors if name.endswith(_STACKED))
    if stacked:
        raise Refused(
            "a layer's experts are in codes in one tensor, which this version does not decode, nothing was written",
            where=group_names(stacked),
            expected="a weight for each expert, as ModelOpt exports all but Llama 4's and gpt-oss's",
        )


def _blocks(module: Module, found: Decoded) -> Made:
    """FP8 by blocks, whose scales have an axis of one element behind each."""
    scale = module.parts.get("weight_scale")
    if scale is not None and len(scale.spec.shape) == 4 and scale.spec.shape[1::2] == (1, 1):
        scale = _with_axes(scale, scale.spec.shape[::2], scale.extents[0].strides[::2])
    elif scale is not None and not scale.spec.shape:  # ModelOpt drops the axes of a single one
        scale = _with_axes(scale, (1, 1), (0, 0))
    parts = module.parts if scale is None else {**module.parts, "weight_scale": scale}
    return compressed_bytes.float8(replace(module, parts=parts), found)


def _with_axes(stored: Stored, shape: tuple[int, ...], strides: tuple[int, ...]) -> Stored:
    (extent,) = stored.extents
    extent = replace(extent, region=Region.whole(shape), strides=strides)
    return Stored(replace(stored.spec, shape=shape), (extent,))


def _nv4(module: Module, found: Decoded) -> Made:
    del found
    return compressed_floats.of_nv(module, "weight", "weight_scale_2", divides=False)


def _mx4(module: Module, found: Decoded) -> Made:
    del found
    return compressed_floats.of_mx(module, 4, "weight")


def _int4(module: Module, found: Decoded) -> Made:
    """Signed codes, two rows a byte; the scales' shape tells the groups where config.json does not."""
    del found
    pairs, columns = matrix(module.need("weight", ("u8",)))
    module.check_no_more("weight", "weight_scale")
    if not module.args.group:
        told = module.need("weight_scale", SCALES).spec.shape
        count = told[1] if len(told) == 2 else 0
        if not count or columns % count:
            raise Damaged(
                "scales do not divide a weight's columns into groups",
                where=f"{module.name}.weight_scale",
                expected=f"[{2 * pairs}, n], {columns} being a multiple of n",
                found=str(list(told)),
            )
        args = replace(module.args, group=columns // count)
        module = replace(module, group=replace(module.group, args=args))
    shape = 2 * pairs, columns
    block, shapes = blocks_of(module, shape)
    scale = module.need("weight_scale", SCALES, *shapes)
    words = f"int4 code x the scale of {of_words(block, shape)}"
    bits = 4 + 8 * ITEMSIZE[scale.spec.dtype] / block[1]
    return Made(shape, (module.parts["weight"], scale), Int4(block[1], scale.spec.dtype), words, bits)


def _smoothed(module: Module, made: Made) -> Made:
    by = module.need(_SMOOTH, SCALES, (made.shape[1],))
    recipe, words = Smoothed(made.recipe, len(made.inputs)), f"{made.words} x the scale of its column's inputs"
    return Made(made.shape, (*made.inputs, by), recipe, words, made.bits + 8 * ITEMSIZE[by.spec.dtype] / made.shape[0])


@dataclass(frozen=True, slots=True)
class Int4:
    """code × scale of its ``group`` columns (in ``scale``, a dtype); inputs: two rows of codes a byte, scales."""

    group: int
    scale: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the pairs of rows that hold the box, and multiply by the scales of its groups."""
        (top, left), (rows, columns) = box.start, box.shape
        first, last = top // 2, -(-box.stop[0] // 2)
        pairs = read(0, Region((first, left), (last - first, columns)), "").view(np.uint8)
        codes = np.ascontiguousarray(unpack(np.ascontiguousarray(pairs.T), 4).T[top - 2 * first :][:rows])
        begin, end = left // self.group, -(-box.stop[1] // self.group)
        return integer.decode(
            codes ^ np.uint8(middle(4)),
            read(1, Region((top, begin), (rows, end - begin)), ""),
            middle(4),
            integer.groups_of(columns, self.group, left) - begin,
            source=self.scale,
            target=dtype,
            bits=4,
            factor=factor,
        )


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What ``recipe`` makes × its column's scale, the input behind ``recipe``'s: taken in fp64 and rounded once."""

    recipe: Recipe
    number: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Compute the box in fp64, and multiply each column."""
        by = read(self.number, Region(box.start[1:], box.shape[1:]), "f64").view("<f8")
        with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
            return cast(self.recipe(box, "f64", factor, read).view("<f8") * by, "f64", dtype)


_NV: Final = Args(4, "float", True, "tensor_group", nvfp4.BLOCK)
_MX: Final = Args(4, "float", True, "group", mx.BLOCK)
_INT8: Final = Args(8, "int", True, "channel")
_FP8_BLOCKS: Final = Args(8, "float", True, "block", block=_BLOCK)
#: ModelOpt's name of an algorithm -> how weights are coded. Those of one kind differ in activations, or in how scales
#: were chosen. Not among them: W4A8_AWQ, whose weights are rounded twice, the second time when they are used;
#: W4A8_NVFP4_FP8, whose groups are of 32; and NVFP4_SVD, which adds a product of two small matrices.
_FORMS: Final[dict[str, tuple[Args, Callable[[Module, Decoded], Made]]]] = {
    "FP8": (Args(8, "float", True, "tensor"), compressed_bytes.float8),
    "FP8_PER_CHANNEL_PER_TOKEN": (Args(8, "float", True, "channel"), compressed_bytes.float8),
    "FP8_PB_WO": (_FP8_BLOCKS, _blocks),
    "FP8_PB_REAL": (_FP8_BLOCKS, _blocks),
    "MXFP8": (Args(8, "float", True, "group", mx.BLOCK), compressed_bytes.mxfp8),
    "NVFP4": (_NV, _nv4),
    "W4A16_NVFP4": (_NV, _nv4),
    "NVFP4_AWQ": (_NV, _nv4),
    "MXFP4": (_MX, _mx4),
    "W4A8_MXFP4_FP8": (_MX, _mx4),
    "W4A16_AWQ": (Args(4, "int", True, "group"), _int4),
    "W8A16": (_INT8, compressed_bytes.int8),
    "W8A8_SQ_PER_CHANNEL": (_INT8, compressed_bytes.int8),
}
