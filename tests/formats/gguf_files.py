"""GGUF files for tests, written by the package gguf: of recorded ones with other types, keys and names."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderField
from gguf.quants import dequantize, quantize

RECORDED = Path(__file__).parent / "recorded" / "gguf.zip"

#: A tensor: GGUF's name, its values or the bytes of its rows, and the type of those.
Tensor = tuple[str, np.ndarray[Any, Any], GGMLQuantizationType | None]
#: What is made of one; fp32 values go in.
Change = Callable[[str, np.ndarray[Any, Any]], Iterable[Tensor]]


def recorded(folder: Path, name: str) -> Path:
    with zipfile.ZipFile(RECORDED) as archive:
        return Path(archive.extract(f"{name}.gguf", folder))


def same(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
    yield name, values, None


def in_blocks(kind: str, *, decoded: bool = False) -> Change:
    """Every matrix whose rows are whole blocks, in blocks; ``decoded`` gives the fp32 values of those blocks."""

    def change(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        number = GGMLQuantizationType[kind]
        if values.ndim < 2 or values.shape[-1] % 32 or "norm" in name:
            yield name, values, None
        else:
            raw = quantize(values, number)
            yield (name, dequantize(raw, number), None) if decoded else (name, raw, number)

    return change


def rewrite(
    source: Path,
    out: Path,
    change: Change = same,
    *,
    values: Mapping[str, Any] | None = None,
    tokens: int = 0,
    split: int = 0,
) -> Path:
    """A file again.

    Args:
        values: keys to be set; None leaves one out.
        tokens: the size of a vocabulary to be added.
        split: tensors a file, at most.
    """
    reader, values = GGUFReader(source), dict(values or {})
    kept = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.") and key not in values}
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, values.pop("general.architecture", arch), split_max_tensors=split)
    for key, field in kept.items():
        if key != "general.architecture":
            _copy(writer, field)
    for key, value in values.items():
        _add(writer, key, value)
    if tokens:
        writer.add_tokenizer_model("other")
        writer.add_token_list([f"t{token}" for token in range(tokens)])
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        for name, data, kind in change(tensor.name, plain):
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _copy(writer: GGUFWriter, field: ReaderField) -> None:
    writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
