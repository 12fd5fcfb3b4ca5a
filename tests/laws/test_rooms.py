"""The house: a room imports only from rooms below it, and what is slow to import is imported only when it runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dconv.arch.llama import LLAMA
from dconv.coded import compressed_config, gptq_config, modelopt_config
from dconv.coded.decode import METHODS
from tests.models import config_of, write_random

ROOT = Path(__file__).resolve().parents[2]

#: From the ground up; each may import those before it.
ROOMS = (
    "errors", "sharding", "codec", "arch", "coded", "checkpoint", "net", "quant", "request", "describe", "matrix",
    "quantise", "calibrate", "calibrate_rank", "neuron", "gguf", "mlx", "targets", "own_names", "trace", "pipeline",
    "live", "export", "hw", "directions", "compare", "bounds", "logits", "verify", "report", "examine", "checking",
    "launch", "api", "formats", "assist", "commands", "cli", "__main__",
)  # fmt: skip


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" if node.module == "dconv" else node.module for alias in node.names]
    return [name for name in found if name.split(".")[0] == "dconv"]


def sources() -> list[Path]:
    return sorted((ROOT / "dconv").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    mine = room(module)
    if mine == "__init__":
        return
    for name in imports(path):
        other = room(name)
        if other not in ("__init__", "__version__"):
            assert ROOMS.index(other) <= ROOMS.index(mine), f"{module} imports {name}"


@pytest.mark.parametrize("module", ["dconv", "dconv.cli", "dconv.launch.__main__", "dconv.pipeline"])
def test_quick_to_start(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'yaml', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


#: What a rank that writes weights as they are has no use for.
IDLE = (
    "calibrate", "calibrate_rank", "checkpoint.gguf", "checkpoint.mlx", "checkpoint.neuron", "checkpoint.onnx",
    "checkpoint.state_dict", "codec.ggml", "coded.encode", "coded.integers", "compare", "export.prompt", "gguf",
    "hw.settings", "hw.target", "mlx", "neuron", "own_names", "quant", "quantise", "report.page", "trace", "verify",
)  # fmt: skip


@pytest.mark.parametrize("format", ["megatron", "hf"])
def test_a_rank_that_moves_weights_imports_nothing_of_codes(tmp_path: Path, format: str) -> None:
    """Else each of a cluster's ranks would take longer to start than for its share."""
    model = write_random(tmp_path / "model", LLAMA, config_of(LLAMA))
    code = f"""
import sys
from dconv.cli import main
assert main(["convert", {str(model)!r}, {format!r}, "-o", {str(tmp_path / "out")!r}, "--quiet"]) == 0
print([name for name in {IDLE} if f"dconv.{{name}}" in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("method", "module"), METHODS.items())
def test_methods_are_those_of_the_modules_that_decode_them(method: str, module: str) -> None:
    decoder = import_module(f"dconv.coded.{module}")
    assert callable(decoder.decode)
    said = {"fp8": ("fp8",), "compressed_tensors": (compressed_config.METHOD,), "gptq": (gptq_config.METHOD,),
            "modelopt": modelopt_config.METHODS}.get(module)  # fmt: skip
    assert method in (said or (decoder.METHOD,))
    assert set(said or ()) <= METHODS.keys()


def test_nothing_unpickles_or_runs_code_of_a_checkpoint() -> None:
    forbidden = ("weights_only=False", "trust_remote_code=True", "pickle.load(", "pickle.loads(", "eval(", "exec(")
    for path in sources():
        text = path.read_text()
        for word in forbidden:
            for line in text.splitlines():
                if word in line and ".eval(" not in line:
                    pytest.fail(f"{path.relative_to(ROOT)}: {line.strip()}")
