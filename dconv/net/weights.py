"""A source's weights under the names of a transformers model, read by the boxes that a computation comes to.

Containers do not matter: what is read are logical tensors, whose names are those that HuggingFace publishes. How
transformers renames and joins them (experts of one tensor each into one of three axes) is asked of transformers itself.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.kernels import apply
from dconv.errors import Damaged, group_names
from dconv.net.untyped import first_of, from_numpy
from dconv.sharding.derived import open_reader
from dconv.sharding.dtypes import ITEMSIZE, TO_TORCH
from dconv.sharding.ops import MOVE
from dconv.sharding.parsed import is_list
from dconv.sharding.plan import Copy
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical

if TYPE_CHECKING:
    import torch

#: Bytes read at once, beside what they become.
_TILE: Final = 4 << 20
#: How the sources of a parameter are joined (transformers' rule; None: it is the one), and them with the pattern that
#: each matched.
Recipe = tuple[Any, list[tuple[str, str]]]


def recipes(logical: Logical, model: Any) -> tuple[dict[str, Recipe], tuple[str, ...]]:
    """Where each parameter of a model comes from, in transformers' order, and the tensors that have no place in it.

    Raises:
        Damaged: the source lacks a parameter of the model.
    """
    wanted: dict[str, Any] = model.state_dict(keep_vars=True)
    found: dict[str, Recipe] = {}
    unused = tuple(_map(logical, model, wanted, found))
    tied = {id(value): name for name, value in wanted.items() if name in found}
    for name, value in wanted.items():
        if name not in found and id(value) in tied:
            found[name] = found[tied[id(value)]]
    if lacking := sorted(wanted.keys() - found.keys()):
        raise Damaged("weights that the model needs are missing", where=f"{group_names(lacking)}\nin {logical.root}")
    return found, unused


def _map(logical: Logical, model: Any, wanted: dict[str, Any], found: dict[str, Recipe]) -> list[str]:
    """Give each logical tensor its place in the model; returns those that have none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    loading = import_module("transformers.core_model_loading")
    rules = (get_model_conversion_mapping(model) or []) + _rules_of_ours(getattr(model, "expert_parts", ()))
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    place: tuple[str, Any] = (model.base_model_prefix, wanted)  # transformers 5.0 names them otherwise
    prefix = getattr(model, "stored_under", "")
    unused: list[str] = []
    for source in sorted(logical.specs, key=loading.dot_natural_key):
        if not source.startswith(prefix):
            unused.append(source)
            continue
        name, pattern = loading.rename_source_key(source.removeprefix(prefix), renamings, converters, *place)
        if name not in wanted and source in wanted:
            name, pattern = source, None
        if name not in wanted:
            unused.append(source)
            continue
        how = None if pattern is None else by_pattern[pattern]
        found.setdefault(name, (how, []))[1].append((pattern or source, source))
    return unused


