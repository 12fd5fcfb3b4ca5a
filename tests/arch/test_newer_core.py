"""Newer judges: megatron-core 0.19.2 computes what transformers does (law 4), Megatron-Bridge 0.6.2 reads and is read.

It lives in an environment of its own (``bash scripts/bridge_env.sh``), in which `tests.oracles.newer_core` runs. Newer
megatron-core has no ``common.pt``: its common state is an entry of the checkpoint (``common_state``).
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

import numpy as np  # noqa: E402

from dconv.compare import diff  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.oracles import hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venvs" / "bridge" / "bin" / "python"
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(7))

pytestmark = pytest.mark.skipif(
    not (PYTHON.parents[1] / "bridge-installed").exists(),
    reason="megatron-core 0.19.2 is not installed: bash scripts/bridge_env.sh installs it",
)


@dataclass(frozen=True)
class Judged:
    """One model through dconv (tp 2, pp 2) into megatron-core 0.19.2 (tp 1, pp 1), and as that saved it.

    The second model is loaded without ``common.pt``: its args come from ``common_state`` then.
    """

    source: Path
    again: Path
    logits: torch.Tensor
    expected: torch.Tensor


@pytest.fixture(scope="module", params=["llama", "qwen2-tied-odd"])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp("newer")
    if request.param == "llama":
        _, model = hf.tiny("llama", seed=3)
    else:
        _, model = hf.tiny("qwen2", seed=4, tie_word_embeddings=True, vocab_size=301)
    source = hf.save(model, folder / "hf")
    convert(Request(source, "megatron", folder / "megatron", parallel=Parallel(tp=2, pp=2)))
    if request.param != "llama":
        (folder / "megatron" / "release" / "common.pt").unlink()
    np.save(folder / "tokens.npy", TOKENS.numpy())
    command = [PYTHON, ROOT / "tests" / "oracles" / "newer_core.py", folder / "megatron" / "release",
               folder / "tokens.npy", folder / "logits.npy", folder / "again"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = hf.logits(model, TOKENS)
    return Judged(source, folder / "again", torch.from_numpy(np.load(folder / "logits.npy")), expected)


def test_newer_core_loads_what_dconv_wrote(judged: Judged) -> None:
    vocabulary = judged.expected.shape[-1]
    assert (judged.logits[..., :vocabulary] - judged.expected).abs().max() <= 1e-4


def test_dconv_reads_what_newer_core_wrote(judged: Judged, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert not list(judged.again.rglob("common.pt"))
    convert(Request(judged.again, "hf", tmp_path / "hf"))
    before, after = (load_file(folder / "model.safetensors") for folder in (judged.source, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(hf.logits(tmp_path / "hf", TOKENS), judged.expected)


def test_bridge_loads_what_dconv_wrote_and_the_other_way_round(tmp_path: Path) -> None:
    """Bridge has a config file of its own in the place of Megatron-LM's args."""
    _, model = hf.tiny("qwen2", seed=5, tie_word_embeddings=True, vocab_size=302)
    source = hf.save(model, tmp_path / "hf")
    convert(Request(source, "megatron", tmp_path / "made", parallel=Parallel(tp=2, pp=2)))
    made, bridges, back = tmp_path / "made" / "release", tmp_path / "bridges", tmp_path / "back"
    command = [PYTHON, ROOT / "tests" / "oracles" / "bridge.py", source, made, bridges, back]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert diff(source, back).equal
    convert(Request(bridges, "hf", tmp_path / "again"))  # from run_config.yaml alone
    assert diff(source, tmp_path / "again").equal
    assert torch.equal(hf.logits(tmp_path / "again", TOKENS), hf.logits(model, TOKENS))
