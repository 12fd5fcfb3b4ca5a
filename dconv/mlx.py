"""FORMAT mlx (``--quant``): a described model in MLX's tensors, plain or in affine codes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.mlx import Held, lay_out, left_out
from dconv.arch.mlx_config import config_of
from dconv.checkpoint.mlx import as_held
from dconv.codec import affine
from dconv.coded import mlx_encode
from dconv.coded.decode import KEY
from dconv.coded.mlx import KEY as MLX_KEY
from dconv.coded.mlx import Grid
from dconv.describe import Described
from dconv.errors import Refused, UsageError, group_names
from dconv.request import Request
from dconv.sharding.derived import Array, Derived, real_files
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.tensor import Logical, Piece, TensorSpec

FORMAT: Final = "mlx"
#: ``--quant`` of groups of 64 columns.
VARIANTS: Final = tuple(f"{bits}bit" for bits in affine.BITS)
_QUANT: Final = re.compile(rf"({'|'.join(map(str, affine.BITS))})bit(?:_g({'|'.join(map(str, affine.GROUPS))}))?")
_USUAL_GROUP: Final = 64
#: What mlx-lm's predicates hold some layers in.
_EIGHT: Final = Grid(8, 64)


@dataclass(frozen=True)
class Written:
    """What is said of a model in MLX's tensors.

    Attributes:
        scheme: the codes in words; "" for none.
    """

    model: Described
    notes: tuple[str, ...]
    scheme: str


def grid_of(request: Request) -> Grid | None:
    """The codes that a request asks for; None where weights are written as they are.

    Raises:
        UsageError: there are no such codes.
    """
    if request.quant is None:
        return None
    found = _QUANT.fullmatch(request.quant)
    if found is None:
        raise UsageError(
            "mlx has no such variant, nothing was written",
            where=f"--quant {request.quant}",
            expected=", ".join(VARIANTS) + ", with groups of 64 columns; 4bit_g32, 4bit_g128 for others",
        )
    return Grid(int(found[1]), int(found[2] or _USUAL_GROUP))


def as_mlx(model: Described, request: Request) -> Written:
    """The model as mlx-lm's class has it.

    Raises:
        Refused: see `dconv.arch.mlx.lay_out`, `dconv.arch.mlx_config.config_of`, `dconv.checkpoint.mlx.as_held`;
            no layer has whole groups.
    """
    grid = grid_of(request)
    held = lay_out(model.family, model.facts)
    config, notes = config_of(model.family, model.facts, model.config)
    predicted = {name: why for name, why in left_out(model.family, model.facts).items() if name in model.logical.specs}
    gone = {".".join(name.split(".")[:3]) + ".*": why for name, why in predicted.items()}
    logical = as_held(held, model.logical)
    logical = replace(logical, left_out={**logical.left_out, **gone})
    fixed, scheme = model.fixed, ""
    if request.dtype:
        config = {**config, **dict.fromkeys(("torch_dtype", "dtype"), TO_TORCH[request.dtype])}
    if grid:
        logical, said, fixed = _coded(held, logical, grid, request.dtype, model.keeps)
        config |= {MLX_KEY: said, KEY: said}
        scheme = f"MLX int{grid.bits}, {grid.group} columns with a scale and a bias"
        notes = (
            [f"{len(said) - 3} modules in int8 by groups of 64, as mlx-lm has them", *notes] if len(said) > 3 else notes
        )
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    source = replace(model.source, side=side)
    new = replace(model, source=source, config=config, logical=logical, fixed=fixed)
    return Written(new, tuple(notes), scheme)


def _coded(
    held: tuple[Held, ...], logical: Logical, grid: Grid, dtype: str | None, keeps: frozenset[str]
) -> tuple[Logical, dict[str, Any], frozenset[str]]:
    """The same in codes, what config.json says of them, and the tensors that ``--dtype`` has no say in.

    None of those that ``keeps`` names is put into codes.
    """
    said: dict[str, Any] = {"group_size": grid.group, "bits": grid.bits, "mode": "affine"}
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    derived: dict[str, Derived] = dict(logical.derived)
    fixed: set[str] = set()
    done: set[str] = set()
    for one in held:
        spec = logical.specs.get(one.name)
        if spec is None:
            continue
        if one.coding == "plain" or spec.shape[-1] % grid.group or spec.name in keeps:
            specs[spec.name], pieces[spec.name] = spec, logical.pieces[spec.name]
            continue
        its = _EIGHT if one.coding == "eight" else grid
        spec = replace(spec, dtype=dtype or spec.dtype)
        _check(spec, its)
        if one.coding == "eight":
            said[spec.name.removesuffix(".weight")] = {"group_size": its.group, "bits": its.bits}
        twins = logical.replicas.get(spec.name, ())
        dense = Array(spec.shape, logical.specs[spec.name].dtype, logical.pieces[spec.name], twins)
        coded = mlx_encode.code(spec, dense, logical, its)
        derived |= coded.derived
        done.add(spec.name)
        for part, where in coded.parts:
            specs[part.name], pieces[part.name] = part, where
            fixed.add(part.name)
    if not done:
        raise Refused(
            f"no layer has whole groups of {grid.group} columns, nothing was written",
            where=group_names(one.name for one in held if one.coding != "plain"),
            expected=f"a multiple of {grid.group} columns",
            do="--quant 4bit_g32 has the smallest groups" if grid.group > min(affine.GROUPS) else "leave --quant out",
        )
    replicas = {name: found for name, found in logical.replicas.items() if name not in done}
    files = {piece.file for found in (*pieces.values(), *replicas.values()) for piece in found}
    behind = real_files(files, derived)
    new = replace(
        logical,
        specs=specs,
        pieces=pieces,
        replicas=replicas,
        files={name: stamp for name, stamp in logical.files.items() if name in behind},
        derived=derived,
    )
    return new, said, frozenset(fixed)


def _check(spec: TensorSpec, grid: Grid) -> None:
    """Refuse what MLX's own ``quantize`` does not take.

    Raises:
        Refused: a dtype that has no scales, or columns that are no whole groups of a layer held in 8 bits.
    """
    if spec.dtype not in mlx_encode.DTYPES:
        raise Refused(
            f"MLX has no codes for weights in {spec.dtype}, nothing was written",
            where=spec.name,
            expected=", ".join(mlx_encode.DTYPES),
            do="--dtype bf16",
        )
    if spec.shape[-1] % grid.group:
        raise Refused(
            "mlx-lm holds this layer in 8 bits by groups of 64 columns, which it does not have, nothing was written",
            where=spec.name,
            expected="a multiple of 64 columns",
            found=str(spec.shape[-1]),
            do="leave --quant out",
        )
