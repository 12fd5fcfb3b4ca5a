"""Weights in codes of several kinds in one checkpoint, and what such a checkpoint is worth before it is written.

Each kind has its own scheme, which says what a weight becomes and what the config has of it. Sources of how a config
puts them together: compressed-tensors 0.20.0 (``mixed-precision``), ``config/base.py`` and
``quantization/quant_config.py``; for quark vLLM's ``quark.py``, which takes names in ``layer_quant_config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dconv.coded.compressed_config import MIXED
from dconv.coded.compressed_encode import config, targets_of
from dconv.coded.decode import KEY, decode
from dconv.coded.encode import Coded, Scheme, encode
from dconv.coded.quark_encode import Quark
from dconv.coded.repack import Repack
from dconv.sharding.tensor import Extent, Logical, Piece, Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dconv.arch.family import Family
    from dconv.arch.layouts import Facts
    from dconv.sharding.derived import Array
    from dconv.sharding.tensor import TensorSpec


@dataclass(frozen=True)
class Mixed:
    """A `dconv.coded.encode.Scheme` of several.

    Attributes:
        kinds: schemes of compressed-tensors, or of quark, each with the names of its weights.
    """

    kinds: Sequence[tuple[Scheme, frozenset[str]]]
    columns: int = field(default=1, init=False)
    _of: Mapping[str, tuple[Scheme, Logical]] = field(default_factory=dict[str, tuple[Scheme, Logical]], repr=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return "codes of several kinds, as quark" if self._quark else f"codes of several kinds ({MIXED})"

    @property
    def _quark(self) -> bool:
        return isinstance(self.kinds[0][0], Quark)

    def of(self, logical: Logical) -> Mixed:
        """The same with the whole numbers that a source has, or will have.

        A kind's scheme sees its own weights only: what shares a scale with others (NVFP4) shares it with its like.

        Raises:
            Refused: some are in a form that cannot be packed anew.
        """
        found: dict[str, tuple[Scheme, Logical]] = {}
        kinds: list[tuple[Scheme, frozenset[str]]] = []
        for scheme, names in self.kinds:
            own = replace(logical, specs={name: spec for name, spec in logical.specs.items() if name in names})
            with_numbers = scheme.of(own) if isinstance(scheme, Repack) else scheme
            kinds.append((with_numbers, names))
            found |= dict.fromkeys(names, (with_numbers, own))
        return replace(self, kinds=kinds, _of=found)

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """By the scheme that the weight was given."""
        del logical
        scheme, own = self._of[spec.name]
        return scheme.code(spec, dense, own)

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`; every group names its modules, in quark all but that of the most weights."""
        if self._quark:
            return self._quark_config(plain)
        groups: list[dict[str, Any]] = []
        for scheme, names in self.kinds:
            own = {name: one for name, one in coded.items() if name in names}
            of_others = [name.removesuffix(".weight") for name in coded if name not in names]
            made: Any = scheme.config(plain, own)
            for group in made["config_groups"].values():
                if group["targets"] == ["Linear"]:
                    modules = [name.removesuffix(".weight") for name in own]
                    group = {**group, "targets": targets_of(modules, of_others)}
                groups.append(group)
        return config(groups, plain)

    def _quark_config(self, plain: list[str]) -> dict[str, Any]:
        first, *others = sorted(self.kinds, key=lambda kind: -len(kind[1]))
        said: dict[str, Any] = first[0].config(plain, {})
        layers = {
            name.removesuffix(".weight"): scheme.config(plain, {})["global_quant_config"]
            for scheme, names in others
            for name in sorted(names)
        }
        return {**said, "layer_quant_config": layers}

    def note(self, said: Mapping[str, Any]) -> str:
        """What a person should know of an output with this config; "" where there is nothing."""
        notes = (scheme.packer.note(said) for scheme, _ in self.kinds if isinstance(scheme, Repack))
        return next(filter(None, notes), "")


def as_coded(family: Family, facts: Facts, logical: Logical, scheme: Scheme, wanted: set[str]) -> Logical:
    """The checkpoint with the weights ``wanted`` worth what a scheme's codes are worth, in fp32.

    The codes are computed as for the output, and decoded by what its config will say: what reads this has the values
    that a reader of the output gets.
    """
    made = encode(family, facts, logical, scheme, wanted)
    parts = {name: _stored(made.logical, name) for name in made.fixed}
    found = decode(parts, {KEY: made.config, "dtype": "float32"}, _no_values)
    specs, pieces = dict(logical.specs), dict(logical.pieces)
    for name, stored in found.tensors.items():
        (extent,) = stored.extents
        specs[name] = stored.spec
        pieces[name] = (Piece(name, extent.region, extent.file, extent.offset, extent.strides, stored.spec.dtype),)
    return replace(
        logical,
        specs=specs,
        pieces=pieces,
        derived={**made.logical.derived, **found.derived},
        replicas={name: found for name, found in logical.replicas.items() if name not in wanted},
    )


def _stored(logical: Logical, name: str) -> Stored:
    spec, pieces = logical.specs[name], logical.pieces[name]
    return Stored(spec, tuple(Extent(p.region, p.file, p.offset, p.strides) for p in pieces))


def _no_values(stored: Stored) -> NDArray[np.generic]:
    raise RuntimeError(f"{stored.spec.name} is to be read while a model is planned")
