"""Measure the GGUF export: its encoders against gguf-py's, its speed against ``cp``, its memory against its budget.

Everything is a ratio of two things timed alternately in one run. Prints tables and writes ``docs/benchmarks-gguf.md``.

    python scripts/bench_gguf.py                 a few minutes, 20 GB of disk under --work while it runs
    python scripts/bench_gguf.py --encoders      the encoders alone (a minute)
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread on both sides

import argparse
import json
import platform
import shutil
import statistics
from importlib import metadata
from pathlib import Path

import numpy as np
from bench import ROOT, Bench, convert, timed
from bench_models import make_model

from dconv import __version__
from dconv.codec.gguf_encode import KINDS, encode


def encoders(repeat: int) -> list[str]:
    """Rows of a table: nanoseconds a weight of both, medians, and their ratio; their bytes are compared, too."""
    import gguf

    weights = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    lines = []
    for kind in KINDS:
        theirs, ours = [], []
        number = gguf.GGMLQuantizationType[kind]
        assert (encode(weights, kind) == gguf.quants.quantize(weights, number)).all(), kind
        for _ in range(repeat):
            theirs.append(timed(lambda number=number: gguf.quants.quantize(weights, number)))
            ours.append(timed(lambda kind=kind: encode(weights, kind)))
        a, b = (statistics.median(times) * 1e9 / weights.size for times in (ours, theirs))
        lines.append(f"| {kind} | {a:.2f} ns | {b:.2f} ns | {b / a:.1f} |")
        print(lines[-1], flush=True)
    return lines


def tokenizer(folder: Path) -> None:
    """A byte-level vocabulary: a GGUF has one inside."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate([*letters, "ab"])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))


def export(bench: Bench) -> list[str]:
    """Rows of a table: peaks at two budgets. The speed of bf16 goes to the bench."""
    source = bench.work / "3B-gguf"
    size = make_model(source, "3B")
    tokenizer(source)
    bench.against_copy("3B HF -> gguf bf16, 2 ranks", source, source, ["gguf", "--quant", "bf16"], 2)
    lines = []
    for quant in ("bf16", "q8_0", "q4_0"):
        for budget in ("32MiB", "256MiB"):
            out = bench.fresh("out")
            peak = convert([str(source), "gguf", "--quant", quant, "--max-memory", budget, "-o", str(out)], 2)
            written = sum(path.stat().st_size for path in out.iterdir())
            read = f"{size / 1e9:.2f} GB | {written / 1e9:.2f} GB"
            lines.append(f"| {quant} | {read} | {budget} | {peak / 2**20:.0f} MiB | {64 + int(budget[:-3]) + 64} MiB |")
            print(lines[-1], flush=True)
            shutil.rmtree(out)
    shutil.rmtree(source)
    return lines


def write(path: Path, command: str, speeds: list[str], bench: Bench | None, memory: list[str]) -> None:
    text = [
        "# Benchmarks of the GGUF export",
        "",
        f"Made by `{command}` with dconv {__version__}, gguf {metadata.version('gguf')}, numpy {np.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}. Times "
        "are medians; each pair was run alternately.",
        "",
        "Encoding fp32 weights, one thread, a weight; the bytes are the same.",
        "",
        "| type | dconv | gguf-py | times faster |",
        "|---|---|---|---|",
        *speeds,
    ]
    if bench is not None:
        text += [
            "",
            "A model of 3B in bf16, 2 ranks. Seconds are the whole torchrun command less a no-op torchrun; digests and "
            "fsync included.",
            "",
            "| what | time | against | ratio | peak memory of a rank |",
            "|---|---|---|---|---|",
            *(
                f"| {r.what} | {r.seconds:.2f} s | {r.against} {r.base:.2f} s | {r.ratio:.2f} "
                f"| {r.peak / 2**20:.0f} MiB |"
                for r in bench.results
            ),
            "",
            "Peak memory (`VmHWM`) of a rank of the same; promised are 128 MiB beside the budget.",
            "",
            "| type | read | written | --max-memory | peak | promised |",
            "|---|---|---|---|---|---|",
            *memory,
        ]
    path.write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "bench")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--encoders", action="store_true")
    parser.add_argument("--write", type=Path, default=ROOT / "docs" / "benchmarks-gguf.md")
    args = parser.parse_args()
    speeds = encoders(max(15, args.repeat))
    bench, memory = None, []
    if not args.encoders:
        args.work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.work, args.repeat)
        memory = export(bench)
    words = [f"--repeat {args.repeat}"] * (args.repeat != 5) + ["--encoders"] * args.encoders
    write(args.write, " ".join(["python scripts/bench_gguf.py", *words]), speeds, bench, memory)


if __name__ == "__main__":
    main()
