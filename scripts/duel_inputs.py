"""Small checkpoints for the duel, and the damage that is done to them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from duel_stage import Tensors, read_back
from safetensors.torch import load_file, save_file

from dconv.cli import main

#: A Llama of 0.4 MB; its vocabulary is cut into four parts of 16 rows.
SMALL: Final = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 64,
}  # fmt: skip
#: One of 41 MB, for what happens on the way.
LARGE: Final = {**SMALL, "hidden_size": 512, "num_hidden_layers": 6, "head_dim": 128, "intermediate_size": 1536}
EMBEDDING: Final = "embedding.word_embeddings.weight"
INDEX: Final = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
#: To torch_dist, of four tensor-parallel ranks.
TO_MEGATRON: Final = ("megatron", "--tp", "4", "--make-vocab-size-divisible-by", "1")


def config_of(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", **sizes,
    }  # fmt: skip


def llama(folder: Path, seed: int = 0, sizes: Mapping[str, int] = SMALL) -> Path:
    """A random Llama in HuggingFace's files: two, with an index."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.05).to(torch.bfloat16)

    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    parts[0]["model.embed_tokens.weight"] = made(vocabulary, width)
    for layer in range(sizes["num_hidden_layers"]):
        at, part = f"model.layers.{layer}.", parts[2 * layer // sizes["num_hidden_layers"]]
        heads = sizes["num_attention_heads"] * sizes["head_dim"]
        for name, shape in {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (heads, width),
            "self_attn.k_proj": (heads, width), "self_attn.v_proj": (heads, width), "self_attn.o_proj": (width, heads),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        }.items():  # fmt: skip
            part[f"{at}{name}.weight"] = made(*shape)
    parts[1] |= {"model.norm.weight": made(width), "lm_head.weight": made(vocabulary, width)}
    for name, part in zip((FIRST, LAST), parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {name: file for file, part in zip((FIRST, LAST), parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_of(sizes)))
    return folder


def truth_of(folder: Path) -> Tensors:
    """What a HuggingFace directory holds."""
    return read_back(folder)


def torch_dist(model: Path, out: Path) -> Path:
    """The same as a torch_dist checkpoint, without a receipt, as Megatron leaves it; returns the DCP directory."""
    assert main(["convert", str(model), *TO_MEGATRON, "-o", str(out), "--quiet"]) == 0
    (out / "dconv.json").unlink()
    return out / "release"


def gguf(model: Path, out: Path) -> Path:
    """The same as a GGUF, with a vocabulary of 18 tokens, which it has to have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["a", "b", "1", "2", ".", ":", "\u0120", "\u010a"]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*letters, "ab"])}, [("a", "b")]))
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    spoken = copied(model, out.with_name(f"{out.name}-spoken"))
    made.save(str(spoken / "tokenizer.json"))
    (spoken / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert main(["convert", str(spoken), "gguf", "-o", str(out), "--quiet"]) == 0
    (out / "dconv.json").unlink(missing_ok=True)
    return out


def shared_bytes(path: Path) -> None:
    """The second of two tensors of a GGUF that have one shape gets the first one's place."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    first, second = (next(it for it in tensors if it.name == f"blk.0.attn_{which}.weight") for which in "qk")
    places = [it.field.offset + sum(part.nbytes for part in it.field.parts[:-1]) for it in (first, second)]
    data = bytearray(path.read_bytes())
    data[places[1] : places[1] + 8] = data[places[0] : places[0] + 8]
    path.write_bytes(data)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, symlinks=True))


# --------------------------------------------------------------------------------------------- HuggingFace directories


