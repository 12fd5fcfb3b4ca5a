"""Measure dconv against ``cp`` of the same bytes, and against Megatron-Bridge where it is installed.

Everything is a ratio of two things timed alternately in one run. Prints a table and writes ``docs/benchmarks.md``.

    python scripts/bench.py                 460M model, speed and memory (a few minutes)
    python scripts/bench.py --all           also the memory of 3B and of a sparse 70B, and planning of the 70B
    python scripts/bench.py --speed-3b      also the speed of the 3B model (200 GB of traffic; medians of 3)
    python scripts/bench.py --codes         quantised formats alone, into docs/benchmarks-codes.md
    python scripts/bench.py --bridge .venvs/bridge/bin/python      also Megatron-Bridge (scripts/bridge_env.sh makes it)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_models import make_model

from dconv import __version__

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """One line of the table: medians in seconds, and their ratio."""

    what: str
    seconds: float
    against: str
    base: float
    peak: int = 0

    @property
    def ratio(self) -> float:
        return self.seconds / self.base


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def ready(source: Path) -> None:
    """The same start for both of a pair: nothing is left to be written, and what is read is in the page cache."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass


def copy_synced(source: Path, target: Path) -> None:
    """``cp`` of every weight file, then fsync: the floor."""
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.name
            subprocess.run(["cp", "--reflink=never", path, copy], check=True)
            fd = os.open(copy, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def torchrun(count: int, *module: str) -> str:
    """Run ``count`` ranks under torchrun; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *module]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def convert(argv: list[str], count: int) -> int:
    """Convert with ``count`` ranks under torchrun; returns the largest peak memory of a rank in bytes."""
    result = json.loads(torchrun(count, "-m", "dconv.launch", *argv, "--json"))
    return max(result["peak_memory"].values())


def no_op(count: int) -> None:
    """What torchrun alone takes: start, rendezvous, watch ``count`` processes that do nothing, end."""
    torchrun(count, "--no-python", "true")


class Bench:
    """Runs pairs alternately and keeps the results."""

    def __init__(self, work: Path, repeat: int) -> None:
        self.work = work
        self.repeat = repeat
        self.results: list[Result] = []

    def fresh(self, name: str) -> Path:
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def against_copy(self, what: str, source: Path, same_bytes: Path, argv: list[str], count: int) -> None:
        """Time a conversion under torchrun, a no-op torchrun taken off, against ``cp`` + fsync of as many bytes."""
        nets, copies, peak = [], [], 0
        for _ in range(self.repeat):
            copy = self.fresh("copy")
            ready(same_bytes)
            copies.append(timed(lambda copy=copy: copy_synced(same_bytes, copy)))
            shutil.rmtree(copy)
            idle = timed(lambda: no_op(count))
            command = [str(source), *argv, "-o", str(self.fresh("out"))]
            ready(source)
            began = time.perf_counter()
            peak = max(peak, convert(command, count))
            nets.append(time.perf_counter() - began - idle)
        result = Result(what, statistics.median(nets), "cp + fsync", statistics.median(copies), peak)
        self.results.append(result)
        print(f"{what:48} {result.seconds:6.2f} s  cp {result.base:5.2f} s  x{result.ratio:4.2f}  "
              f"{peak / 2**20:5.0f} MiB", flush=True)  # fmt: skip

    def whole(self, what: str, argv: list[str], count: int) -> None:
        """Time the whole command under torchrun against a no-op under torchrun."""
        times, noops = [], []
        for _ in range(self.repeat):
            noops.append(timed(lambda: no_op(count)))
            out = self.fresh("out")
            times.append(timed(lambda out=out: convert([*argv, "-o", str(out)], count)))
        result = Result(what, statistics.median(times), "no-op torchrun", statistics.median(noops))
        self.results.append(result)
        print(f"{what:48} {result.seconds:6.2f} s  no-op {result.base:5.2f} s", flush=True)


def speed(bench: Bench, name: str, repeat: int) -> None:
    bench.repeat = repeat
    source = bench.work / name
    size = make_model(source, name)
    print(f"{name}: {size / 1e9:.2f} GB", flush=True)
    for container in ("torch_dist", "legacy"):
        megatron = ["megatron", "--tp", "2", "--megatron-format", container]
        bench.against_copy(f"{name} HF -> {container} tp2, 2 ranks", source, source, megatron, 2)
        kept = bench.work / f"{name}-{container}"
        shutil.rmtree(kept, ignore_errors=True)
        convert([str(source), *megatron, "-o", str(kept)], 2)
        bench.against_copy(f"{name} {container} tp2 -> HF, 2 ranks", kept, source, ["hf"], 2)
        if name == "460M":
            layout = ["megatron", "--tp", "2", "--pp", "2", "--megatron-format", container]
            for count in (1, 2, 4):
                bench.against_copy(f"{name} HF -> {container} tp2 pp2, {count} ranks", source, source, layout, count)
        shutil.rmtree(kept)
    if name == "460M":
        bench.whole("460M HF -> torch_dist tp2, torchrun x 2, whole", [str(source), "megatron", "--tp", "2"], 2)


#: FORMAT with its options, of which the speed is measured: in, and out again.
CODED = (("fp8",), ("fp8", "--quant", "fp8_channel"), ("mx", "--quant", "mxfp4"), ("mx", "--quant", "mxfp6_e2m3"))


CODES_NOTE = (
    "The copy here reads and writes as many bytes in all as the conversion: half the sum of its source and its output. "
    "Encoding reads the source twice, once for scales and once for codes, the second time from the page cache."
)


def coded(bench: Bench, name: str, repeat: int) -> None:
    """Quantised formats, made of bf16 and decoded to it, against ``cp`` that reads and writes as many bytes in all."""
    bench.repeat = repeat
    source = bench.work / name
    size = make_model(source, name)
    for format in CODED:
        kept = bench.fresh(f"{name}-coded")
        convert([str(source), *format, "-o", str(kept)], 2)
        half = bench.fresh("half")
        half.mkdir()
        with open(half / "bytes", "wb") as file:
            left = (size + sum(path.stat().st_size for path in kept.iterdir())) // 2
            while left > 0:
                left -= file.write(os.urandom(min(left, 64 << 20)))
        words = " ".join(format)
        bench.against_copy(f"{name} HF -> {words}, 2 ranks", source, half, list(format), 2)
        bench.against_copy(f"{name} {words} -> HF bf16, 2 ranks", kept, half, ["hf"], 2)
        shutil.rmtree(kept)
        shutil.rmtree(half)


def memory(bench: Bench, names: list[str]) -> list[str]:
    """Peak memory of a rank at two budgets."""
    lines = []
    for name in names:
        source = bench.work / name
        size = make_model(source, name, sparse=name == "70B")
        layout = ["--tp", "8", "--pp", "8"] if name == "70B" else ["--tp", "2"]
        for budget in ("32MiB", "256MiB"):
            out = bench.fresh("out")
            began = time.perf_counter()
            peak = convert([str(source), "megatron", *layout, "--max-memory", budget, "-o", str(out)], 2)
            seconds = time.perf_counter() - began
            bound = 64 + int(budget[:-3]) + 64
            disk = sum(path.stat().st_blocks * 512 for path in out.rglob("*"))
            lines.append(f"| {name} | {size / 1e9:.1f} GB | {budget} | {peak / 2**20:.0f} MiB | {bound} MiB "
                         f"| {seconds:.1f} s | {disk / 1e9:.2f} GB |")  # fmt: skip
            print(lines[-1], flush=True)
            shutil.rmtree(out)
    return lines


#: Plans a 70B layout: headers read, cover proved, tasks cut, plan hashed.
PLANNING = """
import sys, time
began = time.perf_counter()
import dconv
job = dconv.plan(sys.argv[1], "megatron", "out", tp=8, pp=8)
job.plan.id
print(f"{time.perf_counter() - began:.2f} {len(job.plan.tasks)}")
"""


#: The same of DeepSeek-V3, 671B and its token predictor, from its config alone, on one core.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
    "n_shared_experts": 1, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
PLANNING_671B = """
import os, sys, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
began = time.perf_counter()
import dconv
from dconv.launch.progress import peak_memory
job = dconv.plan(sys.argv[1], "megatron", "out", tp=8, pp=16, ep=64, etp=1, first_stage_layers=3, last_stage_layers=2)
job.plan.id
print(f"{time.perf_counter() - began:.1f} {len(job.plan.tasks)} {peak_memory() >> 20}")
"""


def plan_671b(work: Path) -> str:
    """One line on planning DeepSeek-V3 over 1024 ranks."""
    folder = work / "671B"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    command = [sys.executable, "-c", PLANNING_671B, str(folder)]
    seconds, tasks, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return (
        "Planning DeepSeek-V3 671B from its config alone (tp 8 x pp 16 x ep 64, stages of 3 + 14 x 4 + 2 layers, "
        f"{tasks} tasks, imports included, one core): {seconds} s, {peak} MiB."
    )


def fake_671b(work: Path) -> str:
    """One line on making the same model up, and on what `inspect` takes to read it."""
    folder, out = work / "671B", work / "671B-fake"
    shutil.rmtree(out, ignore_errors=True)
    run = [sys.executable, "-m", "dconv"]
    began = time.perf_counter()
    told = json.loads(
        subprocess.run(
            [*run, "convert", str(folder), "hf", "--fake-weight", "-o", str(out), "--json"],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    made = time.perf_counter()
    subprocess.run([*run, "inspect", str(out)], check=True, stdout=subprocess.DEVNULL)
    read = time.perf_counter()
    size = sum(path.stat().st_size for path in out.iterdir())
    used = sum(path.stat().st_blocks * 512 for path in out.iterdir())
    shutil.rmtree(out)
    return (
        f"The same model made up (`dconv convert config.json hf --fake-weight`): {made - began:.1f} s, "
        f"{max(told['peak_memory'].values()) >> 20} MiB, {size / 1e9:.0f} GB of files in {used / 1e6:.0f} MB of disk; "
        f"`dconv inspect` reads it in {read - made:.1f} s."
    )


def bridge(bench: Bench, python: Path) -> None:
    """Megatron-Bridge's import of the same model (``scripts/bridge_peer.py``), alternately with dconv's command."""
    source = bench.work / "460M"
    theirs, ours = [], []
    for _ in range(3):
        out = bench.fresh("bridge")
        command = [str(python), str(ROOT / "scripts" / "bridge_peer.py"), str(source), str(out)]
        theirs.append(
            timed(
                lambda command=command: subprocess.run(
                    command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
        )
        argv = [str(source), "megatron", "--tp", "2", "-o", str(bench.fresh("out"))]
        ours.append(timed(lambda argv=argv: convert(argv, 2)))
    result = Result("Megatron-Bridge 0.6.2 460M import, whole process", statistics.median(theirs),
                    "dconv torch_dist tp2, torchrun x 2, whole", statistics.median(ours))  # fmt: skip
    bench.results.append(result)
    print(f"{result.what:48} {result.seconds:6.2f} s  dconv {result.base:5.2f} s  x{result.ratio:4.1f}", flush=True)


def write(bench: Bench, memory_lines: list[str], plan_line: str, path: Path, command: str) -> None:
    rows = [
        f"| {r.what} | {r.seconds:.2f} s | {r.against} {r.base:.2f} s | {r.ratio:.2f} |"
        + (f" {r.peak / 2**20:.0f} MiB |" if r.peak else " |")
        for r in bench.results
    ]
    text = [
        "# Benchmarks",
        "",
        f"Made by `{command}` with dconv {__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}. Times are medians; each pair was run "
        "alternately, its source in the page cache. Against cp, seconds are the whole torchrun command less a no-op "
        "torchrun of as many ranks timed right before it; digests and fsync included.",
        "",
        "| what | time | against | ratio | peak memory of a rank |",
        "|---|---|---|---|---|",
        *rows,
    ]
    if memory_lines:
        text += [
            "",
            "Peak memory (`VmHWM`) of a relayout rank, 2 ranks. The 70B model is one hole of 141 GB.",
            "",
            "| model | bytes | --max-memory | peak | promised | time | disk used |",
            "|---|---|---|---|---|---|---|",
            *memory_lines,
        ]
    if plan_line:
        text += ["", plan_line]
    path.write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "bench")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--speed-3b", action="store_true")
    parser.add_argument("--codes", action="store_true", help="quantised formats alone")
    parser.add_argument("--bridge", type=Path, help="python of an environment with megatron-bridge")
    parser.add_argument("--write", type=Path, help="docs/benchmarks.md, or docs/benchmarks-codes.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, args.repeat)
    docs = ROOT / "docs"
    if args.codes:
        coded(bench, "460M", args.repeat)
        command = f"python scripts/bench.py --codes --repeat {args.repeat}"
        write(bench, [], CODES_NOTE, args.write or docs / "benchmarks-codes.md", command)
        return
    speed(bench, "460M", args.repeat)
    if args.speed_3b:
        speed(bench, "3B", min(3, args.repeat))
    lines = memory(bench, ["460M", "3B", "70B"] if args.all else ["460M"])
    plan_line = f"{plan_671b(args.work)} {fake_671b(args.work)}"
    print(plan_line)
    if args.all:
        command = [sys.executable, "-c", PLANNING, str(args.work / "70B")]
        seconds, tasks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        of_70b = f"Planning the 70B layout (tp 8 x pp 8, {tasks} tasks, imports included): {seconds} s."
        print(of_70b)
        plan_line = f"{of_70b}\n\n{plan_line}"
    if args.bridge:
        bridge(bench, args.bridge)
    words = ["--all"] * args.all + ["--speed-3b"] * args.speed_3b + ["--bridge PYTHON"] * bool(args.bridge)
    write(bench, lines, plan_line, args.write or docs / "benchmarks.md", " ".join(["python scripts/bench.py", *words]))


if __name__ == "__main__":
    main()
