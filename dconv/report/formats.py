"""What ``dconv formats`` says: the conversion matrix, every container, scheme and type by name, compilers and chips."""

from __future__ import annotations

from typing import Any

from dconv import matrix
from dconv.arch.gguf import ARCHS
from dconv.checkpoint.detect import CONTAINERS
from dconv.codec.gguf import BLOCKS
from dconv.coded.decode import METHODS
from dconv.gguf import TYPES
from dconv.hw.registry import adapters
from dconv.mlx import VARIANTS as MLX_VARIANTS
from dconv.quantise import VARIANTS
from dconv.report.table import Table
from dconv.request import FORMATS


def known() -> dict[str, Any]:
    """For ``--json``."""
    encode = {format: {name: one.words for name, one in variants.items()} for format, variants in VARIANTS.items()}
    return {
        "read": sorted(CONTAINERS),
        "decode": sorted(METHODS),
        "write": _spellings(),
        "encode": encode,
        "gguf": {"architectures": sorted(ARCHS), "types": sorted(BLOCKS), "encode": sorted(TYPES)},
        "mlx": {"encode": list(MLX_VARIANTS)},
        "matrix": dict(matrix.rows()),
        "compile": {name: {"title": one.title, "platforms": dict(one.platforms)} for name, one in adapters().items()},
    }


def parts() -> list[str | Table]:
    """For a person."""
    said = known()
    columns = matrix.outputs()
    rows = [
        (matrix.INPUTS[name].words, *(matrix.SIGNS[cells[one]] for one in columns)) for name, cells in matrix.rows()
    ]
    table = Table(rows, ("", *columns), centred=frozenset(range(1, len(columns) + 1)))
    shown: list[str | Table] = [table, ""]
    shown += [*(f"{matrix.SIGNS[kind] or ' '}  {words}" for kind, words in matrix.MEANINGS.items()), ""]
    shown.append(f"reads (--from)   {', '.join(said['read'])}")
    shown.append(f"decodes          quant_method {', '.join(said['decode'])}")
    shown.append(f"reads gguf of    {', '.join(said['gguf']['architectures'])}")
    shown.append(f"decodes          GGUF's {', '.join(said['gguf']['types'])}")
    for engine, names in said["write"].items():
        also = [name for name in names if name != engine]
        shown.append(f"writes (FORMAT)  {engine}" + (f", also spelled {', '.join(also)}" if also else ""))
    for format, variants in said["encode"].items():
        shown += [f"encodes          {format} --quant {name}  {words}" for name, words in variants.items()]
    shown += [f"encodes          {name} --quant {', '.join(said[name]['encode'])}" for name in ("gguf", "mlx")]
    for target, one in said["compile"].items():
        kinds: dict[str, list[str]] = {}
        for chip, what in one["platforms"].items():
            kinds.setdefault(what, []).append(chip)
        words = f"hands over       {target} --platform"
        shown += [f"{words} {', '.join(chips)}  {one['title']}: {what}" for what, chips in kinds.items()]
    return shown


def _spellings() -> dict[str, list[str]]:
    spellings: dict[str, list[str]] = {}
    for spelling, engine in FORMATS.items():
        if spelling not in VARIANTS:
            spellings.setdefault(engine, []).append(spelling)
    return spellings
