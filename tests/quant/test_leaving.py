"""Ranks that calibrate together and do not end together: one is killed, one fails, one is told to stop."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")
pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from dconv.errors import Preempted  # noqa: E402
from dconv.pipeline import Request, prepare, run  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from tests.processes import ROOT, call, local  # noqa: E402
from tests.quant.calibrated import model_of  # noqa: E402
from tests.quant.test_calibrate import weights_digest  # noqa: E402

_SAID = json.dumps({"bits": 4, "group_size": 32, "nsamples": 12, "seqlen": 512})
#: Loaded by every process of a run: at the numbered call of a function of rank HOOK_RANK something happens to it.
_HOOK = """
import os, signal
if os.environ.get("RANK", "0") == os.environ["HOOK_RANK"]:
    from dconv.quant.sums import Sum
    real, calls = Sum.add, 0
    def add(self, *args):
        global calls
        calls += 1
        if calls == int(os.environ["HOOK_CALL"]):
            what = os.environ["HOOK_WHAT"]
            if what == "fail":
                raise OSError(28, "No space left on device")
            os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGTERM)
        return real(self, *args)
    Sum.add = add
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of("qwen2_moe", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (12, 512)))
    return path


@pytest.fixture(scope="module")
def whole(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every run must end with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(prepare(request_for(model, "gptq", ids, out)), Settings())
    return weights_digest(out)


_LOST = ("preempted (75)", "another rank has ended")
_STOPPED = ("preempted (75)", "stopped by a signal")


@pytest.mark.parametrize(
    ("what", "rank", "code", "said"),
    [
        ("die", "1", 137, _LOST),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("die", "0", -9, _LOST),
                ("fail", "1", 5, ("storage (5)", "No space left", *_LOST)),
                ("stop", "0", 75, _STOPPED),
                ("stop", "1", 75, _STOPPED),
            )
        ),
    ],
)
def test_one_of_two_ranks(
    model: Path,
    ids: Path,
    whole: dict[str, str],
    tmp_path: Path,
    what: str,
    rank: str,
    code: int,
    said: tuple[str, ...],
) -> None:
    """The other one leaves soon and says why; another number of ranks brings it to its end."""
    hook, out = tmp_path / "hook", tmp_path / "out"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_HOOK)
    words = [model, "gptq", "-o", out, "--calibration", ids, "--quantization-config", _SAID, "--quiet"]
    path = os.pathsep.join([str(hook), str(ROOT)])
    found, _, err = call(*local(2, *words), PYTHONPATH=path, HOOK_WHAT=what, HOOK_RANK=rank, HOOK_CALL="14")
    assert found == code, err
    assert all(word in err for word in said), err
    assert "Traceback" not in err
    assert not out.exists()
    run(prepare(request_for(model, "gptq", ids, out)), Settings())
    assert weights_digest(out) == whole
    assert {one.name for one in tmp_path.iterdir()} == {"hook", "out"}


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_told_in_the_midst_of_a_pass(
    model: Path, ids: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No linear layer is computed any more, and nothing of the pass is kept."""
    run(prepare(request_for(model, form, ids, tmp_path / "whole")), Settings())
    out, stop, calls = tmp_path / "out", threading.Event(), []
    own = torch.nn.functional.linear
    with monkeypatch.context() as patch:

        def linear(*args: Any) -> Any:
            calls.append(stop.is_set())
            if len(calls) == 60:
                stop.set()
            return own(*args)

        patch.setattr(torch.nn.functional, "linear", linear)
        with pytest.raises(Preempted, match="stopped by a signal") as told:
            run(prepare(request_for(model, form, ids, out)), Settings(stop=stop))
    assert ".partial-" in told.value.where
    assert sum(calls) < 12  # an expert's own three, a router
    run(prepare(request_for(model, form, ids, out)), Settings())
    assert weights_digest(out) == weights_digest(tmp_path / "whole")


def request_for(model: Path, form: str, ids: Path, out: Path) -> Request:
    return Request(model, form, out, calibration=str(ids), quantization_config=_SAID)
