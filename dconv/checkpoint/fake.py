"""A model of config.json alone whose weights are made up (``--fake-weight``): to try a pipeline or a cluster with.

Each tensor is a virtual file of its own, one row behind the other. Zeros are holes in it, so that a checkpoint of any
size takes seconds and no room; `FakeReader` makes other values where they are read.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.arch import registry
from dconv.arch.args import dtype_of
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint.fake_config import Wishes, read_wishes
from dconv.checkpoint.fake_shapes import settled
from dconv.checkpoint.files import read_json
from dconv.checkpoint.source import Located, Source, expected_specs, side_files
from dconv.codec.fill import filled
from dconv.errors import Damaged, Refused, UsageError
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import FileStamp, Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "config alone, made-up weights"
#: What says how weights are stored that are not there.
_QUANTIZED: Final = ("quantization_config", "compression_config")


class FakeReader:
    """Makes the values of boxes up (`dconv.sharding.reader.BoxReader`). A virtual file is called as its tensor."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes

    def close(self) -> None:
        """Nothing is open."""

    def has(self, file: str) -> bool:  # noqa: ARG002 - of every tensor
        """Always: values are made up for every tensor."""
        return True

    def is_sparse(self, file: str) -> bool:
        """Where the tensor is filled with zeros: its output needs no disk."""
        return self._wishes.fill_of(file).is_zero

    def is_hole(self, copy: Copy) -> bool:
        """Where the tensor is filled with zeros."""
        return self.is_sparse(copy.file)

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        """Make the values up, each from its place in the tensor: however boxes are cut, they are the same."""
        itemsize = ITEMSIZE[copy.dtype]
        index = np.array(copy.offset // itemsize, np.uint64)
        for n, stride in zip(copy.region.shape, copy.strides, strict=True):
            index = index[..., None] + np.arange(n, dtype=np.uint64) * np.uint64(stride // itemsize)
        out[...] = filled(self._wishes.fill_of(copy.file), copy.file, index, copy.dtype)


def open_source(path: Path, config_file: Path | None, model_type: str | None, hf_config: Path | None = None) -> Source:
    """The model that a config.json speaks of, in the config's dtype (bf16 where it has none).

    Args:
        path: a directory with config.json, or the file itself; weights beside it are not looked at.
        config_file: sizes and fills (`dconv.checkpoint.fake_config`).
        model_type: its family; None detects it.
        hf_config: a directory with the config to use instead.

    Raises:
        UsageError: there is no config.json; a file of wishes that cannot be fulfilled.
        Refused, Damaged: a config that no family has, or that contradicts itself.
    """
    folder = hf_config or (path.parent if path.is_file() else path)
    file = path if path.is_file() and hf_config is None else folder / "config.json"
    if not file.is_file():
        raise UsageError("made-up weights need a config.json", where=str(path), expected="a directory with one, or it")
    wishes = read_wishes(config_file) if config_file else Wishes()
    published = read_json(file, what="config.json")
    config = wishes.changed(published)
    stored = next((key for key in _QUANTIZED if config.pop(key, None) is not None), None)
    notes = (f"{stored} of config.json is left out: made-up weights are not quantised",) if stored else ()
    family = registry.by_name(model_type) if model_type else registry.detect(config, None, {})
    _check_told(family, config, model_type, file)
    if wishes.dimensions:
        _check_dimensions(family, wishes, published, config)
    if wishes.shapes:
        config = settled(config, wishes, partial(_shapes, family))
    dtype = dtype_of(config)
    _check_patterns(wishes, _shapes(family, config))

    def locate(family: Family, facts: Facts) -> Located:
        located = Located({}, {}, {})
        kept = {spec.name for entry in family.entries(facts) if entry.row.keeps for spec in entry.fused.specs}
        for name, spec in expected_specs(family, facts).items():
            stored = "f32" if name in kept else dtype
            strides = tuple(accumulate(reversed(spec.shape[1:]), mul, initial=ITEMSIZE[stored]))[::-1]
            strides = strides if spec.shape else ()
            located.pieces[name] = [Piece(name, Region.whole(spec.shape), name, 0, strides, stored)]
            size = math.prod(spec.shape) * ITEMSIZE[stored]
            files[name] = FileStamp(size, 0, 0, 0 if wishes.fill_of(name).is_zero else size)
        return located

    files: dict[str, FileStamp] = {}
    side = {name: path for name, path in side_files(folder).items() if name != "config.json"}
    return Source(
        format=FORMAT,
        root=folder,
        config=config,
        args=None,
        side=side,
        files=files,
        parallel=None,
        locate=locate,
        notes=notes,
        reader=partial(_reader, wishes),
        made=_words(wishes),
    )


def _check_told(family: Family, config: Mapping[str, Any], model_type: str | None, file: Path) -> None:
    """Raises Refused where it takes tensors to tell what the model is."""
    if family.either:
        raise Refused(
            f"config.json does not say the shapes of a {family.name}, nothing was written",
            where=str(file),
            expected="a family of which the config says all",
        )
    others = [other.name for other in registry.families().values() if other.marks]
    others = [name for name in others if registry.by_name(name).config.architecture == family.config.architecture]
    if others and model_type is None and config.get("num_experts"):
        raise Refused(
            "config.json alone does not tell the family, nothing was written",
            where=str(file),
            found=f"{family.name}, {' or '.join(others)}",
            do="--model-type FAMILY says which",
        )


def _check_dimensions(family: Family, wishes: Wishes, published: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Raises UsageError where the family takes the config as published but not as changed."""
    try:
        _shapes(family, changed)
    except (Damaged, Refused) as fault:
        with contextlib.suppress(Damaged, Refused):
            _shapes(family, published)
            raise UsageError(
                "wished-for dimensions contradict the architecture, nothing was written",
                where=f"{', '.join(wishes.dimensions)} in {wishes.file}",
                expected=fault.expected,
                found=fault.what,
            ) from fault
        raise


def _reader(wishes: Wishes, scratch_bytes: int) -> BoxReader:
    del scratch_bytes  # nothing is read
    return FakeReader(wishes)


def _shapes(family: Family, config: Mapping[str, Any]) -> dict[str, Index]:
    specs = expected_specs(family, family.facts(config))
    return {name: spec.file_shape for name, spec in specs.items()}


def _check_patterns(wishes: Wishes, shapes: Mapping[str, Index]) -> None:
    used = {fill_pattern for name in shapes for fill_pattern in [wishes.pattern_of(name)] if fill_pattern}
    idle = [pattern for pattern in wishes.fills if pattern not in used]
    if idle:
        raise UsageError(
            "--fake-weight-config fills no tensor with a pattern",
            where=f"{', '.join(idle)} in {wishes.file}",
            expected="names of tensors that no earlier pattern takes",
        )


def _words(wishes: Wishes) -> str:
    """What the values are, for the plan's id and the receipt."""
    return json.dumps([[pattern, repr(fill)] for pattern, fill in (*wishes.fills.items(), ("*", wishes.fill))])
