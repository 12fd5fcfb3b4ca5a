"""``--quantization-config``: JSON text, the name of a JSON or YAML file, or the name of a ready config.

Keys are those of `dconv.quant.settings` and of `dconv.quant.table`, side by side; ``preset`` names a ready config that
the other keys change. The words that users of GPTQModel, AutoGPTQ, AutoAWQ and llm-compressor have for the same are
taken where they mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import parse_json
from dconv.checkpoint.small_config import read_mapping
from dconv.errors import Damaged, UsageError
from dconv.quant.grid import POWER
from dconv.quant.kinds import INT_GROUPS, KINDS, PLAIN
from dconv.quant.settings import Awq, Calibration, Gptq, Method, Quantization
from dconv.quant.table import Fields, Table, fields_of, overrides_of, unknown

OPTION: Final = "--quantization-config"
_PRESETS: Final = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class _Value:
    """What a key may be: ``made`` returns it as it is kept, or None for what it cannot be."""

    words: str
    made: Callable[[Any], object]


def _among(*values: int) -> _Value:
    return _Value(", ".join(map(str, values)), lambda said: said if type(said) is int and said in values else None)


def _whole(low: int, high: int) -> _Value:
    words = f"a whole number from {low} to {high}"
    return _Value(words, lambda said: said if type(said) is int and low <= said <= high else None)


def _is_number(said: object) -> bool:
    return isinstance(said, int | float) and not isinstance(said, bool) and math.isfinite(said)


def _exponent(said: Any) -> object:
    if isinstance(said, bool):
        return POWER if said else 0.0
    return float(said) if _is_number(said) and 0 <= said <= 16 else None


_FLAG: Final = _Value("true or false", lambda said: said if isinstance(said, bool) else None)
_GROUP: Final = _among(*INT_GROUPS)
_SETTINGS: Final[Mapping[Method, Mapping[str, _Value]]] = {
    "gptq": {
        "bits": _among(2, 3, 4, 8),
        "group_size": _GROUP,
        "sym": _FLAG,
        "desc_act": _FLAG,
        "act_group_aware": _FLAG,
        "static_groups": _FLAG,
        "damp_percent": _Value(
            "between 0 and 1", lambda said: float(said) if _is_number(said) and 0 < said < 1 else None
        ),
        "damp_auto_increment": _Value(
            "above 0 and below 1", lambda said: float(said) if _is_number(said) and 0 < said < 1 else None
        ),
        "mse": _Value("true, false, or an exponent from 0 to 16", _exponent),
        "true_sequential": _FLAG,
        "routing_weighted": _FLAG,
        "lm_head": _FLAG,
    },
    "awq": {
        "bits": _among(4),
        "group_size": _among(-1, 32, 64, 128),
        "zero_point": _FLAG,
        "n_grid": _whole(1, 1000),
        "clip": _FLAG,
        "duo_scaling": _FLAG,
    },
}
_CALIBRATION: Final[Mapping[str, _Value]] = {
    "data": _Value("the name of a file or folder", lambda said: said if isinstance(said, str) and said else None),
    "nsamples": _whole(1, 1 << 20),
    "seqlen": _whole(1, 1 << 20),
    "seed": _whole(0, (1 << 63) - 1),
}
_OTHERS: Final = ("default", "overrides", "preset", "method", "comment")
#: Other tools' words, each with ours.
_ALIASES: Final[Mapping[str, str]] = {
    "w_bit": "bits", "wbits": "bits", "num_bits": "bits",
    "q_group_size": "group_size", "groupsize": "group_size",
    "symmetric": "sym",
    "actorder": "desc_act", "act_order": "desc_act",
    "static-groups": "static_groups",
    "damp": "damp_percent", "percdamp": "damp_percent", "dampening_frac": "damp_percent",
    "apply_clip": "clip",
    "dataset": "data", "calib_data": "data",
    "num_samples": "nsamples", "n_samples": "nsamples", "max_calib_samples": "nsamples",
    "num_calibration_samples": "nsamples",
    "seq_len": "seqlen", "max_calib_seq_len": "seqlen", "max_seq_length": "seqlen",
    "quant_method": "method",
}  # fmt: skip
#: Keys of other tools that mean something which is said elsewhere, by method ("" for both).
_ELSEWHERE: Final[Mapping[tuple[str, str], str]] = {
    ("", "format"): "--quant says the format",
    ("", "checkpoint_format"): "--quant says the format",
    ("", "dynamic"): "overrides says this, with patterns instead of regular expressions",
    ("", "modules_to_not_convert"): 'overrides says this: [{"pattern": "*NAME*", "skip": true}]',
    ("", "ignore"): 'overrides says this: [{"pattern": "*NAME*", "skip": true}]',
    ("", "pattern"): "it belongs into an entry of overrides",
    ("", "wq"): "it belongs into default or an entry of overrides",
    ("", "aq"): "it belongs into default or an entry of overrides",
    ("gptq", "zero_point"): "sym says this, the other way round",
    ("awq", "sym"): "zero_point says this, the other way round",
}


def presets() -> list[str]:
    """The names of the ready configs."""
    return sorted(path.stem for path in _PRESETS.glob("*.json"))


def quantization_of(
    said: str | Path | Mapping[str, Any] | None, method: Method = "gptq", data: str | None = None
) -> Quantization:
    """What ``--quantization-config`` asks for.

    Args:
        said: text, a name, the keys themselves, or None for all defaults.
        method: what FORMAT asks for.
        data: what ``--calibration`` names.

    Raises:
        UsageError: no such file or name, a key that is not known (the nearest is named), a value that a key cannot
            have, or two that contradict each other.
        Damaged: a JSON file that is none.
        Refused: activations in a type that no dynamic scheme is for.
    """
    keys, where, preset = _read(said)
    keys, preset = _with_preset(_renamed(keys, where), preset, where)
    _check_keys(keys, method, where)
    settings = _values(keys, _SETTINGS[method], where)
    sampling = _values(keys, _CALIBRATION, where)
    if data is not None and sampling.setdefault("data", data) != data:
        raise UsageError(
            "samples are named twice", where=f"--calibration {data}\ndata in {where}", found=str(sampling["data"])
        )
    made = Gptq(**settings) if method == "gptq" else Awq(**settings)
    table = _table(keys, made, where)
    default = KINDS[table.default.wq or PLAIN]
    if default.integer:
        made = replace(made, bits=default.bits)
    if default.integer and table.default.group is not None:
        made = replace(made, group_size=table.default.group)
    return Quantization(made, Calibration(**sampling), table, preset)


def _read(said: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str, str]:
    """The keys, where they are from, and the preset's name where they are one."""
    if said is None or isinstance(said, Mapping):
        return dict(said or {}), OPTION, ""
    if isinstance(said, str) and said.lstrip().startswith("{"):
        try:
            return parse_json(said.encode("utf-8", "surrogatepass"), where=OPTION, what="the text"), OPTION, ""
        except Damaged as fault:
            raise UsageError(f"{OPTION} is no JSON", where=f"{said:.200}", found=fault.found or fault.what) from fault
    if str(said) in presets() and not Path(said).is_file():
        return _preset(str(said)), f"the ready config {said}", str(said)
    try:
        there = Path(said).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a zero in it
        there = False
    if not there:
        raise UsageError(
            f"{OPTION} names no file and no ready config",
            where=f"{said!s:.200}",
            expected=f"JSON that begins with {{, a JSON or YAML file, or one of\n{', '.join(presets())}",
            do=unknown(str(said), presets(), OPTION).do,
        )
    return read_mapping(Path(said), OPTION), str(said), ""