def _rules_of_ours(parts: tuple[str, ...]) -> list[Any]:
    """How experts of a model of `dconv.net.own` are joined, by what their gate, up and down are called."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not parts:
        return []
    gate, up, down = (f"mlp.experts.*.{part}.weight" for part in parts)
    return [
        WeightConverter(
            [gate, up], "mlp.experts.gate_up_proj", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]
        ),
        WeightConverter([down], "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


class Weights:
    """The parameters of a model of transformers, as float32 tensors.

    Args:
        logical: the source.
        model: of the architecture that the source's config names; its parameters are not touched.

    Raises:
        Damaged: the source lacks a parameter of the model, or has one in another shape.
    """

    def __init__(self, logical: Logical, model: Any) -> None:
        self._logical, self._model = logical, model
        self._reader = open_reader(logical, _TILE, apply)
        self._wanted: dict[str, Any] = model.state_dict(keep_vars=True)
        self._recipes, self.unused = recipes(logical, model)

    def close(self) -> None:
        """Let the source's files go."""
        self._reader.close()

    def is_plain(self, name: str) -> bool:
        """Whether a parameter is one logical tensor as it is, so that `rows` reads any part of it."""
        how, sources = self._recipes[name]
        return how is None and self._logical.specs[sources[0][1]].file_shape == tuple(self._wanted[name].shape)

    def by_expert(self, name: str) -> bool:
        """Whether `expert` reads a parameter, whose first axis numbers experts, one by one."""
        if self._wanted[name].ndim < 3:
            return False
        how, sources = self._recipes[name]
        if how is None:
            spec = self._logical.specs[sources[0][1]]
            return self.is_plain(name) and spec.shape[0] == spec.file_shape[0]
        first, *rest = how.operations
        axes = {axis for op in rest for axis in (getattr(op, name, None) for name in ("dim", "dim0", "dim1"))}
        named = {type(op).__name__ for op in rest}
        return type(first).__name__ == "MergeModulelist" and named <= {"Concatenate", "Transpose"} and 0 not in axes

    def source(self, name: str) -> str | None:
        """The logical tensor that a parameter is as it is; None where it is made of several, or turned."""
        return self._recipes[name][1][0][1] if self.is_plain(name) else None

    def sources(self, name: str) -> list[tuple[str, ...]]:
        """The logical tensors of each expert's matrix of a parameter that `by_expert` holds for, in their order."""
        how, sources = self._recipes[name]
        if how is None:
            return []
        each: dict[str, list[str]] = {}
        for pattern, source in sources:
            each.setdefault(pattern, []).append(source)
        return list(zip(*each.values(), strict=True))

    def logical(self, source: str) -> torch.Tensor:
        """A logical tensor, float32 in its stored shape."""
        return self._read(source)

    def whole(self, name: str) -> torch.Tensor:
        """A parameter, float32 in the model's shape.

        Raises:
            Damaged: it has another shape than the model's.
        """
        how, sources = self._recipes[name]
        value = self._read(sources[0][1]) if how is None else self._join(name, how, sources)
        return self._fitting(name, value, tuple(self._wanted[name].shape))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a parameter that `is_plain`, float32 [rows, …]."""
        _, ((_, source),) = self._recipes[name]
        return self._read(source, start, stop)

    def expert(self, name: str, index: int) -> torch.Tensor:
        """One expert's matrix of a parameter that `by_expert` holds for, float32.

        Raises:
            Damaged: it has another shape than the model's.
        """
        how, sources = self._recipes[name]
        if how is None:
            value = self._read(sources[0][1], index, index + 1)
        else:
            each: dict[str, list[str]] = {}
            for pattern, source in sources:
                each.setdefault(pattern, []).append(source)
            value = self._join(name, how, [(pattern, found[index]) for pattern, found in each.items()])
        return self._fitting(name, value, (1, *self._wanted[name].shape[1:]))[0]

    def _fitting(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if tuple(value.shape) != shape:
            raise Damaged("a weight has another shape than the model's", where=name, expected=f"{list(shape)}",
                          found=f"{list(value.shape)}")  # fmt: skip
        return value

    def _join(self, name: str, how: Any, sources: list[tuple[str, str]]) -> torch.Tensor:
        rule = deepcopy(how)
        for pattern, source in sources:
            rule.add_tensor(name, source, pattern, self._read(source))
        converted = rule.convert(name, model=self._model, config=self._model.config)
        made = first_of(converted)[name]  # with errors beside it up to transformers 5.0
        return made[0] if is_list(made) else made

    def _read(self, source: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a logical tensor (all of them without ``stop``), read tile by tile and widened to float32."""
        import torch

        spec = self._logical.specs[source]
        box = Region.whole(spec.shape)
        if stop is not None:
            box = Region((start, *box.start[1:]), (stop - start, *box.shape[1:]))
        kind: torch.dtype = getattr(torch, TO_TORCH[spec.dtype])
        code, itemsize = f"<i{ITEMSIZE[spec.dtype]}", ITEMSIZE[spec.dtype]
        out = torch.empty(box.shape)
        pieces = self._logical.pieces[source]
        copies = [Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE) for p in pieces]
        for tile in box.bands(_TILE // itemsize):
            bits = np.empty(tile.shape, code)
            for copy in copies:
                if (part := copy.clip(tile)) is not None:
                    self._reader.read_box(part, bits[_within(part.region, tile)])
            out[_within(tile, box)] = from_numpy(bits).view(kind).float()
        return out.reshape(spec.file_shape if stop is None else (stop - start, *spec.file_shape[1:]))


def _within(inner: Region, outer: Region) -> tuple[Any, ...]:
    """An index of the larger box that is the smaller one; of no axes, it is all."""
    place = zip(inner.start, outer.start, inner.shape, strict=True)
    return (..., *(slice(a - b, a - b + n) for a, b, n in place))
