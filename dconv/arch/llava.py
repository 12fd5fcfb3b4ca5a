"""LLaVA: a CLIP vision tower, a projector of two layers, and the language model of another family.

LLaVA takes the output of a layer before the last one; megatron-core has no such switch, so that its tower has the layers
up to that one, and what follows (a layer, and CLIP's norm behind the last) travels beside the model. Sources:
``megatron/core/models/vision/clip_vit_model.py``, ``models/multimodal/llava_model.py``; transformers'
``modeling_llava.py``, ``modeling_clip.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.config import LLAMA as LLAMA_CONFIG
from dconv.arch.config import MISTRAL, QWEN2
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.fields import deep, flag, heads, multiple, number, table, whole
from dconv.arch.layouts import columns, copied, led, query_groups, rows
from dconv.arch.llama import LLAMA
from dconv.arch.translate import CONFIG
from dconv.errors import Damaged, Refused

_LANGUAGES: Final = {config.model_type: config for config in (LLAMA_CONFIG, MISTRAL, QWEN2)}
_TOWER: Final = {
    "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "num_channels": 3,
}  # fmt: skip
_TOP: Final = {
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True, "image_token_index": 32000,
}  # fmt: skip
#: Sizes of the tower under their two names; Megatron-LM's examples know them by ``vision_model_type``, without args.
_SIZES: Final = {
    "hidden_size": "vision_hidden_size", "intermediate_size": "vision_ffn_hidden_size",
    "num_hidden_layers": "vision_hf_num_layers", "num_attention_heads": "vision_num_attention_heads",
    "image_size": "img_h", "patch_size": "patch_dim",
}  # fmt: skip


@dataclass(frozen=True)
class LlavaConfig:
    """A `dconv.arch.translate.Config`: the language model's args, and the tower's beside them."""

    model_type: str = "llava"
    architecture: str = "LlavaForConditionalGeneration"

    def facts(self, hf: Mapping[str, object]) -> dict[str, Any]:
        """Sizes of the language model, the tower and the projector.

        Returns:
            The language model's, and vision_layers (those that are used), vision_unused, vision_hidden, vision_ffn,
            vision_heads, vision_groups, vision_head_dim, vision_tokens, vision_channels, patch; projector_bias.

        Raises:
            Damaged: a size that is impossible, or ``vision_feature_layer`` names no layer of the tower.
            Refused: a language model of another family than Llama, Mistral and Qwen2.
        """
        language, text = self._language(hf)
        facts = language.facts(text)
        tower, top = self._tower(hf), {**_TOP, **hf}
        layers, used = deep(tower, "num_hidden_layers", CONFIG), self._used(tower, top)
        hidden, count = whole(tower, "hidden_size", CONFIG), heads(tower, "num_attention_heads", CONFIG)
        patch = whole(tower, "patch_size", CONFIG)
        side = multiple("image_size", whole(tower, "image_size", CONFIG), "patch_size", patch, CONFIG)
        return facts | {
            "vision_layers": used,
            "vision_unused": layers - used,
            "vision_hidden": hidden,
            "vision_ffn": whole(tower, "intermediate_size", CONFIG),
            "vision_heads": count,
            "vision_groups": count,
            "vision_head_dim": multiple("hidden_size", hidden, "num_attention_heads", count, CONFIG),
            "vision_tokens": side * side + 1,
            "vision_channels": whole(tower, "num_channels", CONFIG),
            "patch": patch,
            "projector_bias": flag(top, "multimodal_projector_bias", CONFIG),
        }

    def to_args(self, hf: Mapping[str, object], strict: bool = True) -> dict[str, object]:
        """The language model's args, and beside them those of the tower and the projector.

        Raises:
            Damaged: see `facts`.
            Refused: see `facts`; ``strict``, and something would be lost.
        """
        args, lost = self._translate(hf)
        if strict and lost:
            raise Refused(
                "Megatron's args cannot say all of this llava config, nothing was written",
                where=CONFIG,
                expected="what Megatron-LM's arguments have a name for",
                found="\n".join(lost),
            )
        return args

    def unsayable(self, hf: Mapping[str, object]) -> list[str]:
        """What is lost of the language model, and a tower or projector of another kind than Megatron's."""
        return self._translate(hf)[1]

    def needs(self, hf: Mapping[str, object]) -> list[str]:
        """What the language model needs, and the tower's sizes."""
        language, text = self._language(hf)
        sizes = "the tower's sizes: Megatron-LM's examples take them from vision_model_type, no argument sets them"
        return [sizes, *language.needs(text)]

    def to_hf(self, args: Mapping[str, object]) -> dict[str, object]:
        """A whole config.json: ``text_config``, ``vision_config``, and what joins them.

        Raises:
            Damaged: a missing or impossible value.
            Refused: the args are not those of a CLIP tower before a language model that is known here.
        """
        reasons = self.matches_args(args)
        if reasons:
            raise Refused(
                "these Megatron args are not a llava model, nothing was written",
                where=ARGS,
                found="\n".join(reasons),
                do="name the family with --model-type, or supply a config.json with --hf-config DIR",
            )
        text = _LANGUAGES[str(args["language_model_type"])].to_hf({**args, "vision_model_type": None})
        dtype = text.pop("torch_dtype")
        hf: dict[str, object] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "text_config": text,
            "vision_config": {
                **_TOWER,
                **{key: whole(args, arg, ARGS) for key, arg in _SIZES.items()},
                "layer_norm_eps": number(args, "vision_norm_epsilon", ARGS),
            },
            **_TOP,
            "vision_feature_layer": args["vision_feature_layer"],
            "image_token_index": args["image_token_index"],
            "multimodal_projector_bias": flag(args, "vision_projection_bias", ARGS),
            "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": dtype,
        }
        if not flag(args, "disable_vision_class_token", ARGS):
            hf["vision_feature_select_strategy"] = "full"
        self.facts(hf)
        return hf

    def matches_args(self, args: Mapping[str, object]) -> list[str]:
        """Another tower or language model, sizes that are not set, and the language model's own reasons."""
        language = _LANGUAGES.get(str(args.get("language_model_type")))
        if args.get("vision_model_type") != "clip" or language is None:
            return ["vision_model_type and language_model_type are not clip and one of " + ", ".join(_LANGUAGES)]
        lacking = [arg for arg in (*_SIZES.values(), "vision_feature_layer") if args.get(arg) is None]
        reasons = [f"{arg} is not set, this family has a vision tower" for arg in lacking]
        return reasons + language.matches_args({**args, "vision_model_type": None})

    def check_pair(self, hf: Mapping[str, object], args: Mapping[str, object]) -> list[str]:
        """Where the language models disagree, and where args of the tower that are there do."""
        language, text = self._language(hf)
        lines = language.check_pair(text, {**args, "vision_model_type": None})
        expected = self._translate(hf)[0]
        own = {*_SIZES.values(), "vision_model_type", "vision_feature_layer", "disable_vision_class_token"}
        lines += [
            f"{arg} {expected[arg]} != args.{arg} {args[arg]}"
            for arg in sorted(own)
            if arg in args and args[arg] != expected[arg]
        ]
        return lines

    def _translate(self, hf: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
        language, text = self._language(hf)
        tower, top = self._tower(hf), {**_TOP, **hf}
        self.facts(hf)
        lost = language.unsayable(text)
        only = (
            (tower, "model_type", ("clip_vision_model",)), (tower, "hidden_act", ("quick_gelu",)),
            (tower, "num_channels", (3,)), (top, "projector_hidden_act", ("gelu",)),
            (top, "vision_feature_select_strategy", ("default", "full")),
        )  # fmt: skip
        lost += [
            f"{key} {said[key]!r:.60}: Megatron's LLaVA has {' or '.join(map(str, known))}"
            for said, key, known in only
            if said[key] not in known
        ]
        tied = flag(text, "tie_word_embeddings", CONFIG)
        if "tie_word_embeddings" in hf and flag(hf, "tie_word_embeddings", CONFIG) != tied:
            lost.append(f"tie_word_embeddings {not tied}: text_config says {tied}, and versions of transformers differ")
        return {
            **language.to_args(text, strict=False),
            **{arg: whole(tower, key, CONFIG) for key, arg in _SIZES.items()},
            "img_w": whole(tower, "image_size", CONFIG),
            "vision_model_type": "clip",
            "language_model_type": language.model_type,
            "vision_num_layers": self._used(tower, top),
            "vision_norm_epsilon": number(tower, "layer_norm_eps", CONFIG),
            "vision_projection_type": "mlp",
            "vision_projection_bias": flag(top, "multimodal_projector_bias", CONFIG),
            "vision_feature_layer": top["vision_feature_layer"],
            "disable_vision_class_token": top["vision_feature_select_strategy"] != "full",
            "image_token_index": top["image_token_index"],
        }, lost

    def _language(self, hf: Mapping[str, object]) -> tuple[DecoderConfig, dict[str, object]]:
        text = table(hf, "text_config", CONFIG)
        kind = text.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in _LANGUAGES:
            raise Refused(
                f"LLaVA with a language model of {kind!r:.60} is not here, nothing was written",
                where=f"{CONFIG}: text_config.model_type",
                expected=", ".join(_LANGUAGES),
            )
        dtype = hf.get("dtype") or hf.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        text.pop("dtype", None)
        return _LANGUAGES[kind], {**text, "torch_dtype": dtype}

    def _tower(self, hf: Mapping[str, object]) -> dict[str, object]:
        return {**_TOWER, **table(hf, "vision_config", CONFIG)}

    def _used(self, tower: Mapping[str, object], top: Mapping[str, object]) -> int:
        """Layers up to the one whose output is taken: ``hidden_states`` counts the embedding as 0."""
        layers, taken = deep(tower, "num_hidden_layers", CONFIG), top["vision_feature_layer"]
        used = taken + layers + 1 if type(taken) is int and taken < 0 else taken
        if type(used) is not int or not 0 < used <= layers:
            raise Damaged(
                "vision_feature_layer names no single layer of the tower",
                where=f"{CONFIG}: vision_feature_layer",
                expected=f"-{layers} to {layers}, but not 0",
                found=f"{taken!r:.60}",
            )
        return used


_HF, _VISION = "vision_tower.vision_model", "vision_model"
_H, _F = "vision_hidden", "vision_ffn"


def _tower_rows(megatron: str, stack: str, after: str, beside: bool) -> tuple[Row, ...]:
    here, theirs, ffn = f"{megatron}.*.self_attention", f"{_HF}.encoder.layers.*", f"{megatron}.*.mlp"
    table = (
        (f"{here}.linear_qkv.layer_norm_weight", "layer_norm1.weight", copied(_H)),
        (f"{here}.linear_qkv.layer_norm_bias", "layer_norm1.bias", copied(_H)),
        (f"{here}.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", query_groups(_H, of="vision_")),
        (f"{here}.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", query_groups(of="vision_")),
        (f"{here}.linear_proj.weight", "self_attn.out_proj.weight", columns(_H, _H)),
        (f"{here}.linear_proj.bias", "self_attn.out_proj.bias", copied(_H)),
        (f"{ffn}.linear_fc1.layer_norm_weight", "layer_norm2.weight", copied(_H)),
        (f"{ffn}.linear_fc1.layer_norm_bias", "layer_norm2.bias", copied(_H)),
        (f"{ffn}.linear_fc1.weight", "mlp.fc1.weight", rows(_F, _H)),
        (f"{ffn}.linear_fc1.bias", "mlp.fc1.bias", rows(_F)),
        (f"{ffn}.linear_fc2.weight", "mlp.fc2.weight", columns(_H, _F)),
        (f"{ffn}.linear_fc2.bias", "mlp.fc2.bias", copied(_H)),
    )
    return tuple(
        Row(name, f"{theirs}.{hf}", layout, stack=stack, after=after, stage="first", beside=beside)
        for name, hf, layout in table
    )


def _first(megatron: str, hf: str, layout: Any, when: str = "", beside: bool = False) -> Row:
    return Row(megatron, hf, layout, when=when, stage="first", beside=beside)


_MLP, _OWN = "vision_projection.encoder", "multi_modal_projector"
_LANGUAGE = tuple(
    replace(
        row,
        megatron=f"language_model.{row.megatron}",
        hf=f"language_model.{row.hf}",
        stage="first" if row.first_stage and not row.per_layer else row.stage,
    )
    for row in LLAMA.rows
)
# fmt: off
LLAVA = Family("llava", LlavaConfig(), (
    _first(f"{_VISION}.class_token",                 f"{_HF}.embeddings.class_embedding",            led(copied(_H), 2)),
    _first(f"{_VISION}.conv1.weight",                f"{_HF}.embeddings.patch_embedding.weight",     copied(_H, "vision_channels", "patch", "patch")),
    _first(f"{_VISION}.position_embeddings.weight",  f"{_HF}.embeddings.position_embedding.weight",  copied("vision_tokens", _H)),
    _first(f"{_VISION}.ln_pre.weight",               f"{_HF}.pre_layrnorm.weight",                   copied(_H)),
    _first(f"{_VISION}.ln_pre.bias",                 f"{_HF}.pre_layrnorm.bias",                     copied(_H)),
    *_tower_rows(f"{_VISION}.decoder.layers", "vision_layers", "", beside=False),
    *_tower_rows("beside_the_model.vision.layers", "vision_unused", "vision_layers", beside=True),
    _first("beside_the_model.vision.post_layernorm.weight", f"{_HF}.post_layernorm.weight",                copied(_H), beside=True),
    _first("beside_the_model.vision.post_layernorm.bias",  f"{_HF}.post_layernorm.bias",                   copied(_H), beside=True),
    _first(f"{_MLP}.linear_fc1.weight",              f"{_OWN}.linear_1.weight",                      rows("hidden", _H)),
    _first(f"{_MLP}.linear_fc1.bias",                f"{_OWN}.linear_1.bias",                        rows("hidden"), when="projector_bias"),
    _first(f"{_MLP}.linear_fc2.weight",              f"{_OWN}.linear_2.weight",                      columns("hidden", "hidden")),
    _first(f"{_MLP}.linear_fc2.bias",                f"{_OWN}.linear_2.bias",                        copied("hidden"), when="projector_bias"),
    *_LANGUAGE,
), recomputed=(
    ("*.rotary_emb.inv_freq", "recomputed from the config"),
    ("*.embeddings.position_ids", "recomputed from the config"),
), head="language_model.lm_head.weight", also=(("vision_tower.", f"{_HF}."),))
# fmt: on
FAMILIES = (LLAVA,)
