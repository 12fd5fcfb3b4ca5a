"""Rotary position embedding: HuggingFace's ``rope_parameters`` and Megatron's rotary args.

HuggingFace names a kind and gives its numbers (``modeling_rope_utils.py``); Megatron has a handful of args and, for
Llama 3's scaling, constants (``megatron/core/models/common/embeddings/rotary_pos_embedding.py``). What Megatron cannot
say is returned as reasons, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dconv.arch.args import ARGS
from dconv.arch.fields import flag, not_negative, number, table, whole
from dconv.arch.translate import CONFIG
from dconv.errors import Damaged
from dconv.sharding.parsed import is_list, is_mapping


@dataclass(frozen=True, slots=True)
class _Kind:
    """One ``rope_type``.

    Attributes:
        args: which arg carries which parameter.
        fixed: parameters that Megatron has as constants of its code.
        defaults: what both sides take for a parameter that is not given.
        position: ``--position-embedding-type``.
    """

    args: Mapping[str, str] = field(default_factory=dict[str, str])
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    defaults: Mapping[str, object] = field(default_factory=dict[str, object])
    position: str = "rope"


_KINDS: Final[Mapping[str, _Kind]] = {
    "default": _Kind(),
    "linear": _Kind({"factor": "rotary_seq_len_interpolation_factor"}),
    # RotaryEmbedding._apply_scaling: three of its four numbers have no arg
    "llama3": _Kind(
        {"factor": "rope_scaling_factor"},
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 8.0},
    ),
    # arguments.py and argument_utils.py (_apply_yarn_config_from_args), 2026-06; GPTModel reads the numbers without a
    # default, so that a Megatron-LM that lacks these arguments stops instead of computing something else
    "yarn": _Kind(
        {
            "factor": "rotary_scaling_factor",
            "original_max_position_embeddings": "yarn_original_max_position_embeddings",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "yarn_correction_range_round_to_int",
        },
        defaults={
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "truncate": True,
        },
        position="yarn",
    ),
}
#: Parameters that are no real numbers, each with its check.
_NOT_REAL: Final = {"original_max_position_embeddings": whole, "truncate": flag}
#: What no argument of Megatron says at all: it travels as its table, in the args under the key's own name.
LONGROPE: Final = "longrope"
TABLE: Final = "rope_scaling"
#: Parameters whose place is elsewhere than in a kind's own list.
_COMMON: Final = {"rope_type", "rope_theta", "partial_rotary_factor", "attention_factor"}


def rope_parameters(hf: Mapping[str, object]) -> dict[str, object]:
    """The rotary parameters of a config.json as transformers 5 reads them, whichever version wrote it.

    ``rope_scaling`` (4.x) wins over ``rope_parameters`` (5.x); numbers inside win over ``rope_theta`` and
    ``partial_rotary_factor`` beside them; ``type`` is the old name of ``rope_type``
    (``RotaryEmbeddingConfigMixin.convert_rope_params_to_dict``, ``standardize_rope_params``).

    Raises:
        Damaged: a value of the wrong type, or a missing number.
    """
    rope = table(hf, "rope_scaling", CONFIG) or table(hf, "rope_parameters", CONFIG)
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {"rope_type": "one per layer type", "rope_theta": 10000.0}
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"
    for key, otherwise in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        rope[key] = number({key: rope.get(key, hf.get(key, otherwise))}, key, CONFIG)
    if rope["rope_type"] in ("llama3", "yarn"):
        inside = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
        rope["original_max_position_embeddings"] = hf.get("original_max_position_embeddings") or inside
        whole(rope, "original_max_position_embeddings", CONFIG)
    if rope["rope_type"] in ("llama3", "yarn", "linear"):
        number(rope, "factor", CONFIG)
    for key in ("beta_fast", "beta_slow", "attention_factor"):
        if rope.get(key) is not None:
            number(rope, key, CONFIG)
    for key in ("mscale", "mscale_all_dim"):  # 0 is their way to say none; below it `_attention_factor` can divide by 0
        if rope.get(key) is not None:
            not_negative(rope, key, CONFIG)
    flag(rope, "truncate", CONFIG)
    return {key: value for key, value in rope.items() if value is not None}


def for_older_loaders(hf: Mapping[str, object]) -> dict[str, object]:
    """A config whose ``rope_parameters`` are said in 4.x's keys, too, in ``text_config`` as well.

    Who reads those takes the defaults of a class where they are missing, silently. transformers 5 makes the same
    config of both. A table for each kind of layer has no older spelling and stays alone.
    """
    said = dict(hf)
    if is_mapping(inner := said.get("text_config")):
        said["text_config"] = for_older_loaders(inner)
    rope = said.get("rope_parameters")
    if not is_mapping(rope) or not rope or any(isinstance(value, Mapping) for value in rope.values()):
        return said
    if said.get(TABLE):  # which wins over rope_parameters
        return said
    given = {key: value for key, value in rope.items() if value is not None}
    said |= {key: given.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in given}
    # a class may have a scaling by default: that there is none is said, too
    said[TABLE] = None if given in ({}, {"rope_type": "default"}) else given
    return said


def longrope(hf: Mapping[str, object], rotated: int, where: str) -> dict[str, object]:
    """The table of a longrope as a config.json says it, under ``rope_scaling`` and without ``rope_theta``.

    ``rope_type`` and its older name ``type`` are both kept as they stand: the code of published models reads either.

    Args:
        hf: config.json, or args that carry the table.
        rotated: elements of a head that are rotated, two to a factor.
        where: what ``hf`` is called in an error.

    Raises:
        Damaged: factors that are no numbers, or not one for each pair.
    """
    given = table(hf, TABLE, where) or table(hf, "rope_parameters", where)
    given.pop("rope_theta", None)
    for key in ("short_factor", "long_factor"):
        factors = given.get(key)
        if not is_list(factors) or len(factors) != rotated // 2:
            raise Damaged(
                f"longrope's {key} does not have one number for each pair of rotated elements",
                where=f"{where}: {TABLE}.{key}",
                expected=f"{rotated // 2} numbers",
                found=f"{len(factors)} entries" if is_list(factors) else f"{factors!r:.40}",
            )
        for factor in factors:
            number({key: factor}, key, where)
    if given.get("original_max_position_embeddings") is not None:
        whole(given, "original_max_position_embeddings", where)
    return given


def rope_to_args(rope: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Megatron's rotary args for these parameters, and what they cannot say.

    Where a reason is given the args are the nearest there is.
    """
    known = _KINDS.get(str(rope["rope_type"]))
    kind = known or _KINDS["default"]
    reasons = [] if known else [f"rope_type {rope['rope_type']}: Megatron has {', '.join(_KINDS)}"]
    said = {**kind.defaults, **concentrated(rope)} if kind is _KINDS["yarn"] else rope
    theta = number(rope, "rope_theta", CONFIG)
    scaled = kind is _KINDS["llama3"]
    args: dict[str, object] = {
        "position_embedding_type": kind.position,
        "use_rotary_position_embeddings": kind.position == "rope",
        # the command line takes whole numbers only; a fraction survives in a checkpoint, which is read back
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": scaled,
        "rope_scaling_factor": 8.0,
        **{arg: said[key] for key, arg in kind.args.items()},
    }
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append(f"partial_rotary_factor {rope['partial_rotary_factor']}: this family rotates whole heads")
    if not known:
        return args, reasons
    for key, constant in kind.fixed.items():
        if rope.get(key) != constant:
            reasons.append(f"rope {key} {rope.get(key)}: Megatron's code has {constant}, no argument changes it")
    for key in sorted(rope.keys() - _COMMON - kind.args.keys() - kind.fixed.keys()):
        reasons.append(f"rope {key} {rope[key]}: rope_type {rope['rope_type']} has no such number")
    if kind is _KINDS["linear"]:
        factor = number(rope, "factor", CONFIG)
        args["rotary_seq_len_interpolation_factor"] = int(factor)
        if not factor.is_integer() or factor < 1:
            reasons.append(f"rope factor {factor}: --rotary-seq-len-interpolation-factor takes whole numbers")
    attention = rope.get("attention_factor", _attention_factor(said) if kind.position == "yarn" else None)
    if attention is not None and not (kind.position == "yarn" and attention == _attention_factor(said)):
        reasons.append(f"rope attention_factor {attention}: Megatron computes it from factor and mscale")
    return args, reasons


