"""The real onnx and onnxruntime as judges of a directory with graphs: check them, and compute on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Damaged, Refused, ToolMissing
from dconv.export.graph_halves import DECODER, ENCODER
from dconv.export.huggingface import continuation, largest
from dconv.export.onnx_fixed_run import Lengths
from dconv.export.onnx_graph import require
from dconv.export.prompt import NEW_TOKENS, Answers, Prompt

#: Of the graph of a model that is one; the file of its weights is named after it.
NAME: Final = "model.onnx"
_TYPES: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def validate(path: Path) -> bool:
    """Whether the graphs of a directory are whole, by ONNX's own checker.

    Raises:
        ToolMissing: onnx is not installed.
    """
    require(("onnx",))
    import onnx

    checker: Any = onnx.checker  # whose functions have types in part
    graphs = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    try:
        for graph in graphs:
            checker.check_model(str(graph), full_check=False)
    except (checker.ValidationError, OSError, ValueError):
        return False
    return bool(graphs)


def can_infer(path: Path, prompt: Prompt, **_: Any) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer.

    Returns:
        As `dconv.export.huggingface.can_infer`.

    Raises:
        Damaged: ONNX's checker finds fault, or the logits are not finite.
        ToolMissing: onnxruntime is not installed, or does not take the graph.
    """
    require(("onnx", "onnxruntime"))
    import onnxruntime

    if not validate(path):
        raise Damaged("ONNX's checker finds fault with a graph", where=str(path))
    run = Runs(path)
    if run.limit is not None:
        prompt = run.limit.cut(prompt)
        largest(run.answers(run.limit.filled(prompt)), path)
    shown: dict[str, object] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "model": run.graphs,
        "largest_logit": largest(run.answers(prompt), path),
    }
    return shown | continuation(path, prompt, partial(run.generated, prompt))


def answers_of(path: Path, prompt: Prompt, **_: Any) -> Answers:
    """What the graphs answer; errors as for `can_infer`."""
    return Runs(path).answers(prompt)


class Runs:
    """Graphs in onnxruntime, on the CPU.

    Args:
        path: a graph, or a directory with one, or with the two of an encoder-decoder.

    Attributes:
        graphs: their files, for a person.
        limit: the lengths that they are given for; None where any will do.

    Raises:
        Refused: there is no graph.
        ToolMissing: onnxruntime is not installed, or does not take a graph.
    """

    def __init__(self, path: Path) -> None:
        require(("onnxruntime",))
        folder = path if path.is_dir() else path.parent
        names = [path.name] if path.is_file() else [n for n in (NAME, ENCODER, DECODER) if (folder / n).exists()]
        if not names:
            raise Refused("no graph is there", where=str(path), expected=NAME)
        self._sessions = {name: self._open(folder / name) for name in names}
        self.graphs = ", ".join(names)
        self.limit = Lengths.of(next(iter(self._sessions.values())))

    def _open(self, path: Path) -> Any:
        import onnxruntime

        runtime: Any = onnxruntime  # in part of compiled code, which says no types
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        try:
            return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever a runtime raises about one graph
            raise ToolMissing(
                "onnxruntime does not take this graph", where=str(path), found=f"{type(error).__name__}: {error}"[:600]
            ) from error

    def _run(self, session: Any, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        given = {one.name: given[one.name] for one in session.get_inputs()}
        return session.run(None, given) if self.limit is None else self.limit.run(session, given)

    def answers(self, prompt: Prompt) -> Answers:
        """fp32 logits [batch, sequence, vocabulary], and what other outputs an encoder has."""
        whole = {"input_ids": prompt.tokens, "attention_mask": np.ones_like(prompt.tokens)}
        if prompt.replies is not None:
            return (self._replied(self._read(prompt.tokens), prompt.replies),)
        (session,) = self._sessions.values()
        if prompt.types is not None:
            made = self._run(session, {**whole, "token_type_ids": prompt.types})
            return tuple(one.astype(np.float32) for one in made)
        if not self._cached(session):
            return (self._run(session, whole)[0].astype(np.float32),)
        return (self.step(prompt.tokens, None)[0],)

    def _cached(self, session: Any) -> bool:
        return any(one.name == "position_ids" for one in session.get_inputs())

    def _read(self, tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        mask = np.ones_like(tokens)
        (states,) = self._run(self._sessions[ENCODER], {"input_ids": tokens, "attention_mask": mask})
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _replied(self, read: dict[str, NDArray[Any]], replies: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(self._sessions[DECODER], {**read, "input_ids": replies})[0].astype(np.float32)

    def step(
        self,
        tokens: NDArray[np.int64],
        past: list[NDArray[Any]] | None,
        mask: NDArray[np.int64] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        """Logits [batch, sequence, vocabulary] of a decoder, and its keys and values.

        Args:
            tokens: [batch, sequence], those behind the past.
            past: keys and values of each layer, [batch, heads, length, width]; None where there is none.
            mask: [batch, past and sequence]; all of them by default.
            positions: [batch, sequence]; behind the past by default.
        """
        (session,) = self._sessions.values()
        batch: int = tokens.shape[0]
        length: int = tokens.shape[1]
        ports = session.get_inputs()[3:]
        if past is None:
            past = [np.zeros((batch, port.shape[1], 0, port.shape[3]), _TYPES[port.type]) for port in ports]
        before: int = past[0].shape[2] if past else 0
        if self.limit is not None:
            self.limit.require(before, length)
        if self.limit is not None and length > self.limit.sequence:
            end = self.limit.sequence
            early = [None if one is None else one[:, :-end] for one in (mask, positions)]
            first, held = self.step(tokens[:, :-end], past, *early)
            then, present = self.step(tokens[:, -end:], held, mask, None if positions is None else positions[:, -end:])
            return np.concatenate([first, then], 1), present
        given: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, before + length), np.int64) if mask is None else mask,
            "position_ids": np.tile(np.arange(before, before + length), (batch, 1)) if positions is None else positions,
        }
        said, *present = self._run(session, given | {p.name: held for p, held in zip(ports, past, strict=True)})
        return said.astype(np.float32), present

    def generated(self, prompt: Prompt, sentence: NDArray[np.int64]) -> NDArray[np.int64]:
        """A sentence and what follows it greedily, as tokens [1, length]; of an encoder-decoder its answer.

        A graph of given lengths takes the sentence as far as it reaches.
        """
        if self.limit is not None:
            sentence = sentence[:, : self.limit.total]
        new = np.zeros((1, 1), np.int64) if prompt.kind == "encoder-decoder" else sentence.astype(np.int64)
        read = self._read(sentence.astype(np.int64)) if prompt.kind == "encoder-decoder" else {}
        past: list[NDArray[Any]] | None = None
        kept = self.limit is None or self.limit.past > 0
        for _ in range(NEW_TOKENS):
            if self.limit is not None and new.shape[1] >= self.limit.total:
                break
            if read:
                said = self._replied(read, new)
            elif prompt.kind == "decoder" and kept:
                said, past = self.step(new if past is None else new[:, -1:], past)
            else:
                said = self.answers(Prompt(prompt.kind, new))[0]
            new = np.concatenate([new, said[:, -1].argmax(-1)[:, None]], 1)
        return new
