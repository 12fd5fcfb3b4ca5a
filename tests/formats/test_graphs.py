"""FORMAT torch_export and torchscript: what torch loads computes what transformers computes, at lengths of any kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dconv.checking import check
from dconv.checkpoint.pickling import Global, Reduce, dumps
from dconv.checkpoint.torchframe import ZipWriter
from dconv.cli import main
from dconv.errors import Refused, ToolMissing, UsageError
from dconv.examine import inspect
from dconv.net.device import computing, placed
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import RECEIPT
from tests.formats import graph_models
from tests.formats.graph_models import DTYPES, FILES
from tests.models import tree_digest
from tests.oracles import hf

FORMATS = tuple(FILES)
#: Models that are not traced, with what the refusal says; all others of `hf.FAMILIES` are.
REFUSED = {"llava": "models that see are not traced"}
#: Tied embeddings and windows; experts; two heads; two stacks; state-space layers.
SAMPLE = {"torch_export": ("gemma3_text", "mixtral", "bert"), "torchscript": ("t5", "mamba2")}
#: Families whose layers are not counted by that key, or are more than two kinds.
DEEP = ("bamba", "nemotron_h", "t5", "llava")


def small(name: str) -> transformers.PreTrainedModel:
    return hf.tiny(name, **({} if name in DEEP else {"num_hidden_layers": 2}))[1]


def _cases() -> list[object]:
    return [
        pytest.param(format, name, dtype, marks=() if dtype == "f32" and name in SAMPLE[format] else pytest.mark.long)
        for format in FORMATS
        for name in hf.FAMILIES
        for dtype in ("f32", "bf16", "f16")
    ]


@pytest.mark.parametrize(("format", "name", "dtype"), _cases())
def test_a_graph_computes_what_transformers_computes(format: str, name: str, dtype: str, tmp_path: Path) -> None:
    model = small(name)
    hf.save(model, tmp_path / "hf")
    request = Request(tmp_path / "hf", format, tmp_path / "out", dtype=dtype)
    if name in REFUSED:
        with pytest.raises(Refused, match=REFUSED[name]):
            prepare(request)
        return
    convert(request)
    if dtype != "f32":
        # experts one by one, as in the graph: transformers' forms of them round otherwise, which in narrow dtypes sends
        # tokens of a model of random weights to other experts (Mixtral: its own two forms are 0.34 apart)
        ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = type(model).from_pretrained(tmp_path / "hf", dtype=DTYPES[dtype], **ways).eval()
    graph = graph_models.load(tmp_path / "out", format)
    assert graph_models.farthest(graph, model) < (1e-4 if dtype == "f32" else 2e-2)
    held = len(json.loads((tmp_path / "out" / RECEIPT).read_text())["tensors"])
    assert held == len({id(value) for value in model.state_dict(keep_vars=True).values()})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads that three ranks divide, and its graphs in bf16 and fp32."""
    root = tmp_path_factory.mktemp("graphs")
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 192}
    hf.save(hf.tiny("llama", num_hidden_layers=2, vocab_size=384, **sizes)[1], root / "hf")
    for format in FORMATS:
        convert(Request(root / "hf", format, root / format, dtype="bf16"))
    return root


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_a_step_is_transformers_greedy_text(llama: Path, format: str) -> None:
    graph = graph_models.load(llama / format, format)
    model = transformers.LlamaForCausalLM.from_pretrained(
        llama / "hf", dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor([[7, 300, 21, 5]])
    expected = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    fed, cache = tokens, graph.empty(1)
    with torch.no_grad():
        for _ in range(20):
            logits, cache = graph.step(fed, cache)
            fed = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, fed], 1)
    assert torch.equal(tokens, expected)


def test_torch_alone_loads_them(llama: Path) -> None:
    code = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dconv", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
