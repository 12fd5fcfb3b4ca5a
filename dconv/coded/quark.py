"""AMD Quark's MX weights: ``weight`` in packed codes, ``weight_scale`` in E8M0, ``quant_method`` quark.

``X.weight`` is uint8 [out, in · bits / 8] and ``X.weight_scale`` uint8 [out, in / 32]; which format the codes have is
said by ``quantization_config`` and borne out by the shapes. Sources: amd-quark 0.13, ``torch/utils/pack.py`` and
``torch/export``, run; ``quark_ocp_mx.py`` of vLLM, which reads the formats of 4 and 6 bits. amd-quark 0.13 exports none
of 8 bits, whose codes are read here as the config calls them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.codec.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat
from dconv.codec.mx import BLOCK
from dconv.coded import mx
from dconv.coded.decoded import Decoded, dense
from dconv.coded.pairs import pairs_of
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.tensor import Stored

METHOD: Final = "quark"
WEIGHT, SCALE = ".weight", ".weight_scale"
#: Quark's name of a dtype -> the format and the dtypes in which files may have its codes.
DTYPES: Final[Mapping[str, tuple[Minifloat, tuple[str, ...]]]] = {
    "fp4": (E2M1, ("u8",)),
    "fp6_e2m3": (E2M3, ("u8",)),
    "fp6_e3m2": (E3M2, ("u8",)),
    "fp8_e4m3": (E4M3, ("f8_e4m3", "u8")),
    "fp8_e5m2": (E5M2, ("f8_e5m2", "u8")),
}
#: What a dense weight has no use for: scales of activations and of the cache.
_ACTIVATIONS: Final = (".input_scale", ".output_scale")


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in MX codes, each proved to have its scales, and every scale its weight.

    Raises:
        Damaged: a weight without its scales, the reverse, or shapes that the config's format does not make.
        Refused: a format other than MX.
    """
    tensors, said = found.tensors, _Said.of(config)
    coded = {kind for _, kinds in DTYPES.values() for kind in kinds}
    for module in pairs_of(tensors, (WEIGHT, SCALE), "MX", coded):
        parts = {module + suffix: tensors[module + suffix] for suffix in (WEIGHT, SCALE)}
        kind = said.kind(module)
        fmt, columns = _format(kind, parts[module + WEIGHT], parts[module + SCALE])
        words = f"{fmt.name} code x the power of two of its {BLOCK} neighbours"
        shape = (*parts[module + WEIGHT].spec.shape[:-1], columns)
        weight = dense(shape, parts, mx.Decode(fmt), words, 8 * (mx.width(fmt) + 1) / BLOCK)
        found.put(module + WEIGHT, dtype, parts, weight, words)
    for name in [name for name in tensors if name.endswith(_ACTIVATIONS)]:
        del tensors[name]
        found.left_out[name] = "a scale of activations, which dense weights have no use for"


def _format(kind: str, weight: Stored, scale: Stored) -> tuple[Minifloat, int]:
    """The format of a weight's codes and its in-features, which the shapes must bear out."""
    fmt, kinds = DTYPES[kind]
    shape, of = weight.spec.shape, scale.spec.shape
    fits = len(shape) >= 2 and len(of) == len(shape) and shape == (*of[:-1], of[-1] * mx.width(fmt))
    if not fits or weight.spec.dtype not in kinds or scale.spec.dtype not in mx.SCALES:
        raise Damaged(
            f"codes and scales of shapes that {kind} does not make",
            where=f"{weight.spec.name} in {weight.extents[0].file}",
            expected=f"{kinds[0]}[out, {mx.width(fmt)} n] and u8[out, n] for {BLOCK} n in-features",
            found=f"{weight.spec.dtype}{list(shape)} and {scale.spec.dtype}{list(of)}",
            do="quantization_config in config.json belongs to another model",
        )
    return fmt, of[-1] * BLOCK


@dataclass(frozen=True)
class _Said:
    """What the config says of modules: amd-quark takes the first pattern of ``layer_quant_config`` that fits."""

    everywhere: Mapping[str, Any]
    patterns: Mapping[str, Any]

    @staticmethod
    def of(config: Mapping[str, object]) -> _Said:
        said = mapping_or_empty(config.get("quantization_config"))
        return _Said(
            mapping_or_empty(said.get("global_quant_config")), mapping_or_empty(said.get("layer_quant_config"))
        )

    def kind(self, module: str) -> str:
        """The dtype of a module's codes, a key of `DTYPES`.

        Raises:
            Refused: it is in another format than MX.
        """
        fits = (found for pattern, found in self.patterns.items() if fnmatch.fnmatchcase(module, str(pattern)))
        layer = next(fits, self.everywhere)
        weight = mapping_or_empty(mapping_or_empty(layer).get("weight"))
        said = (weight.get("qscheme"), weight.get("group_size"), weight.get("scale_format"))
        kind, wanted = weight.get("dtype"), ("per_group", BLOCK, "e8m0")
        if (
            not isinstance(kind, str)
            or kind not in DTYPES
            or said != wanted
            or weight.get("ch_axis", -1) not in (-1, 1)
        ):
            raise Refused(
                "a weight in a form of quark's that this version does not decode, nothing was written",
                where=module + WEIGHT,
                expected=f"dtype {', '.join(DTYPES)}; {' '.join(map(str, wanted))}",
                found=f"{kind!r:.40}; {' '.join(map(str, said)):.80}",
            )
        return kind
