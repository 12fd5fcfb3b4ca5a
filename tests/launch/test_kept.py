"""A rank that something else keeps: it ends with its keeper, is heard line by line, and said once."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dconv.launch.place import LAUNCHED, place
from dconv.launch.progress import NOTES, Board
from dconv.launch.ray_keeper import Heard, Keeper
from dconv.launch.ray_ranks import Said
from tests.processes import ROOT

#: Starts a tied process from a thread of its own, says its number, and ends that thread when told.
KEEPER = """
import os, subprocess, sys, threading
go = threading.Event()
def keep():
    work = "open(%r, 'w').close(); __import__('time').sleep(600)" % sys.argv[1]
    words = [sys.executable, "-m", "dconv.launch.tied", str(os.getpid()), "timeit", "-n1", "-r1", work]
    print(subprocess.Popen(words).pid, flush=True)
    go.wait()
thread = threading.Thread(target=keep)
thread.start()
input()
go.set()
thread.join()
input()
"""


def gone(pid: int, seconds: float = 60) -> bool:
    """Whether a process ends in that time; as a zombie it has."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("ends", ["process", "thread"])
def test_a_tied_process_ends_with_the_one_that_keeps_it(ends: str, tmp_path: Path) -> None:
    """Also by SIGKILL; and with the thread alone, which is why a keeper's thread stays as long as its child."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(tmp_path / "works")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    child = int(keeper.stdout.readline())
    try:
        while not (tmp_path / "works").exists():  # until then it has not tied itself
            assert keeper.poll() is None
            time.sleep(0.02)
        assert not gone(child, seconds=0.1)
        if ends == "process":
            keeper.kill()
        else:
            keeper.stdin.write("\n")
            keeper.stdin.flush()
        assert gone(child)
        assert keeper.poll() is None or ends == "process"
    finally:
        keeper.kill()
        keeper.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_process_whose_keeper_is_gone_already_does_nothing() -> None:
    words = [sys.executable, "-m", "dconv.launch.tied", "1" if os.getpid() != 1 else "2", "this"]
    ran = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (ran.returncode, ran.stdout) == (-signal.SIGKILL, b"")


# ---------------------------------------------------------------------------------------------------------- keeper


def kept(code: str, tmp_path: Path, keeper: Keeper) -> int:
    """The exit code of a module with this code."""
    (tmp_path / "kept.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return keeper.run("kept", ["a", "b c"], str(tmp_path), {"PYTHONPATH": path, "RANK": "3"})


def test_what_a_child_says_is_heard_once(tmp_path: Path) -> None:
    code = (
        "import os, sys, json\nprint(sys.argv[1:], os.environ['RANK'], os.getcwd())\nprint('x', file=sys.stderr)\n"
        "sys.stdout.write('no end of line'); sys.exit(5)"
    )
    keeper = Keeper()
    assert kept(code, tmp_path, keeper) == 5
    assert keeper.heard() == Heard(f"['a', 'b c'] 3 {tmp_path}\nno end of line", "x\n")
    assert keeper.heard() == Heard()


def test_a_child_is_told(tmp_path: Path) -> None:
    """One that listens ends by itself; one that does not yet was told all the same; one to come never comes."""
    deaf = "print('here', flush=True)\nimport time; time.sleep(600)"
    listening = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(9))\n"
    for code, wanted in ((listening + deaf, 9), (deaf, 75)):
        keeper, found = Keeper(), []
        thread = threading.Thread(target=lambda c=code, k=keeper, f=found: f.append(kept(c, tmp_path, k)))
        thread.start()
        while "here" not in keeper.heard().out:
            time.sleep(0.02)
        keeper.stop()
        thread.join()
        assert found == [wanted]
    keeper = Keeper()
    keeper.stop()
    assert kept("print('here')", tmp_path, keeper) == 75
    assert keeper.heard() == Heard()


def test_a_rank_notes_where_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a launcher that does not see the output's place."""
    monkeypatch.setenv(NOTES, str(tmp_path / "mine.json"))
    Board(tmp_path / "nowhere", 2, 0.0).note(4, 4)
    assert '"done": 4' in (tmp_path / "mine.json").read_text()


# ------------------------------------------------------------------------------------------------------- what is said


def test_what_ranks_say_alike_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """However it was cut on the way; what one says twice is said twice."""
    out = io.StringIO()
    said = Said(out)
    said.hear(0, Heard(err="refused (3)  this\n  where      here\n"))
    said.hear(1, Heard(err="refused (3)  this\n"))
    assert not said.result
    said.hear(1, Heard(err="  where      here\n[rank 1] storage (5)\n", out="wrote\n"))
    said.hear(2, Heard(err="again\nagain\n"))
    said.hear(0, Heard(err="again\n"))
    assert capsys.readouterr().err.splitlines() == [
        "refused (3)  this", "  where      here", "[rank 1] storage (5)", "again", "again",
    ]  # fmt: skip
    assert (out.getvalue(), said.result) == ("wrote\n", True)


def test_when_the_ranks_were_started() -> None:
    """An actor's process may be hours older than the run: who started this run says when."""
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert place({**ranks, LAUNCHED: "12.5"}).launched == 12.5
    assert place({**ranks, LAUNCHED: "then"}).launched > 12.5
    assert place({"RANK": "0", "WORLD_SIZE": "1", LAUNCHED: "12.5"}).launched == float("inf")
