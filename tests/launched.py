"""The conversion that tests of launchers run: small, by several ranks, and what one rank makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dconv.arch.registry import by_name
from dconv.pipeline import Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, tree_digest, write_random

#: Of ``megatron``.
OPTIONS = ["--tp", "2", "--megatron-format", "legacy"]


def small_llama(folder: Path, *, shard_size: int = 200_000, **sizes: int) -> Path:
    """A source of several files."""
    family = by_name("llama")
    config = config_of(family, hidden_size=64, intermediate_size=192, vocab_size=301, head_dim=16, **sizes)
    return write_random(folder / "model", family, config, shard_size=shard_size)


def by_one_rank(model: Path, **options: Any) -> dict[str, str]:
    """What one rank makes of `small_llama` with `OPTIONS`, or with others, beside it."""
    out = model.parent / "expected"
    options = options or {"parallel": Parallel(tp=2, etp=2), "megatron_format": "legacy"}
    run(prepare(Request(model, "megatron", out, **options)), Settings())
    return tree_digest(out)
