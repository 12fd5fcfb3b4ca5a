"""The good checkpoints: one small Llama in every container, all made by dconv or by the few lines here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attacks.corpus import MAGIC, Canary, read_safetensors, records, root_of
from dconv.checkpoint import pickling
from dconv.pipeline import Request, convert

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Twin:
    """A good checkpoint.

    Attributes:
        make: writes it to a directory.
        words: of ``dconv convert MODEL``, ``{}`` standing for its directory.
        model: MODEL, below its directory.
    """

    make: Callable[[Path], object]
    words: tuple[str, ...]
    model: str = ""


def make_twins(folder: Path, names: Iterable[str]) -> None:
    """Each in a directory of its name; those that are there already stay."""
    for name in names:
        if not (folder / name).exists():
            TWINS[name].make(folder / name)


def make_canary(folder: Path, secret: str) -> Canary:
    """The directory that payloads aim at."""
    canary = Canary(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alive").write_text("alive")
    canary.secret.write_text(secret)
    if not canary.outside.exists():
        _huggingface(canary.outside)
    return canary


def _huggingface(folder: Path, shard_size: int = 40_000) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = folder.with_name(f"{folder.name}.json")
    own.write_text(json.dumps(CONFIG))
    convert(Request(own, "hf", folder, fake_weight=True, shard_size=shard_size))
    own.unlink()
    (folder / "dconv.json").unlink()  # nobody's result: a receipt would tell of other damage first
    (folder / "tokenizer_config.json").write_text("{}")


def _converted(folder: Path, engine: str, **options: Any) -> None:
    source = folder.with_name(f"{folder.name}-source")
    _huggingface(source)
    convert(Request(source, engine, folder, **options))
    for path in sorted(source.iterdir()):
        path.unlink()
    source.rmdir()
    (folder / "dconv.json").unlink()


def _one(folder: Path) -> None:
    _huggingface(folder, 900_000)


def _bin(folder: Path) -> None:
    _converted(folder, "pt")


def _old(folder: Path) -> None:
    """As torch wrote it before 1.6: pickles, then the storages."""
    _bin(folder)
    path = folder / "pytorch_model.bin"
    held = records(path)
    root = root_of(held)
    tree = held[f"{root}/data.pkl"]
    count = sum(name.startswith(f"{root}/data/") for name in held)
    keys = [str(number) for number in range(count)]
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [MAGIC, pickling.dumps(1001), pickling.dumps(system), tree, pickling.dumps(keys)]
    for key in keys:
        content = held[f"{root}/data/{key}"]
        parts += [struct.pack("<q", len(content) // 2), content]  # bf16
    path.write_bytes(b"".join(parts))


def _pt(folder: Path) -> None:
    _bin(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")


def _configured(folder: Path) -> None:
    _huggingface(folder)
    (folder / "run.yaml").write_text("tp: 1\ndtype: bf16\n")
    (folder / "rename.yaml").write_text("model.norm.weight: model.norm.weight\n")
    (folder / "rename.json").write_text('{"model.norm.weight": "model.norm.weight"}')


def _made_up(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "fake.yaml").write_text("fill: zeros\n")


def _tokenized(folder: Path) -> None:
    """With a tokenizer.json that was made of a SentencePiece model."""
    _huggingface(folder)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "\u2581", "ab", "\u2581a"]
    tokens += [f"<0x{i:02X}>" for i in range(10)]
    added = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    file = {
        "version": "1.0", "added_tokens": [{**one, "single_word": False, "lstrip": False, "rstrip": False,
                                             "normalized": False} for one in added],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": ["a b", "\u2581 a"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))


def _pieces(folder: Path) -> None:
    """With a tokenizer.model."""
    _huggingface(folder)
    held = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((chr(97 + i), -float(i), 1) for i in range(26))]
    data = b"".join(field(1, piece(*one)) for one in held)
    (folder / "tokenizer.model").write_bytes(data)


def piece(text: str, score: float, kind: int) -> bytes:
    """A SentencePiece message."""
    return field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    """A field of Protocol Buffers that holds bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def whole(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3) + varint(value)


def onnx_graph(location: str | bytes = "weights.data", offset: str = "0", length: str = "16", *, again: int = 1,
               dims: tuple[int, ...] = (4,), more: bytes = b"") -> bytes:  # fmt: skip
    """A graph ``y = x + w`` whose weight of four fp32 lies in another file."""
    where = location if isinstance(location, bytes) else location.encode()
    pairs = ((b"location", where), (b"offset", offset.encode()), (b"length", length.encode()))
    outside = b"".join(field(13, field(1, key) + field(2, value)) for key, value in pairs)
    weight = b"".join(whole(1, n) for n in dims) + whole(2, 1) + field(8, b"w") + outside + whole(14, 1)
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"add") + field(4, b"Add")
    shape = field(2, field(1, whole(1, 4)))
    kind = field(2, field(1, whole(1, 1) + shape))
    graph = field(1, node) + field(2, b"main") + field(5, weight) * again
    graph += field(11, field(1, b"x") + kind) + field(12, field(1, b"y") + kind) + more
    return whole(1, 8) + field(8, field(1, b"") + whole(2, 17)) + field(7, graph)


def _onnx(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx_graph())
    (folder / "weights.data").write_bytes(struct.pack("<4f", 1, 2, 3, 4))


def _gguf(folder: Path) -> None:
    from attacks.ggufs import good  # which needs this file's sizes

    folder.mkdir(parents=True)
    source = folder.with_name("gguf-source")
    _one(source)
    header, body = read_safetensors(source / "model.safetensors")
    for path in sorted(source.iterdir()):
        path.unlink()
    source.rmdir()
    good(CONFIG, header, body).write(folder / "model.gguf")


TWINS: Final[dict[str, Twin]] = {
    "huggingface": Twin(_huggingface, ("megatron",)),
    "one file": Twin(_one, ("megatron",)),
    "bin": Twin(_bin, ("hf",)),
    "old bin": Twin(_old, ("hf",)),
    "pt": Twin(_pt, ("hf",), "model.pt"),
    "legacy": Twin(lambda at: _converted(at, "megatron", megatron_format="legacy"), ("hf",)),
    "torch_dist": Twin(lambda at: _converted(at, "megatron"), ("hf",)),
    "mlx": Twin(lambda at: _converted(at, "mlx"), ("hf",)),
    "gguf": Twin(_gguf, ("hf",)),
    "onnx": Twin(_onnx, ("onnx", "--dtype", "f16")),
    "tokenizer.json": Twin(_tokenized, ("gguf",)),
    "tokenizer.model": Twin(_pieces, ("gguf",)),
    "run config": Twin(_configured, ("megatron", "--config", "{}/run.yaml")),
    "renaming": Twin(_configured, ("megatron", "--rename", "{}/rename.yaml")),
    "JSON renaming": Twin(_configured, ("megatron", "--rename", "{}/rename.json")),
    "made-up weights": Twin(_made_up, ("hf", "--fake-weight", "--fake-weight-config", "{}/fake.yaml"), "config.json"),
}
