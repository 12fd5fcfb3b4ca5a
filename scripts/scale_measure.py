"""What docs/scale.md rests on, measured here: rates of one rank, the cost of real plans, operations of real runs.

``scripts/scale.py --measure`` calls this. Others may use the machine meanwhile, so times are the processor's, of one
thread whose files are in memory, and the best of several.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

from bench import DEEPSEEK_V3, ROOT
from bench_gguf import tokenizer
from bench_models import config_of, make_model

from dconv import __version__

#: Nodes, and ranks on each, whose shares are taken from the plans.
NODES: Final = (1, 2, 4, 8, 16, 32, 64)
RANKS_PER_NODE: Final = 8

_LLAMA_405B: Final = {
    "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    "intermediate_size": 53248, "vocab_size": 128256, "head_dim": 128,
}  # fmt: skip
#: No such model is published: DeepSeek-V3's architecture, wider, deeper and with more experts.
_MOE_2T: Final = DEEPSEEK_V3 | {
    "num_hidden_layers": 104, "hidden_size": 8192, "intermediate_size": 24576, "n_routed_experts": 384,
    "first_k_dense_replace": 4, "num_nextn_predict_layers": 0,
}  # fmt: skip
#: Of each model its config and the layout that it is laid out in; the last three have as many shards as 16 or 64 nodes.
LAYOUTS: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, int]]]] = {
    "70B": (config_of("70B"), {"tp": 8, "pp": 8}),
    "405B": (config_of("70B") | _LLAMA_405B, {"tp": 8, "pp": 16, "first_stage_layers": 7, "last_stage_layers": 7}),
    "671B": (
        DEEPSEEK_V3,
        {"tp": 8, "pp": 16, "ep": 32, "etp": 1, "first_stage_layers": 3, "last_stage_layers": 2},
    ),
    "2T": (_MOE_2T, {"tp": 8, "pp": 8, "ep": 64, "etp": 1}),
}

#: What a rank may do with bytes: FORMAT with its options, and the kind whose output it reads where not bf16.
KINDS: Final[Mapping[str, tuple[Sequence[str], str]]] = {
    "relayout (moves)": (("megatron", "--tp", "2", "--pp", "2"), ""),
    "cast bf16 to f32": (("hf", "--dtype", "f32"), ""),
    "encode block FP8": (("fp8",), ""),
    "decode block FP8": (("hf",), "encode block FP8"),
    "encode MXFP4": (("mx", "--quant", "mxfp4"), ""),
    "decode MXFP4": (("hf",), "encode MXFP4"),
    "encode GGUF Q8_0": (("gguf", "--quant", "q8_0"), ""),
    "encode GGUF Q4_0": (("gguf", "--quant", "q4_0"), ""),
    "encode MLX 4 bit": (("mlx", "--quant", "4bit"), ""),
}

#: One rank with one thread; plans first, so that only the work is timed.
_RATE: Final = """
import argparse, json, sys, time
from dconv.launch.options import add_target_options, parse, to_request
from dconv.pipeline import prepare, run
from dconv.sharding.commit import Settings
parser = argparse.ArgumentParser()
add_target_options(parser)
job = prepare(to_request(parse(parser, sys.argv[1:])))
job.plan.id
began, used = time.perf_counter(), time.process_time()
run(job, Settings())
seconds, used = time.perf_counter() - began, time.process_time() - used
print(json.dumps({"seconds": used, "wall": seconds, "read": job.plan.bytes_read, "written": job.plan.bytes_written}))
"""

#: Plans, and looks at what each rank of several worlds would do.
_PLAN: Final = """
import json, sys, time
began = time.process_time()
import dconv
from dconv.launch.progress import peak_memory
job = dconv.plan(sys.argv[1], "megatron", sys.argv[2], **json.loads(sys.argv[3]))
plan = job.plan
plan.id, plan.tasks
seconds, peak = time.process_time() - began, peak_memory()
read = [
    {c.file for c in plan.copies[task.tensor] if c.region.intersect(task.region)} if task.tensor >= 0 else set()
    for task in plan.tasks
]
per_node, worlds = int(sys.argv[4]), {}
for nodes in map(int, sys.argv[5:]):
    shares = [plan.share(rank, nodes * per_node) for rank in range(nodes * per_node)]
    sizes = [sum(task.nbytes for task in share) for share in shares]
    worlds[nodes] = {
        "largest_rank": max(sizes),
        "largest_node": max(sum(sizes[at : at + per_node]) for at in range(0, len(sizes), per_node)),
        "own_shards": plan.target.world == len(shares),
        "sources_opened": sum(len(set().union(*(read[task.index] for task in share))) for share in shares),
        "outputs_opened": sum(len({task.file for task in share}) for share in shares),
    }
