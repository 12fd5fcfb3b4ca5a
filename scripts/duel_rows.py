"""What a row of the duel is, and the checkpoints that rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import duel_inputs as inputs
from duel_stage import Ending, Seen, Tensors, judged, peer

CONSOLIDATION: Final = "torch DCP, `consolidate_safetensors_files`"
DCP: Final = "torch DCP, `dcp_to_torch_save`"
TO_DCP: Final = "torch DCP, `torch_save_to_dcp`"
MEGATRON: Final = "megatron-core, `load_plain_tensors`"
TRANSFORMERS: Final = "transformers, `from_pretrained`"
SAVE: Final = "transformers, `save_pretrained`"
SAFETENSORS: Final = "safetensors, `load_file`"
GGUF: Final = "gguf-py, `GGUFReader`"
LLAMA: Final = "llama.cpp (xllamacpp)"
TORCH: Final = "torch, `load`"
BRIDGE: Final = "Megatron-Bridge, `import_ckpt`"

SAME: Final = "the same bytes"
DIST: Final = "the same damage in a torch_dist (DCP) directory"
HF: Final = "the same tensors in HuggingFace files"


class Stage:
    """A folder with the undamaged checkpoints, each made once, and what dconv did with each damage."""

    def __init__(self, root: Path, bridge: Path | None = None) -> None:
        self.root = root
        self.bridge = bridge
        self._seen: dict[str, Seen] = {}
        self._made: dict[str, Path] = {}

    def fresh(self, name: str) -> Path:
        """A path that is not there yet."""
        number = sum(1 for _ in self.root.iterdir())
        return self.root / f"{number:03d}-{name.replace(' ', '-')}"

    def empty(self, name: str) -> Path:
        folder = self.fresh(name)
        folder.mkdir()
        return folder

    def peer(self, action: str, *arguments: object, limit: int = 0) -> Ending:
        return peer(self.root, action, *arguments, limit=limit)

    def once(self, key: str, look: Callable[[], Seen]) -> Seen:
        """Several peers stand beside one run of dconv."""
        if key not in self._seen:
            self._seen[key] = look()
        return self._seen[key]

    def made(self, key: str, make: Callable[[Path], object]) -> Path:
        """An input that several rows read."""
        if key not in self._made:
            self._made[key] = self.fresh(key)
            make(self._made[key])
        return self._made[key]

    def dconv(self, source: Path, truth: Tensors, *words: str, unknown: str = "") -> Seen:
        """What `dconv convert` makes of a checkpoint: HuggingFace again, for that can be read here."""
        out = self.fresh("dconv")
        around = {path.name for path in self.root.iterdir() if path.suffix != ".log"}
        seen = judged(self.peer("dconv", "convert", str(source), "hf", "-o", str(out), *words), truth, out,
                      unknown=unknown)  # fmt: skip
        left = {path.name for path in self.root.iterdir() if path.suffix != ".log"} - around - {out.name}
        return Seen("late", f"{seen.words}; left {', '.join(sorted(left))}") if left else seen

    @cached_property
    def model(self) -> Path:
        return inputs.llama(self.fresh("model"))

    @cached_property
    def truth(self) -> Tensors:
        return inputs.truth_of(self.model)

    @cached_property
    def release(self) -> Path:
        return inputs.torch_dist(self.model, self.fresh("torch_dist"))

    @cached_property
    def gguf(self) -> Path:
        return inputs.gguf(self.model, self.fresh("gguf"))

    @cached_property
    def megatron_truth(self) -> Tensors:
        """The torch_dist directory's own names, as torch reads them while it is whole."""
        return self.peer("dcp_load", str(self.release)).value


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: names it; never changes.
        done: what was done to the input.
        ours: what dconv was given.
        fast: a default run of the tests has it.
    """

    key: str
    part: str
    done: str
    peer: str
    ours: str
    them: Callable[[Stage], Seen]
    us: Callable[[Stage], Seen]
    fast: bool = False


PARTS: Final = {
    "lost": "Something is missing",
    "wrong": "Something is wrong",
    "outside": "A path that leads outside",
    "pickle": "A pickle that runs something",
    "moment": "A run that does not end well",
}
