"""Element types by one short name each, whatever a container calls them.

A name is enough to move bytes; how a value is converted lives in `dconv.codec`.
"""

from __future__ import annotations

from typing import Final

#: dconv name -> bytes per element.
ITEMSIZE: Final[dict[str, int]] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8_e4m3": 1, "f8_e5m2": 1, "f8_e8m0": 1,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1,
    "c64": 8,
}  # fmt: skip

#: safetensors' name -> dconv name.
FROM_SAFETENSORS: Final[dict[str, str]] = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2",
    "F8_E8M0": "f8_e8m0", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8", "U64": "u64", "U32": "u32",
    "U16": "u16", "U8": "u8", "BOOL": "bool", "C64": "c64",
}  # fmt: skip
TO_SAFETENSORS: Final[dict[str, str]] = {v: k for k, v in FROM_SAFETENSORS.items()}

#: torch's name (``torch.<name>``) -> dconv name.
FROM_TORCH: Final[dict[str, str]] = {
    "float64": "f64", "double": "f64", "float32": "f32", "float": "f32", "float16": "f16", "half": "f16",
    "bfloat16": "bf16", "float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2", "float8_e8m0fnu": "f8_e8m0",
    "int64": "i64", "long": "i64", "int32": "i32", "int": "i32", "int16": "i16", "short": "i16", "int8": "i8",
    "uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8", "bool": "bool", "complex64": "c64",
}  # fmt: skip
TO_TORCH: Final[dict[str, str]] = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8_e4m3": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2", "f8_e8m0": "float8_e8m0fnu", "i64": "int64", "i32": "int32", "i16": "int16",
    "i8": "int8", "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "bool": "bool",
    "c64": "complex64",
}  # fmt: skip

#: What ``--dtype`` takes -> dconv name.
OPTION: Final[dict[str, str]] = {
    "bf16": "bf16", "bfloat16": "bf16", "f16": "f16", "fp16": "f16", "float16": "f16",
    "f32": "f32", "fp32": "f32", "float32": "f32",
}  # fmt: skip


def carrier(dtype: str) -> str:
    """The numpy type that holds an element: itself where numpy has it, else its bit pattern."""
    return {"f64": "<f8", "f32": "<f4", "f16": "<f2"}.get(dtype, f"<u{ITEMSIZE[dtype]}")
