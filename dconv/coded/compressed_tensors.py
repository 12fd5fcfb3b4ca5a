"""compressed-tensors (llm-compressor, vLLM) as a source: which stored tensors make a weight, by what its config says.

A module's codes are ``weight`` or ``weight_packed``; ``weight_scale`` and others beside it say what they mean. Source:
compressed-tensors 0.20.0, ``compressors/*/base.py``, for each format what it stores, and how it is decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from dconv.coded import compressed_bytes, compressed_floats, compressed_packed, fp8
from dconv.coded.compressed_config import config_of
from dconv.coded.compressed_parts import Made, Module, parts_of
from dconv.coded.decoded import Decoded, dense
from dconv.coded.integers import Integers, add
from dconv.errors import Damaged
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.tensor import Stored

#: A module's tensors that its weight is made of, those with codes by the dtypes that tell.
_CODES: Final[dict[str, tuple[str, ...]]] = {"weight": (fp8.FP8, "f8_e5m2", "i8"), "weight_packed": ()}
_BESIDE: Final = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape")
#: What else compressed-tensors stores, which says how activations and caches are rounded: a dense weight is without.
_ACTIVATIONS: Final = frozenset(
    f"{what}_{part}"
    for what in ("input", "output", "q", "k", "v", "kv")
    for part in ("scale", "zero_point", "global_scale")
)


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in codes, each proved to be whole, and every part to belong to one.

    Raises:
        Damaged: a part is missing, of another shape than the config says, or of no use; a weight that the config does
            not speak of.
        Refused: a format that is not known.
    """
    said = config["quantization_config"]
    groups = config_of(mapping_or_empty(said))
    tensors = found.tensors
    for name in [name for name in tensors if name.rpartition(".")[2] in _ACTIVATIONS]:
        del tensors[name]
        found.left_out[name] = "a scale of activations or of a cache, which dense weights have no use for"
    for name, parts in _modules(tensors).items():
        where = next(stored.spec.name for part, stored in parts.items() if part in _CODES)
        module = Module(name, groups.group_of(name, where), parts)
        made = _MAKERS[module.group.format](module, found)
        named_parts = {stored.spec.name: stored for stored in parts.values()}
        if isinstance(made, Integers):
            add(found, name, dtype, named_parts, made)
            continue
        named = {stored.spec.name: stored for stored in made.inputs}
        whole = dense(made.shape, named, made.recipe, made.words, made.bits)
        found.put(f"{name}.weight", dtype, named_parts, whole, made.words)


def _modules(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Modules whose weights are in codes, with their parts.

    Raises:
        Damaged: a part without codes, or codes twice.
    """
    found = parts_of(tensors, _CODES, _BESIDE)
    for name, parts in found.items():
        if "weight_packed" in parts and f"{name}.weight" in tensors:
            raise Damaged("a weight is stored twice, packed and not", where=f"{name}.weight, {name}.weight_packed")
    return found


_MAKERS: Final[dict[str, Callable[[Module, Decoded], Made | Integers]]] = {
    "float-quantized": compressed_bytes.float8,
    "int-quantized": compressed_bytes.int8,
    "naive-quantized": compressed_bytes.naive,
    "pack-quantized": compressed_packed.integers,
    "mxfp4-pack-quantized": compressed_floats.mx4,
    "mxfp6-pack-quantized": compressed_floats.mx6,
    "mxfp8-quantized": compressed_bytes.mxfp8,
    "nvfp4-pack-quantized": compressed_floats.nv4,
}
