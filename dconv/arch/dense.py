"""How a dense decoder family's HuggingFace config.json and Megatron's args say the same thing.

Dictionaries in, dictionaries out: no tensor, no torch. A family is a few declarations (`DenseConfig`); the rules that
all share are tables here. Sources: transformers' ``configuration_*.py`` and ``modeling_*.py``; Megatron-LM's
``megatron/training/arguments.py``, ``argument_utils.py`` (``core_transformer_config_from_args``) and
``checkpointing.py`` (``load_args_from_checkpoint``, ``check_checkpoint_args``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from dconv.arch.args import ARGS, RENAMED, biases, dtype_name, named_as_of_old, read, window
from dconv.arch.fields import count, deep, flag, heads, multiple, number, whole
from dconv.arch.rope import rope_from_args, rope_parameters, rope_to_args
from dconv.errors import Damaged, Refused

_CONFIG: Final = "config.json"

#: Sizes under their two names.
_SIZES: Final = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
#: Real numbers under their two names.
_NUMBERS: Final = {
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}
#: Args that are equal in all these families: written, and demanded of a checkpoint.
_SAME: Final[Mapping[str, object]] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "num_experts": None,
    "multi_latent_attention": False,
}
#: Args with which Megatron computes another function: demanded to be unset, not written.
_UNSET: Final[Mapping[str, object]] = {
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "quick_geglu": False,
    "use_mup": False,
    "apply_residual_connection_post_layernorm": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
}
#: Args without influence on the function in exact arithmetic. Dropout is one of them once training is over, but
#: Megatron's default is 0.1, and ``add_position_embedding`` is compared by ``check_checkpoint_args``.
_WRITTEN: Final[Mapping[str, object]] = {
    "hidden_dropout": 0.0,
    "add_position_embedding": True,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
}
#: Keys of config.json by which other families scale, clip or position what flows, with the value that changes nothing.
_RESCALING: Final[Mapping[str, object]] = {
    "scale_emb": None,  # MiniCPM
    "scale_depth": None,
    "dim_model_base": None,
    "logits_scaling": 1,  # Granite
    "logit_scale": 1,  # Cohere
    "query_pre_attn_scalar": None,  # Gemma
    "clip_qkv": None,  # OLMo
    "no_rope_layers": None,  # SmolLM3
}
#: The same for keys that end so.
_RESCALING_ENDS: Final[Mapping[str, object]] = {"_multiplier": 1, "_multipliers": None, "_softcapping": None}
_WEIGHTS_ONLY: Final = "the weights alone can be moved when config.json travels with them"


@dataclass(frozen=True)
class DenseConfig:
    """One family.

    Attributes:
        model_type: ``model_type`` of its config.json.
        architecture: the only entry of ``architectures``.
        defaults: transformers' values for keys that config.json may omit; ``None`` for ``num_key_value_heads`` means
            the number of heads, for ``head_dim`` hidden_size / heads.
        qkv_bias: whether q_proj, k_proj, v_proj have a bias: a constant of the family, or the key that says so.
        out_bias: the same for o_proj.
        mlp_bias: the same for gate_proj, up_proj, down_proj.
        qk_norm: whether query and key heads are normalised (``qk_layernorm``).
        window: which layers ``sliding_window`` concerns: none (the key is not read), all, or those that
            ``use_sliding_window``, ``max_window_layers`` and ``layer_types`` single out.
        ropes: the only ``rope_type`` that transformers' class understands as the others do; none means all.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, object] = field(hash=False)
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: Literal["none", "all", "layers"] = "none"
    ropes: tuple[str, ...] = ()

    def facts(self, hf: Mapping[str, object]) -> dict[str, int | bool]:
        """Sizes and switches that shapes follow from.

        Returns:
            layers, hidden, ffn, heads, groups, head_dim, vocab, q (heads * head_dim), kv (groups * head_dim);
            tied, untied, qkv_bias, out_bias, mlp_bias, qk_norm.

        Raises:
            Damaged: a wrong type, not positive, or does not divide.
        """
        said = self._filled(hf)
        queries, groups = (heads(said, key, _CONFIG) for key in ("num_attention_heads", "num_key_value_heads"))
        hidden, head_dim = (whole(said, key, _CONFIG) for key in ("hidden_size", "head_dim"))
        multiple("num_attention_heads", queries, "num_key_value_heads", groups, _CONFIG)
        multiple("head_dim", head_dim, "the two halves that are rotated", 2, _CONFIG)
        tied = flag(said, "tie_word_embeddings", _CONFIG)
        return {
            "layers": deep(said, "num_hidden_layers", _CONFIG),
            "hidden": hidden,
            "ffn": whole(said, "intermediate_size", _CONFIG),
            "heads": queries,
            "groups": groups,
            "head_dim": head_dim,
            "vocab": whole(said, "vocab_size", _CONFIG),
            "q": queries * head_dim,
            "kv": groups * head_dim,
            "tied": tied,
            "untied": not tied,
            "qkv_bias": _switch(self.qkv_bias, said),
            "out_bias": _switch(self.out_bias, said),
            "mlp_bias": _switch(self.mlp_bias, said),
            "qk_norm": self.qk_norm,
        }

    def to_args(self, hf: Mapping[str, object], strict: bool = True) -> dict[str, object]:
        """The args that describe this model to Megatron: plain values, no parallel sizes, no padding of the vocabulary.

        Args:
            hf: config.json.
            strict: refuse a config that args cannot say; else return the nearest args (`unsayable` tells what is lost).

        Raises:
            Damaged: see `facts`.
            Refused: ``strict``, and something would be lost.
        """
        args, lost = self._translate(hf)
        if strict and lost:
            raise Refused(
                f"Megatron's args cannot say all of this {self.model_type} config, nothing was written",
                where=_CONFIG,
                expected="what Megatron-LM's arguments have a name for",
                found="\n".join(lost),
                do=f"change the key if the model does not depend on it; {_WEIGHTS_ONLY}",
            )
        return args

    def unsayable(self, hf: Mapping[str, object]) -> list[str]:
        """What Megatron's args cannot say of this config, one line each."""
        return self._translate(hf)[1]

    def to_hf(self, args: Mapping[str, object]) -> dict[str, object]:
        """A whole config.json from Megatron's args alone.

        The vocabulary is ``vocab_size`` where given, else ``padded_vocab_size``. Token ids are not in the args: they
        are null, since transformers would otherwise take 1 and 2 for the Llama 1 tokenizer's.

        Raises:
            Damaged: a missing or impossible value.
            Refused: the args are not this family's.
        """
        reasons = self.matches_args(args)
        if reasons:
            raise Refused(
                f"these Megatron args are not a {self.model_type} model, nothing was written",
                where=ARGS,
                found="\n".join(reasons),
                do="name the family with --model-type, or supply a config.json with --hf-config DIR",
            )
        said = read(args)
        hf = self._describe(said)
        hf["vocab_size"] = whole(said, "vocab_size" if "vocab_size" in said else "padded_vocab_size", ARGS)
        self.facts(hf)
        return hf

    def matches_args(self, args: Mapping[str, object]) -> list[str]:
        """Reasons why these args are not this family; none if they are.

        Raises:
            Damaged: a value of the wrong type.
        """
        said = read(args)
        reasons = [
            f"{arg} is {said.get(arg)}, {self.model_type} has {value}"
            for arg, value in {**_SAME, "qk_layernorm": self.qk_norm, **_UNSET}.items()
            if said.get(arg) != value and (said.get(arg) or value)
        ]
        rope, odd = rope_from_args(said)
        reasons += odd + self._rope(rope["rope_scaling"])
        keys: dict[str, bool] = {}
        for part, here in biases(said).items():
            declared = getattr(self, part)
            there = keys.setdefault(declared, here) if isinstance(declared, str) else declared
            if there != here:
                reasons.append(f"{part} is {here}, {self.model_type} has {there} ({_ARGS_OF_BIAS})")
        width, slides = window(said)
        if width and (self.window == "none" or (self.window == "all" and not all(slides))):
            reasons.append(f"window_size is {said['window_size']}, {self.model_type} has {self.window} such layers")
        return reasons

    def check_pair(self, hf: Mapping[str, object], args: Mapping[str, object]) -> list[str]:
        """Where a config.json that was carried along disagrees with the args beside it; none if the two fit.

        Concerns what the function depends on. Args that are absent agree; what args cannot say at all (`unsayable`)
        agrees too; context length, dropout and dtype may differ.

        Raises:
            Damaged: a value of the wrong type on either side.
        """
        facts = self.facts(hf)
        expected = named_as_of_old(self._translate(hf)[0])
        found = {**{arg: value for arg, value in expected.items() if arg not in _OVERRIDING}, **named_as_of_old(args)}
        ours, theirs = self._describe(read(expected)), self._describe(read(found))
        lines = [
            f"{key} {ours.get(key)} != args.{arg} {found.get(arg)}"
            for key, arg in _COMPARED.items()
            if ours.get(key) != theirs.get(key)
        ]
        known = self.matches_args(expected)
        lines += [reason for reason in self.matches_args(found) if reason not in known]
        least, most = args.get("vocab_size") or 1, args.get("padded_vocab_size") or facts["vocab"]
        if isinstance(least, int) and isinstance(most, int) and not least <= facts["vocab"] <= most:
            lines.append(f"vocab_size {facts['vocab']} is not between args.vocab_size {least} and padded {most}")
        return lines

    def _filled(self, hf: Mapping[str, object]) -> dict[str, object]:
        """The config with the keys that it leaves to transformers' classes."""
        said = {**self.defaults, **hf}
        queries = whole(said, "num_attention_heads", _CONFIG)
        if said.get("num_key_value_heads") is None:
            said["num_key_value_heads"] = queries
        if said.get("head_dim") is None:
            hidden = whole(said, "hidden_size", _CONFIG)
            said["head_dim"] = multiple("hidden_size", hidden, "num_attention_heads", queries, _CONFIG)
        said["attention_dropout"] = said.get("attention_dropout") or 0.0
        return said

    def _translate(self, hf: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
        """Args, and what they lose."""
        said, facts = self._filled(hf), self.facts(hf)
        rotary, lost = rope_to_args(rope_parameters(said))
        window, kinds = self._window_args(said, int(facts["layers"]))
        lost += kinds + self._of_others(hf) + self._rope(rope_parameters(said))
        if said.get("hidden_act", "silu") not in ("silu", "swish"):
            lost.append(f"hidden_act {said['hidden_act']}: Megatron's --swiglu is gated SiLU")
        if facts["out_bias"] != facts["mlp_bias"] or (facts["out_bias"] and not facts["qkv_bias"]):
            spelt = ", ".join(f"{part} {facts[part]}" for part in ("qkv_bias", "out_bias", "mlp_bias"))
            lost.append(f"{spelt}: Megatron has {_ARGS_OF_BIAS}")
        dtype = dtype_name(hf.get("dtype") or hf.get("torch_dtype"))
        return {
            **{arg: whole(said, key, _CONFIG) for key, arg in _SIZES.items()},
            "seq_length": said["max_position_embeddings"],
            # a namespace of MHA says num_query_groups 1; the number of heads is right for every reader
            "group_query_attention": facts["groups"] != facts["heads"],
            **{arg: number(said, key, _CONFIG) for key, arg in _NUMBERS.items()},
            "vocab_size": facts["vocab"],
            "untie_embeddings_and_output_weights": facts["untied"],
            "add_qkv_bias": facts["qkv_bias"],
            "add_bias_linear": facts["out_bias"] and facts["mlp_bias"],
            "qk_layernorm": self.qk_norm,
            **_SAME,
            **_WRITTEN,
            **rotary,
            **window,
            **{new: {**_SAME, "norm_epsilon": said["rms_norm_eps"]}[old] for new, old in RENAMED.items()},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        }, lost

    def _rope(self, rope: object) -> list[str]:
        kind = str(rope.get("rope_type")) if isinstance(rope, Mapping) else "default"
        known = not self.ropes or kind in self.ropes
        return [] if known else [f"rope_type {kind}: {self.model_type} has {', '.join(self.ropes)}"]

    def _of_others(self, hf: Mapping[str, object]) -> list[str]:
        """Keys by which another family, read as this one (``--model-type``), would compute something else."""
        lost = [
            f"{key} {value!r:.60}: {self.model_type} computes nothing with it"
            for key, value in sorted(hf.items())
            if value is not None and _rescales(key, value)
        ]
        named = hf.get("architectures") or [hf.get("model_type")]
        own = isinstance(named, list) and named[0] in (self.architecture, self.model_type)
        slides = hf.get("sliding_window") is not None and hf.get("use_sliding_window") is not False
        if self.window == "none" and slides and not own:
            lost.append(f"sliding_window {hf['sliding_window']!r:.60}: {self.model_type} has no such layers")
        return lost

    def _describe(self, said: Mapping[str, object]) -> dict[str, object]:
        """config.json without its vocabulary, for args that went through `read`."""
        hf: dict[str, object] = {"architectures": [self.architecture], "model_type": self.model_type}
        hf |= {key: whole(said, arg, ARGS) for key, arg in _SIZES.items()}
        hf |= {key: number(said, arg, ARGS) for key, arg in _NUMBERS.items()}
        hf |= {"hidden_act": "silu", "bos_token_id": None, "eos_token_id": None}
        hf["tie_word_embeddings"] = not flag(said, "untie_embeddings_and_output_weights", ARGS)
        hf |= rope_from_args(said)[0]
        for part, here in biases(said).items():
            if isinstance(key := getattr(self, part), str):
                hf.setdefault(key, here)
        width, slides = window(said)
        if self.window != "none":
            hf["sliding_window"] = width
        if self.window == "layers":
            hf["use_sliding_window"] = width is not None
        if self.window == "layers" and width:
            hf["max_window_layers"] = slides.index(True)
            hf["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
        flags = "bfloat16" if said.get("bf16") else "float16" if said.get("fp16") else "float32"
        hf["torch_dtype"] = dtype_name(said.get("params_dtype")) or flags  # 4.x reads only this name, 5.x both
        return hf

    def _window_args(self, said: Mapping[str, object], layers: int) -> tuple[dict[str, object], list[str]]:
        """transformers counts a window with the token itself (``masking_utils.py``), Megatron without."""
        types = said.get("layer_types")
        width = None
        if self.window == "all" or (self.window == "layers" and flag(said, "use_sliding_window", _CONFIG)):
            width = whole(said, "sliding_window", _CONFIG) if said.get("sliding_window") is not None else None
        if self.window == "layers" and types is None:
            first = count(said, "max_window_layers", _CONFIG)
            types = ["sliding_attention" if width and i >= first else "full_attention" for i in range(layers)]
        if types is None:
            types = ["sliding_attention" if width else "full_attention"] * layers
        if not isinstance(types, list) or len(types) != layers:
            raise Damaged("layer_types does not have one entry a layer", where=_CONFIG, expected=f"{layers} entries")
        lost = [
            f"layer_types has {kind}: {self.model_type} and Megatron have no such layers here"
            for kind in sorted({str(kind) for kind in types})
            if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and not width)
        ]
        slides = [int(kind == "sliding_attention") for kind in types]
        if self.window == "all" and width and not all(slides):
            lost.append(f"layer_types names full layers: {self.architecture} slides in all of them")
        if not width or not any(slides):
            return {"window_size": None, "window_attn_skip_freq": None}, lost
        return {"window_size": [width - 1, 0], "window_attn_skip_freq": None if all(slides) else slides}, lost


#: Keys of config.json that a stale one is found by, with an arg that is behind each.
_COMPARED: Final = {
    **{key: arg for key, arg in _SIZES.items() if key != "max_position_embeddings"},
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
    "rope_theta": "rotary_base",
    "rope_scaling": "use_rope_scaling",
    "attention_bias": "add_qkv_bias",
    "mlp_bias": "add_bias_linear",
    "sliding_window": "window_size",
    "layer_types": "window_attn_skip_freq",
}
#: Args that change what others mean: not filled in where a checkpoint lacks them.
_OVERRIDING: Final = {"use_rotary_position_embeddings", "group_query_attention"}
_ARGS_OF_BIAS: Final = "add_qkv_bias for q, k, v, or add_bias_linear for every linear layer"


def _rescales(key: str, value: object) -> bool:
    neutral = next((one for end, one in _RESCALING_ENDS.items() if key.endswith(end)), _RESCALING.get(key, value))
    return value != neutral


def _switch(declared: bool | str, said: Mapping[str, object]) -> bool:
    return flag(said, declared, _CONFIG) if isinstance(declared, str) else declared
