"""Laws 1 and 2 over every family in the registry: bit-identical round trips, at layouts drawn at random and fixed."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.arch.family import Family
from dconv.arch.layouts import heads_divide
from dconv.arch.registry import families
from dconv.errors import Refused
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, tree_digest, write_random

CONTAINERS = ("torch_dist", "legacy")


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[str, Parallel, int, str]]]:
    """A config and two Megatron targets (container, layout, vocabulary divisor, layer names) that it divides by."""
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([4, 8]))
    layers = draw(st.integers(1, 6))
    sizes = {
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_size": draw(st.sampled_from([16, 24])),
        "intermediate_size": draw(st.sampled_from([16, 48])),
        "vocab_size": draw(st.integers(1, 70)),
        "num_hidden_layers": layers,
        "tie_word_embeddings": draw(st.booleans()),
    }
    facts = {"heads": groups * per_group, "groups": groups, "head_dim": head_dim}
    targets = []
    for _ in range(2):
        divides = [t for t in (1, 2, 3, 4, 8) if heads_divide(facts, t) and sizes["intermediate_size"] % t == 0]
        tp = draw(st.sampled_from(divides))
        stages = draw(st.lists(st.integers(0, layers), max_size=3))
        cuts = [0, *sorted(min(s, layers) for s in stages), layers]
        counts = [b - a for a, b in itertools.pairwise(cuts)]
        vpp = 2 if len(counts) == 4 and draw(st.booleans()) else 1
        pp = len(counts) // vpp
        layout = tuple(tuple(counts[v * pp + p] for v in range(vpp)) for p in range(pp))
        parallel = Parallel(tp=tp, pp=pp, vpp=vpp, etp=tp, stages=layout)
        impl = draw(st.sampled_from(["transformer_engine", "local"]))
        targets.append((draw(st.sampled_from(CONTAINERS)), parallel, draw(st.sampled_from([1, 7, 16])), impl))
    return sizes, targets


def to_megatron(source: Path, out: Path, target: tuple[str, Parallel, int, str], **options: Any) -> Path:
    container, parallel, divisor, impl = target
    convert(
        Request(
            source, "megatron", out, parallel=parallel, megatron_format=container, divisor=divisor,
            transformer_impl=impl, **options,
        )
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", families())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=models(), shard_size=st.sampled_from([2000, 10**12]))
def test_round_trips_are_bit_identical(
    name: str, drawn: tuple[dict[str, Any], list[tuple[str, Parallel, int, str]]], shard_size: int
) -> None:
    sizes, (first, second) = drawn
    family = families()[name]
    with tempfile.TemporaryDirectory() as folder:
        check_laws(Path(folder), family, sizes, first, second, shard_size)


def check_laws(
    root: Path, family: Family, sizes: dict[str, Any], first: Any, second: Any, shard_size: int = 10**12
) -> None:
    source = write_random(root / "hf", family, config_of(family, **sizes), shard_size=shard_size)
    a = to_megatron(source, root / "a", first)
    convert(Request(a, "hf", root / "back"))
    assert tensors(root / "back") == tensors(source)
    for side in ("config.json", "tokenizer.json"):
        assert (root / "back" / side).read_bytes() == (source / side).read_bytes()
    direct = to_megatron(a, root / "direct", second)
    through = to_megatron(root / "back", root / "through", second)
    assert tree_digest(direct) == tree_digest(through)
    again = to_megatron(direct, root / "again", first)
    assert tree_digest(again) == tree_digest(a)


LAYOUTS = [
    Parallel(tp=tp, pp=pp, vpp=vpp, etp=tp)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for vpp in (1, 2)
    if vpp == 1 or pp > 1
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab", [64, 61], ids=["vocab64", "vocab61"])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", families())
def test_fixed_layouts(name: str, container: str, vocab: int, tied: bool, tmp_path: Path) -> None:
    family = families()[name]
    sizes = {"vocab_size": vocab, "tie_word_embeddings": tied, "num_hidden_layers": 8, "num_key_value_heads": 4}
    source = write_random(tmp_path / "hf", family, config_of(family, **sizes))
    for number, parallel in enumerate(LAYOUTS):
        out = to_megatron(source, tmp_path / f"m{number}", (container, parallel, 8, "transformer_engine"))
        convert(Request(out, "hf", tmp_path / f"b{number}"))
        assert tensors(tmp_path / f"b{number}") == tensors(source), parallel


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", families())
def test_layouts_that_do_not_divide_are_refused(name: str, container: str, tmp_path: Path) -> None:
    family = families()[name]
    source = write_random(tmp_path / "hf", family, config_of(family))
    for parallel in (Parallel(tp=5, etp=5), Parallel(pp=3), Parallel(pp=2, vpp=3), Parallel(pp=2, first=5)):
        with pytest.raises(Refused):
            to_megatron(source, tmp_path / "m", (container, parallel, 8, "local"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
