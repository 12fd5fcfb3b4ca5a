"""A model run layer by layer computes what the whole one does, in less memory than it takes, from any container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: nothing runs")
pytest.importorskip("transformers", reason="transformers is not installed: nothing runs")

from dconv.checkpoint import safetensors  # noqa: E402
from dconv.errors import Damaged, Refused  # noqa: E402
from dconv.export import huggingface, layerwise  # noqa: E402
from dconv.export.prompt import Prompt, prompt_for  # noqa: E402
from dconv.pipeline import Described, Request, convert, describe_model  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.cli.conftest import Dconv  # noqa: E402
from tests.oracles import hf  # noqa: E402

KEYS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"time_step_min": 1e-30},
    "t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
#: Bamba is no family here.
FAMILIES = [family for family in hf.FAMILIES if family != "bamba"]
#: Less than any model of these takes in fp32; GPT-2's matrices are not cut.
TIGHT, WIDE = 250_000, 900_000


def described(folder: Path) -> tuple[Described, Prompt]:
    model = describe_model(folder)
    return model, prompt_for(model.family, model.facts, model.config)


def close(ours: huggingface.Answers, theirs: huggingface.Answers) -> bool:
    return all(np.abs(a - b).max() <= 1e-5 * np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_does_whole(family: str, tmp_path: Path) -> None:
    _, whole = hf.tiny(family, **KEYS.get(family, {}))
    model, prompt = described(hf.save(whole, tmp_path / "m"))
    budget = WIDE if family == "gpt2" else TIGHT
    assert sum(value.numel() * 4 for value in whole.parameters()) > budget
    assert close(layerwise.answers_of(model, prompt, budget), huggingface.forward(whole, prompt))


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
def test_megatron_s_containers_are_read_the_same_way(container: str, tmp_path: Path) -> None:
    """gpt-oss is stored otherwise in each: experts in one tensor with rows that alternate, here; one each, there."""
    for family in ("mixtral", "gpt_oss"):
        _, whole = hf.tiny(family, **KEYS.get(family, {}))
        source, out = hf.save(whole, tmp_path / family), tmp_path / f"{family}-m"
        parallel = Parallel(tp=2, pp=2, ep=2, etp=1)
        convert(Request(source, "megatron", out, parallel=parallel, megatron_format=container))
        model, prompt = described(out)
        assert close(layerwise.answers_of(model, prompt, TIGHT), huggingface.forward(whole, prompt))


_RUN = """
import sys
from pathlib import Path
import numpy as np
from dconv.export import layerwise
from tests.cli.test_layerwise import described
model, prompt = described(Path(sys.argv[1]))
budget = int(sys.argv[2])
with layerwise.opened(model, budget):  # what is imported and built without weights
    pass
def peak():  # of this program alone; getrusage would count that of the one which started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = peak()
answers = layerwise.answers_of(model, prompt, budget)
print(peak() - before)
np.save(sys.argv[3], answers[0])
"""


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param("llama", {"intermediate_size": 3072}, marks=pytest.mark.long),
        ("mixtral", {"intermediate_size": 1024}),
        pytest.param("deepseek_v3", {"intermediate_size": 3072, "moe_intermediate_size": 512}, marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow_with_the_model(family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """Of 150 MB and more of weights, 40 MB are there at a time, as the system counts it."""
    _, whole = hf.tiny(family, hidden_size=768, vocab_size=6144, num_hidden_layers=4, **sizes)
    nbytes = sum(value.numel() * 4 for value in whole.parameters())
    assert nbytes > 150e6
    folder = hf.save(whole, tmp_path / "m")
    _, prompt = described(folder)
    expected = huggingface.forward(whole, prompt)
    budget = 40_000_000
    words = [sys.executable, "-c", _RUN, str(folder), str(budget), str(tmp_path / "answers.npy")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < budget
    assert close((np.load(tmp_path / "answers.npy"),), expected)


def spoil(folder: Path, name: str) -> None:
    extent = safetensors.read_header(folder / "model.safetensors")[name].extents[0]
    with (folder / extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(b"\xff\xff\xff\x7f")


@pytest.mark.parametrize(
    ("name", "layer"), [("model.layers.2.mlp.up_proj.weight", "model.layers.2"), ("lm_head.weight", "")]
)
def test_the_first_layer_that_computes_nonsense_is_named(name: str, layer: str, dconv: Dconv, tmp_path: Path) -> None:
    _, whole = hf.tiny("llama")
    folder = hf.save(whole, tmp_path / "m")
    spoil(folder, name)
    model, prompt = described(folder)
    with pytest.raises(Damaged, match="finite") as caught:
        layerwise.can_infer(model, prompt, TIGHT)
    assert caught.value.where == (layer or str(folder))
    ran = dconv("check", folder, "--max-memory", TIGHT)
    assert ran.code == 4
    assert layer in ran.err


def test_a_budget_below_what_is_needed_at_once_is_refused_by_name(tmp_path: Path) -> None:
    _, whole = hf.tiny("gpt2")
    model, prompt = described(hf.save(whole, tmp_path / "m"))
    with pytest.raises(Refused, match="too small") as caught:
        layerwise.answers_of(model, prompt, 50_000)
    assert caught.value.where == "transformer.h.0"


def test_missing_weights_are_named(tmp_path: Path) -> None:
    _, whole = hf.tiny("llama")
    model, prompt = described(hf.save(whole, tmp_path / "m"))
    del model.logical.specs["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(Damaged, match="missing") as caught:
        layerwise.answers_of(model, prompt, TIGHT)
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.where


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_it_goes_on_as_transformers_does(family: str, dconv: Dconv, tmp_path: Path) -> None:
    _, whole = hf.tiny(family, eos_token_id=None, **KEYS.get(family, {}))
    folder = hf.save(whole, tmp_path / "m")
    _, prompt = described(folder)
    asked = torch.from_numpy(prompt.tokens[:1])
    with torch.no_grad():
        made = whole.generate(input_ids=asked, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    ran = dconv("check", folder, "--max-memory", TIGHT, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["run"]["tokens"] == made[0, -3:].tolist()
    assert ran.json["run"]["layers"] == (8 if family == "t5" else 4)
    assert "are allowed" in ran.json["notes"][0]
