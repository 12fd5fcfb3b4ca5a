"""``--verify`` fails, with exit code 6 and the output left in its place, whenever it could not say that all is well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv import logits, verify
from dconv.checkpoint import safetensors
from dconv.errors import Damaged, Refused, VerifyFailed
from dconv.export import runtimes
from dconv.pipeline import Job, Request, convert, prepare
from tests.cli.conftest import Dconv, flip
from tests.models import tensors

Logits = NDArray[np.float32]
SHAPE = (2, 16, 61)
LOGITS: Logits = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def spoilt(at: tuple[int, ...], value: float) -> Logits:
    found = LOGITS.copy()
    found[at] = value
    return found


def runtimes_that_compute(source: Logits | Exception, target: Logits | Exception) -> Callable[[str], Any]:
    """In place of `logits.runtime_of`: the first call is the source's."""
    answers = [source, target]

    def answers_of(*_: object, **__: object) -> tuple[Logits]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return (answer,)

    return lambda _: SimpleNamespace(answers_of=answers_of)


@pytest.fixture
def job(hf: Path, tmp_path: Path) -> Job:
    return prepare(Request(hf, "hf", tmp_path / "out"))


NAN, INF = float("nan"), float("inf")
LAST = (1, 15, 60)
LARGEST = float(np.abs(LOGITS).max())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (LOGITS, spoilt(LAST, NAN)),
        (spoilt(LAST, NAN), LOGITS),
        (spoilt(LAST, NAN), spoilt(LAST, NAN)),
        (LOGITS, np.full(SHAPE, np.nan, np.float32)),
        (LOGITS, spoilt(LAST, INF)),
        (spoilt(LAST, INF), spoilt(LAST, INF)),
        (spoilt(LAST, INF), LOGITS),
        (LOGITS, spoilt(LAST, LOGITS[LAST] + 1.1e-4 * LARGEST)),
        (LOGITS, spoilt(LAST, LOGITS[LAST] - 1.1e-4 * LARGEST)),
        (np.zeros(SHAPE, np.float32), LOGITS),
    ],
)
def test_logits_that_are_none_or_too_far_fail(
    job: Job, monkeypatch: pytest.MonkeyPatch, source: Logits, target: Logits
) -> None:
    monkeypatch.setattr(logits, "runtime_of", runtimes_that_compute(source, target))
    with np.errstate(invalid="ignore"), pytest.raises(VerifyFailed) as caught:
        logits.compare(job, job.request.output)
    assert caught.value.exit_code == 6
    assert "within 1.0e-04 of the largest logit" in caught.value.expected


def test_logits_within_the_bound_pass_and_padding_is_not_compared(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    near = spoilt(LAST, LOGITS[LAST] + 0.9e-4 * LARGEST)
    padded = np.concatenate([near, np.full((2, 16, 3), np.nan, np.float32)], axis=-1)
    monkeypatch.setattr(logits, "runtime_of", runtimes_that_compute(LOGITS, padded))
    assert float(str(logits.compare(job, job.request.output)["difference"])) == pytest.approx(0.9e-4, rel=1e-2)


@pytest.mark.parametrize("error", [Refused("not this"), Damaged("no finite logits")])
@pytest.mark.parametrize("first", [True, False])
def test_a_comparison_that_cannot_be_made_fails(
    job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception, first: bool
) -> None:
    monkeypatch.setattr(logits, "runtime_of", runtimes_that_compute(*((error, LOGITS) if first else (LOGITS, error))))
    with pytest.raises(VerifyFailed, match="could not be compared") as caught:
        logits.compare(job, job.request.output)
    assert str(error) in caught.value.found


def test_too_little_memory_fails(
    dconv: Dconv, job: Job, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first byte where it is known then, else after the commit."""
    monkeypatch.setattr(runtimes, "available_memory", lambda: 1000)
    with pytest.raises(VerifyFailed, match="were not compared") as caught:
        logits.compare(job, job.request.output)
    assert "fp32 needs about" in caught.value.found
    ran = dconv("convert", hf, "hf", "-o", tmp_path / "out", "--verify", "logits")
    assert ran.code == 3
    assert "fp32 needs about" in ran.err
    assert not list(tmp_path.glob("out*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers runs."""
    oracle = pytest.importorskip("tests.oracles.hf")
    _, model = oracle.tiny("llama", vocab_size=61, num_hidden_layers=2)
    return oracle.save(model, tmp_path_factory.mktemp("tiny") / "tiny")


def write(folder: Path, name: str, data: bytes, at: int = 0) -> None:
    """Overwrite bytes of a tensor of a HuggingFace directory."""
    for path in folder.glob("*.safetensors"):
        stored = safetensors.read_header(path).get(name)
        if stored is not None:
            with path.open("r+b") as file:
                file.seek(stored.extents[0].offset + at)
                file.write(data)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight", "lm_head.weight"]
)
def test_one_spoilt_matrix_of_a_cast_output_is_past_the_bound(
    tiny: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    """Rounding is allowed for, a matrix whose rows are in another order is not."""
    job = prepare(Request(tiny, "hf", tmp_path / "out", dtype=dtype))
    convert(job.request)
    found = logits.compare(job, tmp_path / "out")
    assert f"rounded to {dtype}" in str(found["why"])
    _, (_, columns), data = tensors(tmp_path / "out")[name]
    write(tmp_path / "out", name, data[2 * columns :] + data[: 2 * columns])
    with pytest.raises(VerifyFailed, match="does not compute") as caught:
        logits.compare(job, tmp_path / "out")
    assert f"rounded to {dtype}, 16 unit roundoffs" in caught.value.expected


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_an_output_that_computes_nan_fails(tiny: Path, tmp_path: Path, name: str) -> None:
    job = prepare(Request(tiny, "hf", tmp_path / "out"))
    convert(job.request)
    write(tmp_path / "out", name, b"\xff" * 4, at=20)
    with np.errstate(invalid="ignore"), pytest.raises(VerifyFailed):
        logits.compare(job, tmp_path / "out")


@pytest.mark.parametrize("mode", ["digest", "logits"])
@pytest.mark.parametrize("said", [{"damaged": ("x in model.safetensors",)}, {"broken": ("config.json (missing)",)}])
def test_damage_that_is_read_back_ends_with_6(
    dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, said: dict[str, Any]
) -> None:
    monkeypatch.setattr(verify, "reread", lambda _: verify.Reread("plan", 1, 1, 1, **said))
    ran = dconv("convert", hf, "hf", "-o", tmp_path / "out", "--verify", mode)
    assert ran.code == 6
    assert ran.err.startswith("verification (6)")
    assert next(iter(said.values()))[0] in ran.err
    assert (tmp_path / "out" / "dconv.json").is_file()
    ran = dconv("convert", hf, "hf", "-o", tmp_path / "again", "--verify", mode, "--json")
    assert ran.code == 6
    assert json.loads(ran.out or ran.err)["exit_code"] == 6


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_a_bit_that_turned_after_the_commit_ends_with_6(
    dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Nothing is changed but the disk."""
    real = verify.told

    def told(mode: str, job: Job, out: Path) -> dict[str, object]:
        tensor = job.plan.target.tensors[-1]
        flip(out / tensor.file, tensor.offset + tensor.spec.nbytes - 1, bit=7)
        return real(mode, job, out)

    monkeypatch.setattr(verify, "told", told)
    ran = dconv("convert", hf, format, "-o", tmp_path / "out", "--verify", "digest")
    assert ran.code == 6, ran.err
    assert "1 tensor changed since the receipt was written" in ran.err
    assert dconv("check", tmp_path / "out", "--no-run").code == 4
