"""The peer of calibrated quantisation: GPTQModel on a CPU, with given samples and settings.

Run with the python of the environment that ``scripts/gptq_env.sh`` makes (dconv is not imported):

    .venvs/gptqmodel/bin/python scripts/gptqmodel_peer.py MODEL SAMPLES OUT '{"bits": 4, "group_size": 64}'

SAMPLES has a line of JSON for each, ``{"input_ids": […]}``; the settings are QuantizeConfig's. Prints one JSON object
as its last line, seconds of each part: ``{"import": s, "load": s, "quantise": s, "save": s, "versions": {…}}``. No line
of GPTQModel is replaced; GPTQMODEL_CPU_WORKERS=2 is what it needs to start on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path


def absolute(path: str) -> Path:
    return Path(path).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=absolute)
    parser.add_argument("samples", type=absolute)
    parser.add_argument("out", type=absolute)
    parser.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(args.out.parent)  # GPTQModel writes a folder of logs where it runs
    marks = [time.perf_counter()]

    from gptqmodel import (  # pyright: ignore[reportMissingImports]  # its own environment has it
        BACKEND,
        GPTQModel,
        QuantizeConfig,
    )

    marks.append(time.perf_counter())
    model = GPTQModel.load(str(args.model), QuantizeConfig(**args.settings), device="cpu")
    marks.append(time.perf_counter())
    samples = [json.loads(line)["input_ids"] for line in args.samples.read_text().splitlines()]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    marks.append(time.perf_counter())
    model.save(str(args.out))
    marks.append(time.perf_counter())
    parts = ("import", "load", "quantise", "save")
    took = {part: round(after - before, 2) for part, (before, after) in zip(parts, pairwise(marks), strict=True)}
    versions = {name: metadata.version(name) for name in ("gptqmodel", "torch", "transformers")}
    print(json.dumps(took | {"versions": versions}), flush=True)


if __name__ == "__main__":
    main()
