"""A plan that does not write every byte exactly once is refused before the first byte; such a source is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from dconv.errors import Damaged, Refused
from dconv.sharding.plan import Plan, Target, TargetFile, TargetTensor, build_plan, check_pieces
from dconv.sharding.region import Region, row_major
from dconv.sharding.tensor import FileStamp, Logical, Piece, Slot, TensorSpec

ROWS = TensorSpec("rows", (4, 3), "f32")
SCALE = TensorSpec("scale", (), "f32")
HEADER = b"12345678"
FIRST, SECOND = len(HEADER), len(HEADER) + ROWS.nbytes


def dense(spec: TensorSpec, file: str) -> Piece:
    return Piece(spec.name, Region.whole(spec.shape), file, 0, row_major(spec.shape, 4), spec.dtype)


def logical(*specs: TensorSpec) -> Logical:
    """A source that has these tensors whole, each in a file of its own."""
    pieces = {spec.name: (dense(spec, spec.name),) for spec in specs}
    return Logical(Path("/nowhere"), {s.name: s for s in specs}, pieces, {s.name: FileStamp(0, 0, 0, 0) for s in specs})


def rows(start: int, count: int, to: int) -> Slot:
    """Rows of the logical tensor, and the row of the stored one at which they begin."""
    return Slot("rows", Region((start, 0), (count, 3)), (to, 0), (0, 1))


def whole(spec: TensorSpec, offset: int, *slots: Slot, padding: int = 0) -> TargetTensor:
    axes = tuple(range(len(spec.shape)))
    given = slots or (Slot(spec.name, Region.whole(spec.shape), (0,) * len(axes), axes),)
    return TargetTensor(f"key of {spec.name}", "out.bin", offset, spec, given, padding)


def plan(source: Logical, *tensors: TargetTensor, size: int = 10**6, left_out: dict[str, str] | None = None) -> Plan:
    file = TargetFile("out.bin", size, ((0, HEADER),))
    return build_plan(source, Target((file,), tensors, lambda: (), "seal", left_out=left_out))


def test_the_control_is_a_plan() -> None:
    """Header, tensor and scalar end to end up to the file's last byte, from boxes out of order."""
    source = logical(ROWS, SCALE)
    made = plan(source, whole(SCALE, SECOND), whole(ROWS, FIRST, rows(2, 2, 2), rows(0, 2, 0)), size=SECOND + 4)
    assert made.bytes_written == SECOND + 4
    assert made.bytes_read == ROWS.nbytes + SCALE.nbytes


@pytest.mark.parametrize(
    ("slots", "padding"),
    [
        ((rows(0, 2, 0), rows(2, 2, 1)), 0),  # row 1 twice, row 3 never
        ((rows(0, 2, 0), rows(2, 2, 3)), 0),  # row 2 never, and one past the end
        ((rows(0, 2, -1), rows(2, 2, 2)), 0),  # the same before the start
        ((rows(0, 3, 0),), 0),
        ((rows(0, 4, 0), rows(0, 1, 0)), 0),
        ((rows(0, 4, 0),), 3),  # padding that is not there
        ((rows(0, 3, 0),), 2),
        ((rows(0, 4, 0), rows(0, 1, 0)), -3),
    ],
    ids=["overlap and gap", "past the end", "before the start", "gap", "twice", "padding", "less", "negative"],
)
def test_a_tensor_not_written_exactly_once_is_refused(slots: tuple[Slot, ...], padding: int) -> None:
    with pytest.raises(Refused, match="does not cover a tensor exactly once") as caught:
        plan(logical(ROWS), whole(ROWS, FIRST, *slots, padding=padding))
    assert "key of rows in out.bin" in caught.value.where


def test_padding_is_what_no_box_fills() -> None:
    assert plan(logical(ROWS), whole(ROWS, FIRST, rows(0, 3, 0), padding=3)).bytes_read == 3 * 12


