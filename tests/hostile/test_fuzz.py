"""Random damage to any file of a source."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.arch.registry import by_name
from dconv.errors import DconvError
from dconv.pipeline import Request, prepare, run
from dconv.sharding.rank import Settings
from tests.hostile.conftest import CONTAINERS, check_form, megatron_of
from tests.models import config_of, write_random

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def _targets(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("dconv.json",)]


def request_of(source: Path, out: Path) -> Request:
    return Request(source, "megatron" if source.name == "hf" else "hf", out)


def weights(out: Path) -> dict[str, bytes]:
    """The files that hold an output's tensors and nothing else (Megatron's extra states repeat the config)."""
    paths = sorted([*out.rglob("*.safetensors"), *out.rglob("__0_0.distcp")])
    return {path.name: path.read_bytes() for path in paths}


def unequal(a: bytes, b: bytes) -> int:
    """Bytes that differ, of two strings of one length."""
    return int(np.count_nonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)))


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the weights of what is made of it undamaged."""

    path: Path
    weights: dict[str, bytes] = field(repr=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """One small source of each container."""
    root = tmp_path_factory.mktemp("fuzz")
    family = by_name("qwen2")
    hf = write_random(root / "hf", family, config_of(family, num_hidden_layers=2), shard_size=30_000)
    found = {}
    for kind, source in {"hf": hf, **{name: megatron_of(hf, name) for name in CONTAINERS}}.items():
        run(prepare(request_of(source, root / f"undamaged-{kind}")), Settings())
        found[kind] = Source(source, weights(root / f"undamaged-{kind}"))
        assert len(found[kind].weights) == 1
    return found


@pytest.mark.parametrize("kind", ["hf", *CONTAINERS])
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_random_damage_is_an_error_of_ours_or_harmless(
    sources: dict[str, Source], kind: str, data: st.DataObject
) -> None:
    """Flipped bytes, cuts, additions in any file: one of our errors, or no byte is wrong but those that were flipped.

    Where a container has checksums of its tensors nothing reads them: a flipped byte goes through, but into its place.
    """
    source, undamaged = sources[kind].path, sources[kind].weights
    victims = _targets(source)
    victim = victims[data.draw(st.integers(0, len(victims) - 1), label="file")]
    good, times = victim.read_bytes(), victim.stat()
    # headers are at the front, zip directories at the end
    at = data.draw(st.one_of(st.integers(0, len(good)), st.integers(0, 300), st.integers(len(good) - 300, len(good))))
    at = max(0, min(at, len(good)))
    junk = data.draw(st.binary(max_size=9), label="junk")
    bad = data.draw(
        st.sampled_from([good[:at], good[:at] + junk + good[at:], good[:at] + junk + good[at + len(junk) :]])
    )
    flipped = unequal(good, bad) if len(good) == len(bad) else 0
    work = source.parent / "work"
    work.mkdir()
    try:
        victim.write_bytes(bad)
        try:
            job = prepare(request_of(source, work / "out"))
            assert list(work.iterdir()) == []
            run(job, Settings())
        except DconvError as error:
            check_form(str(error), error.exit_code)
            assert list(work.iterdir()) == []
        else:
            made = weights(work / "out")
            assert {name: len(body) for name, body in made.items()} == {n: len(body) for n, body in undamaged.items()}
            assert sum(unequal(made[name], undamaged[name]) for name in made) <= flipped
    finally:
        shutil.rmtree(work)
        victim.write_bytes(good)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
