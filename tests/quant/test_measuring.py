"""The scripts that measure quantisation: perplexity by its definition, a held-out text that nothing else has seen."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_gptq
import bench_moe
import perplexity
import prose
import train_moe


@given(st.integers(2, 40), st.data())
def test_windows_score_each_token_once(length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    count = data.draw(st.integers(length, 200))
    scored = [
        at for start, first in perplexity.windows(count, length, stride) for at in range(start + first, start + length)
    ]
    assert scored == list(range(1, scored[-1] + 1)), "from the second token on, in order, none twice"
    assert count - scored[-1] - 1 < stride, "only what fills no window is left out"


def test_windows_side_by_side_leave_their_first_tokens_out() -> None:
    assert list(perplexity.windows(1100, 512, 512)) == [(0, 1), (512, 1)]


@pytest.mark.parametrize(("count", "length", "stride"), [(9, 10, 10), (10, 10, 11), (10, 10, 0), (10, 1, 1)])
def test_no_windows(count: int, length: int, stride: int) -> None:
    with pytest.raises(ValueError, match="no windows"):
        list(perplexity.windows(count, length, stride))


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(shape).float().eval()


@pytest.mark.parametrize(("length", "stride"), [(24, 24), (24, 10)])
def test_score_is_the_definition(length: int, stride: int) -> None:
    """Each token's probability by a forward pass over its own context alone, in numpy's fp64."""
    model = _llama()
    ids = np.random.default_rng(0).integers(0, 32, 60).tolist()
    losses = []
    for start, first in perplexity.windows(len(ids), length, stride):
        for at in range(start + first, start + length):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:at]])).logits[0, -1].double().numpy()
            losses.append(-np.log(np.exp(logits[ids[at]]) / np.exp(logits).sum()))
    found = perplexity.score(model, ids, length, stride)
    assert found.scored == len(losses)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.perplexity > 33, "a model that errs on random tokens is worse than an even guess among 32"


def test_codes_are_decoded(tmp_path: Path) -> None:
    """A model in block FP8 scores as its weights decoded by hand do, and not as the plain one."""
    import dconv

    model = _llama()
    model.save_pretrained(tmp_path / "plain")
    dconv.convert(tmp_path / "plain", "fp8", tmp_path / "coded")
    stored = load_file(tmp_path / "coded" / "model.safetensors")
    by_hand = _llama()
    with torch.no_grad():
        for name, value in by_hand.named_parameters():
            if f"{name}_scale_inv" in stored:
                value.copy_(stored[name].float() * stored[f"{name}_scale_inv"].float())  # one block each
    ids = np.random.default_rng(0).integers(0, 32, 60).tolist()
    coded, hand, plain = (
        perplexity.score(m, ids, 20, 20).nll for m in (perplexity.load(tmp_path / "coded"), by_hand, model)
    )
    assert coded == pytest.approx(hand, rel=1e-6)
    assert coded != pytest.approx(plain, rel=1e-6)


def test_nothing_of_the_held_out_president_is_learnt_from() -> None:
    texts = {
        "1900-McKinley-1.txt": "old",
        "1961-Kennedy-1.txt": "new",
        "1978-Carter-1.txt": "his",
        prose.HELD_OUT: "held",
    }
    assert prose.training(texts) == "old\n\nnew"
    assert prose.calibration(texts) == "new"


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 9), st.data())
def test_samples_do_not_overlap(count: int, length: int, rest: int, data: st.DataObject) -> None:
    ids = list(range((count + data.draw(st.integers(0, 20))) * length + min(rest, length - 1)))
    drawn = prose.samples(ids, count, length, data.draw(st.integers(0, 99)))
    assert len(drawn) == count
    assert all(window == list(range(window[0], window[0] + length)) for window in drawn)
    flat = [token for window in drawn for token in window]
    assert flat == sorted(set(flat))


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="larger than population"):
        prose.samples(list(range(99)), 10, 10)


def test_samples_are_lines_of_json(tmp_path: Path) -> None:
    prose.write_samples(tmp_path / "ids.jsonl", [[1, 2], [3, 4]])
    assert (tmp_path / "ids.jsonl").read_text() == '{"input_ids": [1, 2]}\n{"input_ids": [3, 4]}\n'


@pytest.mark.parametrize("family", train_moe.FAMILIES)
def test_routing_is_watched(family: str) -> None:
    """Every router of every family is found; its loss of balance is 1 when it is even, experts / 2 at the worst."""
    import transformers

    config_name, model_name, own = train_moe.FAMILIES[family]
    small = train_moe._SHARED | own | {"num_hidden_layers": 2}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**small)).eval()
    routers = [value for name, value in model.named_parameters() if name.endswith("mlp.gate.weight")]
    routing = train_moe.watch(model)
    saved = [router.detach().clone() for router in routers]

    def routed(scale: float, tokens: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
        with torch.no_grad():
            for router, value in zip(routers, saved, strict=True):
                router.copy_(scale * value)
            model(tokens[None], use_cache=False)
        assert len(routing.shares) == len(routers) == 2 - (family == "deepseek_v2")
        return zip(routing.shares, routing.balance, strict=True)

    for share, balance in routed(0, torch.arange(64)):
        assert share.sum() == pytest.approx(1)
        assert balance == pytest.approx(1), "even probabilities"
    for share, balance in routed(1e4, torch.zeros(64, dtype=torch.int64)):  # alike, so that all have one way to go
        assert sorted(share.tolist())[-3:] == [0, 0.5, 0.5]
        assert balance == pytest.approx(len(share) / 2, rel=1e-3)


def test_the_whole_tree_of_processes_counts(tmp_path: Path) -> None:
    held = "import time; kept = b'x' * (64 << 20); time.sleep(1)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {held!r}]); {held}; child.wait()"
    _, most, printed = bench_gptq.measured([sys.executable, "-c", f"print('{{}}'); {both}"], {}, tmp_path / "log")
    assert printed.strip() == "{}"
    assert 128 << 20 < most < 256 << 20


def test_gap_closed() -> None:
    """Of the peer's distance to fp32: all of it where nothing is lost, below none where more is."""
    runs = {
        name: bench_gptq.Run(10, 1 << 30, 0.1, perplexity)
        for name, perplexity in (("GPTQModel: defaults", 24), ("dconv: a", 20), ("dconv: b", 23), ("dconv: c", 25))
    }
    cells = [line.split(" | ") for line in bench_gptq.table(20, runs, "small")[4:]]
    assert [row[5:] for row in cells] == [
        ["4.0000", " |"],
        ["0.0000", "100% |"],
        ["3.0000", "25% |"],
        ["5.0000", "-25% |"],
    ]


def test_no_worse_goes_by_the_mean_of_the_seeds() -> None:
    better = [bench_moe.Row("olmoe", seed, 30, 31, weighted) for seed, weighted in enumerate((30.5, 31.3, 30.9))]
    worse = [bench_moe.Row("mixtral", seed, 30, 31, weighted) for seed, weighted in enumerate((30.5, 31.8, 31.3))]
    lines = bench_moe.table(better + worse, 4)
    assert lines[-1] == "Routing-weighted is no worse (within 0.1%) for 1 of 2 families."
    assert "| olmoe | mean | 30.000 | 31.000 | 30.900 | 0.9968 |" in lines