ones, places = torch.ones(2, 4, dtype=torch.long), torch.arange(4).expand(2, 4)
cache = [torch.zeros(2, 3, 0, 16, dtype=torch.bfloat16)] * 4
first = torch.export.load(sys.argv[1]).module()(ones, ones, places, *cache)
second = torch.jit.load(sys.argv[2])(ones, ones, places, *cache)
print(all(map(torch.equal, first, second)), first[0].shape)
"""
    files = [str(llama / format / FILES[format]) for format in FORMATS]
    done = subprocess.run([sys.executable, "-I", "-c", code, *files], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True torch.Size([2, 4, 384])", done.stderr


def test_lengths_that_do_not_agree_are_an_error_of_the_graph(llama: Path) -> None:
    graph = graph_models.load(llama / "torch_export", "torch_export")
    tokens = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(AssertionError, match="Guard failed"):
        graph.call(tokens, torch.ones(2, 9, dtype=torch.long), tokens, *graph.empty(2))


@pytest.mark.parametrize("format", FORMATS)
def test_from_megatron_on_any_number_of_ranks_the_same_bytes(llama: Path, format: str, tmp_path: Path) -> None:
    convert(Request(llama / "hf", "megatron", tmp_path / "megatron", parallel=Parallel(tp=3, pp=2, etp=3)))
    job = prepare(Request(tmp_path / "megatron", format, tmp_path / "1", dtype="bf16"))
    assert len(job.notes) == (format == "torchscript")
    for world in (1, 2, 3):
        placed = replace(job, request=replace(job.request, out=tmp_path / str(world)))
        for rank in range(world):
            run(placed, Settings(rank=rank, world=world, max_memory=1 << 20))
        assert tree_digest(tmp_path / str(world))[FILES[format]] == tree_digest(llama / format)[FILES[format]]


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.long)])
def test_processes_trace_the_same_bytes(llama: Path, ranks: int, tmp_path: Path) -> None:
    words = [
        "convert",
        str(llama / "hf"),
        "pt2",
        "--dtype",
        "bf16",
        "-o",
        str(tmp_path / "out"),
        "--nproc",
        str(ranks),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "dconv", *words], check=True, env=environment, capture_output=True)
    assert tree_digest(tmp_path / "out") == tree_digest(llama / "torch_export")


@pytest.mark.parametrize("format", FORMATS)
def test_looked_at_and_run(llama: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(llama / format)
    assert (report.format, report.family, report.layers) == (format, "llama", 2)
    assert "convert from the checkpoint that it was made of" in report.refused
    done = check(llama / format)
    assert done.reread is not None
    assert done.reread.whole
    assert done.run is not None
    assert done.run["computed"] == "bfloat16 on the CPU"
    assert main(["check", str(llama / format / FILES[format])]) == 0
    assert "a graph with" in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_once_more_for_another_device_and_back(llama: Path, format: str, tmp_path: Path) -> None:
    convert(Request(llama / format, format, tmp_path / "cuda", device="cuda:1"))
    data = (tmp_path / "cuda" / FILES[format]).read_bytes()
    assert b"cuda" in data
    if not torch.cuda.is_available():
        with pytest.raises(ToolMissing, match="device that is not here"):
            check(tmp_path / "cuda")
    convert(Request(tmp_path / "cuda", format, tmp_path / "back", device="cpu"))
    ours, theirs = (graph_models.load(folder, format) for folder in (tmp_path / "back", llama / format))
    tokens = torch.arange(6)[None]
    assert torch.equal(ours.step(tokens, ours.empty(1))[0], theirs.step(tokens, theirs.empty(1))[0])
    assert (tmp_path / "back" / "config.json").read_bytes() == (llama / format / "config.json").read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{"format": "hf"}, {"format": "megatron"}, {"dtype": "f32"}, {"format": "other"}])
def test_nothing_else_is_made_of_a_graph(llama: Path, format: str, options: dict[str, str], tmp_path: Path) -> None:
    to = options.get("format", format).replace("other", FORMATS[format == FORMATS[0]])
    with pytest.raises(Refused, match="a graph") as refusal:
        prepare(Request(llama / format, to, tmp_path / "out", dtype=options.get("dtype")))
    assert refusal.value.do == "convert from the checkpoint that it was made of"


@pytest.mark.parametrize(
    "option", [{"hf_config": "hf"}, {"rename": "names.json"}, {"submodel": "student"}, {"drop": ("*",)}], ids=str
)
def test_what_says_how_weights_are_read_says_nothing_of_a_graph(
    llama: Path, option: dict[str, Any], tmp_path: Path
) -> None:
    (llama / "names.json").write_text('{"a.*": "b.*"}')
    told = {name: llama / said if name in ("hf_config", "rename") else said for name, said in option.items()}
    (name,) = (f"--{name.replace('_', '-')}" for name in told)
    with pytest.raises(Refused, match="a graph") as refusal:
        prepare(Request(llama / "torchscript", "torchscript", tmp_path / "out", **told))
    assert refusal.value.found == name
    with pytest.raises(UsageError, match="checked as it is") as usage:
        check(llama / "torchscript", run=False, **told)
    assert usage.value.where == name


def test_a_graph_beyond_the_memory_that_is_allowed_is_not_run(llama: Path) -> None:
    """Of which only the bytes are known: no table knows its weights."""
    for format in FORMATS:
        found = check(llama / format, max_memory=1000)
        assert found.run is None and "0.0 MB are allowed" in found.not_run


def test_what_is_no_directory_or_no_device_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.save(small("llama"), tmp_path / "hf")
    words = ["convert", str(tmp_path / "hf"), "pt2", "-o", str(tmp_path / "out.pt2")]
    assert main(words) == 2
    assert "a directory's name" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "out"), "--device", "tpu"]) == 2
    assert "cuda:1" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("asked", "found"), [("auto", "cpu"), ("cpu", "cpu"), ("mps", "cpu"), ("cuda", "cpu"), ("cuda:3", "cpu")]
)
def test_without_a_gpu_the_cpu_computes_and_that_is_said(
    asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, notes = computing(asked)
    assert device == found
    assert [f"--device {asked}" in note for note in notes] == [True] * (asked not in ("auto", "cpu"))


def test_of_several_gpus_each_rank_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [computing(asked)[0] for asked in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert placed("auto") == ("cpu", ())


@pytest.mark.parametrize("format", FORMATS)
def test_an_archive_that_runs_code_is_not_loaded(llama: Path, format: str, tmp_path: Path) -> None:
    shutil.copytree(llama / format, tmp_path / "bad")
    (tmp_path / "bad" / RECEIPT).unlink()
    file = tmp_path / "bad" / FILES[format]
    writer = ZipWriter(0, "model")
    call = dumps(Reduce(Global("os", "system"), (f"touch {tmp_path / 'ran'}",)))
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name, content = info.filename.partition("/")[2], _content(file, info)
            if name.startswith("data/sample_inputs/"):
                content = call
            if name.startswith("code/"):
                content = content.replace(
                    b"  def forward", b"  def __setstate__(self, x: int):\n    return None\n  def forward"
                )
            writer.add(name, content)
    writer.finish()
    file.write_bytes(b"".join(data for _, data in writer.literals))
    with pytest.raises(Refused, match="more than tensors"):
        check(tmp_path / "bad")
    assert not (tmp_path / "ran").exists()


def _content(file: Path, info: zipfile.ZipInfo) -> bytes:
    """A record's bytes, whose checksum is not looked at."""
    data = file.read_bytes()[info.header_offset :]
    at = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    return data[at : at + info.file_size]
