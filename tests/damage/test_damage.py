"""Whatever happens to an output after it was written, ``dconv check`` finds it, and names the tensors that were hit.

`kinds` has what happens, `containers` to what; `truth` tells what was hit without dconv's readers. By default each kind
is tried once on each container, with ``--long`` all of `kinds.TOTAL`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dconv import matrix
from dconv.cli import main
from tests.damage import kinds
from tests.damage.containers import CONTAINERS, Made, copied, make
from tests.damage.kinds import Damage

Check = Callable[[Path], tuple[int, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each container, made when it is asked for."""
    root = tmp_path_factory.mktemp("damage")
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = make(name, root)
        return known[name]

    return get


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """``dconv check`` without running: its exit code, and all that it says."""

    def run(path: Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["check", str(path), "--no-run"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def named(text: str) -> Callable[[str], bool]:
    """Whether a message names a tensor or a file: in a line of its own, with numbers in ranges."""
    lines = [re.sub(r"^ *(where|found)? +(the header of )?", "", line) for line in text.splitlines()]
    parts = [part for line in lines for part in re.split(r" in (?!.* in )| \(|: ", line) if part]
    patterns = [re.compile("".join(_patterns(part))) for part in parts if part.count("{") == part.count("}")]
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)


def _patterns(line: str) -> Iterator[str]:
    for i, part in enumerate(re.split(r"[{}]", line)):
        if i % 2 == 0:
            yield re.escape(part)
            continue
        numbers: list[str] = []
        for run in part.split(","):
            low, _, high = run.partition("..")
            numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
        yield f"(?:{'|'.join(numbers)})"


def test_names_of_a_message() -> None:
    found = named(
        "  where      a.{0..1,5}.b{02..03} in x.bin\n             the header of y{0..3}.bin\n  found  z: missing"
    )
    assert all(map(found, ("a.0.b02", "a.5.b03", "x.bin", "y2.bin", "z")))
    assert not any(map(found, ("a.2.b02", "a.0.b2", "b", "a.0.b02x", "y4.bin")))


def tried(made: Made, check: Check, rounds: range) -> int:
    """Do each damage, ask, and undo it; returns how many there were."""
    missed: list[str] = []
    count = 0
    for seed, kind in kinds.damages(rounds):
        draw = np.random.default_rng((list(CONTAINERS).index(made.name), seed))
        done: Damage = kind(made, draw)
        code, said = check(made.folder)
        made.restore()
        count += 1
        names = named(said)
        many = "more patterns" in said
        unnamed = [name for name in done.hit if not names(name)]
        if code != 4 or (unnamed and not many):
            missed.append(f"{kind.__name__}: {done.words}: exit {code}, not named: {unnamed}\n{said}")
    assert not missed, "\n".join(missed)
    return count


def containers(slow: bool) -> list[object]:
    marks = [pytest.mark.long]
    return [pytest.param(name, marks=marks * (kind.slow and slow)) for name, kind in CONTAINERS.items()]


@pytest.mark.parametrize("name", containers(slow=True))
def test_each_kind_is_found(made: Callable[[str], Made], check: Check, name: str) -> None:
    one = made(name)
    code, said = check(one.folder)
    assert code == 0, said
    assert tried(one, check, range(kinds.QUICK)) == len(kinds.KINDS)
    assert check(one.folder)[0] == 0


@pytest.mark.long
@pytest.mark.parametrize("name", containers(slow=False))
def test_all_are_found(
    made: Callable[[str], Made], check: Check, name: str, counted: Callable[[str, int], None]
) -> None:
    count = tried(made(name), check, range(kinds.ROUNDS))
    assert count * len(CONTAINERS) == kinds.TOTAL
    counted("damages found", count)
    counted("bit flips found", kinds.ROUNDS * sum(kind.__name__.startswith("flip") for kind in kinds.KINDS))


def test_these_are_all_containers_and_enough_damages() -> None:
    assert kinds.TOTAL >= 1000
    formats = {kind.format for kind in CONTAINERS.values()}
    assert {"huggingface" if one == "hf" else one for one in formats} >= set(matrix.outputs())


def test_an_undamaged_copy_is_whole(made: Callable[[str], Made], check: Check, tmp_path: Path) -> None:
    """Elsewhere, with other times, with a file of someone's beside it."""
    for name in ("hf_sharded", "torch_dist", "gguf", "hand_off"):
        path = copied(made(name), tmp_path / name)
        assert check(path)[0] == 0
        if name != "hand_off":  # there any other file would travel along to the compiler
            (path / "notes.txt").write_text("mine")
            code, said = check(path)
            assert (code, "not covered by the receipt: notes.txt" in said) == (0, True)


@pytest.mark.parametrize("name", ["hf", "torch_dist", "gguf", "pt"])
def test_without_its_receipt_nothing_is_said_of_digests(
    made: Callable[[str], Made], check: Check, tmp_path: Path, name: str
) -> None:
    """That is no damage that can be found: it is like any checkpoint that something else wrote."""
    path = copied(made(name), tmp_path / name)
    (path / "dconv.json").unlink()
    code, said = check(path)
    assert code == 0, said
    assert "no dconv.json to compare with" in said
    assert "as dconv wrote" not in said


def test_an_older_receipt_has_no_digest_of_its_own(made: Callable[[str], Made], check: Check, tmp_path: Path) -> None:
    path = copied(made("hf"), tmp_path / "hf")
    written = json.loads((path / "dconv.json").read_text())
    own = written.pop("own_digest")
    (path / "dconv.json").write_text(json.dumps(written, indent=1) + "\n")
    assert check(path)[0] == 0
    for lies in ({**written, "own_digest": own[::-1]}, {**written, "own_digst": own}, {"own_digest": own, **written}):
        (path / "dconv.json").write_text(json.dumps(lies, indent=1) + "\n")
        code, said = check(path)
        assert (code, "the receipt changed since it was written" in said) == (4, True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["hf", "torch_dist", "gguf", "hand_off"])
def test_every_bit_of_a_receipt(made: Callable[[str], Made], check: Check, name: str) -> None:
    one = made(name)
    data = one.content[one.kind.seal]
    path = one.folder / one.kind.seal
    for at in [*range(0, len(data), 11), *range(len(data) - 100, len(data))]:
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            assert check(one.folder)[0] == 4, (at, bit)
    one.restore()


def test_a_receipt_beside_a_file_is_held_against_its_digest_too(
    made: Callable[[str], Made], check: Check, tmp_path: Path
) -> None:
    """A flip in the name of the file: it would no longer be one that the receipt speaks of."""
    folder = copied(made("gguf"), tmp_path / "gguf")
    path = next(folder.glob("*.gguf"))
    receipt = (folder / "dconv.json").read_text()
    assert check(path)[0] == 0
    (folder / "dconv.json").write_text(receipt.replace(path.name, path.name.replace("m", "l", 1)))
    assert check(path)[0] == 4
