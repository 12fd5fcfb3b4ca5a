"""FORMAT onnx: what the graphs compute in onnxruntime is what transformers computes, at all lengths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

import dconv
from dconv import logits
from dconv.describe import describe_model
from dconv.errors import Damaged, Refused, ToolMissing, UsageError
from dconv.export import huggingface, onnx_graph
from dconv.export import onnx_run as engine
from dconv.export.prompt import kind_of, prompt_for
from dconv.pipeline import prepare, run
from dconv.request import Request
from dconv.sharding.rank import Settings
from tests.formats import onnx_models as models
from tests.oracles import hf

BOUND = {"f32": 1e-4, "f16": 2e-2}


def check_decoder(one: models.Made, dtype: str) -> None:
    """Whole texts, and texts in pieces, of other lengths than those that were traced, with padding and without.

    Of fp16 transformers' own in fp16 is the judge: a router may choose another expert there than in fp32.
    """
    runs, bound = one.runs, BOUND[dtype]
    one = replace(one, model=one.narrow) if dtype == "f16" else one
    for batch, length in ((1, 1), (3, 11)):
        ids = models.tokens(batch, length)
        assert models.apart(runs.step(ids, None)[0], models.theirs(one.model, ids)) < bound
    ids = models.tokens(2, 13, 1)
    wanted = models.theirs(one.model, ids)
    said, past = [], None
    for begin, end in ((0, 6), (6, 7), (7, 8), (8, 13)):
        part, past = runs.step(ids[:, begin:end], past)
        said.append(part)
    assert models.apart(np.concatenate(said, 1), wanted) < bound
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    places = np.maximum(mask.cumsum(1) - 1, 0)
    wanted = models.theirs(one.model, ids, attention_mask=mask, position_ids=places)
    first, past = runs.step(ids[:, :9], None, mask[:, :9], places[:, :9])
    then, _ = runs.step(ids[:, 9:], past, mask, places[:, 9:])
    found = np.concatenate([first, then], 1)
    assert models.apart(found[1], wanted[1]) < bound
    assert models.apart(found[0, 4:], wanted[0, 4:]) < bound


def check_prompt(one: models.Made, bound: float) -> None:
    model = describe_model(one.source)
    whole = prompt_for(model.family, model.facts, model.config)
    for length in (16, 11, 1):
        types = None if whole.types is None else whole.types[:, :length]
        prompt = replace(whole, tokens=whole.tokens[:, :length], types=types)
        wanted = huggingface.answers_of(one.source, prompt)
        for found, want in zip(one.runs.answers(prompt), wanted, strict=True):
            assert models.apart(found, want) < bound


@pytest.mark.parametrize(("name", "dtype"), [("llama", "f32"), ("gemma", "f16"), ("mixtral", "f32")])
def test_decoders_answer_as_transformers(name: str, dtype: str) -> None:
    one = models.made(name, dtype)
    check_decoder(one, dtype)
    assert engine.validate(one.out)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_answer_as_transformers(name: str) -> None:
    one = models.made(name)
    check_prompt(one, BOUND["f32"])
    assert engine.validate(one.out)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", hf.FAMILIES)
def test_every_family(name: str, dtype: str) -> None:
    if name in REFUSED:
        with pytest.raises(Refused, match=REFUSED[name]):
            models.made(name, dtype, None, False)
        return
    one = models.made(name, dtype, None, False)
    assert engine.validate(one.out)
    if kind_of(one.job.family) == "decoder":
        check_decoder(one, dtype)
    else:
        check_prompt(one, BOUND[dtype])


#: Families that torch's exporter has no graph for, and what is said of it.
REFUSED: dict[str, str] = {"llava": "models that see are not traced"}


def test_a_text_is_continued_as_by_transformers() -> None:
    one = models.made("llama")
    ids = models.tokens(1, 5)
    wanted = one.model.generate(torch.from_numpy(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)
    model = describe_model(one.source)
    found = one.runs.generated(prompt_for(model.family, model.facts, model.config), ids)
    assert found.tolist() == wanted.tolist()


def test_onnxruntime_genai_continues_it_too() -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    one = models.made("llama")
    model = genai.Model(str(one.out))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=30, do_sample=False)
    writer = genai.Generator(model, params)
    ids = models.tokens(1, 5)
    writer.append_tokens(ids[0].astype(np.int32))
    while not writer.is_done():
        writer.generate_next_token()
    wanted = one.model.generate(torch.from_numpy(ids), max_length=30, do_sample=False, pad_token_id=0)
    assert list(map(int, writer.get_sequence(0))) == wanted[0].tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_any_world_writes_the_same_bytes(world: int, tmp_path: Path) -> None:
    one = models.made("llama")
    out = tmp_path / "out"
    job = replace(one.job, request=replace(one.job.request, out=out))
    for rank in range(world):
        run(job, Settings(rank=rank, world=world))
    for path in one.out.iterdir():
        if path.name != "dconv.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.long  # `test_graphs` and `test_matrix` have other processes trace
def test_another_process_plans_the_same(tmp_path: Path) -> None:
    one = models.made("llama")
    words = [sys.executable, "-m", "dconv", "plan", str(one.source), "onnx", "--dtype", "f32", "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([*words, "-o", str(tmp_path / "out")], capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout)["plan"] == one.job.plan.id


def test_weights_lie_as_the_graph_takes_them() -> None:
    graph = onnx.load(models.made("llama").out / "model.onnx", load_external_data=False).graph
    weights = {one.name: tuple(one.dims) for one in graph.initializer}
    assert not [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    assert weights["model.layers.0.self_attn.k_proj.weight"] == (128, 64)
    assert weights["model.embed_tokens.weight"] == (320, 128)
    for one in graph.initializer:
        place = {entry.key: int(entry.value) for entry in one.external_data if entry.key != "location"}
        assert place.get("offset", 0) % (4096 if place.get("length", 0) >= 1 << 16 else 64) == 0


def test_a_tied_embedding_is_there_once() -> None:
    one = models.made("gemma", "f16")
    graph = onnx.load(one.out / "model.onnx", load_external_data=False).graph
    assert [w.name for w in graph.initializer if 320 in w.dims] == ["model.embed_tokens.weight"]


def test_a_graph_tells_nothing_of_who_traced_it() -> None:
    data = (models.made("llama").out / "model.onnx").read_bytes()
    for word in (b"site-packages", b".py", b"pkg.torch", b"stack"):
        assert word not in data


def test_what_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = models.source("llama")
    out = tmp_path / "out"
    for options in ({"opset": 9}, {"quant": "int3"}):
        with pytest.raises(UsageError):
            prepare(Request(folder, "onnx", out, **options))
    with pytest.raises(Refused, match="models that see are not traced"):
        prepare(Request(models.source("llava")[1], "onnx", out))
    monkeypatch.setattr(onnx_graph, "MODULES", ("torch", "no_such_package"))
    monkeypatch.setattr(onnx_graph.require, "__defaults__", (("no_such_package",),))
    with pytest.raises(ToolMissing, match="no_such_package"):
        prepare(Request(folder, "onnx", out))
    assert not list(tmp_path.iterdir())


def test_graphs_are_looked_at_checked_and_verified() -> None:
    one = models.made("llama")
    report = dconv.inspect(one.out)
    assert (report.format, report.family, report.layers) == ("onnx", "llama", 2)
    assert "a graph is no checkpoint" in report.refused
    found = dconv.check(one.out / "model.onnx")
    assert found.run is not None
    assert str(found.run["runtime"]).startswith("onnxruntime")
    assert found.reread is not None
    assert logits.compare(one.job, one.out)["bound"] == logits.BOUND
    with pytest.raises(Refused, match="no bound of logits"):
        logits.require(models.made("llama", "f32", "int8").job)


def test_check_finds_a_changed_weight(tmp_path: Path) -> None:
    out = shutil.copytree(models.made("llama").out, tmp_path / "out")
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (out / "model.onnx.data").write_bytes(data)
    with pytest.raises(Damaged, match="changed since the receipt"):
        dconv.check(out)
