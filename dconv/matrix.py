"""What can be made of what: the conversion matrix of ``dconv formats`` and of the README, from the registries.

A source of weights becomes every FORMAT that its family allows. What a cell says of the numbers holds for all of them,
and is tested cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from dconv.request import CALIBRATED, FORMATS, QUANTISED

#: ``exact``: the same values, in the same dtype where the format has it. ``kept``: codes and scales that are there
#: stay as they are, where the output has that form. ``decoded``: each weight is what its code and scales say, rounded
#: once. ``coded``: new codes, each within the bound that its variant states. ``calibrated``: new codes, chosen by what
#: a layer answers.
#: ``refused``: a graph is not made into anything else.
Numbers = Literal["exact", "kept", "decoded", "coded", "calibrated", "refused"]
#: As a table shows them.
SIGNS: Final[dict[Numbers, str]] = {
    "exact": "=", "kept": "≡", "decoded": "≈", "coded": "c", "calibrated": "q", "refused": "",
}  # fmt: skip
MEANINGS: Final[dict[Numbers, str]] = {
    "exact": "the same values, bit by bit where the dtype stays",
    "kept": "codes and scales stay as they are; for another --quant they are decoded, or it is refused",
    "decoded": "each weight as its code and scales say, rounded once",
    "coded": "new codes, each within the bound that the plan states (from codes: decoded first)",
    "calibrated": "new codes, chosen by calibration",
    "refused": "a graph is the end of a way: convert from the checkpoint that it was made of",
}


@dataclass(frozen=True, slots=True)
class Input:
    """A kind of source.

    Attributes:
        words: for a person.
        coded: its weights are in codes.
        kept: the FORMATs that keep them.
        graph: the one FORMAT that it becomes.
    """

    words: str
    coded: bool = False
    kept: tuple[str, ...] = ()
    graph: str = ""


#: Every kind of source, by name.
INPUTS: Final[dict[str, Input]] = {
    "huggingface": Input("HuggingFace, safetensors, .bin"),
    "torch_dist": Input("Megatron torch_dist"),
    "legacy": Input("Megatron mp_rank_*"),
    "model_pt": Input("Megatron model.pt"),
    "pt": Input("one state dict (.pt)"),
    "meta": Input("Meta consolidated.*.pth"),
    "bmtrain": Input("BMTrain, ModelCenter"),
    "neuron": Input("Neuron"),
    "gguf": Input("GGUF, F32 F16 BF16"),
    "mlx": Input("MLX"),
    "fp8": Input("FP8: blocks, rows, tensors", True, ("fp8",)),
    "mx": Input("MXFP4, MXFP6, MXFP8, NVFP4", True, ("mx",)),
    "gptq": Input("GPTQ, pack-quantized", True, ("gptq", "awq")),
    "awq": Input("AWQ", True, ("gptq", "awq")),
    "neuron_fp8": Input("Neuron FP8", True, ("neuron",)),
    "gguf_blocks": Input("GGUF, its blocks", True, ("gguf",)),
    "mlx_codes": Input("MLX 2 to 8 bits", True),
    "onnx": Input("ONNX graph", graph="onnx"),
    "torch_export": Input("torch.export .pt2", graph="torch_export"),
    "torchscript": Input("TorchScript .pt", graph="torchscript"),
}


def outputs() -> tuple[str, ...]:
    """FORMATs, each by its first spelling."""
    engines = dict.fromkeys(FORMATS.values())
    return (*engines, *QUANTISED)


def numbers(source: str, format: str) -> Numbers:
    """What happens to a source's numbers in a FORMAT.

    Args:
        source: a key of `INPUTS`.
        format: one of `outputs`.
    """
    given = INPUTS[source]
    if given.graph:
        return "exact" if format == given.graph else "refused"
    if format in given.kept:
        return "kept"
    if format in CALIBRATED:
        return "calibrated"
    if format in QUANTISED or (format == "neuron" and source in ("fp8", "mx")):
        return "coded"
    return "decoded" if given.coded else "exact"


def rows() -> Iterable[tuple[str, dict[str, Numbers]]]:
    """Each kind of source with its cells by FORMAT."""
    for name in INPUTS:
        yield name, {format: numbers(name, format) for format in outputs()}


def markdown() -> str:
    """The matrix for the README."""
    columns = outputs()
    lines = ["| from \\ to | " + " | ".join(f"`{format}`" for format in columns) + " |"]
    lines.append("|---|" + ":-:|" * len(columns))
    for name, cells in rows():
        lines.append(f"| {INPUTS[name].words} | " + " | ".join(SIGNS[cells[format]] for format in columns) + " |")
    meanings = (
        f"`{SIGNS[kind]}` {words}.  " if SIGNS[kind] else f"Empty: {words}.  " for kind, words in MEANINGS.items()
    )
    return "\n".join([*lines, "", *meanings])