print(json.dumps({
    "parameters": job.parameters, "seconds": seconds, "peak": peak, "tasks": len(plan.tasks),
    "tensors": len(job.logical.specs), "shards": plan.target.world, "read": plan.bytes_read,
    "written": plan.bytes_written, "source_files": len(plan.source.files), "target_files": len(plan.target.files),
    "worlds": worlds,
}))
"""

#: Loaded by every process of a counted run: what it asks the file system for below COUNT_UNDER, by what it asks about.
#: No rank begins with its first task before all are there, and tasks take a while: else the first rank does everything.
_COUNTING: Final = """
import atexit, builtins, collections, functools, io, json, os, threading, time
if os.environ.get("COUNT_INTO"):
    counts, lock, under, real_open = collections.Counter(), threading.Lock(), os.environ["COUNT_UNDER"], builtins.open
    def about(path, options):
        if options.get("dir_fd") is not None:
            return "output"
        if isinstance(path, int):
            return "an open file"
        path = os.fsdecode(path)
        marks = (("/journal", "journal"), ("/ranks", "progress"), ("/stealing", "stealing"), ("/source", "source"),
                 ("/ends", "ends"))
        if not path.startswith(under):
            return ""
        return next((name for mark, name in marks if mark in path), "output")
    def counted(name, real):
        @functools.wraps(real)
        def call(*args, **options):
            what = about(args[0] if args else ".", options)
            if what and not (real is real_open and what == "an open file"):
                with lock:
                    counts[f"{name} {what}"] += 1
            return real(*args, **options)
        return call
    for name in ("open", "stat", "lstat", "fstat", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir",
                 "scandir", "listdir", "ftruncate"):
        setattr(os, name, counted(name, getattr(os, name)))
    io.open = builtins.open = counted("open", real_open)
    def leave():
        with real_open(os.path.join(os.environ["COUNT_INTO"], os.environ.get("RANK", "0")), "w") as file:
            json.dump(counts, file)
    atexit.register(leave)
    from dconv.sharding.execute import Worker
    real_do, here = Worker.do, os.path.join(os.environ["COUNT_INTO"], "here-" + os.environ.get("RANK", "0"))
    def do(self, task):
        if not os.path.exists(here):
            real_open(here, "w").close()
        into, all_ranks = os.environ["COUNT_INTO"], int(os.environ["COUNT_ALL"])
        while sum(name.startswith("here-") for name in os.listdir(into)) < all_ranks:
            time.sleep(0.01)
        time.sleep(0.1)
        return real_do(self, task)
    Worker.do = do
