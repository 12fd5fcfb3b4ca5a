"""Calibrations killed with SIGKILL at random moments and resumed on other numbers of ranks: the same files at the end.

    python scripts/kill_calibration.py MODEL [FORMAT …] [--times 5] [--seed 0] [--samples 16] [--length 512]

FORMAT is gptq or awq; both without it. An uninterrupted run of two ranks comes first; its time is what the moments are
drawn from, and its files what all others are compared with, by SHA-256. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import perplexity

#: Ranks of one run after another.
WORLDS: Final = (2, 1, 3)
#: Files that say when and how long, and differ from run to run.
TIMED: Final = frozenset({"dconv.json", "calibration.json", "calibration.html"})


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that has to be the same."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def begun(words: list[str], out: Path, ranks: int) -> subprocess.Popen[str]:
    """A run, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(perplexity.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dconv", "convert", *words, "-o", str(out), "--nproc", str(ranks), "--quiet"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> None:
    """Raises SystemExit with a run's last words where it failed."""
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{process.args}: exit code {process.returncode}\n{said[-4000:]}")


def layer_of(out: Path) -> str:
    """How far an interrupted run had come: the layer that the next one goes on with."""
    states = list(out.parent.glob(f"{out.name}.partial-*/.dconv/calibration/state.json"))
    return f"layer {json.loads(states[0].read_text())['layer']}" if states else "the start"


def killed(words: list[str], out: Path, whole: Path, seconds: float, times: int, moments: random.Random) -> bool:
    """Kill a run so many times and let it finish; whether it then has the files of ``whole``.

    Where a run was done before its moment came, its files are compared, too, and what follows starts over.
    """
    same, kills, number = True, 0, 0
    while kills < times or not out.exists():
        ranks, moment = WORLDS[number % len(WORLDS)], moments.uniform(0, seconds) if kills < times else float("inf")
        number += 1
        process, began = begun(words, out, ranks), time.monotonic()
        while process.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            what = f"{moment:.1f} s, at {'the very end' if out.exists() else layer_of(out)}"
        else:
            ended(process)
            what = "not killed"
        if out.exists():
            alike = digests(out) == digests(whole) and not list(out.parent.glob(f"{out.name}.partial*"))
            what += ", the same files" if alike else ", OTHER FILES"
            same &= alike
            if kills < times:
                shutil.rmtree(out)
        print(f"| {out.name} | {ranks} | {what} |", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("formats", nargs="*", default=["gptq", "awq"], metavar="FORMAT")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--work", type=Path, default=perplexity.ROOT / "work" / "kill_calibration")
    args = parser.parse_args()
    import numpy as np

    args.work.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    samples = args.work / "samples.npy"
    np.save(samples, np.random.default_rng(args.seed).integers(0, vocabulary, (args.samples, args.length)))
    said = {"bits": 4, "group_size": args.group_size, "nsamples": args.samples, "seqlen": args.length}
    print("| FORMAT | ranks | killed after |\n|---|---|---|", flush=True)
    wrong = []
    for form in args.formats:
        words = [str(args.model), form, "--calibration", str(samples), "--quantization-config", json.dumps(said)]
        whole, out = args.work / f"{form}-whole", args.work / form
        for old in args.work.glob(f"{form}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        began = time.monotonic()
        ended(begun(words, whole, 2))
        seconds = time.monotonic() - began
        print(f"| {form} | 2 | never, {seconds:.1f} s |", flush=True)
        moments = random.Random(f"{form} {args.seed}")  # noqa: S311
        if not killed(words, out, whole, seconds, args.times, moments):
            wrong.append(form)
    if wrong:
        raise SystemExit(f"other files after kills: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
