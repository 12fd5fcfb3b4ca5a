"""Multi-latent attention (DeepSeek-V2 and V3) as an aspect: low ranks, heads in two parts, and its rotation.

Sources: ``core/transformer/multi_latent_attention.py``, ``MLATransformerConfig`` and the MLA group of
``megatron/training/arguments.py``; transformers' ``modeling_deepseek_v2.py`` and ``modeling_deepseek_v3.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import heads, multiple, number, whole
from dconv.arch.rope import LONGROPE, TABLE, concentrated, longrope, rope_parameters
from dconv.arch.rotary import LONGROPE_NEEDS
from dconv.arch.translate import CONFIG, Said

_SIZES: Final = {
    "num_attention_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
#: transformers' code and DeepSeek's own have it as a constant in the norms of both latents.
_EPSILON: Final = 1e-6
#: Own arg: that epsilon, where the other norms have another.
_EPSILON_ARG: Final = "latent_norm_epsilon"


@dataclass(frozen=True)
class Latent:
    """Queries, keys and values through low ranks; one rotated key is shared by all heads.

    Attributes:
        norm_eps: the key of the other norms' epsilon.
        even: whether ``v_head_dim`` is hidden_size / heads where it is not given.
    """

    norm_eps: str = "rms_norm_eps"
    even: bool = False

    @property
    def owns(self) -> tuple[str, ...]:
        """Whether attention is latent, its sizes, and its norms."""
        # megatron-core's MLA reads neither kv_channels nor num_query_groups
        return "multi_latent_attention", "qk_layernorm", "softmax_type", *_SIZES.values(), "q_lora_rank"

    @property
    def compared(self) -> Mapping[str, str]:
        """Sizes, the queries' rank among them."""
        return {**_SIZES, "q_lora_rank": "q_lora_rank"}

    def facts(self, said: Said) -> dict[str, Any]:
        """Sizes of the latents and of what is made of them.

        Returns:
            mla, q_lora (0: queries are not of low rank), q_is_low_rank, q_is_full, kv_lora, qk_nope, qk_rope, v_dim,
            q_rows, kv_a_rows, kv_b_rows, o_columns; heads, groups, head_dim, q, kv as if every head had its own key.
        """
        queries = heads(said, "num_attention_heads", CONFIG)
        if self.even and said.get("v_head_dim") is None:
            hidden = whole(said, "hidden_size", CONFIG)
            said = {**said, "v_head_dim": multiple("hidden_size", hidden, "num_attention_heads", queries, CONFIG)}
        kv_lora, nope, rotated, v_dim = (
            whole(said, key, CONFIG) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        multiple("qk_rope_head_dim", rotated, "the two halves that are rotated", 2, CONFIG)
        q_lora = 0 if said.get("q_lora_rank") is None else whole(said, "q_lora_rank", CONFIG)
        rows = queries * (nope + rotated)
        return {
            "heads": queries,
            "groups": queries,
            "head_dim": nope + rotated,
            "q": rows,
            "kv": rows,
            "qk_norm": False,
            "sinks": False,
            "mla": True,
            "q_lora": q_lora,
            "q_is_low_rank": bool(q_lora),
            "q_is_full": not q_lora,
            "kv_lora": kv_lora,
            "qk_nope": nope,
            "qk_rope": rotated,
            "v_dim": v_dim,
            "q_rows": rows,
            "kv_a_rows": kv_lora + rotated,
            "kv_b_rows": queries * (nope + v_dim),
            "o_columns": queries * v_dim,
        }

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Sizes, and the norms' epsilon if it is not the others'; keys and values that heads share are lost."""
        groups = said.get("num_key_value_heads")
        lost: list[str] = []
        if groups is not None and groups != facts["heads"]:
            lost.append(f"num_key_value_heads {groups}: every head of this attention has its own key and value")
        args: dict[str, object] = {
            **{arg: whole(said, key, CONFIG) for key, arg in _SIZES.items() if key != "v_head_dim"},
            "v_head_dim": facts["v_dim"],
            "multi_latent_attention": True,
            "q_lora_rank": facts["q_lora"] or None,
            "qk_layernorm": True,  # the norms of the latents
            "softmax_type": "vanilla",
            "num_query_groups": facts["heads"],
            "group_query_attention": False,
            "kv_channels": facts["qk_nope"],
        }
        if number(said, self.norm_eps, CONFIG) != _EPSILON:
            args[_EPSILON_ARG] = _EPSILON
        return args, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Sizes; nothing where the args are not of latent attention."""
        if not said.get("multi_latent_attention"):
            return {}
        hf: dict[str, object] = {key: whole(said, arg, ARGS) for key, arg in _SIZES.items()}
        low = said.get("q_lora_rank") is not None
        return {
            **hf,
            "q_lora_rank": whole(said, "q_lora_rank", ARGS) if low else None,
            "num_key_value_heads": hf["num_attention_heads"],
        }

    def mismatches(self, said: Said) -> list[str]:
        """Attention of another kind, or another epsilon in the norms of the latents."""
        fixed = {"multi_latent_attention": True, "qk_layernorm": True, "softmax_type": "vanilla"}
        reasons = differing(said, fixed)
        epsilon = said.get(_EPSILON_ARG) or said.get("norm_epsilon")
        if said.get("multi_latent_attention") and epsilon != _EPSILON:
            reasons.append(f"norm_epsilon is {epsilon}, this family has {_EPSILON} in the norms of the latents")
        return reasons

    def needs(self, said: Said) -> list[str]:
        """An epsilon of the other norms that is not that of the latents' own."""
        if number(said, self.norm_eps, CONFIG) == _EPSILON:
            return []
        return [f"an epsilon of {_EPSILON} in the norms of the latents, where the others have {said[self.norm_eps]}"]


_YARN: Final = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_DEFAULTS: Final = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
#: Own arg: see `LatentRope.halves`.
_HALVES_ARG: Final = "latent_rotary_halves"
_UNSCALED: Final = {"factor": 1.0, "original_max_position_embeddings": 4096, **_DEFAULTS}


@dataclass(frozen=True)
class LatentRope:
    """Its rotation: neighbours of a head's rotated part together, unscaled or by YaRN.

    megatron-core's MLA parts neighbours into halves by itself (``multi_latent_attention=True`` in its rotary functions)
    and then rotates halves: that is ``rope_interleave`` of config.json, and ``rotary_interleaved`` must be false.

    Attributes:
        halves: whether the two halves are rotated together instead, which mainline megatron-core lacks here.
        longrope: whether a longrope's table is carried along in the args.
    """

    halves: bool = False
    longrope: bool = False

    @property
    def owns(self) -> tuple[str, ...]:
        """What is rotated, which elements together, and YaRN's numbers."""
        carried = (TABLE,) if self.longrope else ()
        return "rotary_percent", "rotary_interleaved", "rope_type", _HALVES_ARG, *carried, *_YARN.values()

    @property
    def compared(self) -> Mapping[str, str]:
        """Base and factor."""
        return {"rope_theta": "rotary_base", "rope_scaling": "rotary_scaling_factor"}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Base and YaRN's numbers; another scaling, and a part of what is rotated, are lost."""
        rope = rope_parameters(said)
        kind, theta = str(rope["rope_type"]), number(rope, "rope_theta", CONFIG)
        own: dict[str, object] = {_HALVES_ARG: True} if self.halves else {}
        if self.longrope and kind == LONGROPE:
            own[TABLE], kind = longrope(said, facts["qk_rope"], CONFIG), "default"
        lost = [] if kind in ("default", "yarn") else [f"rope_type {kind}: Megatron's latent attention has yarn"]
        yarn: Mapping[str, object] = _UNSCALED
        if kind == "yarn":
            yarn = {**_UNSCALED, **concentrated(rope)}
            lost += _unsayable(rope)
        if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            lost.append(f"partial_rotary_factor {part}: qk_rope_head_dim says what is rotated")
        return {
            "position_embedding_type": "rope",
            "use_rotary_position_embeddings": True,
            "rotary_base": int(theta) if theta.is_integer() else theta,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rotary_seq_len_interpolation_factor": None,
            "use_rope_scaling": False,
            "rope_type": "yarn" if kind == "yarn" else "rope",
            **{arg: yarn[key] for key, arg in _YARN.items()},
            **own,
        }, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Base, and YaRN's table or a longrope's where the args have one."""
        hf: dict[str, object] = {"rope_theta": number(said, "rotary_base", ARGS), "rope_scaling": None}
        if said.get("rope_type", "yarn") == "yarn" and said.get("multi_latent_attention"):
            given = {**_DEFAULTS, **said}
            yarn: dict[str, object] = {key: number(given, arg, ARGS) for key, arg in _YARN.items()}
            yarn["original_max_position_embeddings"] = whole(given, "original_max_position_embeddings", ARGS)
            if (yarn["mscale"], yarn["mscale_all_dim"]) == (1.0, 0.0):
                del yarn["mscale"], yarn["mscale_all_dim"]
            # both names: DeepSeek's own code reads "type", transformers "rope_type"
            hf["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **yarn}
        if self.longrope and said.get(TABLE) is not None and said.get("multi_latent_attention"):
            hf[TABLE] = longrope(said, whole(said, "qk_pos_emb_head_dim", ARGS), ARGS)
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """Another part or other elements, another scaling, or multipliers that transformers reads otherwise."""
        fixed = {"rotary_percent": 1.0, "rotary_interleaved": False, _HALVES_ARG: self.halves}
        reasons = differing(said, fixed)
        if said["position_embedding_type"] not in ("rope", "yarn", "none"):
            reasons.append(f"position_embedding_type is {said['position_embedding_type']}, not rope")
        kind = said.get("rope_type", "yarn")  # MLATransformerConfig's own default
        given = {**_DEFAULTS, **said}
        both = number(given, "mscale", ARGS), number(given, "mscale_all_dim", ARGS)
        if kind == "rope" and both[1] and number(given, "rotary_scaling_factor", ARGS) > 1:
            reasons.append("mscale_all_dim scales the softmax although rope_type is rope")
        if kind == "yarn" and not all(both) and both != (1.0, 0.0):
            reasons.append(f"mscale and mscale_all_dim are {both}: transformers wants both, or 1.0 and 0.0")
        if kind not in ("rope", "yarn"):
            reasons.append(f"rope_type is {kind}, this family has rope and yarn")
        return reasons

    def needs(self, said: Said) -> list[str]:
        """Rotation of two halves, and a longrope's factors."""
        halves = ["rotation of a head's two halves in latent attention (megatron-core's rotates neighbours)"]
        carried = self.longrope and rope_parameters(said)["rope_type"] == LONGROPE
        return (halves if self.halves else []) + ([LONGROPE_NEEDS] if carried else [])


def _unsayable(rope: Mapping[str, object]) -> list[str]:
    """What of a YaRN table Megatron's latent attention has no arg for, or reads differently."""
    lost = [
        f"rope {key} {rope[key]}: Megatron's latent attention computes it by itself"
        for key, usual in (("attention_factor", None), ("truncate", True))
        if key in rope and rope[key] != usual
    ]
    # transformers lets one multiplier without the other count for nothing in the rotation, but not in the softmax
    given = {key: rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key)}
    if len(given) == 1 and given != {"mscale": 1.0}:
        lost.append(f"rope {next(iter(given))} without its partner: both sides read it differently")
    known = {*_YARN, "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}
    return lost + [f"rope {key} {rope[key]}: yarn has no such number" for key in sorted(rope.keys() - known)]