def rope_from_args(args: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """``rope_theta`` and ``rope_scaling`` (None without scaling) for Megatron's rotary args, and what they cannot say.

    The 4.x spelling is the one that every version reads: transformers 5 turns it into ``rope_parameters``.

    Raises:
        Damaged: a value of the wrong type.
    """
    position = args["position_embedding_type"]
    found = {
        "yarn": position == "yarn",
        "llama3": bool(args.get("use_rope_scaling")),
        "linear": args.get("rotary_seq_len_interpolation_factor") not in (None, 1),
    }
    name, *others = [name for name, there in found.items() if there] or ["default"]
    reasons = [f"position_embedding_type is {position}, not rope or yarn"] if position not in ("rope", "yarn") else []
    reasons += [f"args ask for {name} and {other} scaling at once" for other in others]
    kind = _KINDS[name]
    given = {key: args[arg] for key, arg in kind.args.items() if args.get(arg) is not None}
    rope = {"rope_type": name, **kind.defaults, **kind.fixed, **given}
    for key in kind.args.keys() - _NOT_REAL.keys():
        rope[key] = number(rope, key, ARGS)
    for key in kind.args.keys() & _NOT_REAL.keys():
        _NOT_REAL[key](rope, key, ARGS)
    if name == "yarn":
        multipliers = (rope.pop("mscale"), rope.pop("mscale_all_dim"))
        if all(multipliers):
            rope["mscale"], rope["mscale_all_dim"] = multipliers
        elif multipliers != (1.0, 0.0):
            reasons.append(f"mscale and mscale_all_dim are {multipliers}: transformers wants both, or 1.0 and 0.0")
        if rope["truncate"]:
            del rope["truncate"]
    theta = number(args, "rotary_base", ARGS)
    return {"rope_theta": theta, "rope_scaling": None if name == "default" else rope}, reasons


def concentrated(yarn: Mapping[str, object]) -> dict[str, object]:
    """YaRN's numbers with transformers' rule applied: one multiplier without the other counts for nothing."""
    both = yarn.get("mscale") and yarn.get("mscale_all_dim")
    return {**yarn} if both else {**yarn, "mscale": 1.0, "mscale_all_dim": 0.0}


def _attention_factor(yarn: Mapping[str, object]) -> float:
    """What both multiply cosine and sine by (``yarn_rotary_pos_embedding.py``, ``_compute_yarn_parameters``)."""
    factor = number(yarn, "factor", CONFIG)
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (growth * number(yarn, "mscale", CONFIG) + 1) / (growth * number(yarn, "mscale_all_dim", CONFIG) + 1)
