"""torchrun: a rank that is lost is started again, an answer is not, a signal passes through; the same bytes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dconv.errors import ToolMissing
from dconv.launch import torchrun
from dconv.launch.__main__ import main
from dconv.launch.process import EXIT_CODES, left_codes
from tests import launched
from tests.cluster.held import Gate, journals, until
from tests.launched import by_one_rank, small_llama
from tests.models import tree_digest
from tests.processes import ROOT, call, ended, start

OPTIONS = [*launched.OPTIONS, "--max-memory", "1MiB", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("source"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What one rank makes of `model` with `OPTIONS`."""
    return by_one_rank(model)


def by_torchrun(ranks: int, *words: object) -> list[str]:
    """``dconv convert --launcher torchrun``."""
    launcher = ["--launcher", "torchrun", "--nproc", str(ranks)]
    return [sys.executable, "-m", "dconv", "convert", *map(str, words), *launcher]


# ------------------------------------------------------------------------------------------------- on one machine


def test_a_lost_rank_is_started_again(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL to one rank in the midst: what is finished is kept, and the run ends as if nothing had been."""
    out, gate = tmp_path / "out", Gate(tmp_path / "gate")
    process = start(*by_torchrun(2, model, "megatron", "-o", out, *OPTIONS), "--max-restarts", "3", **gate.variables)
    until(lambda: len(journals(out)) == 2, lambda: process.poll() is None)
    first = journals(out)
    os.kill(min(first), signal.SIGKILL)
    gate.open()
    code, _, err = ended(process)
    assert code == 0, err
    assert tree_digest(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate", "out"]


@pytest.mark.long
def test_a_lost_rank_without_restarts_is_told(model: Path, tmp_path: Path) -> None:
    """As a shell tells a process that was killed; the ranks that were stopped for it do not pass for a preemption."""
    out, gate = tmp_path / "out", Gate(tmp_path / "gate")
    process = start(*by_torchrun(2, model, "megatron", "-o", out, *OPTIONS), "--max-restarts", "0", **gate.variables)
    until(lambda: len(journals(out)) == 2, lambda: process.poll() is None)
    os.kill(min(journals(out)), signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGKILL, err
    assert not out.exists()


def test_a_refusal_is_not_repeated(model: Path, tmp_path: Path) -> None:
    """Its own exit code, said once, though torchrun may start the ranks three times more."""
    words = by_torchrun(3, model, "megatron", "-o", tmp_path / "out", "--tp", 3)
    code, out, err = call(*words, "--max-restarts", "3")
    assert code == 3, err
    assert (out + err).count("refused (3)") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_a_stop_and_the_next_run(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM passes through to the ranks, none is started again, 75; the same command goes on."""
    out, gate = tmp_path / "out", Gate(tmp_path / "gate")
    words = by_torchrun(2, model, "megatron", "-o", out, *OPTIONS)
    process = start(*words, **gate.variables)
    until(lambda: len(journals(out)) == 2, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 75, err
    kept = journals(out)
    assert len(kept) == 2, "the two ranks that were stopped, and none that was started since"
    assert not out.exists()
    code, _, err = call(*words)
    assert code == 0, err
    assert tree_digest(out) == expected


def test_without_torch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool that is missing, before anything is started."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissing, match="torch"):
        torchrun.run(argparse.Namespace(nproc=2, max_restarts=None), [str(model), "megatron"])


# ---------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(("options", "code"), [(["--tp", "2"], 0), (["--tp", "3"], 3), (["--tpp", "3"], 2)])
def test_exit_code_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int
) -> None:
    """Where a launcher asks for it; what an earlier start left does not stay."""
    folder = tmp_path / "codes"
    folder.mkdir()
    (folder / "0").write_text("75")
    monkeypatch.setenv(EXIT_CODES, str(folder))
    try:
        ended_with = main([str(model), "megatron", "-o", str(tmp_path / "out"), "--quiet", *options])
    except SystemExit as end:  # argparse's
        ended_with = end.code
    assert ended_with == code
    assert left_codes(folder, 2) == [code, None]


@pytest.mark.parametrize(
    ("code", "left", "told", "ends"),
    [
        (0, [0, 0], False, 0),
        (1, [75, 4], False, 4),  # torchrun stopped rank 0 since rank 1 found damage
        (1, [3, 3], True, 3),
        (1, [75, 75], True, 75),
        (1, [75, None], False, 137),  # rank 1 was killed, and rank 0 stopped for it
        (-15, [None, None], True, 75),  # before there were ranks
    ],
)
def test_whose_exit_code(code: int, left: list[int | None], told: bool, ends: int) -> None:
    assert torchrun._outcome(code, left, told=told) == ends


def test_torchrun_that_cannot_start() -> None:
    with pytest.raises(ToolMissing):
        torchrun._outcome(1, [None, None], told=False)


# ----------------------------------------------------------------------------------------------- several machines


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_nodes(*words: object, ranks: int, **variables: str) -> list[subprocess.Popen[str]]:
    """launch/torchrun.sh twice, as two machines that meet on this one's loopback."""
    meeting = {
        "NNODES": "2", "NPROC": str(ranks), "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *map(str, words)]
    return [start(*command, **meeting, **variables, NODE_RANK=str(node)) for node in range(2)]


def test_two_nodes(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    nodes = two_nodes(model, "megatron", "-o", tmp_path / "out", *OPTIONS[:-1], ranks=1)
    ends = [ended(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "".join(out for _, out, _ in ends).count("with 2 ranks, bit-exact") == 1, ends
    assert tree_digest(tmp_path / "out") == expected


@pytest.mark.long
def test_a_lost_rank_of_two_nodes(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Both machines start their ranks again, and meet again."""
    out, gate = tmp_path / "out", Gate(tmp_path / "gate")
    nodes = two_nodes(model, "megatron", "-o", out, *OPTIONS, ranks=2, **gate.variables)
    until(lambda: len(journals(out)) == 4, lambda: all(node.poll() is None for node in nodes))
    before = set(journals(out))
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(set(journals(out)) - before) == 4, lambda: all(node.poll() is None for node in nodes))
    gate.open()
    ends = [ended(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert tree_digest(out) == expected


@pytest.mark.long
def test_a_refusal_on_two_nodes(model: Path, tmp_path: Path) -> None:
    """Once on each machine."""
    nodes = two_nodes(model, "megatron", "-o", tmp_path / "out", "--tp", 3, ranks=2)
    ends = [ended(node) for node in nodes]
    assert all(code for code, _, _ in ends)
    assert [(out + err).count("refused (3)") for _, out, err in ends] == [1, 1], ends
