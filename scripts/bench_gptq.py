"""Measure dconv's GPTQ against GPTQModel's on a real model: the same samples, settings, machine; one process each.

    python scripts/bench_gptq.py MODEL                     the whole table (about an hour on two free cores)
    python scripts/bench_gptq.py MODEL --only dconv        one side; what earlier calls measured is kept
    python scripts/bench_gptq.py MODEL --write FILE

MODEL is SmolLM2-135M as ``scripts/quickstart.sh`` unpacks it (work/quickstart/smollm2). Samples are 64 × 512 tokens of
``prose.calibration``, perplexity is ``perplexity.py``'s on the held-out speech: every result is decoded by dconv and
run in fp32 by transformers, so that only the codes differ. GPTQModel runs in ``scripts/gptq_env.sh``'s environment.

Wall time is that of the whole command, imports included. Memory is the largest sum over the command's processes of
what they have resident. Prints a table and keeps the numbers in WORK/measured.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import perplexity
import prose

from dconv import __version__

ROOT: Final = Path(__file__).resolve().parent.parent
SAMPLES: Final = 64
LENGTH: Final = 512
#: What both sides are told; GPTQModel's defaults are told to dconv where the two differ.
SETTINGS: Final[dict[str, Any]] = {"bits": 4, "group_size": 64, "sym": True, "damp_percent": 0.05}
#: Runs by side and name, with what each is told beyond `SETTINGS`.
RUNS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "GPTQModel": {
        "defaults": {},
        "desc_act": {"desc_act": True, "act_group_aware": False},
    },
    "dconv": {
        "defaults": {},
        "desc_act": {"desc_act": True},
        "desc_act, static_groups": {"desc_act": True, "static_groups": True},
        "mse": {"mse": True},
        "desc_act, mse": {"desc_act": True, "mse": True},
        "desc_act, static_groups, mse": {"desc_act": True, "static_groups": True, "mse": True},
    },
}
_SAMPLED_EVERY: Final = 0.05  # seconds


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes:
        seconds: of the whole command.
        resident: the largest bytes that its processes had resident at a time.
        load: other work on the machine: its one-minute load average right before the run.
        parts: seconds of the command's own parts, where it says them.
        settings: all that it was told.
    """

    seconds: float
    resident: int
    load: float
    perplexity: float
    parts: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def resident(root: int) -> int:
    """Bytes that a process and all below it have resident, shared pages counted once each."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    total, below = 0, [root]
    while below:
        process = below.pop()
        below += parents.get(process, [])
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def measured(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[float, int, str]:
    """Run a command; its seconds, the most memory that it and its children had, and what it printed.

    Raises:
        SystemExit: it failed; ``log`` has its words.
    """
    most = 0
    ended = threading.Event()
    with log.open("wb") as words:
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=words)

        def watch() -> None:
            nonlocal most
            while not ended.wait(_SAMPLED_EVERY):
                most = max(most, resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        printed = process.communicate()[0].decode()
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()[-4000:]}")
    return seconds, most, printed


def samples_of(model: Path, path: Path) -> Path:
    """The file of token ids that every run is calibrated with, by the model's own tokenizer; written once."""
    if not path.exists():
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        text = prose.calibration(prose.speeches(perplexity.PROSE))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prose.write_samples(path, prose.samples(ids, SAMPLES, LENGTH))
    return path


def perplexity_of(folder: Path) -> float:
    """On the held-out speech, in a process of its own, so that its memory goes back."""
    command = [sys.executable, str(ROOT / "scripts" / "perplexity.py"), str(folder), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)["perplexity"]


def quantised(side: str, told: Mapping[str, Any], model: Path, samples: Path, peer: Path, out: Path) -> Run:
    """One run of a side, and the perplexity of what it made, which stays in ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    settings = SETTINGS | dict(told)
    words = json.dumps(settings)
    if side == "dconv":
        words = json.dumps(settings | {"nsamples": SAMPLES, "seqlen": LENGTH})
        calibrated = ["--calibration", str(samples), "--quantization-config", words]
        command = [sys.executable, "-m", "dconv", "convert", str(model), "gptq", "-o", str(out), *calibrated, "--json"]
    else:
        command = [str(peer), str(ROOT / "scripts" / "gptqmodel_peer.py"), str(model), str(samples), str(out), words]
    load = os.getloadavg()[0]
    environment = {"GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": str(ROOT)}
    seconds, most, printed = measured(command, environment, out.with_name(out.name + ".log"))
    said = next((json.loads(line) for line in reversed(printed.splitlines()) if line.startswith("{")), {})
    parts = {key: value for key, value in said.items() if isinstance(value, float)}
    return Run(seconds, most, load, perplexity_of(out), parts, settings)


def table(plain: float, runs: Mapping[str, Run], model: str) -> list[str]:
    """Markdown: each run with the part of the peer's gap to fp32 that it closes."""
    first = runs.get("GPTQModel: defaults")
    lines = [
        f"{model}, {SAMPLES} x {LENGTH} tokens, {json.dumps(SETTINGS)}; perplexity in fp32 on the first 10,240 tokens "
        f"of {prose.HELD_OUT}: {plain:.4f} before.",
        "",
        "| what | time | load before | peak memory | perplexity | over fp32 | of GPTQModel's gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        gap = run.perplexity - plain
        closed = f"{1 - gap / (first.perplexity - plain):.0%}" if first and run is not first else ""
        cost = f"{run.seconds:.0f} s | {run.load:.1f} | {run.resident / 2**30:.2f} GiB"
        lines.append(f"| {name} | {cost} | {run.perplexity:.4f} | {gap:.4f} | {closed} |")
    return lines


def machine() -> str:
    """What the numbers were had on, and with which versions."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return (
        f"dconv {__version__}, GPTQModel 7.7.0, Python {platform.python_version()}, {versions}; {os.cpu_count()} cores "
        f"({named[0].partition(':')[2].strip() if named else platform.machine()})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", choices=RUNS, help="run this side alone")
    parser.add_argument("--run", action="append", help="run this alone, by its name; may be given several times")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venvs" / "gptqmodel" / "bin" / "python")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "bench_gptq")
    parser.add_argument("--write", type=Path, help="the table goes here, too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "measured.json"
    numbers: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    samples = samples_of(args.model, args.work / f"samples-{SAMPLES}x{LENGTH}.jsonl")
    if "fp32" not in numbers:
        numbers["fp32"] = perplexity_of(args.model)
    for side, runs in RUNS.items():
        for name, told in runs.items():
            if (args.only and side != args.only) or (args.run and name not in args.run):
                continue
            what = f"{side}: {name}"
            out = args.work / what.replace(": ", "-").replace(", ", "-")
            run = quantised(side, told, args.model, samples, args.peer, out)
            numbers[what] = asdict(run)
            kept.write_text(json.dumps(numbers, indent=1) + "\n")
            print(f"{what}: {run.seconds:.0f} s, load {run.load:.1f} before, {run.parts}, "
                  f"{run.resident / 2**30:.2f} GiB, {run.perplexity:.4f}", file=sys.stderr, flush=True)  # fmt: skip
    found = {name: Run(**value) for name, value in numbers.items() if name != "fp32"}
    text = "\n".join([*table(numbers["fp32"], found, args.model.name), "", machine()]) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
