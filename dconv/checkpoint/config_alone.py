"""A directory of config.json without weights: what a model would be, so that its conversion can be planned and priced.

No file stands behind its pieces; only ``dconv plan`` opens one.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from dconv.arch.args import dtype_of
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint.files import read_json
from dconv.checkpoint.source import Located, Source, expected_specs, side_files
from dconv.sharding.region import Region
from dconv.sharding.tensor import Piece

FORMAT: Final = "config alone"
_FILE: Final = "model.safetensors"
#: Bytes of the widest element, for the strides of a file that is not there.
_WIDE: Final = 8


def open_source(folder: Path) -> Source:
    """Describe the model that config.json speaks of, its weights in the config's dtype (bf16 where it has none)."""
    config = read_json(folder / "config.json", what="config.json")
    dtype = dtype_of(config)

    def locate(family: Family, facts: Facts) -> Located:
        located = Located({}, {}, {})
        for name, spec in expected_specs(family, facts).items():
            strides = [_WIDE, *(_WIDE * n for n in itertools.accumulate(reversed(spec.shape[1:]), int.__mul__))]
            axes = tuple(reversed(strides[: len(spec.shape)]))
            located.pieces[name] = [Piece(name, Region.whole(spec.shape), _FILE, 0, axes, dtype)]
        return located

    return Source(
        format=FORMAT,
        root=folder,
        config=config,
        args=None,
        side=side_files(folder),
        files={},
        parallel=None,
        locate=locate,
    )
