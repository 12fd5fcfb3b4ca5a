"""Linear layers in MX codes as AMD Quark exports them and vLLM reads them (`dconv.coded.quark`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.codec.minifloat import Minifloat
from dconv.codec.mx import BLOCK, Rule
from dconv.coded import mx
from dconv.coded.encode import Coded
from dconv.coded.quark import DTYPES, METHOD, SCALE, WEIGHT
from dconv.sharding.derived import Array
from dconv.sharding.tensor import Logical, TensorSpec

#: The version whose export has these keys.
_VERSION: Final = "0.13"


@dataclass(frozen=True)
class Quark:
    """See the module. Codes and scales that the source has are kept, bit by bit."""

    fmt: Minifloat
    rule: Rule = "floor"
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"MXFP{self.fmt.bits} ({self.fmt.name}), {BLOCK} with a power of two, as quark"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """Codes u8 [out, bytes] under the weight's name; E8M0 scales u8 [out, in / 32]."""
        codes, scales = mx.encoded(dense, spec.shape, self.fmt, self.rule)
        weight = TensorSpec(spec.name, codes.shape, "u8")
        scale = TensorSpec(spec.name.removesuffix(WEIGHT) + SCALE, scales.shape, "u8")
        if there := mx.kept(dense, logical.derived, mx.Decode(self.fmt)):
            return Coded([(weight, there[0]), (scale, there[1])], kept=True)
        made = Coded()
        made.make(weight, codes)
        made.make(scale, scales)
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`: the keys of amd-quark's own export, weights alone being in codes.

        An entry of ``exclude`` is a whole name or, after ``re:``, an expression to vLLM, a pattern to amd-quark.
        """
        del coded
        ends = [
            (entry, f"*.{entry}", f"{entry}.*", f"*.{entry}.*", f"re:(.*[.])?{entry.replace('.', '[.]')}([.]|$)")
            for entry in plain
        ]
        kind = next(name for name, (fmt, _) in DTYPES.items() if fmt == self.fmt)
        return {
            "quant_method": METHOD,
            "version": _VERSION,
            "quant_mode": "eager_mode",
            "global_quant_config": {
                "weight": {
                    "dtype": kind,
                    "is_dynamic": False,
                    "qscheme": "per_group",
                    "group_size": BLOCK,
                    "ch_axis": -1,
                    "scale_format": "e8m0",
                    "scale_calculation_mode": self.rule,
                    "scale_type": "float",
                    "round_method": "half_even",
                    "observer_cls": "PerBlockMXObserver",
                    "symmetric": None,
                    "block_size": None,
                    "is_scale_quant": False,
                    "mx_element_dtype": None,
                },
                "input_tensors": None,
                "output_tensors": None,
                "bias": None,
                "target_device": None,
            },
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "kv_cache_quant_config": {},
            "kv_cache_post_rope": False,
            "softmax_quant_spec": None,
            "algo_config": None,
            "exclude": [form for forms in ends for form in forms],
            "export": {
                "kv_cache_group": [],
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }
