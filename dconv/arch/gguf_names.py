"""Which box of which GGUF tensor each of HuggingFace's tensors is.

Names are those of the package gguf (``TensorNameMap``, the table of llama.cpp's own converter), asked for each name
that a family's table has; so the inverse is derived. What differs by more than its name is one function each here:
experts stacked, queries and keys in another order of rows, what is one tensor on one side and several on the other.
Sources: ``modify_tensors`` in llama.cpp's ``conversion/*.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dconv.arch.gguf import ARCHS
from dconv.arch.layouts import Facts, size
from dconv.errors import ToolMissing
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import TensorSpec

#: Gives GGUF's name for one of HuggingFace's; None where it has none.
Names = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a HuggingFace tensor as it lies in one of GGUF's.

    Attributes:
        region: the box, in HuggingFace's coordinates.
        tensor: GGUF's.
        whole: the shape that GGUF's tensor must have.
        start: where the box's first element is in it.
        axes: for each of HuggingFace's axes the one of GGUF's, -1 for an axis that only stacks (extent 1).
        step: rows of GGUF's from one of HuggingFace's first axis to the next.
    """

    region: Region
    tensor: str
    whole: Index
    start: Index
    axes: Index
    step: int = 1


_SUFFIXES: Final = (".weight", ".bias")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_ROWS: Final = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_LATENT: Final = re.compile(r"(blk\.\d+)\.attn_kv_b\.weight")
_PAIRS: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias)?")


def names_of(arch: str, layers: int) -> Names:
    """GGUF's names of a model with so many layers.

    Raises:
        ToolMissing: no package gguf, or one that does not know this architecture.
    """
    try:
        import gguf  # only where a GGUF is read
    except ImportError as fault:
        raise ToolMissing(
            "tensors of a GGUF are named by the package gguf",
            found=str(fault),
            do="pip install gguf",
        ) from None
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if known is None:
        raise ToolMissing(f"the package gguf does not know {arch}", do="pip install --upgrade gguf")
    table = gguf.get_tensor_name_map(known, layers)

    def name_of(hf: str) -> str | None:
        # the converter's own first step (``filter_tensors`` in conversion/base.py)
        hf = hf.replace("e_score_correction_bias", "e_score_correction.bias")
        found = table.get_name(hf, _SUFFIXES)
        return found if found is None or found.endswith(_SUFFIXES) else f"{found}.weight"

    return name_of


def boxes_of(
    arch: str, specs: Iterable[TensorSpec], facts: Facts, shapes: Mapping[str, Index]
) -> Iterator[tuple[TensorSpec, Box]]:
    """The boxes of every tensor of a family that is there, in whatever form; what is not there has none.

    Args:
        arch: GGUF's name of the architecture.
        specs: the logical tensors.
        facts: of the model.
        shapes: of GGUF's tensors, by their names.

    Raises:
        ToolMissing: see `names_of`.
    """
    names = names_of(arch, size(facts, "layers"))
    for spec in specs:
        for box in _boxes(arch, spec, facts, shapes, names):
            if box.tensor in shapes:
                yield spec, box


def boxes_to_write(arch: str, specs: Iterable[TensorSpec], facts: Facts) -> Iterator[tuple[TensorSpec, list[Box]]]:
    """The boxes that every tensor of a family is written to, in the form that llama.cpp's converter gives it today.

    A tensor that GGUF has no name for has none.

    Raises:
        ToolMissing: see `names_of`.
    """
    names = names_of(arch, size(facts, "layers"))
    for spec in specs:
        yield spec, list(_boxes(arch, spec, facts, {}, names))


def _boxes(arch: str, spec: TensorSpec, facts: Facts, shapes: Mapping[str, Index], names: Names) -> Iterable[Box]:
    if match := _EXPERT.fullmatch(spec.name):
        return _expert(spec, match[1], int(match[2]), match[3], size(facts, "experts"), shapes, names)
    if match := _PAIRS.fullmatch(spec.name):
        return _pairs(spec, match[1], match[2], match[3], names)
    name = names(spec.name)
    if name is None:
        return ()
    if match := _ROWS.fullmatch(spec.name):
        neighbours = ARCHS[arch].neighbours and match[2] != "v"
        return _rows(spec, name, match[2], neighbours, facts, shapes)
    if (match := _LATENT.fullmatch(name)) and name not in shapes and ARCHS[arch].absorbed:
        return _latent(match[1], facts)
    if spec.shape[:1] == (1,) and shapes.get(name) == spec.shape[1:]:  # ggml drops an axis of length 1
        return (Box(Region.whole(spec.shape), name, spec.shape[1:], (0,) * (len(spec.shape) - 1), (-1, 0)),)
    return (_same(spec, name),)


