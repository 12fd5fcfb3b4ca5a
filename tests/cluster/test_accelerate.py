"""``accelerate launch`` with the config of launch/: as many ranks as asked, with a GPU or without, the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.pipeline import Request, prepare, run
from dconv.sharding.commit import Settings
from tests.models import config_of, tree_digest, write_random
from tests.processes import ROOT, call

pytest.importorskip("accelerate")


def test_two_ranks(tmp_path: Path) -> None:
    """The ranks are counted by what they say, since one process without a rank would write the same bytes."""
    family = by_name("llama")
    config = config_of(family, hidden_size=64, intermediate_size=192, vocab_size=301, head_dim=16)
    model = write_random(tmp_path / "model", family, config, shard_size=200_000)
    run(prepare(Request(model, "megatron", tmp_path / "expected", megatron_format="legacy")), Settings())
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate.yaml")]
    words = [str(model), "megatron", "-o", str(tmp_path / "out"), "--megatron-format", "legacy", "--json"]
    code, out, err = call(sys.executable, *launch, "--num_processes", "2", "-m", "dconv.launch", *words)
    assert code == 0, err
    assert json.loads(out)["ranks"] == 2
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "expected")
