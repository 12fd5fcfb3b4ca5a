"""What tells the containers apart, without their modules: a rank reads one of them, and does not import the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dconv.checkpoint import safetensors
from dconv.checkpoint.files import listed, read_json
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_mapping

#: Ends of files.
GGUF, ONNX = ".gguf", ".onnx"
#: How a GGUF begins.
GGUF_MAGIC: Final = b"GGUF"
#: Ends of files that may hold a state dict.
STATE_DICTS: Final = (".pt", ".pth", ".bin")
#: Archives of graphs, each with the file that dconv writes it as; ends of those that others wrote.
ARCHIVES: Final = {"torch_export": "model.pt2", "torchscript": "model.pt"}
_ARCHIVED: Final = (".pt2", ".pt", ".pth", ".ts")
#: What MLX writes into a file's header, and where config.json says its codes.
MLX, MLX_KEY = "mlx", "quantization"
#: What no other checkpoint than Neuron's has in its names.
_NEURON: Final = (".self_attn.qkv_proj.q_proj.", ".expert_mlps.mlp_op.")
#: The file of FORMAT megatron's model_pt.
MODEL_PT: Final = "model.pt"
INDEX: Final = "model.safetensors.index.json"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF by its name, or by how it begins: some stores name files by their digests."""
    if not path.is_file() or path.suffix == GGUF:
        return path.is_file()
    try:
        with path.open("rb") as opened:
            return opened.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def is_state_dict(path: Path) -> bool:
    """Whether a path is a file that may hold a state dict."""
    return path.is_file() and path.suffix in STATE_DICTS


def has_onnx(folder: Path) -> bool:
    """Whether a directory has a file that ends as an ONNX graph does."""
    return bool(listed(folder, f"*{ONNX}"))


def is_onnx(path: Path) -> bool:
    """Whether a path is an ONNX graph, or a directory of such and no other checkpoint."""
    if path.is_file():
        return path.suffix == ONNX
    return path.is_dir() and has_onnx(path) and not listed(path, "*.safetensors")


def archives(path: Path) -> list[Path]:
    """Files that may be an archive of a graph: the path itself, or what dconv writes in it."""
    held = [path / name for name in ARCHIVES.values()] if path.is_dir() else [path]
    return [file for file in held if file.suffix in _ARCHIVED and file.is_file()]


def is_neuron(folder: Path) -> bool:
    """Whether the tensors of a directory's files have Neuron's names."""
    try:
        if (folder / INDEX).exists():
            names = read_json(folder / INDEX, what="the index").get("weight_map")
        else:
            names = safetensors.read_header(listed(folder, "*.safetensors")[0])
    except (Damaged, Refused, IndexError):
        return False
    return is_mapping(names) and any(mark in str(name) for name in names for mark in _NEURON)


def is_mlx(folder: Path) -> bool:
    """Whether a directory's files say that MLX wrote them, or its config.json that they are in MLX's codes."""
    try:
        said = read_json(folder / "config.json", what="config.json").get(MLX_KEY)
        if isinstance(said, Mapping) and {"group_size", "bits"} <= said.keys():
            return True
        files = listed(folder, "model*.safetensors")
        return bool(files) and safetensors.framework(files[0]) == MLX
    except (Damaged, Refused):
        return False
