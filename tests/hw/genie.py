"""Genie, played on a CPU: a bundle's graphs run over one cache, by what lies in the bundle alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

#: What Genie writes into a mask in half precision.
HIDDEN = -1000.0


class Genie:
    """Reads a text in pieces: the graph whose name says the most tokens first, the one of one token for the last."""

    def __init__(self, bundle: Path) -> None:
        dialog = json.loads((bundle / "genie/genie_config.json").read_text())["dialog"]
        engine = dialog["engine"]
        self.context = dialog["context"]["size"]
        htp = engine["backend"]["QnnHtp"]
        positional = engine["model"].get("positional-encoding")
        if positional is None:
            positional = {"rope-dim": htp["pos-id-dim"], "rope-theta": htp["rope-theta"]}
        self.turns = [turn(positional, i) for i in range(positional["rope-dim"])]
        self.sessions = {}
        for folder in ("prompt", "token"):
            session = onnxruntime.InferenceSession(bundle / folder / "model.onnx", providers=["CPUExecutionProvider"])
            shapes = {one.name: one.shape for one in session.get_inputs()}
            assert shapes["attention_mask"][3] == self.context
            assert shapes["past_key_0_in"][2] == htp["kv-dim"]
            self.sessions[shapes["input_ids"][1]] = session
        self.cache: dict[str, np.ndarray] = {}
        self.read = 0

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of each token, which stands behind all that were read before."""
        found = []
        while tokens:
            length = max(self.sessions) if len(tokens) > 1 else min(self.sessions)
            piece, tokens = tokens[:length], tokens[length:]
            found.append(self.call(self.sessions[length], length, piece))
        return np.concatenate(found)

    def call(self, session: Any, length: int, piece: list[int]) -> np.ndarray:
        past = self.context - length
        shapes = {one.name: one.shape for one in session.get_inputs()}
        mask = np.full((1, 1, length, self.context), HIDDEN, np.float32)
        cos, sin = (np.zeros((1, 1, length, len(self.turns)), np.float32) for _ in range(2))
        for i in range(length):
            mask[0, 0, i, : self.read] = 0
            mask[0, 0, i, past : past + min(i + 1, len(piece))] = 0
            for k, one in enumerate(self.turns):
                cos[0, 0, i, k], sin[0, 0, i, k] = math.cos((self.read + i) * one), math.sin((self.read + i) * one)
        ids = np.array([[*piece, *[0] * (length - len(piece))]], np.int32)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids_cos": cos, "position_ids_sin": sin}
        for name in shapes:
            if name.startswith("past_"):
                axis = 3 if "key" in name else 2
                held = self.cache.setdefault(name, np.zeros(self.whole(shapes[name], axis), np.float32))
                given[name] = np.ascontiguousarray(held.take(range(past), axis))
        made = dict(zip([one.name for one in session.get_outputs()], session.run(None, given), strict=True))
        for name, held in self.cache.items():
            axis, new = 3 if "key" in name else 2, made[name.replace("_in", "_out")]
            at = (slice(None),) * axis + (slice(self.read, self.read + len(piece)),)
            held[at] = new.take(range(len(piece)), axis)
        self.read += len(piece)
        return made["logits"][0, : len(piece)]

    def whole(self, shape: list[int], axis: int) -> list[int]:
        return [self.context if i == axis else one for i, one in enumerate(shape)]


def turn(said: dict[str, Any], i: int) -> float:
    """How far one pair of numbers turns from a token to the next; Llama 3's scaling as Meta's model.py has it."""
    freq = said["rope-theta"] ** (-i / said["rope-dim"])
    if "rope-scaling" not in said:
        return freq
    scaling = said["rope-scaling"]
    old, wavelength = scaling["original-max-position-embeddings"], 2 * math.pi / freq
    if wavelength < old / scaling["high-freq-factor"]:
        return freq
    if wavelength > old / scaling["low-freq-factor"]:
        return freq / scaling["factor"]
    low, high = scaling["low-freq-factor"], scaling["high-freq-factor"]
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * freq / scaling["factor"] + smooth * freq
