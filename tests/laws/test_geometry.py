"""Boxes: intersection, bands and the cover proof, against sets of indices."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dconv.sharding.region import Region, first_overlap


def indices(region: Region) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True))))


def regions(rank: int) -> st.SearchStrategy[Region]:
    pair = st.lists(st.integers(0, 4), min_size=rank, max_size=rank)
    return st.builds(lambda a, n: Region(tuple(a), tuple(n)), pair, pair)


@given(st.integers(0, 3).flatmap(lambda rank: st.tuples(regions(rank), regions(rank))))
def test_intersection_is_that_of_the_index_sets(pair: tuple[Region, Region]) -> None:
    a, b = pair
    common = a.intersect(b)
    assert (indices(common) if common else set()) == indices(a) & indices(b)
    inside = zip(a.start, a.stop, b.start, b.stop, strict=True)
    assert a.contains(b) == all(low <= first and last <= high for low, high, first, last in inside)


@given(regions(3), st.integers(1, 40))
def test_bands_cover_in_row_major_order(region: Region, limit: int) -> None:
    bands = list(region.bands(limit))
    listed = [index for band in bands for index in sorted(indices(band))]
    assert listed == sorted(indices(region))
    assert all(band.volume <= limit or band.volume == 1 for band in bands)


@given(st.integers(1, 3).flatmap(lambda rank: st.lists(regions(rank), max_size=6)))
def test_overlap_is_found_exactly_when_there_is_one(boxes: list[Region]) -> None:
    shared = any(indices(a) & indices(b) for a, b in itertools.combinations(boxes, 2))
    found = first_overlap(boxes)
    assert (found is not None) == shared
    if found:
        assert indices(boxes[found[0]]) & indices(boxes[found[1]])
