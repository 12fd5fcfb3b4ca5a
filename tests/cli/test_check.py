"""What check finds: flipped bits anywhere, edited files, and models that do not compute; and what it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dconv import checking, logits, verify
from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from dconv.errors import Damaged, ToolMissing, VerifyFailed
from dconv.export import runtimes
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.cli.conftest import Dconv, flip
from tests.models import config_of, write_random

FORMATS = ("hf", "legacy", "torch_dist")


def receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dconv.json").read_text())


def edit_receipt(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As a receipt of before it had a digest of its own."""
    written = receipt(folder)
    del written["own_digest"]
    change(written)
    (folder / "dconv.json").write_text(json.dumps(written))


@pytest.mark.parametrize("format", FORMATS)
def test_whole(dconv: Dconv, made: Callable[[str], Path], format: str) -> None:
    out = made(format)
    ran = dconv("check", out, "--no-run", "--json")
    assert ran.code == 0, ran.out
    written = receipt(out)
    assert ran.json["receipt"]["tensors"] == len(written["tensors"])
    assert ran.json["receipt"]["files"] == len(written["frames"]) + len(written["closing"])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "dconv.json")
    assert ran.json["receipt"]["nbytes"] == size


@pytest.mark.parametrize("format", FORMATS)
def test_one_bit_of_a_tensor(dconv: Dconv, made: Callable[[str], Path], format: str) -> None:
    out = made(format)
    key, entry = list(receipt(out)["tensors"].items())[7]
    flip(out / entry["file"], entry["offset"] + 5, bit=3)
    ran = dconv("check", out)
    assert ran.code == 4
    assert ran.err.startswith("damaged (4)  1 tensor changed since the receipt was written")
    assert key in ran.err.replace("{", "").replace("}", "")
    told = dconv("check", out, "--json")
    assert (told.code, told.json["error"]) == (4, "damaged")
    with pytest.raises(VerifyFailed, match="1 tensor changed"):
        verify.digest(out)


@pytest.mark.parametrize("format", FORMATS)
def test_one_bit_of_a_header(dconv: Dconv, made: Callable[[str], Path], format: str) -> None:
    out = made(format)
    name = next(iter(receipt(out)["frames"]))
    size = (out / name).stat().st_size
    held = [t["offset"] for t in receipt(out)["tensors"].values() if t["file"] == name]
    for at in (9, min(held) - 1, size - 1 if format != "hf" else 30):
        flip(out / name, at)
        ran = dconv("check", out, "--no-run")
        assert ran.code == 4
        assert f"the header of {name}" in ran.err
        flip(out / name, at)
    assert dconv("check", out, "--no-run").code == 0


