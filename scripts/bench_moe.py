"""Routing-weighted Hessians against plain ones: perplexity over four families of mixtures of experts, three seeds each.

    python scripts/bench_moe.py                        trains what is not there yet, then quantises on two ranks
    python scripts/bench_moe.py --models DIR           where models trained earlier lie, as <family>-<seed>
    python scripts/bench_moe.py --train                only trains (about an hour on a core)

Models are those of ``train_moe.py``; samples are `SAMPLES` windows of ``prose.calibration``, drawn by the model's seed.
Perplexity is on the whole held-out speech, in fp32 (``perplexity.py``). Prints a table, and keeps its numbers in
WORK/<bits>-bit/measured.json: what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import perplexity
import prose
import train_moe

SEEDS: Final = (0, 1, 2)
SAMPLES: Final = 128
RANKS: Final = 2
#: 3 bits: 4 cost these models less than a percent, too little to tell two ways apart.
SETTINGS: Final[dict[str, Any]] = {"bits": 3, "group_size": 64, "sym": True, "desc_act": False, "damp_percent": 0.05}
#: Of the same integers: GPTQ's own has no place for DeepSeek's 80 rows of 3 bits.
PACKING: Final = "pack-quantized"
#: What a perplexity may be above another and still be no worse: a tenth of a percent.
NO_WORSE: Final = 1.001


@dataclass(frozen=True)
class Row:
    """Perplexities of one model: in fp32, and quantised with each kind of Hessian."""

    family: str
    seed: int
    fp32: float
    plain: float
    weighted: float


def run(*command: str | Path) -> None:
    """A command with this checkout's dconv; raises SystemExit with its last words where it fails."""
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": str(perplexity.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-4000:]}")


def trained(models: Path, family: str, seed: int, steps: int) -> Path:
    """The model's directory; it is trained where it is not there."""
    out = models / f"{family}-{seed}"
    if not out.exists():
        print(f"training {out.name}", file=sys.stderr, flush=True)
        script = Path(train_moe.__file__)
        run(sys.executable, script, family, out, "--seed", str(seed), "--steps", str(steps))
    return out


def row(model: Path, family: str, seed: int, bits: int, work: Path, texts: Mapping[str, str]) -> Row:
    """Quantise a model both ways and measure the three."""
    from transformers import AutoTokenizer

    samples = work / f"{model.name}.jsonl"
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prose.calibration(texts), add_special_tokens=False)["input_ids"]
    prose.write_samples(samples, prose.samples(ids, SAMPLES, train_moe.LENGTH, seed))

    def measured(folder: Path) -> float:
        length = train_moe.LENGTH
        text = texts[prose.HELD_OUT]
        return perplexity.of_directory(folder, text, length=length, stride=length, tokens=0).perplexity

    found = []
    for weighted in (False, True):
        out = work / f"{model.name}-{'weighted' if weighted else 'plain'}"
        shutil.rmtree(out, ignore_errors=True)
        all_of_them = {"nsamples": SAMPLES, "seqlen": train_moe.LENGTH}
        settings = json.dumps(SETTINGS | all_of_them | {"bits": bits, "routing_weighted": weighted})
        told = ["--calibration", samples, "--quantization-config", settings, "--nproc", str(RANKS)]
        run(sys.executable, "-m", "dconv", "convert", model, "gptq", "--quant", PACKING, "-o", out, *told)
        found.append(measured(out))
    return Row(family, seed, measured(model), *found)


def table(rows: list[Row], bits: int) -> list[str]:
    """Markdown: every model, and the mean of each family's."""
    lines = [
        f"{RANKS} ranks, {SAMPLES} x {train_moe.LENGTH} tokens, {json.dumps(SETTINGS | {'bits': bits})}; perplexity on "
        f"{prose.HELD_OUT}.",
        "",
        "| family | seed | fp32 | plain | routing-weighted | weighted / plain |",
        "|---|---|---|---|---|---|",
    ]
    no_worse = 0
    families = list(dict.fromkeys(found.family for found in rows))
    for family in families:
        own = [found for found in rows if found.family == family]
        for found in own:
            lines.append(_line(family, str(found.seed), found.fp32, found.plain, found.weighted))
        means = [statistics.fmean(values) for values in zip(*((r.fp32, r.plain, r.weighted) for r in own), strict=True)]
        lines.append(_line(family, "mean", *means))
        no_worse += means[2] <= NO_WORSE * means[1]
    return [*lines, "", f"Routing-weighted is no worse (within 0.1%) for {no_worse} of {len(families)} families."]


def _line(family: str, seed: str, fp32: float, plain: float, weighted: float) -> str:
    return f"| {family} | {seed} | {fp32:.3f} | {plain:.3f} | {weighted:.3f} | {weighted / plain:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="WORK/models by default")
    parser.add_argument("--family", choices=train_moe.FAMILIES, action="append", help="this one alone")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="of these models alone")
    parser.add_argument("--bits", type=int, default=SETTINGS["bits"])
    parser.add_argument("--steps", type=int, default=train_moe.STEPS, help="of what is trained")
    parser.add_argument("--train", action="store_true", help="train what is not there, and no more")
    parser.add_argument("--work", type=Path, default=perplexity.ROOT / "work" / "bench_moe")
    parser.add_argument("--write", type=Path, help="the table goes here, too")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    work = args.work / f"{args.bits}-bit"
    work.mkdir(parents=True, exist_ok=True)
    models = args.models or args.work / "models"
    models.mkdir(parents=True, exist_ok=True)
    texts = prose.speeches(perplexity.PROSE)
    measured = work / "measured.json"
    rows = [Row(**found) for found in json.loads(measured.read_text())] if measured.exists() else []
    for family in args.family or train_moe.FAMILIES:
        for seed in args.seed or SEEDS:
            model = trained(models, family, seed, args.steps)
            if args.train or any((found.family, found.seed) == (family, seed) for found in rows):
                continue
            rows.append(row(model, family, seed, args.bits, work, texts))
            print(rows[-1], file=sys.stderr, flush=True)
            measured.write_text(json.dumps([asdict(found) for found in rows], indent=1) + "\n")
    if rows:
        rows.sort(key=lambda found: (list(train_moe.FAMILIES).index(found.family), found.seed))
        text = "\n".join(table(rows, args.bits)) + "\n"
        print(text)
        if args.write:
            args.write.write_text(text)


if __name__ == "__main__":
    main()
