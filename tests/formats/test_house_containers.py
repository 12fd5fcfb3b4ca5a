"""State dicts as teams keep them, whatever the container: any world, checks, damage, the command line.

What dconv writes is opened by torch itself; what it reads was written by torch in the test.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.checking import check
from dconv.cli import main
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.formats.house import edit, refused, source
from tests.models import tensors, tree_digest
from tests.oracles import hf

TARGETS: dict[str, dict[str, Any]] = {
    "pt": {"format": "pt"},
    "pt in two": {"format": "pt", "parallel": Parallel(tp=2, etp=2)},
    "bmtrain": {"format": "bmtrain"},
    "model_pt": {"format": "megatron", "megatron_format": "model_pt"},
}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("target", TARGETS)
def test_any_world_gives_the_same_bytes(tmp_path: Path, target: str, world: int) -> None:
    """Ranks as plain calls, the last one first; and again from the container back to HuggingFace."""
    model = source(tmp_path / "model", hidden_size=64, intermediate_size=96, vocab_size=500)
    convert(Request(model, out=tmp_path / "one", **TARGETS[target]))

    def by_ranks(request: Request) -> None:
        launched = time.time()
        outcomes = [
            run(prepare(request), Settings(rank=rank, world=world, launched=launched, max_memory=64 << 10))
            for rank in reversed(range(world))
        ]
        assert [outcome.committed for outcome in outcomes] == [False] * (world - 1) + [True]

    by_ranks(Request(model, out=tmp_path / "many", **TARGETS[target]))
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "one")
    by_ranks(Request(tmp_path / "many", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


@pytest.mark.parametrize("target", TARGETS)
def test_check_runs_it(tmp_path: Path, target: str) -> None:
    """A real model's output is read back against its receipt and run by transformers or megatron-core."""
    _, model = hf.tiny("llama")
    hf.save(model, tmp_path / "model")
    convert(Request(tmp_path / "model", out=tmp_path / "out", **TARGETS[target]))
    found = check(tmp_path / "out")
    assert found.reread is not None and found.reread.whole and found.run is not None
    expected = check(tmp_path / "model").run
    assert expected is not None
    assert found.run["largest_logit"] == pytest.approx(expected["largest_logit"], rel=1e-4)


def test_verify_logits_of_a_cut_state_dict(tmp_path: Path) -> None:
    from dconv import logits

    _, model = hf.tiny("llama")
    hf.save(model, tmp_path / "model")
    job = prepare(Request(tmp_path / "model", "pt", tmp_path / "out", parallel=Parallel(tp=2, etp=2)))
    run(job, Settings())
    assert logits.compare(job, tmp_path / "out")["why"] == "the same weights"


@pytest.mark.parametrize("target", ["pt", "bmtrain", "model_pt"])
def test_strange_and_missing_tensors(tmp_path: Path, target: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    convert(Request(source(tmp_path / "model"), out=work / "made", **TARGETS[target]))
    path = next(path for path in sorted((work / "made").iterdir()) if path.suffix in (".pt", ".bin"))
    edit(path, lambda held: held.update({"more.weight": torch.zeros(3)}))
    refused(Refused, "in no row of llama", Request(work / "made", "hf", work / "out"))
    edit(path, lambda held: held.pop("more.weight"))
    edit(path, lambda held: held.pop(next(name for name in held if "norm" in name and held[name] is not None)))
    refused(Damaged, "not whole", Request(work / "made", "hf", work / "out"))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--tp`` is of ``pt`` as of Megatron; the other layout options are not; the list of formats has them all."""
    model = source(tmp_path / "model", vocab_size=64)
    out = tmp_path / "out"
    assert main(["plan", str(model), "pt", "--tp", "2", "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["target"]
    assert (target["format"], target["layout"], target["files"], target["shards"]) == ("pt", "tp 2", 2, 2)
    for options in (["pt", "--pp", "2"], ["pt", "--megatron-format", "legacy"], ["bmtrain", "--tp", "2"]):
        assert main(["convert", str(model), *options, "-o", str(out)]) == 2
        assert "has no such layout" in capsys.readouterr().err
    assert main(["convert", str(model), "modelcenter", "-o", str(out), "--quiet"]) == 0
    assert main(["convert", str(out / "pytorch_model.pt"), "pt", "--quiet", "-o", str(tmp_path / "pt")]) == 0
    assert main(["formats", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert {"pt", "bmtrain", "model_pt"} <= set(known["read"])
    assert known["write"]["bmtrain"] == ["bmtrain", "modelcenter"]
    assert main(["inspect", str(tmp_path / "pt" / "pytorch_model.bin"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["family"], found["refused"]) == ("pt", "llama", "")
    assert found["receipt"] is not None