@pytest.mark.parametrize("format", FORMATS)
def test_every_byte_counts(made: Callable[[str], Path], format: str) -> None:
    """The last bit of every 97th byte of every file: each is found, none twice."""
    out = made(format)
    written = receipt(out)
    for name in [*written["frames"], *written["closing"]]:
        path = out / name
        for at in range(0, path.stat().st_size, max(97, path.stat().st_size // 20)):
            flip(path, at)
            found = verify.reread(out)
            assert len(found.damaged) + len(found.broken) == 1, (name, at)
            flip(path, at)
    assert verify.reread(out).whole


def test_closing_files(dconv: Dconv, made: Callable[[str], Path]) -> None:
    out = made("hf")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    ran = dconv("check", out)
    assert ran.code == 4
    assert "config.json" in ran.err
    dist = made("torch_dist")
    (dist / "release" / "common.pt").unlink()
    os.truncate(dist / "release" / ".metadata", 100)
    ran = dconv("check", dist)
    assert ran.code == 4
    assert "release/common.pt (missing)" in ran.err
    assert "release/.metadata" in ran.err


def test_a_file_cut_short(dconv: Dconv, made: Callable[[str], Path]) -> None:
    out = made("hf")
    name, last = max(receipt(out)["frames"]), "lm_head.weight"
    os.truncate(out / name, (out / name).stat().st_size - 1)
    ran = dconv("check", out)
    assert ran.code == 4
    assert last in ran.err


def test_below_the_root_and_beside_it(dconv: Dconv, made: Callable[[str], Path]) -> None:
    out = made("torch_dist")
    (out / "notes.txt").write_text("mine")
    ran = dconv("check", out / "release", "--no-run")
    assert ran.code == 0
    assert "not covered by the receipt: notes.txt" in ran.out


def test_receipts_that_lie(dconv: Dconv, made: Callable[[str], Path]) -> None:
    out = made("hf")
    key, entry = next(iter(receipt(out)["tensors"].items()))

    def change(**fields: object) -> Callable[[dict[str, Any]], None]:
        return lambda written: written["tensors"][key].update(fields)

    for lie in (
        change(file="../../etc/hostname"),
        change(shape=[2**62, 2**62, -1]),
        change(offset="0"),
        change(dtype="f12"),
        lambda written: written["closing"].update({"/etc/hostname": "00"}),
        lambda written: written.update(digest="crc32"),
        lambda written: written.update(tensors=[]),
    ):
        before = (out / "dconv.json").read_bytes()
        edit_receipt(out, lie)
        ran = dconv("check", out, "--no-run")
        assert ran.code == 4, lie
        assert "the receipt is broken" in ran.err
        (out / "dconv.json").write_bytes(before)
    edit_receipt(out, change(offset=2**60))
    assert key in dconv("check", out, "--no-run").err
    (out / "dconv.json").write_text('{"plan": ')
    assert dconv("check", out, "--no-run").code == 4
    assert entry["digest"]


def test_holes_are_zeros(dconv: Dconv, tmp_path: Path) -> None:
    """A sparse source: its output has holes, which check hashes without reading; data in a hole is damage."""
    config = config_of(LLAMA, hidden_size=512, intermediate_size=2048, num_hidden_layers=1, head_dim=128)
    model = write_random(tmp_path / "model", LLAMA, config)
    path = model / "model.safetensors"
    size, stored = path.stat().st_size, safetensors.read_header(path)
    begin = min(tensor.extents[0].offset for tensor in stored.values())
    head = path.read_bytes()[:begin]
    path.write_bytes(head)
    os.truncate(path, size)
    at = stored["model.layers.0.mlp.down_proj.weight"].extents[0].offset + 700_000
    flip(path, at)
    out = tmp_path / "out"
    convert(Request(model, "hf", out))
    assert (out / "model.safetensors").stat().st_blocks * 512 < size / 2
    assert verify.reread(out).whole
    flip(out / "model.safetensors", at + 400_000)
    assert verify.reread(out).damaged == ("model.layers.0.mlp.down_proj.weight in model.safetensors",)


def test_without_a_receipt(dconv: Dconv, hf: Path) -> None:
    ran = dconv("check", hf, "--no-run")
    assert ran.code == 0
    assert "no dconv.json" in ran.out
    shard = sorted(hf.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 2)
    assert dconv("check", hf, "--no-run").code == 4


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_tensors_and_literals_without_gaps(hf: Path, tmp_path: Path, format: str) -> None:
    """What the digest of a frame rests on: literals in order, and nothing else between the tensors."""
    options: dict[str, Any] = {"megatron_format": format} if format != "hf" else {}
    name = "megatron" if options else "hf"
    plan = prepare(Request(hf, name, tmp_path / "m", parallel=Parallel(tp=2, pp=2, etp=2), **options)).plan
    for file in plan.target.files:
        literals = [offset for offset, _ in file.literals]
        assert literals == sorted(literals)
        stretches = [(offset, len(data)) for offset, data in file.literals]
        stretches += [(t.offset, t.spec.nbytes) for t in plan.target.tensors if t.file == file.path]
        at = 0
        for offset, nbytes in sorted(stretches):
            assert offset == at
            at += nbytes
        assert at == file.size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers runs, with a tokenizer of a few words."""
    oracle = pytest.importorskip("tests.oracles.hf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    _, model = oracle.tiny("llama", vocab_size=61, num_hidden_layers=2)
    folder = oracle.save(model, tmp_path_factory.mktemp("tiny") / "tiny")
    words = ["The", "capital", "of", "France", "is", *(f"word{i}" for i in range(56))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="word0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_runs_transformers(dconv: Dconv, tiny: Path) -> None:
    ran = dconv("check", tiny, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["run"]["runtime"].startswith("transformers ")
    assert ran.json["run"]["continuation"].startswith("The capital of France is word")
    assert 0.1 < ran.json["run"]["largest_logit"] < 100


@pytest.mark.parametrize("format", ["legacy", "torch_dist"])
def test_runs_megatron(dconv: Dconv, tiny: Path, tmp_path: Path, format: str) -> None:
    pytest.importorskip("megatron.core")
    out = tmp_path / "m"
    ran = dconv("convert", tiny, "megatron", "--pp", 2, "--megatron-format", format, "-o", out, "--verify", "logits",
                "--json")  # fmt: skip
    assert ran.code == 0, ran.out
    assert ran.json["verified"]["logits"]["difference"] < logits.BOUND
    run = dconv("check", out, "--json").json["run"]
    assert run["runtime"].startswith("megatron-core ")
    assert f"pp {2 if format == 'legacy' else 1}" in run["model"]


def test_megatron_logits_that_differ(tiny: Path, tmp_path: Path) -> None:
    """The comparison across frameworks sees an output whose weights are wrong."""
    pytest.importorskip("megatron.core")
    job = prepare(Request(tiny, "megatron", tmp_path / "m"))
    convert(job.request)
    entry = next(t for key, t in receipt(tmp_path / "m")["tensors"].items() if "layers.1.mlp.linear_fc2" in key)
    with (tmp_path / "m" / entry["file"]).open("r+b") as file:
        file.seek(entry["offset"])
        file.write(bytes(4 * 344))
    with pytest.raises(VerifyFailed, match="does not compute what the source computes"):
        logits.compare(job, tmp_path / "m")


def test_logits_that_differ(tiny: Path, tmp_path: Path) -> None:
    job = prepare(Request(tiny, "hf", tmp_path / "a", shard_size=100_000))
    convert(job.request)
    assert logits.compare(job, tmp_path / "a")["difference"] == 0.0
    stored = next(safetensors.read_header(path) for path in sorted((tmp_path / "a").glob("*.safetensors")))
    extent = stored["model.embed_tokens.weight"].extents[0]
    with (tmp_path / "a" / extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes(128 * 4 * 30))
    with pytest.raises(VerifyFailed) as caught:
        logits.compare(job, tmp_path / "a")
    assert "logits within 1.0e-04" in caught.value.expected
    cast = prepare(Request(tiny, "hf", tmp_path / "b", dtype="bf16"))
    convert(cast.request)
    found = logits.compare(cast, tmp_path / "b")
    assert 0.0 < float(str(found["difference"])) < 0.0625
    assert "rounded to bf16" in str(found["why"])


def test_nonsense_is_damage(dconv: Dconv, tiny: Path, tmp_path: Path) -> None:
    convert(Request(tiny, "hf", tmp_path / "a"))
    (tmp_path / "a" / "dconv.json").unlink()
    extent = safetensors.read_header(tmp_path / "a" / "model.safetensors")["model.norm.weight"].extents[0]
    with (tmp_path / "a" / extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(b"\xff" * 4)
    ran = dconv("check", tmp_path / "a")
    assert ran.code == 4
    assert "no finite logits" in ran.err


def test_too_little_memory(dconv: Dconv, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, and where that is too much as well, not at all, which is no success."""
    for bytes_free in (400_000, 1000):
        monkeypatch.setattr(runtimes, "available_memory", lambda: bytes_free)  # noqa: B023
        monkeypatch.setattr(checking, "available_memory", lambda: bytes_free)  # noqa: B023
        ran = dconv("check", tiny)
        assert "fp32 needs about" in ran.out
        assert ran.code == (0 if "layer by layer" in ran.out else ToolMissing.exit_code)
    assert "not run" in ran.out
    assert "too small" in ran.out
    assert dconv("check", tiny, "--no-run").code == 0
    assert dconv("check", tiny, "--force-run", "--json").json["run"]


def test_missing_runtimes(
    dconv: Dconv, made: Callable[[str], Path], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = dconv("check", made("torch_dist"))
    assert ran.code == ToolMissing.exit_code
    assert "pip install 'dconv[megatron]'" in ran.err
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = dconv("check", tiny)
    assert ran.code == ToolMissing.exit_code
    assert "pip install 'dconv[megatron]'" in ran.err


def test_a_receipt_is_needed(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        verify.reread(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["tensors"]["lm_head.weight"].update(dtype=["bf16"]),
        lambda said: said["frames"].update({"half-\ud800-a-pair": "0"}),
        lambda said: said["closing"].update({"config.json/inside": "0"}),
        lambda said: said["closing"].update({"fifo": "0"}),
    ],
)
def test_a_hostile_receipt(dconv: Dconv, made: Callable[[str], Path], change: Callable[[dict[str, Any]], None]) -> None:
    out = made("hf")
    os.mkfifo(out / "fifo")  # whoever opens it waits for a writer
    said = receipt(out)
    change(said)
    (out / "dconv.json").write_text(json.dumps(said))
    ran = dconv("check", out, "--no-run")
    assert ran.code == Damaged.exit_code, ran.err
    assert ran.err.startswith("damaged (4)")


def test_a_model_that_computes_zero(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits are equal, also when the largest is 0."""
    job = prepare(Request(tiny, "hf", tmp_path / "a"))
    nothing = SimpleNamespace(answers_of=lambda *_, **__: (np.zeros((2, 16, 512), np.float32),))
    monkeypatch.setattr(logits, "runtime_of", lambda _: nothing)
    assert logits.compare(job, tmp_path / "a")["difference"] == 0.0
