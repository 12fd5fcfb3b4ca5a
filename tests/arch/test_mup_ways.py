"""``--mup2llama`` by every way: into and out of Megatron, by any number of ranks; what is refused, verified, told."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from safetensors.torch import load_file, save_file  # noqa: E402

from dconv import live, logits  # noqa: E402
from dconv.arch.registry import by_name  # noqa: E402
from dconv.cli import main  # noqa: E402
from dconv.errors import Damaged, DconvError, Refused, UsageError, VerifyFailed  # noqa: E402
from dconv.pipeline import Request, convert, prepare, run  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from tests.arch.test_minicpm import TOKENS, longrope, write_model  # noqa: E402
from tests.arch.test_mup import BIASED, difference, fold, in_bf16  # noqa: E402
from tests.laws.test_handoff import Threads, chunks_of, each  # noqa: E402
from tests.models import config_of, tensors, tree_digest, write_random  # noqa: E402
from tests.oracles import hf, minicpm  # noqa: E402
from tests.processes import call, local  # noqa: E402

#: Ways from a MiniCPM directory to the folded HuggingFace directory, each with the conversions on it.
WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "folded into torch_dist": [("megatron", {"mup2llama": True, "parallel": Parallel(tp=2, pp=2, etp=2)}), ("hf", {})],
    "folded into legacy": [
        ("megatron", {"mup2llama": True, "parallel": Parallel(tp=2, pp=2, vpp=2, etp=2), "megatron_format": "legacy"}),
        ("hf", {}),
    ],
    "folded into model_pt": [
        ("megatron", {"mup2llama": True, "megatron_format": "model_pt"}),
        ("hf", {}),
    ],
    "folded from torch_dist": [("megatron", {"parallel": Parallel(tp=2, pp=2, etp=2)}), ("hf", {"mup2llama": True})],
    "folded from legacy": [
        ("megatron", {"parallel": Parallel(pp=4), "megatron_format": "legacy"}),
        ("hf", {"mup2llama": True}),
    ],
    "folded between layouts": [
        ("megatron", {"parallel": Parallel(tp=2, etp=2)}),
        ("megatron", {"parallel": Parallel(pp=2), "mup2llama": True}),
        ("hf", {}),
    ],
    "folded into pt files": [("pt", {"mup2llama": True, "parallel": Parallel(tp=2, etp=2)}), ("hf", {})],
    "folded from pt files": [("pt", {"parallel": Parallel(tp=2, etp=2)}), ("hf", {"mup2llama": True})],
    "folded into bmtrain": [("bmtrain", {"mup2llama": True}), ("hf", {})],
    "folded from bmtrain": [("bmtrain", {}), ("hf", {"mup2llama": True})],
}


@pytest.mark.parametrize(
    ("way", "family"),
    [
        (way, family)
        for way in WAYS
        for family in (("minicpm",) if "bmtrain" in way else ("minicpm", "minicpm_moe", "granite"))
    ],
)
def test_every_way_gives_the_same_weights_and_function(way: str, family: str, tmp_path: Path) -> None:
    """Megatron's args alone say the scalars: what travels beside them is taken away."""
    keys = {"tie_word_embeddings": True, "sparse_config": None, "mup_denominator": None, "vocab_size": 64}
    source = in_bf16(write_model(tmp_path / "hf", family, **keys))
    expected = fold(source, tmp_path / "at once")
    at = source
    for step, (format, options) in enumerate(WAYS[way]):
        convert(Request(at, format, tmp_path / str(step), **options))
        at = tmp_path / str(step)
        if "model_pt" not in way:  # whose metadata.json says less than args
            shutil.rmtree(at / "huggingface", ignore_errors=True)
    assert tensors(at) == tensors(expected)
    assert torch.equal(hf.logits(at, TOKENS), hf.logits(expected, TOKENS))


def test_longrope_goes_with_a_llama_through_megatron(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "minicpm", rope_scaling=longrope(4, 16))
    job = prepare(Request(source, "megatron", tmp_path / "megatron", parallel=Parallel(tp=2, etp=2), mup2llama=True))
    assert [line for line in job.needs if "longrope" in line]
    assert not [line for line in job.needs if "scale_" in line]
    run(job, Settings())
    shutil.rmtree(tmp_path / "megatron" / "huggingface")
    convert(Request(tmp_path / "megatron", "hf", tmp_path / "back"))
    assert difference(minicpm.logits(source, TOKENS), hf.logits(tmp_path / "back", TOKENS)) <= 1e-5


