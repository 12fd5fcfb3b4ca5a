"""The fuzz targets: what is kept of their corpus passes, each runs for a moment, and what feeds them can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.checkpoint import graphs, onnx
from dconv.errors import Damaged
from fuzz.folders import torch_zip
from fuzz.mutators import as_varint
from fuzz.target import target
from fuzz.targets import TARGETS
from tests.models import config_of

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "fuzz" / "corpus"
needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="no atheris: pip install 'dconv[fuzz]'")


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept_is_read_or_refused(name: str, counted: Callable[[str, int], None]) -> None:
    paths = sorted((CORPUS / name).iterdir())
    assert paths
    for path in paths:
        try:
            TARGETS[name].run(path.read_bytes())
        except BaseException as fault:
            pytest.fail(f"{path.relative_to(ROOT)}: {type(fault).__name__}: {fault}")
    counted("fuzz targets", 1)
    counted("fuzz inputs kept", len(paths))


def test_the_corpus_is_small_and_of_targets_that_there_are() -> None:
    sizes = {path: path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()}
    assert {path.parent.name for path in sizes} == set(TARGETS)
    assert max(sizes.values()) < 20_000
    assert sum(sizes.values()) < 500_000


#: Calls by which bytes become values.
_READS = re.compile(
    r"json\.loads?\(|\b(parse_json|read_json|read_mapping)\(|safe_load|SafeLoader|\binert\.(load|Machine)\(|struct\.unpack"
    r"|unpack_from|torchzip\.read\(|np\.load\(|zipfile\.ZipFile\("
)
#: Modules that no target is for, and why.
NOT_FED = {
    "commands/config.py": "presets that come with dconv",
    "assist/glance.py": "config.json and headers, as targets config and safetensors have them",
    "checkpoint/fake.py": "config.json, as target config has it",
    "export/genai.py": "generation_config.json by `parse_json`, its values copied",
    "export/graph_run.py": "runs a graph in torch: test_graphs.py",
    "export/huggingface.py": "config.json, as target config has it, then transformers",
    "export/torch_export.py": "runs a graph in torch: test_graphs.py",
    "export/torchscript.py": "what torch wrote a moment ago",
    "hw/drivers": "run by a vendor's Python, on what dconv wrote for them",
    "launch/history.py": "dconv's own database",
    "launch/meeting.py": "what ranks of this run write to each other",
    "launch/ray_keeper.py": "what a rank of this run writes",
    "net/skeleton.py": "config.json once more, under an except for whatever transformers raises",
}


def test_every_module_that_parses_is_fed_or_named() -> None:
    fed = {path for target in TARGETS.values() for pattern in target.reads for path in (ROOT / "dconv").glob(pattern)}
    for path in sorted((ROOT / "dconv").rglob("*.py")):
        name = path.relative_to(ROOT / "dconv").as_posix()
        named = any(name.startswith(known) for known in NOT_FED)
        assert path in fed or named or not _READS.search(path.read_text()), f"no target feeds {name}"


def test_fields_of_a_weight_in_another_encoding_are_no_places(tmp_path: Path) -> None:
    """A number where a place should be would have the whole file read, or what lies before it."""
    weight = b"".join([b"\x0a\x01a", b"\x40\x05"])  # name as a number
    (tmp_path / "m.onnx").write_bytes(b"\x3a" + bytes([len(weight) + 2]) + b"\x2a" + bytes([len(weight)]) + weight)
    with pytest.raises(Damaged, match="not a graph"):
        onnx.initializers(tmp_path / "m.onnx")
    axes = b"\x08\x02" * 70
    inner = b"\x2a" + as_varint(len(axes)) + axes
    (tmp_path / "m.onnx").write_bytes(b"\x3a" + as_varint(len(inner)) + inner)
    with pytest.raises(Damaged, match="not a graph"):
        onnx.initializers(tmp_path / "m.onnx")


def test_an_archive_with_two_records_of_one_name_is_not_read(tmp_path: Path) -> None:
    """torch might read the other one."""
    records = [("a/archive_format", b"pt2"), ("a/models/m.json", b"{}"), ("a/extra/ports.json", b"{}")]
    (tmp_path / "m.pt2").write_bytes(torch_zip(records))
    assert graphs.archive_of(tmp_path / "m.pt2") is not None
    (tmp_path / "m.pt2").write_bytes(torch_zip([*records, ("b/extra/ports.json", b"{}")]))
    with pytest.raises(Damaged, match="two records"):
        graphs.archive_of(tmp_path / "m.pt2")


def test_a_config_of_more_tensors_than_any_model_is_damaged() -> None:
    family = by_name("mixtral")
    with pytest.raises(Damaged, match="more tensors than any model"):
        family.facts(config_of(family, num_local_experts=8000, num_hidden_layers=9000))


def feed(out: Path, *words: str, plant: str = "") -> subprocess.CompletedProcess[str]:
    """``fuzz/run.py``, in a process whose dconv may be given a fault first."""
    code = f"import sys; from fuzz import run; targets = run.instrumented()\n{plant}\nsys.exit(run.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    argv = [sys.executable, "-c", code, *words, "--seed", "1", "--out", str(out)]
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_atheris
def test_every_target_is_fed_and_finds_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    done = feed(tmp_path, "--runs", "2000" if request.config.getoption("--long") else "120")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(TARGETS), done.stderr
    assert [line for line in lines if not line.endswith("nothing found")] == []
    assert all(int(line.split()[1].replace(",", "")) >= 120 for line in lines)
    assert done.returncode == 0


#: Of one target each: what is taken out of dconv or put in, and what libFuzzer must then come to.
PLANTED = {
    "a check that is not there": (
        "import json; from dconv.checkpoint import safetensors as s\ns.parse_json = lambda data, **_: json.loads(data)",
        "crash-",
    ),
    "a loop without end": (
        "from dconv.checkpoint import safetensors as s\nrun._LONGEST = 1\nold = s.framework\n"
        "def hangs(path):\n    while old(path) is not None: pass\ns.framework = hangs",
        "timeout-",
    ),
    "memory by the file's word": (
        "from dconv.checkpoint import safetensors as s\ns.framework = lambda path: bytes(8 << 30)",
        "crash-",
    ),
    "a refusal that fills the screen": (
        "from dconv.checkpoint import safetensors as s; from dconv.errors import Damaged\n"
        "def fails(path): raise Damaged('x' * 100_000)\ns.framework = fails",
        "crash-",
    ),
}


@needs_atheris
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    plant, kind = PLANTED[fault]
    done = feed(tmp_path, "safetensors", "--runs", "2000", plant=plant)
    assert done.returncode == 1, done.stdout + done.stderr
    found = list((tmp_path / "safetensors").glob(f"{kind}*"))
    assert found, done.stdout
    assert found[0].name in done.stdout


def test_a_refusal_passes_and_anything_else_does_not() -> None:
    def refuses(data: bytes) -> None:
        raise Damaged("no", where=data.decode())

    before = dict(TARGETS)
    try:
        run = target()(refuses)
        run(b"here")
        with pytest.raises(UnicodeDecodeError):
            run(b"\xff")
        with pytest.raises(AssertionError, match="a refusal of"):
            run(b"\n" * 100)
    finally:
        TARGETS.clear()
        TARGETS.update(before)
