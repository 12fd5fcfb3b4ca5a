"""Somebody else's checkpoint has no digests: what is cut off is found, and a header that lies.

A bit that flips inside of a weight cannot be found there (but in what torch saved, see `test_saved_by_torch`): it is
another weight, and nothing says what it was. Nor is a bit that no reader looks at, such as padding, a date in a zip
archive, a word of a vocabulary: but then all weights are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dconv
from tests.damage import kinds
from tests.damage.containers import CONTAINERS, Made, make
from tests.damage.test_damage import Check, check

__all__ = ["check"]

#: Those that are read as they are stored; the others repeat their files.
NAMES = ("hf", "hf_sharded", "fp8", "neuron", "mlx", "torch_dist", "legacy", "model_pt", "pt", "bmtrain", "gguf")
#: Their header is all there is between tensors, and each byte of it counts.
STRICT = ("hf_sharded", "fp8", "mlx", "neuron")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """As something else would have written it."""
    root = tmp_path_factory.mktemp("foreign")
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            one = make(name, root)
            (one.folder / one.kind.seal).unlink()
            content = {file: data for file, data in one.content.items() if file != one.kind.seal}
            known[name] = replace(one, content=content)
        return known[name]

    return get


def files_of(made: Made) -> list[str]:
    return sorted({tensor.file for tensor in made.tensors})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_off_is_found(foreign: Callable[[str], Made], check: Check, name: str) -> None:
    made = foreign(name)
    code, said = check(made.folder)
    assert (code, "no dconv.json to compare with" in said) == (0, True), said
    draw = np.random.default_rng(1)
    for file in files_of(made):
        whole = made.content[file]
        for size in (0, 1, *draw.integers(len(whole), size=3), len(whole) - 1):
            (made.folder / file).write_bytes(whole[:size])
            assert check(made.folder)[0] == 4, (file, size)
        made.restore()


@pytest.mark.parametrize("name", NAMES)
def test_a_header_that_lies_is_found_or_nothing_of_the_weights_is_lost(
    foreign: Callable[[str], Made], check: Check, tmp_path: Path, name: str
) -> None:
    made = foreign(name)
    whole = make(name, tmp_path).folder
    found = 0
    for seed in range(12):
        done = kinds.flip_between(made, np.random.default_rng(seed))
        code, said = check(made.folder)
        assert code in ((3, 4) if name in STRICT else (0, 3, 4)), (done.words, said)
        found += code != 0
        if code == 0:
            apart = dconv.diff(whole, made.folder)
            assert not (apart.only_a or apart.only_b or apart.differences), done.words
        made.restore()
    assert found


def test_a_bit_of_a_weight_is_not_found(foreign: Callable[[str], Made], check: Check) -> None:
    """Which is why there are receipts."""
    made = foreign("hf")
    one = made.tensors[3]
    data = bytearray(made.content[one.file])
    data[one.begin] ^= 1
    (made.folder / one.file).write_bytes(data)
    assert check(made.folder)[0] == 0
    made.restore()


def test_names_are_containers() -> None:
    assert set(NAMES) < CONTAINERS.keys()