def _preset(name: str) -> dict[str, Any]:
    path = _PRESETS / f"{name}.json"
    return parse_json(path.read_bytes(), where=str(path), what="a ready config")


def _with_preset(keys: dict[str, Any], preset: str, where: str) -> tuple[dict[str, Any], str]:
    """The keys laid over those of the ready config that ``preset`` names: overrides come after its own."""
    name = keys.pop("preset", None)
    if name is None:
        return keys, preset
    if not isinstance(name, str) or name not in presets():
        raise UsageError(
            "there is no such ready config",
            where=f"preset in {where}",
            expected=", ".join(presets()),
            found=f"{name!r:.80}",
            do=unknown(str(name), presets(), where).do,
        )
    base, own = _preset(name), keys.get("overrides", [])
    first = base.get("overrides", [])
    return {**base, **keys, "overrides": [*first, *own] if isinstance(own, list) else own}, name


def _renamed(keys: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The same by our names.

    Raises:
        UsageError: one thing is said twice.
    """
    found: dict[str, Any] = {}
    before: dict[str, str] = {}
    for key, value in keys.items():
        name = _ALIASES.get(str(key), str(key))
        if name in found:
            raise UsageError(f"{name} is said twice", where=where, found=f"{before[name]} and {key}")
        found[name], before[name] = value, str(key)
    return found


def _check_keys(keys: Mapping[str, Any], method: Method, where: str) -> None:
    known = (*_SETTINGS[method], *_CALIBRATION, *_OTHERS)
    for key in keys:
        if key not in known and not (method == "awq" and key == "version"):
            hint = _ELSEWHERE.get(("", key)) or _ELSEWHERE.get((method, key), "")
            raise unknown(key, known, where, hint)
    if str(keys.get("method", method)).lower() != method:
        raise UsageError(
            "the config is for another method",
            where=f"method in {where}",
            expected=method,
            found=f"{keys['method']!r:.80}",
            do="FORMAT gptq or awq says the method",
        )
    if str(keys.get("version", "gemm")).lower() != "gemm":  # as AutoAWQ's own configs have it
        raise UsageError(
            "there is no such layout of AWQ's codes here",
            where=f"version in {where}",
            expected="gemm, which loaders turn into their kernels' own",
            found=f"{keys['version']!r:.80}",
        )


def _values(keys: Mapping[str, Any], known: Mapping[str, _Value], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in known.items():
        if name in keys:
            made = value.made(keys[name])
            if made is None:
                raise UsageError(
                    f"{name} cannot be this", where=where, expected=value.words, found=f"{keys[name]!r:.80}"
                )
            found[name] = made
    return found


def _table(keys: Mapping[str, Any], settings: Gptq | Awq, where: str) -> Table:
    """What the default and the overrides say; where there is no default, ``bits`` and ``group_size`` are it.

    Raises:
        UsageError: the default says what ``bits`` or ``group_size`` says, or AWQ is to store what it has no form for.
    """
    overrides = overrides_of(keys.get("overrides", []), where)
    default = fields_of(keys["default"], f"default in {where}") if "default" in keys else Fields()
    for key, said in (("bits", default.wq), ("group_size", default.group)):
        if key in keys and said is not None:
            raise UsageError(f"{key} is said twice", where=where, found=f"{key} {keys[key]}, and {said} in default")
    if "bits" in keys or "default" not in keys:
        default = replace(default, wq=f"int{settings.bits}")
    if default.group is None and ("group_size" in keys or "default" not in keys):
        default = replace(default, group=settings.group_size)
    if isinstance(settings, Awq):
        said = [("default", default), *((override.pattern, override.fields) for override in overrides)]
        other = [f"{name}: {found.wq}" for name, found in said if found.wq not in (None, "int4", PLAIN)]
        if other:
            raise UsageError(
                "AWQ's format stores 4 bits, nothing else",
                where=where,
                expected=f"int4 or {PLAIN}",
                found="\n".join(other[:8]),
                do="FORMAT gptq takes mixed types",
            )
        groups = {found.group for _, found in said if found.group is not None and found.wq != PLAIN}
        if len(groups) > 1:
            raise UsageError("AWQ's format has one group size", where=where, found=", ".join(map(str, sorted(groups))))
    return Table(default, overrides)