def test_one_logical_box_twice_into_one_tensor_is_refused_although_the_source_is_whole() -> None:
    across = [Slot("rows", Region((0, a), (4, n)), (0, b), (0, 1)) for a, n, b in ((0, 2, 0), (1, 1, 1))]
    with pytest.raises(Refused, match="exactly once"):
        plan(logical(ROWS), whole(ROWS, FIRST, *across))


@pytest.mark.parametrize("offset", [0, FIRST - 1, FIRST + 1, SECOND - 1])
def test_two_things_on_one_byte_of_a_file_are_refused(offset: int) -> None:
    """The scalar over the header, over the other tensor's first bytes, over its last one."""
    with pytest.raises(Refused, match=r"overlap in the plan of out\.bin"):
        plan(logical(ROWS, SCALE), whole(ROWS, FIRST), whole(SCALE, offset))


@pytest.mark.parametrize("short", [1, 4, SECOND])
def test_a_tensor_past_the_end_of_its_file_is_refused(short: int) -> None:
    with pytest.raises(Refused, match=r"past the end of out\.bin"):
        plan(logical(ROWS, SCALE), whole(ROWS, FIRST), whole(SCALE, SECOND), size=SECOND + 4 - short)


def test_a_tensor_that_the_source_lacks_is_refused() -> None:
    with pytest.raises(Refused, match="1 tensors that the target needs are not in the source") as caught:
        plan(logical(ROWS), whole(ROWS, FIRST), whole(SCALE, SECOND))
    assert caught.value.where == "scale"


def test_pieces_that_a_slot_asks_for_in_vain_are_refused() -> None:
    """The source knows the tensor, but only half of what the slot names."""
    half = Piece("rows", Region((0, 0), (2, 3)), "rows", 0, (12, 4), "f32")
    source = Logical(Path("/nowhere"), {"rows": ROWS}, {"rows": (half,)}, {"rows": FileStamp(0, 0, 0, 0)})
    with pytest.raises(Refused, match="exactly once"):
        plan(source, whole(ROWS, FIRST))


def test_a_source_tensor_that_is_not_written_is_refused_unless_it_is_named() -> None:
    source = logical(ROWS, SCALE)
    with pytest.raises(Refused, match="1 of 2 source tensors would not be written") as caught:
        plan(source, whole(ROWS, FIRST))
    assert caught.value.where == "scale"
    with pytest.raises(Refused, match="would not be written"):
        plan(source, whole(ROWS, FIRST), left_out={"scales": "another name"})
    assert plan(source, whole(ROWS, FIRST), left_out={"scale": "asked for"}).bytes_written == SECOND


def piece(start: tuple[int, int], shape: tuple[int, int]) -> Piece:
    return Piece("rows", Region(start, shape), "file", 0, row_major(shape, 4), "f32")


TOP, BOTTOM = piece((0, 0), (2, 3)), piece((2, 0), (2, 3))


@pytest.mark.parametrize(
    "found",
    [
        [TOP, piece((1, 0), (2, 3))],
        [piece((0, 0), (3, 2)), piece((2, 0), (2, 3))],
        [TOP, piece((3, 0), (2, 3))],
        [piece((-1, 0), (2, 3)), piece((1, 0), (2, 3))],
        [TOP],
        [TOP, BOTTOM, piece((3, 0), (1, 3))],
        [TOP, TOP],
        [],
    ],
    ids=["overlap and gap", "corner", "past the end", "before the start", "gap", "overlap", "half twice", "nothing"],
)
def test_pieces_that_are_not_the_tensor_once_are_damaged(found: list[Piece]) -> None:
    with pytest.raises(Damaged, match="1 tensor is not whole in the source") as caught:
        check_pieces({"scale": SCALE, "rows": ROWS}, {"scale": [dense(SCALE, "file")], "rows": found})
    assert caught.value.where == "rows"


def test_whole_pieces_pass_and_a_replica_is_set_apart() -> None:
    again = Piece("rows", BOTTOM.region, "other", 0, BOTTOM.strides, "f32")
    proved, replicas = check_pieces({"rows": ROWS}, {"rows": [TOP, BOTTOM, again]})
    assert proved == {"rows": (TOP, BOTTOM)}
    assert replicas == {"rows": (again,)}
