"""GGUF as a source: every type, older and fused forms, sets of files, and what is refused by name."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from dconv.api import diff, inspect
from dconv.codec.gguf import BLOCKS
from dconv.errors import Damaged, DconvError, Refused, ToolMissing
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.trace import trace
from tests.formats.gguf_files import Tensor, in_blocks, recorded, rewrite
from tests.formats.gguf_models import write_model
from tests.models import tensors
from tests.quant.models import values_of

HIDDEN, HEADS, VOCAB = 256, 4, 8
#: GGUF's name in a layer -> HuggingFace's.
LINEAR = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def converted(source: Path, out: Path, **said: Any) -> dict[str, Any]:
    convert(Request(source, "hf", out, **said))
    return tensors(out)


def halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of neighbours that are rotated together, apart by half a head."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_as_the_package_decodes_it(tmp_path: Path, kind: str) -> None:
    number, (weights, size) = GGMLQuantizationType[kind], BLOCKS[kind]
    draw = np.random.default_rng(len(kind))
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, HIDDEN),
        (writer.add_feed_forward_length, HIDDEN), (writer.add_head_count, HEADS),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    expected: dict[str, np.ndarray[Any, Any]] = {}
    for theirs, ours in {"token_embd": "model.embed_tokens", **LINEAR}.items():
        rows = VOCAB if theirs == "token_embd" else HIDDEN
        raw = draw.integers(0, 256, (rows, HIDDEN // weights * size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = dequantize(raw, number) if kind not in ("F32", "F16") else _plain(raw, kind)
        if weights == 1:
            raw = raw.view(np.float32 if kind == "F32" else np.float16 if kind == "F16" else np.uint8)
        writer.add_tensor(f"{'' if rows == VOCAB else 'blk.0.'}{theirs}.weight", raw, raw_dtype=number)
        name = ours if rows == VOCAB else f"model.layers.0.{ours}"
        expected[f"{name}.weight"] = halves(values, HEADS) if theirs in ("attn_q", "attn_k") else values
    for theirs in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{theirs}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = converted(tmp_path / "model.gguf", tmp_path / "out", dtype="f32")
    for name, values in expected.items():
        assert np.array_equal(np.frombuffer(found[name][2], "<f4").reshape(values.shape), values, equal_nan=True), name
    scheme = prepare(Request(tmp_path / "model.gguf", "hf", tmp_path / "other")).source.coded
    assert set(scheme) == (set(expected) if weights > 1 else set())
    assert set(scheme.values()) == ({f"GGUF {kind}"} if weights > 1 else set())


def _plain(raw: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    return raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "Q4_1"), ("deepseek_v2", "Q8_0"), ("gpt_oss", "MXFP4"), ("gemma2", "Q5_0"), ("qwen2_moe", "Q8_0")],
)
def test_blocks_are_cut_and_turned_as_values_are(tmp_path: Path, name: str, kind: str) -> None:
    """Experts stacked, rows in another order, axes turned: the same of blocks and of what they decode to."""
    source = recorded(tmp_path, name)
    blocks = rewrite(source, tmp_path / "blocks.gguf", in_blocks(kind))
    plain = rewrite(source, tmp_path / "plain.gguf", in_blocks(kind, decoded=True))
    assert prepare(Request(blocks, "hf", tmp_path / "none")).source.coded
    one, other = (converted(path, tmp_path / path.stem, dtype="f32") for path in (blocks, plain))
    assert one == other


def test_weights_in_blocks_become_bf16_and_a_note_says_what_stays(tmp_path: Path) -> None:
    source = rewrite(recorded(tmp_path, "llama"), tmp_path / "q8.gguf", in_blocks("Q8_0"))
    found, coded = converted(source, tmp_path / "out"), prepare(Request(source, "hf", tmp_path / "none")).source.coded
    assert len(coded) == 2 * 6 + 2
    assert {entry[0] for name, entry in found.items() if name in coded} == {"BF16"}
    assert {entry[0] for name, entry in found.items() if name not in coded} == {"F32"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert any("fp32" in note for note in prepare(Request(source, "hf", tmp_path / "none")).notes)


def test_plain_weights_keep_their_dtype(tmp_path: Path) -> None:
    found = converted(recorded(tmp_path, "qwen2"), tmp_path / "out")
    assert found["model.layers.0.mlp.up_proj.weight"][0] == "BF16"
    assert found["model.layers.0.self_attn.q_proj.bias"][0] == "F32"


def apart(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
    """Each expert for itself, as until April 2024."""
    if "_exps." not in name:
        yield name, values, None
        return
    for number, expert in enumerate(values):
        yield name.replace("_exps.", f".{number}."), expert, None


def test_experts_of_their_own(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before", "mixtral")
    old = rewrite(recorded(tmp_path, "mixtral"), tmp_path / "old.gguf", apart)
    assert converted(old, tmp_path / "out", dtype="bf16") == tensors(before)


class Fused:
    """Tensors that a converter may write as one."""

    def __init__(self, parts: list[str], whole: str, axis: int) -> None:
        self.parts, self.whole, self.axis = parts, whole, axis
        self.held: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        part = next((part for part in self.parts if name.split(".")[2:3] == [part]), None)
        if part is None:
            yield name, values, None
            return
        self.held[part] = values
        if len(self.held) == len(self.parts):
            whole = np.concatenate([self.held[part] for part in self.parts], axis=self.axis)
            self.held = {}
            yield name.replace(part, self.whole), whole, None


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("llama", Fused(["attn_q", "attn_k", "attn_v"], "attn_qkv", 0)),
        ("qwen3_moe", Fused(["ffn_gate_exps", "ffn_up_exps"], "ffn_gate_up_exps", 1)),
    ],
    ids=["qkv", "gate and up"],
)
def test_fused_by_the_converter(tmp_path: Path, name: str, fused: Fused) -> None:
    before = write_model(tmp_path / "before", name)
    source = rewrite(recorded(tmp_path, name), tmp_path / "fused.gguf", fused)
    assert converted(source, tmp_path / "out", dtype="bf16") == tensors(before)


def test_latent_attention_as_it_was_before_it_was_absorbed(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before", "deepseek_v3")
    kv_b = {f"blk.{layer}.attn_kv_b.weight": f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in (0, 1)}
    known = values_of(before)

    def whole(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        if ".attn_v_b." in name:
            theirs = name.replace("attn_v_b", "attn_kv_b")
            yield theirs, known[kv_b[theirs]].astype(np.float32), None
        elif ".attn_k_b." not in name:
            yield name, values, None

    values = {
        "deepseek2.attention.key_length": 12, "deepseek2.attention.value_length": 6,
        "deepseek2.attention.key_length_mla": None, "deepseek2.attention.value_length_mla": None,
        "deepseek2.attention.head_count_kv": 4,
    }  # fmt: skip
    old = rewrite(recorded(tmp_path, "deepseek_v3"), tmp_path / "old.gguf", whole, values=values)
    assert converted(old, tmp_path / "out", dtype="bf16") == tensors(before)


def test_parts_of_one_weight_in_two_dtypes(tmp_path: Path) -> None:
    """A converter falls back to fp16 where rows are no whole blocks, of k_b alone perhaps."""

    def mixed(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        yield name, values.astype(np.float16) if ".attn_k_b." in name else values, None

    before = write_model(tmp_path / "before", "deepseek_v2")
    source = rewrite(recorded(tmp_path, "deepseek_v2"), tmp_path / "mixed.gguf", mixed)
    assert converted(source, tmp_path / "out", dtype="bf16") == tensors(before)
    assert converted(source, tmp_path / "plain")["model.layers.0.self_attn.kv_b_proj.weight"][0] == "F32"


def test_a_set_of_files(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before", "llama")
    (tmp_path / "set").mkdir()
    rewrite(recorded(tmp_path, "llama"), tmp_path / "set" / "model.gguf", split=8)
    parts = sorted((tmp_path / "set").iterdir())
    assert len(parts) > 2
    for path, out in ((parts[0], "first"), (parts[1], "second"), (tmp_path / "set", "directory")):
        assert converted(path, tmp_path / out, dtype="bf16") == tensors(before)
    held = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(Damaged, match="does not belong"):
        prepare(Request(parts[0], "hf", tmp_path / "none"))
    parts[1].write_bytes(held)
    parts[2].unlink()
    with pytest.raises(Damaged, match="missing"):
        prepare(Request(parts[0], "hf", tmp_path / "none"))
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(Damaged, match="does not belong"):
        prepare(Request(tmp_path / "alone.gguf", "hf", tmp_path / "none"))


def test_a_directory_with_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    recorded(folder, "qwen3")
    (folder / "mmproj-qwen3.gguf").write_bytes(b"a tower for pictures")
    (folder / "README.md").write_text("a model")
    assert prepare(Request(folder, "hf", tmp_path / "none")).family.name == "qwen3"
    recorded(folder, "llama")
    with pytest.raises(Damaged, match="told apart") as caught:
        prepare(Request(folder, "hf", tmp_path / "none"))
    assert "llama.gguf" in str(caught.value)


def test_a_file_of_another_name(tmp_path: Path) -> None:
    source = recorded(tmp_path, "qwen3").rename(tmp_path / "sha256-0123")
    assert prepare(Request(source, "hf", tmp_path / "none")).family.name == "qwen3"
    (tmp_path / "notes.txt").write_text("GG")
    with pytest.raises(Refused, match="a GGUF"):
        prepare(Request(tmp_path / "notes.txt", "hf", tmp_path / "none"))


def test_looked_at_and_compared(tmp_path: Path) -> None:
    source = rewrite(recorded(tmp_path, "qwen3"), tmp_path / "q4.gguf", in_blocks("Q4_0"))
    report = inspect(source)
    assert (report.format, report.family, report.layers, report.tied) == ("gguf", "qwen3", 2, True)
    assert any("GGUF Q4_0" in line for line in str(report).splitlines())
    convert(Request(source, "hf", tmp_path / "out"))
    assert diff(source, tmp_path / "out").equal


def embedding_twice(change: float) -> Any:
    def again(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        yield name, values, None
        if name == "token_embd.weight":
            yield "output.weight", values + np.float32(change), None

    return again


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """The metadata do not say whether it is tied: it is not where there is one, whatever its values."""
    config = write_model(tmp_path / "before", "granite")
    for change in (0.0, 1.0):
        source = rewrite(recorded(tmp_path, "granite"), tmp_path / f"{change}.gguf", embedding_twice(change))
        job = prepare(Request(source, "hf", tmp_path / "none"))
        assert "lm_head.weight" in job.logical.specs
        tied = Request(source, "hf", tmp_path / "none", hf_config=config)
        if change:
            with pytest.raises(Refused, match="differ"):
                prepare(tied)
        else:
            assert "lm_head.weight" not in prepare(tied).logical.specs


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("llama", {"general.architecture": "rwkv7"}, "rwkv7"),
        ("llama", {"general.type": "adapter"}, "adapter"),
        ("llama", {"llama.attention.head_count": None}, "llama.attention.head_count"),
        ("llama", {"llama.attention.scale": 0.1}, "llama.attention.scale"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal"),
        ("llama", {"llama.feed_forward_length": [48, 64]}, "llama.feed_forward_length"),
        ("llama", {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ("llama", {"llama.rope.freq_base": 10000.0}, "rope_freqs.weight"),
        ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type"),
        ("minicpm", {"minicpm.embedding_scale": None}, "minicpm.embedding_scale"),
        ("minimax_m2", {"minimax-m2.expert_gating_func": 1}, "minimax-m2.expert_gating_func"),
        ("deepseek_v2", {"deepseek2.expert_group_count": None}, "deepseek2.expert_group_count"),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(tmp_path: Path, name: str, values: dict[str, Any], said: str) -> None:
    source = rewrite(recorded(tmp_path, name), tmp_path / "changed.gguf", values=values)
    with pytest.raises(Refused) as caught:
        prepare(Request(source, "hf", tmp_path / "none"))
    assert said in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_a_config_from_elsewhere_settles_it(tmp_path: Path) -> None:
    before = write_model(tmp_path / "before", "llama")
    source = rewrite(recorded(tmp_path, "llama"), tmp_path / "odd.gguf", values={"llama.attention.scale": 0.1})
    assert converted(source, tmp_path / "out", dtype="bf16", hf_config=before) == tensors(before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize("values", [{"llama.block_count": "two"}, {"llama.attention.layer_norm_rms_epsilon": "small"}])
def test_values_that_none_are(tmp_path: Path, values: dict[str, Any]) -> None:
    source = rewrite(recorded(tmp_path, "llama"), tmp_path / "changed.gguf", values=values)
    with pytest.raises(Damaged):
        prepare(Request(source, "hf", tmp_path / "none"))


def test_tensors_that_no_row_has_or_that_are_missing(tmp_path: Path) -> None:
    def more(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        yield name, values, None
        if name == "blk.0.ffn_up.weight":
            yield "blk.0.ffn_up.scale", np.ones(1, np.float32), None

    def less(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        if name != "blk.1.ffn_up.weight":
            yield name, values, None

    def wider(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        yield name, np.concatenate([values, values]) if name == "blk.1.attn_q.weight" else values, None

    cases: list[tuple[Any, type[DconvError], str]] = [
        (more, Refused, "blk.0.ffn_up.scale"),
        (less, Damaged, "model.layers.1.mlp.up_proj.weight"),
        (wider, Damaged, "blk.1.attn_q.weight"),
    ]
    for change, error, said in cases:
        source = rewrite(recorded(tmp_path, "llama"), tmp_path / "changed.gguf", change)
        with pytest.raises(error) as caught:
            prepare(Request(source, "hf", tmp_path / "none"))
        assert said in str(caught.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = recorded(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ToolMissing, match="package gguf") as caught:
        prepare(Request(source, "hf", tmp_path / "none"))
    assert "pip install" in caught.value.do


def test_what_its_graph_takes_where_a_key_is_missing(tmp_path: Path) -> None:
    missing = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention.key_length")
    values = {f"gemma2.{key}": None for key in missing} | {"gemma2.attention.value_length": None}
    source = rewrite(recorded(tmp_path, "gemma2"), tmp_path / "old.gguf", values=values)
    config = prepare(Request(source, "hf", tmp_path / "none")).config
    assert (config["sliding_window"], config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (
        4096, 50.0, 30.0,
    )  # fmt: skip
    assert config["head_dim"] == 8


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_way_of_a_tensor_says_what_happens_to_its_rows(tmp_path: Path, name: str) -> None:
    job = prepare(Request(recorded(tmp_path, name), "hf", tmp_path / "none"))
    ways = trace(job.plan, Parallel(), "*.0.self_attn.[qv]_proj.weight")
    apart = {way.name[-13]: any("alternate" in line for line in way.relayout) for way in ways}
    assert apart == {"q": name == "llama", "v": False}


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_no_world_and_no_budget_changes_a_byte(tmp_path: Path, name: str) -> None:
    source = rewrite(recorded(tmp_path, name), tmp_path / "q8.gguf", in_blocks("Q8_0"))
    expected = converted(source, tmp_path / "one", dtype="f32")
    job = prepare(Request(source, "hf", tmp_path / "three", dtype="f32", shard_size=20_000))
    launched = time.time()
    for rank, memory in enumerate((64 << 10, 300_000, 256 << 20)):
        run(job, Settings(rank=rank, world=3, max_memory=memory, launched=launched))
    assert tensors(tmp_path / "three") == expected