"""


def _python(*words: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def rates(work: Path, repeat: int) -> dict[str, Any]:
    """Of each kind: bytes read and written, and seconds, of one rank; of moves, too, two ranks at once."""
    source = work / "460M"
    make_model(source, "460M")
    tokenizer(source)
    found: dict[str, Any] = {}
    made: dict[str, Path] = {"": source}
    for number, (kind, (words, of)) in enumerate(KINDS.items()):
        out = work / f"rate-{number}"
        best: dict[str, Any] = {}
        for _ in range(repeat):
            shutil.rmtree(out, ignore_errors=True)
            one = json.loads(_python("-c", _RATE, str(made[of]), *words, "-o", str(out)).splitlines()[-1])
            best = min(best or one, one, key=lambda found: found["seconds"])
        found[kind] = {**best, "words": " ".join(words)}
        print(f"{kind:24} {best['seconds']:.2f} s of the processor, {best['wall']:.2f} s", flush=True)
        made[kind] = out
        if not any(kind == before for _, before in KINDS.values()):
            shutil.rmtree(out)
    found["two at once"] = min((_two_at_once(work, source) for _ in range(repeat)), key=lambda one: one["seconds"])
    return found


def _two_at_once(work: Path, source: Path) -> dict[str, float]:
    """Of the slower of two ranks that do the same beside each other."""
    words = KINDS["relayout (moves)"][0]
    outs = [work / f"rate-two-{number}" for number in range(2)]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _RATE, str(source), *words, "-o", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )
        for out in outs
    ]  # fmt: skip
    ends = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
    for out in outs:
        shutil.rmtree(out)
    return {name: max(end[name] for end in ends) for name in ("seconds", "wall")}


def plans(work: Path, repeat: int) -> dict[str, Any]:
    """Of each model what planning it costs and gives, from a source of holes of its real size."""
    found = {}
    for name, (config, layout) in LAYOUTS.items():
        folder, source = work / f"{name}-config", work / f"{name}-holes"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        shutil.rmtree(source, ignore_errors=True)
        _python("-m", "dconv", "convert", str(folder), "hf", "--fake-weight", "-o", str(source), "--quiet")
        words = [str(source), str(work / "never"), json.dumps(layout), str(RANKS_PER_NODE), *map(str, NODES)]
        tries = [json.loads(_python("-c", _PLAN, *words)) for _ in range(repeat)]
        shutil.rmtree(source)
        found[name] = min(tries, key=lambda one: one["seconds"]) | {"layout": layout}
        print(f"{name}: planned in {found[name]['seconds']:.1f} s, {found[name]['peak'] >> 20} MiB", flush=True)
    return found


def metadata(work: Path) -> list[dict[str, Any]]:
    """What all ranks of real runs asked of the file system, by kind, for several worlds and numbers of source files."""
    config = config_of("460M") | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 999,
    }
    found = []
    for shard_size in ("7MB", "2MB"):
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder = Path(name)
            (folder / "hook").mkdir()
            (folder / "hook" / "sitecustomize.py").write_text(_COUNTING)
            (folder / "config").mkdir()
            (folder / "config" / "config.json").write_text(json.dumps(config))
            source = folder / "run" / "source"
            source.parent.mkdir()
            made = ["convert", str(folder / "config"), "hf", "--fake-weight", "--shard-size", shard_size]
            _python("-m", "dconv", *made, "-o", str(source), "--quiet")
            worlds = (1, 2, 4, 8)
            words = [str(source), str(folder / "never"), '{"tp": 2, "pp": 2}', "1", *map(str, worlds)]
            planned = json.loads(_python("-c", _PLAN, *words))
            for ranks in worlds:
                into, out = folder / f"counts-{ranks}", folder / "run" / f"out-{ranks}"
                into.mkdir()
                _python(
                    "-m", "dconv", "convert", str(source), "megatron", "--tp", "2", "--pp", "2", "-o", str(out),
                    "--nproc", str(ranks), "--threads", "1", "--quiet",
                    COUNT_INTO=str(into), COUNT_UNDER=str(source.parent), COUNT_ALL=str(ranks),
                    PYTHONPATH=f"{folder / 'hook'}:{ROOT}",
                )  # fmt: skip
                counts = sum(
                    (Counter(json.loads(path.read_text())) for path in into.iterdir() if path.name.isdecimal()),
                    Counter(),
                )
                files = planned["source_files"]
                found.append({
                    "ranks": ranks, "source_files": files, "target_files": planned["target_files"],
                    "tasks": planned["tasks"], "share": planned["worlds"][str(ranks)],
                    "counts": dict(sorted(counts.items())),
                })  # fmt: skip
                print(f"{ranks} ranks, {files} source files: {counts.total()} operations", flush=True)
    return found


def measure(fast: Path, disk: Path, repeat: int) -> dict[str, Any]:
    """All of it.

    Args:
        fast: a folder in memory, for the rates of the processor.
        disk: one for plans and counts.
    """
    return {
        "machine": f"{os.cpu_count()}-core virtual machine, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, dconv {__version__}",
        "day": f"{date.today()}",
        "rates": rates(fast, repeat),
        "plans": plans(disk, repeat),
        "metadata": metadata(disk),
    }
