"""Samples for QAIRT's quantizer of two graphs over one cache, and the codes that both of them must agree on.

Genie moves keys and values as bytes from a graph's outputs into the cache, and from there into the inputs of another.
So what is written by one must mean the same to all, and what each graph's own samples would give does not: the codes of
inputs and outputs are found here, once, and the converter is given them (``--quantization_overrides``).

Keys and values are 8 bits, symmetric about 128, all else 16 bits, as quic/ai-hub-models has them
(``_shared/llm/_utils.py``: ``_set_tensors_to_output_8b_sym``, ``_tie_quantizers_for_kv_cache``); what the mask hides is
-50 in its samples, too (``model.py``, ``sample_input``): a larger number would coarsen the scores that it is added to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import ToolMissing
from dconv.hw.genie_config import angles

ENCODINGS: Final = "encodings.json"
LIST: Final = "input_list.txt"
#: The folder of samples, a folder a graph.
FOLDER: Final = "calibration"
HIDDEN: Final = -50.0
#: Tokens of each text that are read one by one.
STEPS: Final = 4
#: Inputs that reach from -1 to 1, whatever the samples are.
_ANGLES: Final = ("position_ids_cos", "position_ids_sin")

Arrays = dict[str, NDArray[Any]]


@dataclass
class Ranges:
    """The least and the largest number of a tensor, of all samples, 0 included."""

    found: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def see(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Widen the ranges by tensors of a sample, by name."""
        for name, held in arrays.items():
            low, high = self.found.get(name, (0.0, 0.0))
            self.found[name] = min(low, float(held.min())), max(high, float(held.max()))

    def encodings(self) -> dict[str, Any]:
        """For ``--quantization_overrides``: codes of what went through a graph's inputs and outputs.

        Keys and values have one entry for what a graph gives and the same for what it takes.
        """
        said: dict[str, Any] = {}
        for name, (low, high) in sorted(self.found.items()):
            if name.startswith("past_") and name.endswith("_out"):
                shared = _symmetric(max(-low, high))
                said[name] = said[f"{name.removesuffix('_out')}_in"] = [shared]
            elif not name.startswith("past_"):
                said[name] = [_affine(low, high)]
        return {"activation_encodings": dict(sorted(said.items())), "param_encodings": {}}


def _symmetric(largest: float) -> dict[str, Any]:
    scale = (largest or 1.0) / 127
    return {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "offset": -128, "scale": scale,
            "min": -128 * scale, "max": 127 * scale}  # fmt: skip


