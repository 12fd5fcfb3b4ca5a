"""The live line speaks for all ranks of this run, to the end."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.launch import display
from dconv.launch.display import Display
from dconv.launch.progress import Board
from dconv.pipeline import Request, prepare, run
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, write_random


def test_board_ignores_ranks_of_a_killed_run(tmp_path: Path) -> None:
    """Notes that an earlier world left in the partial folder are neither drawn nor reported."""
    family = by_name("llama")
    model = write_random(tmp_path / "model", family, config_of(family))
    job = prepare(Request(model, "megatron", tmp_path / "out"))
    partial = partial_folder(tmp_path / "out", job.plan)
    ranks = partial / ".dconv" / "ranks"
    ranks.mkdir(parents=True)
    (ranks / "7.json").write_text(json.dumps({"done": 10, "total": 10, "peak": 5}))
    os.utime(ranks / "7.json", (1, 1))
    board = Board(partial, 0, time.time() - 1)
    board.note(3, 3)
    assert set(board.read()) == {0}
    assert run(job, Settings()).committed


def test_a_rank_that_helps_others_notes_now_and_then(tmp_path: Path) -> None:
    """Its own end at once; after it no note for each task of another rank, but the last."""
    (tmp_path / ".dconv").mkdir()
    board = Board(tmp_path, 0, 0.0)
    for done, total, noted in ((5, 10, 5), (10, 10, 10), (11, 10, 10), (12, 10, 10), (12, 12, 12)):
        board.note(done, total)
        assert board.read()[0]["done"] == noted


def test_display_line() -> None:
    """One line says bytes, rate, time left and ranks, at the start and at the end too."""
    board = Board(Path("nowhere"), 0, 0.0)
    drawn = Display(board, 4_000_000_000, 2)
    assert drawn.line(1_000_000_000, 2.0) == "[#####---------------]  25%  1.00/4.00 GB  0.50 GB/s  6 s left  2 ranks"
    assert "  0%" in drawn.line(0, 0.0)
    assert "100%" in Display(board, 0, 1).line(0, 1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_goes_on_for_the_ranks_that_are_still_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is done; rank 1 finishes later, and then the folder of notes goes, as at a commit."""
    monkeypatch.setattr(display, "_TICK", 0.01)
    (tmp_path / ".dconv").mkdir()
    screen = Terminal()
    ranks = [Board(tmp_path, rank, 0.0) for rank in range(2)]
    ranks[0].note(10, 10)

    def other() -> None:
        for done in (5, 10):
            ranks[1].note(done, 10)
            time.sleep(0.2)
        shutil.rmtree(tmp_path / ".dconv")

    thread = threading.Thread(target=other)
    with Display(ranks[0], 20, 2, screen) as drawn:
        thread.start()
        drawn.linger(threading.Event())
    assert not ranks[0].folder.exists()
    assert " 75%" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_the_bar_waits_for_no_dead_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_TICK", 0.01)
    monkeypatch.setattr(display, "_PATIENCE", 0.05)
    (tmp_path / ".dconv").mkdir()
    board = Board(tmp_path, 0, 0.0)
    board.note(10, 10)
    stop = threading.Event()
    with Display(board, 20, 2, Terminal()) as drawn:
        drawn.linger(stop)  # returns, or this test never ends
        monkeypatch.setattr(display, "_PATIENCE", 1e9)
        stop.set()
        drawn.linger(stop)
