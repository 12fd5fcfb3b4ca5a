"""What ranks note on their way: all of it before the journal has it, little of it, and nothing else is believed."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from dconv.pipeline import Request, prepare
from dconv.report import tracks
from dconv.report.rates import ranks_of, rates_of
from dconv.report.tracks import Point, Recorder, Track
from dconv.sharding.plan import Plan
from tests.launched import small_llama


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("source")
    return prepare(Request(small_llama(folder), "hf", folder / "out")).plan


def test_the_last_note_has_all(plan: Plan, tmp_path: Path) -> None:
    """Whatever the tick: after each call the file says where the rank is."""
    recorder = Recorder(tmp_path, plan, 1, 4)
    read = written = 0
    for i, task in enumerate(plan.tasks):
        if i < 3:
            recorder.kept([task])
            recorder.kept([task])
        else:
            recorder.done([task])
            written += task.nbytes
            read += tracks.read_by(plan, task)
        (track,) = tracks.tracks(tmp_path)
        assert (track.rank, track.world) == (1, 4)
        assert (track.last.read, track.last.written) == (read, written)
        assert track.last.kept == sum(one.nbytes for one in plan.tasks[: min(i + 1, 3)])
    recorder.kept(plan.tasks)  # its own are not of an earlier run
    (track,) = tracks.tracks(tmp_path)
    assert track.last.kept == sum(one.nbytes for one in plan.tasks[:3])
    assert len(track.points) <= 3 + 2 * (time.time() - track.began) / tracks._EVERY


def test_few_notes_stay(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that notes for days: half as often after each thousand."""
    now = [1e9]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    recorder = Recorder(tmp_path, plan, 0, 1)
    for _ in range(20_000):  # one in 2 s
        now[0] += 2
        recorder.done(())
    (track,) = tracks.tracks(tmp_path)
    assert 3000 < len(track.points) < 8000
    assert (track.points[0].at, track.last.at) == (1e9, now[0])


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[" * 100_000, "[]", "[[0, 1, 2], []]", "[[2, 1, \"a\"], [1.0, 0, 0, 0]]",
        "[[0, 1, \"a\"], [NaN, 0, 0, 0]]",
        "[[0, 1, \"a\"], [1.0, -1, 0, 0]]", "[[0, 1, \"a\"], [1.0, 99999999999999999999, 0, 0]]", "\x00\xff",
        "[[0, 1, \"a\"], [1.0, 0, 0, true]]", "[[0, 1, \"a\"], [Infinity, 0, 0, 0]]", "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_note_is_passed_over(plan: Plan, tmp_path: Path, text: str) -> None:
    Recorder(tmp_path, plan, 0, 2).done(plan.tasks[:1])
    (tmp_path / "tracks" / "0-1-1").write_text(text, "latin-1")
    good = [1, 2, "host"], [5.0, 1, 2, 3]
    (tmp_path / "tracks" / "1-1-1").write_text(f"{json.dumps(good)}\n{text}\n[4.0, 0, 0, 0]\n[6.0", "latin-1")
    found = tracks.tracks(tmp_path)
    assert [track.rank for track in found] == [0, 1]
    assert found[1].points == (Point(4.0, 0, 0, 0), Point(5.0, 1, 2, 3))


def test_no_folder_and_a_full_disk_cost_nothing(plan: Plan, tmp_path: Path) -> None:
    assert tracks.tracks(tmp_path / "nowhere") == []
    Recorder(tmp_path / "nowhere", plan, 0, 1).done(plan.tasks)
    assert not (tmp_path / "nowhere").exists()


def test_rates_add_up_to_the_bytes() -> None:
    """Whatever the stretches, rate x time is what was done; a restart goes on where the other ended."""
    made = [
        Track(0, 2, "a", (Point(100.0, 0, 0, 7), Point(101.0, 300, 100, 7), Point(109.0, 1000, 900, 7))),
        Track(1, 2, "a", (Point(100.5, 0, 0, 0), Point(102.0, 50, 40, 0))),
        Track(1, 2, "b", (Point(105.0, 0, 0, 0), Point(112.3, 500, 400, 40))),
    ]
    ends, rates = rates_of(made)
    edges = [0.0, *ends]
    assert ends[-1] == pytest.approx(12.3) and max(b - a for a, b in pairwise(edges)) < 0.6
    for rank, read, written in ((0, 1000, 900), (1, 550, 440)):
        for side, expected in ((0, read), (1, written)):
            done = sum(rate[side] * (b - a) for rate, (a, b) in zip(rates[rank], pairwise(edges), strict=True))
            assert done == pytest.approx(expected)
    first, second = ranks_of(made)
    assert (first.written, first.kept, first.seconds, first.host) == (900, 7, 9.0, "a")
    assert (second.written, second.kept, second.host) == (440, 0, "a, b") and second.seconds == pytest.approx(12.3)