def reindexed(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Edit the weight_map in its place."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path, count: int = 100) -> None:
    """A truncated tail."""
    os.truncate(path, path.stat().st_size - count)


def headed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the header of a safetensors file; what it speaks of stays."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def coded(folder: Path) -> Path:
    """The small Llama in FP8 with one 0-dim scale a matrix, as modelopt writes it; scales are powers of 2."""
    llama(folder)
    for path in (folder / FIRST, folder / LAST):

        def code(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.endswith("_proj.weight")]:
                tensors[name] = (tensors[name].float() * 64).to(torch.float8_e4m3fn)
                tensors[name.removesuffix("weight") + "weight_scale"] = torch.tensor(1 / 64)

        rewritten(path, code)
    _indexed(folder)
    method = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    config = config_of(SMALL) | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded(folder: Path) -> Tensors:
    """What `coded` stands for in bf16, by torch's own arithmetic."""
    held, one = tensors_of(folder), torch.tensor(1.0)
    names = [name for name in held if not name.endswith("_scale")]
    return as_data({name: (held[name].float() * held.get(f"{name}_scale", one)).to(torch.bfloat16) for name in names})


def packed(folder: Path) -> Path:
    """The small Llama in compressed-tensors' int4: codes as int32, and of each matrix its shape as int64."""
    llama(folder)
    for path in (folder / FIRST, folder / LAST):

        def pack(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.endswith("_proj.weight")]:
                rows, columns = tensors[name].shape
                draw = torch.Generator().manual_seed(rows + columns)
                codes = torch.randint(0, 16, (rows, columns // 8, 8), generator=draw) << torch.arange(0, 32, 4)
                tensors[f"{name}_packed"] = codes.sum(-1).to(torch.int32)
                tensors[f"{name}_scale"] = torch.full((rows, columns // 32), 1 / 64, dtype=torch.bfloat16)
                tensors[f"{name}_shape"] = torch.tensor([rows, columns], dtype=torch.int64)
                del tensors[name]

        rewritten(path, pack)
    _indexed(folder)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    method = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_of(SMALL) | {"quantization_config": method}))
    return folder


def unpacked(folder: Path) -> Tensors:
    """What `packed` stands for in bf16, by torch's own arithmetic."""
    held = tensors_of(folder)
    found = {name: tensor for name, tensor in held.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    for name in [name for name in held if name.endswith("_packed")]:
        codes = (held[name][..., None] >> torch.arange(0, 32, 4)) & 15
        plain = name.removesuffix("_packed")
        shape = held[f"{plain}_shape"].tolist()
        scales = held[f"{plain}_scale"].float().repeat_interleave(32, 1)
        found[plain] = ((codes.reshape(shape) - 8) * scales).to(torch.bfloat16)
    return as_data(found)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """By safetensors' own library."""
    return {name: tensor for file in (FIRST, LAST) for name, tensor in load_file(folder / file).items()}


def as_data(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        name: (
            str(it.dtype).removeprefix("torch."),
            tuple(it.shape),
            it.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, it in tensors.items()
    }


def _indexed(folder: Path) -> None:
    """A new index for changed files."""
    weight_map = {name: file for file in (FIRST, LAST) for name in load_file(folder / file)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------- DCP's safetensors

#: name -> a part of a tensor, and where in it the part begins.
Shard = Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]


def dcp_shards(folder: Path, *shards: Shard) -> Path:
    """A directory as ``HuggingFaceStorageWriter(save_distributed=True)`` of several ranks leaves it."""
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards, 1):
        said = {name: {"saved_offsets": list(at)} for name, (_, at) in shard.items()}
        save_file(
            {name: tensor.contiguous() for name, (tensor, _) in shard.items()},
            folder / f"shard-{number:05d}-model-00001-of-00001.safetensors",
            metadata={"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(said), "format": "pt"},
        )
    return folder


def by_rows(tensors: Mapping[str, torch.Tensor], count: int) -> list[dict[str, tuple[torch.Tensor, tuple[int, ...]]]]:
    """Each matrix cut into ``count`` parts of whole rows; a 0-dim tensor stays with the first."""
    shards: list[dict[str, tuple[torch.Tensor, tuple[int, ...]]]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            shards[0][name] = tensor, ()
            continue
        step = tensor.shape[0] // count
        for number, shard in enumerate(shards):
            shard[name] = tensor[number * step : (number + 1) * step], (number * step,) + (0,) * (tensor.ndim - 1)
    return shards


def by_columns(tensors: Mapping[str, torch.Tensor], count: int) -> list[Shard]:
    """Likewise of columns, which takes the consolidation longest."""
    shards: list[dict[str, tuple[torch.Tensor, tuple[int, ...]]]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        step = tensor.shape[1] // count
        for number, shard in enumerate(shards):
            shard[name] = tensor[:, number * step : (number + 1) * step], (0, number * step)
    return [*shards]


# ------------------------------------------------------------------------------------------------- .metadata of DCP


def edited(release: Path, change: Callable[[Any], object]) -> None:
    """Edit the metadata of a DCP directory that `torch_dist` made."""
    path = release / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _place(metadata: Any, key: str, row: int) -> Any:
    return next(it for it in metadata.storage_data if it.fqn == key and it.offset is not None and it.offset[0] == row)


def without_rows(release: Path, row: int) -> None:
    """The part that begins at ``row`` is nowhere any more."""

    def change(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[EMBEDDING].chunks
        chunks[:] = [chunk for chunk in chunks if chunk.offsets[0] != row]
        del metadata.storage_data[_place(metadata, EMBEDDING, row)]

    edited(release, change)


def without_places(release: Path) -> None:
    """The tensor is in the metadata, and its bytes are nowhere."""

    def change(metadata: Any) -> None:
        for place in [it for it in metadata.storage_data if it.fqn == EMBEDDING]:
            del metadata.storage_data[place]

    edited(release, change)


def overlapping(release: Path) -> None:
    """Rows 8 to 23 are there once more, with the values of rows 0 to 15."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    def change(metadata: Any) -> None:
        first = _place(metadata, EMBEDDING, 0)
        tensor = metadata.state_dict_metadata[EMBEDDING]
        at = torch.Size((8, *(0 for _ in tensor.size[1:])))
        tensor.chunks.append(ChunkStorageMetadata(at, tensor.chunks[0].sizes))
        metadata.storage_data[MetadataIndex(EMBEDDING, at, len(tensor.chunks) - 1)] = metadata.storage_data[first]

    edited(release, change)


def other_dtype(release: Path) -> None:
    """Rows 16 to 31 as float16, which has these values: the bytes differ, and the metadata says bfloat16."""

    def change(metadata: Any) -> None:
        place = _place(metadata, EMBEDDING, 16)
        info = metadata.storage_data[place]
        path = release / info.relative_path
        data = path.read_bytes()
        import io

        tensor = torch.load(io.BytesIO(data[info.offset : info.offset + info.length]), weights_only=True)
        held = io.BytesIO()
        torch.save(tensor.to(torch.float16), held)
        path.write_bytes(data + held.getvalue())
        info.offset, info.length = len(data), len(held.getvalue())

    edited(release, change)


# -------------------------------------------------------------------------------------------------------------- pickles


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, at: Path) -> None:
        self._at = str(at)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._at,)