def _affine(low: float, high: float) -> dict[str, Any]:
    scale = (high - low or 1.0) / 65535
    offset = round(low / scale)
    return {"bitwidth": 16, "dtype": "int", "is_symmetric": "False", "offset": offset, "scale": scale,
            "min": scale * offset, "max": scale * (offset + 65535)}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A graph in onnxruntime.

    Attributes:
        name: as Genie calls it.
        length: tokens that it reads at once.
        context: tokens of the cache and of these.
        rope: how its angles are computed.
    """

    name: str
    session: Any
    length: int
    context: int
    rope: Mapping[str, Any]

    @classmethod
    def opened(cls, name: str, path: Path, rope: Mapping[str, Any]) -> Graph:
        """The graph in a file, on the CPU; its lengths are those of its inputs.

        Args:
            name: as Genie calls it.
            path: of the ONNX file.
            rope: the rotation, of `dconv.hw.genie_config.rotation` and with ``rope-dim``.

        Raises:
            ToolMissing: onnxruntime does not take it.
        """
        import onnxruntime

        runtime: Any = onnxruntime  # in part of compiled code, which says no types
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever a runtime raises about one graph
            raise _failed(name, error) from error
        shapes = {one.name: one.shape for one in session.get_inputs()}
        return cls(name, session, shapes["input_ids"][1], shapes["attention_mask"][3], rope)

    def empty(self) -> Arrays:
        """A cache of nothing, as long as the context: zeros, keys [heads, 1, width, context], values transposed."""
        found: Arrays = {}
        for one in self.session.get_inputs():
            if one.name.startswith("past_"):
                shape = list(one.shape)
                shape[3 if "_key_" in one.name else 2] = self.context
                found[one.name] = np.zeros(shape, np.float32)
        return found

    @property
    def _past(self) -> int:
        return self.context - self.length

    def inputs(self, tokens: NDArray[np.int32], cache: Arrays, before: int) -> Arrays:
        """Inputs of a call: tokens behind ``before`` others, filled up with hidden ones.

        Args:
            tokens: `length` of them at most.
            cache: keys and values, of which the first ``before`` places are taken.
            before: tokens that were read.
        """
        count = len(tokens)
        filled = np.zeros((1, self.length), np.int32)
        filled[0, :count] = tokens
        mask = np.full((1, 1, self.length, self.context), HIDDEN, np.float32)
        mask[..., :before] = 0
        causal = np.tri(self.length, dtype=bool)
        causal[:, count:] = False
        mask[0, 0, :, self._past :][causal] = 0
        cos, sin = angles(self.rope, before + np.arange(self.length))
        given: Arrays = {"input_ids": filled, "attention_mask": mask, "position_ids_cos": cos, "position_ids_sin": sin}
        for name, held in cache.items():
            given[name] = held[..., : self._past] if "_key_" in name else held[:, :, : self._past]
        return {name: np.ascontiguousarray(held) for name, held in given.items()}

    def run(self, given: Arrays) -> Arrays:
        """Outputs by name, of inputs by name.

        Raises:
            ToolMissing: onnxruntime fails.
        """
        names = [one.name for one in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(None, given), strict=True))
        except Exception as error:  # whatever a runtime raises about one graph
            raise _failed(self.name, error) from error


def _failed(name: str, error: Exception) -> ToolMissing:
    return ToolMissing("onnxruntime does not compute samples of the cache, nothing was written", where=name,
                       found=f"{type(error).__name__}: {error}"[:600])  # fmt: skip


def kept(cache: Arrays, made: Arrays, before: int, count: int) -> None:
    """Put what is new into the cache, in place and as Genie does.

    Args:
        cache: keys and values, by the names of inputs.
        made: a call's outputs.
        before: tokens that are in the cache.
        count: tokens of the call that are no filling.
    """
    for name, held in cache.items():
        new = made[f"{name.removesuffix('_in')}_out"]
        if "_key_" in name:
            held[..., before : before + count] = new[..., :count]
        else:
            held[:, :, before : before + count] = new[:, :, :count]


def calls(prompt: Graph, token: Graph, text: NDArray[np.int32]) -> Iterator[tuple[Graph, Arrays, Arrays, int]]:
    """A text read by both graphs over one cache: graph, inputs, outputs and how many tokens are real, call by call."""
    cache, before, alone = prompt.empty(), 0, len(text) - STEPS
    while before < len(text):
        graph = prompt if before < alone else token
        piece = text[before : min(before + graph.length, alone if graph is prompt else len(text))]
        given = graph.inputs(piece, cache, before)
        made = graph.run(given)
        yield graph, given, made, len(piece)
        kept(cache, made, before, len(piece))
        before += len(piece)


def write(work: Path, prompt: Graph, token: Graph, texts: NDArray[np.int32]) -> None:
    """Write the samples of both graphs, their lists, and the codes of inputs and outputs.

    Args:
        work: the work folder: `FOLDER` and `ENCODINGS` are made in it.
        prompt: the graph that reads many tokens at once.
        token: the graph that reads one.
        texts: [texts, tokens], each read to its end by both.

    Raises:
        ToolMissing: onnxruntime fails.
    """
    ranges, lines = Ranges(), {prompt.name: list[str](), token.name: list[str]()}
    for text in texts:
        for graph, given, made, count in calls(prompt, token, text):
            real = {name: _real(name, held, count) for name, held in made.items()}
            ranges.see({**{name: held for name, held in given.items() if name != "input_ids"}, **real})
            lines[graph.name].append(_sample(work, graph, given, len(lines[graph.name])))
    ranges.see({"attention_mask": np.array([HIDDEN]), **dict.fromkeys(_ANGLES, np.array([-1.0, 1.0]))})
    for name, said in lines.items():
        (work / FOLDER / name / LIST).write_text("".join(f"{line}\n" for line in said))
    (work / ENCODINGS).write_text(f"{json.dumps(ranges.encodings(), indent=1)}\n")


def _real(name: str, held: NDArray[Any], count: int) -> NDArray[Any]:
    """What a call gave for tokens that are no filling."""
    return held[..., :count] if "_key_" in name else held[:, :, :count] if "_value_" in name else held[:, :count]


def _sample(work: Path, graph: Graph, given: Arrays, number: int) -> str:
    """A line of the list: the quantizer reads fp32, whole numbers too, from files by name."""
    folder = work / FOLDER / graph.name
    folder.mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    for name, held in given.items():
        # most of a cache is empty at first: zeros of a shape are one file
        stem = f"{name}_{number}" if held.any() else f"zeros_{'x'.join(map(str, held.shape))}"
        path = folder / f"{stem}.raw"
        if not path.exists() or held.any():
            held.astype("<f4").tofile(path)
        words.append(f"{name}:={path.relative_to(work).as_posix()}")
    return " ".join(words)