@pytest.mark.parametrize(("world", "memory"), [(2, 64 << 10), (3, 1 << 20), (5, 256 << 20)])
@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_any_number_of_ranks_writes_the_same_bytes(format: str, world: int, memory: int, tmp_path: Path) -> None:
    family = by_name("minicpm")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "vocab_size": 499}
    source = write_random(tmp_path / "hf", family, config_of(family, tie_word_embeddings=True, **sizes), small=True)

    def request(out: str) -> Request:
        parallel = Parallel(tp=2, pp=2, etp=2) if format == "megatron" else Parallel()
        return Request(
            source, format, tmp_path / out, parallel=parallel, shard_size=60_000, mup2llama=True, dtype="f32"
        )

    convert(request("one"))
    launched = time.time()
    for rank in reversed(range(world)):
        run(prepare(request("many")), Settings(rank=rank, world=world, max_memory=memory, launched=launched))
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "one")


def test_receipt_and_files_say_what_was_done(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "minicpm", tie_word_embeddings=True, auto_map={"AutoModel": "code.M"})
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_minicpm.py").write_text("raise SystemExit")
    out = fold(source, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "dconv.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    receipt = json.loads((out / "dconv.json").read_text())
    assert "sparse_config of config.json" in receipt["left_out"]
    assert "lm_head.weight" not in receipt["left_out"]
    found = receipt["mup"]
    assert (found["from"], found["to"], found["untied"]) == ("minicpm", "llama", True)
    assert found["scalars"] == {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    assert {part: told["factor"] for part, told in found["factors"].items()} == {
        "embedding": 12.0, "residual": 0.7, "head": 8.0
    }  # fmt: skip
    assert found["factors"]["residual"]["tensors"] == [
        "model.layers.{0..3}.self_attn.o_proj.weight", "model.layers.{0..3}.mlp.down_proj.weight"
    ]  # fmt: skip
    assert json.loads((fold(out, tmp_path / "again") / "dconv.json").read_text()).get("mup") is None


def test_the_plan_names_what_is_not_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = in_bf16(write_model(tmp_path / "hf", "granite"))
    words = ["plan", str(source), "megatron", "--tp", "2", "--mup2llama"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    q, o, down, norms = (f"model.layers.{{0..3}}.{name}.weight" for name in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"
    ))  # fmt: skip
    by_op = {kind["op"].split(",")[0]: (kind["count"], kind["tensors"]) for kind in told["precision"]}
    assert by_op == {
        "bf16 x 12 in f64": (1, ["model.embed_tokens.weight"]),
        "bf16 x 0.353553 in f64": (4, [q]),
        "bf16 x 0.22 in f64": (8, [o, down]),
        "bf16 x 0.125 in f64": (1, ["lm_head.weight"]),
    }
    assert told["rounded"] == 14
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"exact: {told['tensors'] - 14} of {told['tensors']} tensors" in text
    assert o in text
    assert norms not in text
    assert "GraniteForCausalLM becomes LlamaForCausalLM" in text


@pytest.mark.parametrize("family", ["llama", "minicpm3"])
def test_nothing_to_fold_is_said_and_the_conversion_goes_on(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"scale_emb": 1, "scale_depth": 2.0, "dim_model_base": 32} if family == "minicpm3" else {}
    source = write_model(tmp_path / "hf", family, **keys)
    assert main(["convert", str(source), "hf", "-o", str(tmp_path / "out"), "--mup2llama"]) == 0
    assert "--mup2llama: nothing to fold" in capsys.readouterr().out
    convert(Request(source, "hf", tmp_path / "plain"))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "a llama with scalars": ("llama", {"scale_emb": 12, "scale_depth": 1.4}, Refused, "folded already"),
    "a zero": ("minicpm", {"scale_emb": 0}, Damaged, "scale_emb"),
    "below zero": ("minicpm", {"scale_depth": -1.4}, Damaged, "scale_depth"),
    "text": ("minicpm", {"dim_model_base": "256"}, Damaged, "dim_model_base"),
    "true": ("granite", {"residual_multiplier": True}, Damaged, "residual_multiplier"),
    "an inverse past every number": ("granite", {"logits_scaling": 1e-320}, Refused, "head"),
    "a scalar that no muP has": ("minicpm", {"logit_scale": 0.5}, Refused, "logit_scale"),
    "a stretch that only one of the two reads": (
        "minicpm", {"rope_scaling": {**longrope(4, 64), "factor": 5.0}}, Refused, "factor 5.0"
    ),
    "a bias that Mixtral has not": ("minicpm_moe", BIASED, Refused, "o_proj.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name: str, tmp_path: Path) -> None:
    family, keys, kind, said = REFUSED[name]
    source = write_model(tmp_path / "hf", family, **keys)
    with pytest.raises(kind) as caught:
        fold(source, tmp_path / "out")
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("options", [{"with_eagle": True}, {"teacher": Path("teacher")}], ids=["eagle", "teacher"])
def test_what_shares_the_embedding_is_not_left_behind(options: dict[str, Any], tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "minicpm")
    with pytest.raises((Refused, UsageError), match="nothing was written"):
        fold(source, tmp_path / "out", "megatron", **options)


def test_megatron_core_computes_what_granite_does(tmp_path: Path) -> None:
    """transformers' Granite on one side, the real megatron-core as a plain Llama on the other."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    _, model = hf.tiny("granite", tie_word_embeddings=True)
    source = hf.save(model, tmp_path / "hf")
    request = Request(source, "megatron", tmp_path / "out", parallel=Parallel(tp=2, etp=2), mup2llama=True)
    run(job := prepare(request), Settings())
    assert not job.needs
    assert logits.compare(job, request.output)["difference"] <= 1e-5


def test_logits_are_verified_between_the_two_functions(tmp_path: Path) -> None:
    _, model = hf.tiny("granite", tie_word_embeddings=True)
    request = Request(hf.save(model, tmp_path / "hf"), "hf", tmp_path / "out", mup2llama=True)
    run(job := prepare(request), Settings())
    found = logits.compare(job, request.output)
    assert found["difference"] <= 1e-5
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["lm_head.weight"] *= 1.01
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyFailed):
        logits.compare(job, request.output)


def test_a_running_job_hands_over_a_llama(tmp_path: Path) -> None:
    """The head comes from the embedding, which the first and the last stage hold."""
    source = in_bf16(write_model(tmp_path / "hf", "minicpm", tie_word_embeddings=True))
    parallel = Parallel(tp=2, pp=2, etp=2)
    convert(Request(source, "megatron", tmp_path / "saved", parallel=parallel, megatron_format="legacy", divisor=8))
    request = Request(Path("memory"), "hf", tmp_path / "out", mup2llama=True)

    def hand(ranks: Threads) -> Any:
        coord = list(parallel.coords())[ranks.rank]
        chunks, args = chunks_of(tmp_path / "saved", coord, parallel)
        return live.handoff(chunks, request, Settings(), ranks, args=args, coord=coord, parallel=parallel)

    for done in each(parallel.world, hand):
        assert not isinstance(done, DconvError), done
    assert tensors(tmp_path / "out") == tensors(fold(source, tmp_path / "at once"))


def greedy(logits: Callable[[Any], Any], prompt: Any, count: int) -> Any:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, logits(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


def test_from_a_tied_minicpm_through_megatron_to_a_generating_llama(tmp_path: Path) -> None:
    """Four ranks on every step, in processes of their own."""
    model = in_bf16(write_model(tmp_path / "model", "minicpm", tie_word_embeddings=True))
    source = tmp_path / "minicpm"
    convert(Request(model, "hf", source, shard_size=20_000))
    assert len(list(source.glob("*.safetensors"))) > 2
    llama, megatron, back = (tmp_path / name for name in ("llama", "megatron", "back"))
    for words in (
        [source, "hf", "-o", llama, "--mup2llama", "--shard-size", "20KB"],
        [llama, "megatron", "-o", megatron, "--tp", "2", "--pp", "2"],
        [megatron, "hf", "-o", back],
    ):
        code, _, err = call(*local(4, *words))
        assert code == 0, err
    assert tensors(back) == tensors(llama)
    prompt = torch.tensor([[1, 17, 42, 5]])
    loaded: Any = hf.load(back)
    made = loaded.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.tolist() == greedy(lambda tokens: minicpm.logits(source, tokens), prompt, 12).tolist()


@pytest.mark.parametrize(("target", "tp"), [("hf", 1), ("megatron", 2)])
def test_verify_logits_asks_the_folded_models_own_runtime(target: str, tp: int, tmp_path: Path) -> None:
    """megatron-core computes no Granite, and the Llama that it becomes."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    _, model = hf.tiny("granite", tie_word_embeddings=True)
    source = hf.save(model, tmp_path / "hf")
    options = [] if target == "hf" else ["--tp", str(tp)]
    words = ["convert", str(source), target, "-o", str(tmp_path / "out"), *options, "--verify", "logits", "--quiet"]
    if target == "megatron":
        assert main(words) == Refused.exit_code
        assert not (tmp_path / "out").exists()
    assert main([*words, "--mup2llama"]) == 0
