"""The most memory that a rank of a calibration takes, on models of a full-sized layer's shape.

    python scripts/bench_calibration_memory.py                       every case of `CASES`
    python scripts/bench_calibration_memory.py --case llama-3b       one; may be given several times

What is promised: 3 x what a rank has of one decoder layer + --max-memory. That is all of it, and with ``--ep N`` what
is no expert and the N-th part of the experts. A layer counts as it is computed with, in float32; what counts is what
comes on top of an interpreter that has imported torch and transformers (``VmHWM``, both of them). Models have random
weights, two layers and a small vocabulary: what layers take does not depend on either. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import perplexity

ROOT: Final = perplexity.ROOT
BUDGET: Final = 256 << 20
LENGTH: Final = 512
VOCABULARY: Final = 1024
_SIZES: Final[dict[str, Any]] = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
#: Each is the published config's layer.
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama-3b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen2-moe-a2.7b": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    format: str
    ranks: int
    samples: int
    ep: int = 1


CASES: Final = (
    Case("llama-3b", "gptq", 1, 8),
    Case("llama-3b", "gptq", 1, 24),
    Case("llama-3b", "gptq", 2, 16),
    Case("llama-3b", "awq", 1, 8),
    Case("qwen2-moe-a2.7b", "gptq", 1, 16),
    Case("qwen2-moe-a2.7b", "gptq", 2, 16),
    Case("qwen2-moe-a2.7b", "gptq", 2, 16, ep=2),
    Case("qwen2-moe-a2.7b", "gptq", 4, 32, ep=4),
    Case("qwen2-moe-a2.7b", "awq", 1, 8),
    Case("qwen2-moe-a2.7b", "awq", 2, 16, ep=2),
)


def made(folder: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Write a model of random weights in bf16, unless it is there; the elements of one of its layers, those of its
    experts apart."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.AutoConfig.for_model(**(_SIZES | dict(settings)), torch_dtype="bfloat16")
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in transformers.AutoModelForCausalLM.from_config(config).named_parameters()
        }
    inside = [shape for name, shape in shapes.items() if name.startswith("model.layers.0.")]
    layer = sum(shape.numel() for shape in inside if len(shape) < 3), sum(s.numel() for s in inside if len(s) == 3)
    if (folder / "config.json").exists():
        return layer
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    for number in range(_SIZES["num_hidden_layers"]):
        start = f"model.layers.{number}."
        inside = [_published(name, shape) for name, shape in shapes.items() if name.startswith(start)]
        tensors = {name: drawn(shape) for found in inside for name, shape in found}
        save_file(tensors, folder / f"model-{number + 1:05}-of-00003.safetensors", metadata={"format": "pt"})
    rest = {name: drawn(tuple(shape)) for name, shape in shapes.items() if not name.startswith("model.layers.")}
    save_file(rest, folder / "model-00003-of-00003.safetensors", metadata={"format": "pt"})
    _index(folder)
    config.save_pretrained(folder)
    return layer


def _published(name: str, shape: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A parameter's names and shapes in a checkpoint: experts are one by one there."""
    if len(shape) < 3:
        yield name, tuple(shape)
        return
    stem, _, which = name.rpartition(".")
    experts, rows, columns = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[which]
    for expert in range(experts):
        for part in parts:
            yield f"{stem}.{expert}.{part}.weight", (rows // len(parts), columns)


def _index(folder: Path) -> None:
    from safetensors import safe_open

    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def peaks(command: list[str]) -> dict[int, int]:
    """The most that each process of a command had resident, bytes by process id, of those that imported torch.

    Raises:
        SystemExit: it failed.
    """
    found: dict[int, int] = {}
    ended = threading.Event()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def look() -> None:
        while not ended.wait(0.02):
            children = f"/proc/{process.pid}/task/{process.pid}/children"
            try:
                every = [process.pid, *map(int, Path(children).read_text().split())]
            except OSError:
                continue
            for one in every:
                try:
                    words = Path(f"/proc/{one}/status").read_text()
                except OSError:
                    continue
                if "VmHWM" in words:
                    found[one] = int(words.partition("VmHWM:")[2].split()[0]) << 10

    watcher = threading.Thread(target=look)
    watcher.start()
    _, said = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{said[-4000:]}")
    return found


def interpreter() -> int:
    """What Python takes with torch and the model's code imported."""
    code = "import torch, transformers; from transformers import LlamaForCausalLM; torch.ones(9, 9) @ torch.ones(9, 9)"
    return max(peaks([sys.executable, "-c", f"{code}; import time; time.sleep(0.2)"]).values())


def measured(case: Case, work: Path) -> tuple[int, list[int]]:
    """Elements of a layer that a rank has, and the peak of each rank."""
    import numpy as np

    model = work / case.model
    dense, experts = made(model, MODELS[case.model])
    samples = work / f"samples-{case.samples}.npy"
    np.save(samples, np.random.default_rng(0).integers(0, VOCABULARY, (case.samples, LENGTH)))
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    settings = {"bits": 4, "group_size": 128, "nsamples": case.samples, "seqlen": LENGTH}
    found = peaks([
        sys.executable, "-m", "dconv", "convert", str(model), case.format, "-o", str(out), "--quiet",
        "--calibration", str(samples), "--quantization-config", json.dumps(settings),
        "--max-memory", str(BUDGET), "--nproc", str(case.ranks), "--ep", str(case.ep),
    ])  # fmt: skip
    shutil.rmtree(out)
    return dense + experts // case.ep, sorted(found.values())[-case.ranks :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=MODELS, help="models; all without it")
    parser.add_argument("--format", choices=("gptq", "awq"))
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--ep", type=int)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "bench_memory")
    args = parser.parse_args()
    base = interpreter()
    print(f"the interpreter with torch and transformers: {base / 1e6:,.0f} MB; --max-memory {BUDGET / 1e6:,.0f} MB\n")
    print("| model | FORMAT | ranks | --ep | samples | layer, fp32 | promised | a rank took | with the interpreter |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    kept = True
    for case in CASES:
        asked = (
            not args.case or case.model in args.case,
            args.format in (None, case.format),
            args.ranks in (None, case.ranks),
            args.samples in (None, case.samples),
            args.ep in (None, case.ep),
        )
        if not all(asked):
            continue
        elements, found = measured(case, args.work)
        promised, most = 3 * 4 * elements + BUDGET, max(found)
        kept &= most - base <= promised
        numbers = (4 * elements, promised, most - base, most)
        cells = [case.model, case.format, str(case.ranks), str(case.ep), f"{case.samples} x {LENGTH}"]
        print(f"| {' | '.join([*cells, *(f'{number / 1e6:,.0f} MB' for number in numbers)])} |", flush=True)
    if not kept:
        raise SystemExit("a rank took more than was promised")


if __name__ == "__main__":
    main()
