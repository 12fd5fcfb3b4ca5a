"""Numbers in a sentence: nodes, GPUs and parallel sizes, and the options that they come to."""

from __future__ import annotations

import argparse
from typing import Final

from dconv.assist import rules
from dconv.assist.glance import Glance
from dconv.assist.reading import Heard, Reading
from dconv.request import CALIBRATED

#: Tensor parallelism beyond a node is slow: no more of it is proposed.
_GPUS_OF_A_NODE: Final = 8
_NUMBER: Final = rf"(?P<n>[1-9]\d{{0,3}}|{'|'.join(rules.NUMBER_WORDS)})"


def count(reading: Reading) -> None:
    """Numbers of nodes, of GPUs, and parallel sizes."""
    for found in reading.take(rf"{_NUMBER} (nodes|machines|hosts)"):
        reading.counts["nodes"] = _number(found["n"])
        reading.heard.append(Heard(found[0], f"{reading.counts['nodes']} nodes"))
    if "nodes" in reading.counts:
        for found in reading.take(rf"(of|with|x|each with|having) {_NUMBER}( gpus?| cards?)?( each)?"):
            reading.counts["each"] = _number(found["n"])
            reading.heard.append(Heard(found[0], f"{reading.counts['each']} GPUs a node"))
    for found in reading.take(rf"{_NUMBER}[ x]*(gpus?|cards|accelerators|[ahb]\d00s?|h20s?|npus?)"):
        reading.counts["each" if "nodes" in reading.counts else "gpus"] = _number(found["n"])
        reading.heard.append(Heard(found[0], f"{_number(found['n'])} GPUs"))
    for found in reading.take(rf"{_NUMBER} (ranks|processes|workers|procs)"):
        reading.option(("--nproc", str(_number(found["n"]))), found[0], "ranks")
    for name, words in rules.SIZES:
        patterns = [rf"(?:{words})( size| degree)?[ =]*(of )?{_NUMBER}", rf"{_NUMBER}[- ](?:way|fold)[- ](?:{words})"]
        patterns += [rf"{_NUMBER} (pipeline )?stages"] if name == "pp" else []
        for pattern in patterns:
            for found in reading.take(pattern):
                reading.option((f"--{name}", str(_number(found["n"]))), found[0], f"{name} of Megatron's layout")
                reading.counts[name] = _number(found["n"])


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else rules.NUMBER_WORDS[text]


def apply(reading: Reading, format: str, known: Glance | None) -> None:
    """What numbers of GPUs and nodes come to."""
    counts = reading.counts
    nodes, each = counts.get("nodes", 1), counts.get("each", counts.get("gpus", 0))
    launcher = reading.options.get("--launcher")
    if format == "megatron" and nodes * each > 1:
        _megatron_layout(reading, nodes, each)
    if launcher == "slurm" and nodes > 1:
        reading.option(("--nodes", str(nodes)), f"{nodes} nodes", "of the job")
    elif nodes > 1 and launcher is None and format != "megatron":
        reading.against.append(f"{nodes} nodes: one machine is this command's; --launcher slurm or ray has more")
    ranks = each * (nodes if launcher == "ray" else 1)
    if ranks > 1 and "--nproc" not in reading.options and (launcher or format in CALIBRATED or format == "hf"):
        reading.option(("--nproc", str(ranks)), f"{ranks} GPUs", "a rank each")
    if known is not None and known.family is not None and format == "megatron":
        _held_to(reading, known)


def _megatron_layout(reading: Reading, nodes: int, each: int) -> None:
    """All GPUs in tensor parallelism, up to a node's; the others in the pipeline."""
    total, said = nodes * each, reading.counts
    rest, left = divmod(total, said.get("tp", 1) * said.get("pp", 1))
    if left:
        reading.against.append(f"{total} GPUs do not divide by the sizes that are said")
        return
    words = f"{total} GPUs"
    if "tp" not in said:
        tp = max(size for size in range(1, min(rest, each, _GPUS_OF_A_NODE) + 1) if rest % size == 0)
        reading.option(("--tp", str(tp)), words, "tensor parallel within a node")
        rest //= tp
    if "pp" not in said and "ep" not in said and rest > 1:
        reading.option(("--pp", str(rest)), words, "the others in the pipeline")


def _held_to(reading: Reading, known: Glance) -> None:
    """Say which sizes MODEL does not permit."""
    from dconv.assist.sizes import SIZES, permitted
    from dconv.launch.options import add_target_options, parse

    said = {name: reading.options[f"--{name}"] for name in SIZES if f"--{name}" in reading.options}
    words = [str(known.path), "megatron", *(word for name, n in said.items() for word in (f"--{name}", str(n)))]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_target_options(parser)
    args = parse(parser, words)
    for name, number in said.items():
        fits = permitted(args, name, known)
        if int(str(number)) not in fits:
            those = ", ".join(map(str, fits[:16])) or "none beside the other sizes"
            reading.against.append(f"--{name} {number}: this model permits {those}")
