"""Laws 1 and 2 over every family in the registry: bit-identical round trips, at layouts drawn at random and fixed."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.arch.family import Family
from dconv.arch.layouts import heads_divide, size
from dconv.arch.registry import families
from dconv.errors import Refused
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.models import config_of, facts_of, tensors, tree_digest, write_random

CONTAINERS = ("torch_dist", "legacy")


def fits(family: Family, facts: Mapping[str, Any], parallel: Parallel) -> bool:
    """Whether every tensor of a model divides over the tensor-parallel ranks (of experts: their own)."""
    try:
        for entry in family.entries(facts):
            if not entry.fused.padded:
                entry.fused.shard(0, parallel.tp if entry.expert < 0 else parallel.etp)
    except Refused:
        return False
    return heads_divide(facts, parallel.tp)


@st.composite
def models(draw: st.DrawFn, family: Family) -> tuple[dict[str, Any], list[tuple[str, Parallel, int, str]]]:
    """A config and two Megatron targets (container, layout, vocabulary divisor, layer names) that it divides by."""
    groups = draw(st.sampled_from([1, 2, 4]))
    config = config_of(
        family,
        num_attention_heads=groups * draw(st.sampled_from([1, 2, 3])),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([4, 8])),
        hidden_size=draw(st.sampled_from([16, 24])),
        intermediate_size=draw(st.sampled_from([16, 48])),
        vocab_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 6)),
        tie_word_embeddings=draw(st.booleans()),
    )
    facts = facts_of(family, config)
    layers = size(facts, "layers")
    targets = []
    for _ in range(2):
        stages = draw(
            st.lists(st.integers(0, layers), max_size=size(facts, "most_stages") - 1 if "most_stages" in facts else 3)
        )
        cuts = [0, *sorted(min(s, layers) for s in stages), layers]
        counts = [b - a for a, b in itertools.pairwise(cuts)]
        vpp = 2 if len(counts) == 4 and draw(st.booleans()) else 1
        pp = len(counts) // vpp
        layout = tuple(tuple(counts[v * pp + p] for v in range(vpp)) for p in range(pp))
        divisions = (
            INNER if size(facts, "experts") else [sizes for sizes in INNER if sizes.etp == sizes.tp == sizes.inner]
        )
        inner = draw(st.sampled_from([sizes for sizes in divisions if fits(family, facts, sizes)]))
        parallel = replace(inner, pp=pp, vpp=vpp, stages=layout)
        one_file_a_rank = len({(coord.tp, coord.ep) for coord in inner.coords()}) == inner.world
        container = draw(st.sampled_from(CONTAINERS if one_file_a_rank else CONTAINERS[:1]))
        impl = draw(st.sampled_from(["transformer_engine", "local"]))
        targets.append((container, parallel, draw(st.sampled_from([1, 7, 16])), impl))
    return config, targets


#: Every division of a stage: over tensor parallelism, and its ranks again over experts.
INNER = [Parallel(tp=tp, etp=tp) for tp in (1, 2, 3, 4, 8)] + [
    Parallel(tp=tp, ep=ep, etp=etp)
    for tp in (1, 2, 4)
    for ep in (1, 2, 4)
    for etp in (1, 2, 4)
    if (ep > 1 or etp != tp) and max(tp, ep * etp) % min(tp, ep * etp) == 0
]


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
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), shard_size=st.sampled_from([2000, 10**12]))
def test_round_trips_are_bit_identical(name: str, data: st.DataObject, shard_size: int) -> None:
    family = families()[name]
    config, (first, second) = data.draw(models(family))
    with tempfile.TemporaryDirectory() as folder:
        check_laws(Path(folder), family, config, first, second, shard_size)


def check_laws(
    root: Path, family: Family, config: dict[str, Any], first: Any, second: Any, shard_size: int = 10**12
) -> None:
    source = write_random(root / "hf", family, config, shard_size=shard_size)
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

#: Expert parallelism inside tensor parallelism, beside it, beyond it; whole experts on every rank.
OF_EXPERTS = [
    Parallel(tp=1, ep=2),
    Parallel(tp=2, ep=2, pp=2),
    Parallel(tp=2, ep=4, vpp=2, pp=2),
    Parallel(tp=2, ep=2, etp=2),
    Parallel(tp=4, ep=2, etp=2),
    Parallel(tp=2, ep=1, pp=2),
]


#: Vocabularies that do and do not divide, tied and untied: each layout meets one of the four, with --long all.
KINDS = [(vocab, tied) for vocab in (64, 61) for tied in (False, True)]


@pytest.mark.parametrize("kind", range(4), ids=["vocab64", "vocab64-tied", "vocab61", "vocab61-tied"])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", families())
def test_fixed_layouts(name: str, container: str, kind: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family = families()[name]
    vocab, tied = KINDS[kind]
    sizes = {"vocab_size": vocab, "tie_word_embeddings": tied, "num_hidden_layers": 8, "num_key_value_heads": 4}
    config = config_of(family, **sizes)
    source = write_random(tmp_path / "hf", family, config)
    facts = facts_of(family, config)
    layouts = LAYOUTS + (OF_EXPERTS if size(facts, "experts") else [])
    layouts = [parallel for parallel in layouts if parallel.pp <= (facts.get("most_stages") or parallel.pp)]
    every = request.config.getoption("--long")
    for number, parallel in enumerate(layouts):
        if every or number % len(KINDS) == kind:
            out = to_megatron(source, tmp_path / f"m{number}", (container, parallel, 8, "transformer_engine"))
            convert(Request(out, "hf", tmp_path / f"b{number}"))
            assert tensors(tmp_path / f"b{number}") == tensors(source), parallel


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", families())
def test_layouts_that_do_not_divide_are_refused(name: str, container: str, tmp_path: Path) -> None:
    family = families()[name]
    source = write_random(tmp_path / "hf", family, config_of(family))
    for parallel in (Parallel(tp=5, etp=5), Parallel(pp=3), Parallel(pp=2, vpp=3), Parallel(pp=2, first=9)):
        with pytest.raises(Refused):
            to_megatron(source, tmp_path / "m", (container, parallel, 8, "local"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
