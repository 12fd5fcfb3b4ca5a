"""One small output of every container that is written, and another of the same shape with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import dconv
from dconv.arch.llama import LLAMA
from dconv.cli import main
from tests.damage import truth
from tests.formats import gguf_tokenizers
from tests.models import config_of, write_random

#: Each matrix is some pages long, and whole blocks of every code.
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
CALIBRATION: Final = {"bits": 4, "group_size": 32, "nsamples": 12, "seqlen": 512}


@dataclass(frozen=True)
class Container:
    """How one is written.

    Attributes:
        format: FORMAT, with its options.
        read: finds its tensors without dconv.
        slow: it is made by a tracer.
        seal: the file that has the digests.
    """

    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    read: truth.Read = truth.safetensors
    slow: bool = False
    calibrated: bool = False
    seal: str = "dconv.json"


CONTAINERS: Final[dict[str, Container]] = {
    "hf": Container("hf"),
    "hf_sharded": Container("hf", {"shard_size": "60KB"}),
    "hf_sha256": Container("hf", {"digest": "sha256"}),
    "torch_dist": Container("megatron", {"tp": 2, "pp": 2}, truth.torch_dist),
    "legacy": Container("megatron", {"tp": 2, "pp": 2, "megatron_format": "legacy"}, truth.legacy),
    "model_pt": Container("megatron", {"megatron_format": "model_pt"}, truth.torch_file),
    "pt": Container("pt", {}, truth.torch_file),
    "bmtrain": Container("bmtrain", {}, truth.torch_file),
    "neuron": Container("neuron"),
    "neuron_fp8": Container("neuron", {"quant": "fp8"}),
    "gguf": Container("gguf", {}, truth.gguf),
    "gguf_q8_0": Container("gguf", {"quant": "q8_0"}, truth.gguf),
    "gguf_q4_0": Container("gguf", {"quant": "q4_0"}, truth.gguf),
    "mlx": Container("mlx"),
    "mlx_4bit": Container("mlx", {"quant": "4bit"}),
    "fp8": Container("fp8"),
    "mxfp8": Container("mx", {"quant": "mxfp8"}),
    "mxfp4": Container("mx", {"quant": "mxfp4"}),
    "nvfp4": Container("mx", {"quant": "nvfp4"}),
    "gptq": Container("gptq", calibrated=True),
    "awq": Container("awq", calibrated=True),
    "compressed_tensors": Container("gptq", {"quant": "pack-quantized"}, calibrated=True),
    "onnx": Container("onnx", {"dtype": "f32"}, truth.onnx, slow=True),
    "torch_export": Container("torch_export", {}, truth.torch_export, slow=True),
    "torchscript": Container("torchscript", {}, truth.torchscript, slow=True),
    "hand_off": Container("ax", seal="manifest.json", read=truth.nothing),
}


@dataclass(frozen=True)
class Made:
    """A container on disk, its twin of other weights, and what it holds."""

    name: str
    folder: Path
    twin: Path
    content: Mapping[str, bytes] = field(repr=False)
    foreign: Mapping[str, bytes] = field(repr=False)
    tensors: tuple[truth.Tensor, ...] = field(repr=False)

    @property
    def kind(self) -> Container:
        return CONTAINERS[self.name]

    def restore(self) -> None:
        """As it was made."""
        now = content_of(self.folder)
        for path in now.keys() - self.content.keys():
            (self.folder / path).unlink()
        for path, data in self.content.items():
            if now.get(path) != data:
                (self.folder / path).write_bytes(data)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def model(folder: Path, seed: int, **sizes: Any) -> Path:
    """A llama of bf16 weights as a training leaves them: normal, none of them 0, norms too."""
    write_random(folder, LLAMA, config_of(LLAMA, **{**SIZES, **sizes}))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    drawn = np.random.default_rng(seed).normal(0, 0.05, (len(data) - begin) // 2).astype(np.float32)
    drawn[drawn == 0] = 1
    data[begin:] = (drawn.view(np.uint32) >> 16).astype("<u2").tobytes()
    path.write_bytes(data)
    return gguf_tokenizers.byte_pairs(folder, small=True)


def make(name: str, root: Path) -> Made:
    """Convert both models, and look where the tensors lie."""
    kind = CONTAINERS[name]
    folders = []
    for seed, which in enumerate(("this", "other")):
        plain, out = root / which / "model", root / which / name
        if not plain.exists():
            model(plain, seed)
        convert(plain, kind, out)
        folders.append(out)
    here, twin = folders
    return Made(name, here, twin, content_of(here), content_of(twin), tuple(kind.read(here)))


def convert(plain: Path, kind: Container, out: Path) -> None:
    options = dict(kind.options)
    if kind.format == "ax":
        words = ["convert", plain, "ax", "--platform", "AX650", "--bundle", "-o", out, "--quiet"]
        assert main([str(word) for word in words]) == 0
        return
    if kind.calibrated:
        samples = plain.parent / "samples.npy"
        np.save(samples, np.random.default_rng(0).integers(0, 40, (12, 512)))
        options |= {"calibration": str(samples), "quantization_config": json.dumps(CALIBRATION)}
    dconv.convert(plain, kind.format, out, **options)


def copied(made: Made, to: Path) -> Path:
    """The same files, somewhere else."""
    return Path(shutil.copytree(made.folder, to))