def _same(spec: TensorSpec, name: str) -> Box:
    shape = spec.shape
    return Box(Region.whole(shape), name, shape, (0,) * len(shape), tuple(range(len(shape))))


def _expert(
    spec: TensorSpec, module: str, number: int, inner: str, count: int, shapes: Mapping[str, Index], names: Names
) -> Iterable[Box]:
    """One of the experts that a tensor [experts, out, in] stacks, gate and up perhaps in one.

    Or one in a tensor of its own, as it was before April 2024.
    """
    name = names(f"{module}.{inner}")
    if name is None:
        return ()
    alone = name.replace("_exps.", f".{number}.")
    if name not in shapes and alone in shapes:
        return (_same(spec, alone),)
    both = re.sub("_(gate|up)_exps", "_gate_up_exps", name)
    stack, rows, first = name, spec.shape[0], 0
    if name not in shapes and both in shapes:
        stack, first, rows = both, spec.shape[0] * ("_up_exps" in name), 2 * spec.shape[0]
    return (Box(Region.whole(spec.shape), stack, (count, rows, *spec.shape[1:]), (number, first, 0), (1, 2)),)


def _pairs(spec: TensorSpec, module: str, what: str, bias: str | None, names: Names) -> Iterable[Box]:
    """gpt-oss: all experts in one, turned, and gate and up alternating where GGUF has them apart."""
    suffix = "bias" if bias else "weight"
    if what == "down_proj":
        name = names(f"{module}.down_proj.{suffix}") or ""
        turned = (0, 1) if bias else (0, 2, 1)
        whole = tuple(spec.shape[axis] for axis in turned)
        yield Box(Region.whole(spec.shape), name, whole, (0,) * len(whole), turned)
        return
    experts, *inner, _ = spec.shape
    turned = (0, 1, -1) if bias else (0, 2, 1, -1)
    for half, part in enumerate(("gate_proj", "up_proj")):
        name = names(f"{module}.{part}.{suffix}") or ""
        region = Region((*(0,) * (len(spec.shape) - 1), half), (*spec.shape[:-1], 1))
        yield Box(region, name, (experts, *reversed(inner)), (0,) * (1 + len(inner)), turned)


def _rows(
    spec: TensorSpec, name: str, part: str, neighbours: bool, facts: Facts, shapes: Mapping[str, Index]
) -> Iterator[Box]:
    """Queries, keys or values, of their own or one after the other in one tensor.

    Where llama.cpp rotates neighbours, its row 2i + s of a head is row s · half + i here.
    """
    whole, first = spec.shape, 0
    fused = re.sub(r"attn_[qkv]\.", "attn_qkv.", name)
    if name not in shapes and fused in shapes:
        q, kv = size(facts, "q"), size(facts, "kv")
        name, whole, first = fused, (q + 2 * kv, *spec.shape[1:]), {"q": 0, "k": q, "v": q + kv}[part]
    axes, rest = tuple(range(len(whole))), whole[1:]
    zeros = (0,) * len(rest)
    if not neighbours:
        yield Box(Region.whole(spec.shape), name, whole, (first, *zeros), axes)
        return
    head = size(facts, "head_dim")
    for at in range(0, spec.shape[0], head):
        for second in (0, 1):
            region = Region((at + second * (head // 2), *zeros), (head // 2, *rest))
            yield Box(region, name, whole, (first + at + second, *zeros), axes, step=2)


def _latent(layer: str, facts: Facts) -> Iterator[Box]:
    """kv_b of latent attention, which llama.cpp parts into [heads, rank, keys], turned, and [heads, values, rank]."""
    heads, keys, values, rank = (size(facts, fact) for fact in ("heads", "qk_nope", "v_dim", "kv_lora"))
    k_b, v_b = f"{layer}.attn_k_b.weight", f"{layer}.attn_v_b.weight"
    for head in range(heads):
        at = head * (keys + values)
        yield Box(Region((at, 0), (keys, rank)), k_b, (heads, rank, keys), (head, 0, 0), (2, 1))
        yield Box(Region((at + keys, 0), (values, rank)), v_b, (heads, values, rank), (head, 0, 0), (1, 2))
