"""How a decoder family's HuggingFace config.json and Megatron's args say the same thing.

Dictionaries in, dictionaries out: no tensor, no torch. A family is a few declarations: sizes and norms here, and an
`Aspect` for each thing that decoders differ in. Sources: transformers' ``configuration_*.py`` and ``modeling_*.py``;
Megatron-LM's ``megatron/training/arguments.py``, ``argument_utils.py`` (``core_transformer_config_from_args``) and
``checkpointing.py`` (``load_args_from_checkpoint``, ``check_checkpoint_args``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.arch.activation import SILU
from dconv.arch.args import ARGS, RENAMED, dtype_name, named_as_of_old, read
from dconv.arch.attention import Biases, Grouped, Window, differing
from dconv.arch.carried import NO_PRE_NORMS, POST_NORMS, RESCALING, rescales
from dconv.arch.fields import deep, flag, number, whole
from dconv.arch.rotary import Rope
from dconv.arch.translate import CONFIG, Aspect
from dconv.errors import Refused

#: Sizes under their two names.
SIZES: Final[Mapping[str, str]] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
}
#: Real numbers under their two names.
_DROPOUT: Final = "attention_dropout"
_NUMBERS: Final = {"initializer_range": "init_method_std", _DROPOUT: _DROPOUT}
#: Args that are equal in nearly all decoders: written, and demanded of a checkpoint.
_SAME: Final[Mapping[str, object]] = {
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "num_experts": None,
    "multi_latent_attention": False,
}
#: Args with which Megatron computes another function: demanded to be unset, not written.
_UNSET: Final[Mapping[str, object]] = {
    **dict.fromkeys((*RESCALING, *POST_NORMS, *NO_PRE_NORMS)),
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_scale": None,
    "activation_func": None,
    "scale_decoder_outputs": None,
    "rope_scaling": None,
    "latent_rotary_halves": None,
    "block_ffn": None,
    "time_step_min": None,
    "use_mup": False,
    "apply_residual_connection_post_layernorm": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "hybrid_layer_pattern": None,
    "vision_model_type": None,
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
#: Args that change what others mean: not filled in where a checkpoint lacks them.
_OVERRIDING: Final = {"use_rotary_position_embeddings", "group_query_attention"}
_WEIGHTS_ONLY: Final = "the weights alone can be moved when config.json travels with them"


@dataclass(frozen=True)
class DecoderConfig:
    """One family; a `dconv.arch.translate.Config`.

    Attributes:
        model_type: ``model_type`` of its config.json.
        architecture: the only entry of ``architectures``.
        defaults: transformers' values for keys that config.json may omit; ``None`` for ``num_key_value_heads`` means
            the number of heads, for ``head_dim`` hidden_size / heads, for the feed-forward size 4 * hidden_size.
        attention: heads (`Grouped`), or multi-latent attention.
        bias: which linear layers have one.
        window: which layers slide.
        rope: how positions are rotated.
        activation: the feed-forward activation.
        more: what else there is: experts, carried keys, …
        constants: args of this family that differ from those of nearly all decoders, or that those lack (also under
            names of our own, where Megatron-LM has none): written, and demanded of a checkpoint.
        only: keys of config.json with the one value whose function is known here; another is refused.
        numbers: real numbers under their two names.
        norm_eps: the key of the norms' epsilon.
        sizes: sizes under their two names; a family may lack the feed-forward size and the context length.
        filling: keys that a config.json of this family may leave to others of its keys.
        lacking: what mainline megatron-core lacks for this family whatever its config says, in words.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, object] = field(hash=False)
    attention: Aspect = Grouped()
    bias: Aspect = Biases()
    window: Window = Window()
    rope: Aspect = Rope()
    activation: Aspect = SILU
    more: tuple[Aspect, ...] = ()
    constants: Mapping[str, object] = field(default_factory=dict[str, object], hash=False)
    only: Mapping[str, object] = field(default_factory=dict[str, object], hash=False)
    numbers: Mapping[str, str] = field(default_factory=lambda: _NUMBERS, hash=False)
    norm_eps: str = "rms_norm_eps"
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES, hash=False)
    filling: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda _: {}
    lacking: tuple[str, ...] = ()

    @property
    def aspects(self) -> tuple[Aspect, ...]:
        """All of them: the five that every decoder has, then the family's more."""
        return self.attention, self.bias, self.window, self.rope, self.activation, *self.more

    def facts(self, hf: Mapping[str, object]) -> dict[str, Any]:
        """Sizes and switches that shapes follow from.

        Returns:
            layers, hidden, ffn, vocab, tied, untied, uniform_layers (all layers have the same tensors), and what each
            aspect adds.

        Raises:
            Damaged: a wrong type, not positive, or does not divide.
        """
        said = self._filled(hf)
        tied = flag(said, "tie_word_embeddings", CONFIG)
        facts: dict[str, Any] = {
            "layers": deep(said, self._key("num_layers"), CONFIG),
            "hidden": whole(said, self._key("hidden_size"), CONFIG),
            "ffn": whole(said, self._key("ffn_hidden_size"), CONFIG) if "ffn_hidden_size" in self.sizes.values() else 0,
            "vocab": whole(said, "vocab_size", CONFIG),
            "tied": tied,
            "untied": not tied,
            "uniform_layers": True,
        }
        for aspect in self.aspects:
            facts |= aspect.facts(said)
        return facts

    def to_args(self, hf: Mapping[str, object], strict: bool = True) -> dict[str, object]:
        """See `dconv.arch.translate.Config.to_args`."""
        args, lost = self._translate(hf)
        if strict and lost:
            raise Refused(
                f"Megatron's args cannot say all of this {self.model_type} config, nothing was written",
                where=CONFIG,
                expected="what Megatron-LM's arguments have a name for",
                found="\n".join(lost),
                do=f"change the key if the model does not depend on it; {_WEIGHTS_ONLY}",
            )
        return args

    def unsayable(self, hf: Mapping[str, object]) -> list[str]:
        """What the args cannot say of this config, one line each."""
        return self._translate(hf)[1]

    def needs(self, hf: Mapping[str, object]) -> list[str]:
        """What mainline megatron-core lacks to compute this model's function, in words; the args say all of it."""
        said = self._filled(hf)
        return [*self.lacking, *(line for aspect in self.aspects for line in aspect.needs(said))]

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
        owned = {arg for aspect in self.aspects for arg in aspect.owns}
        wanted = {arg: value for arg, value in {**_SAME, **_UNSET}.items() if arg not in owned}
        reasons = differing(said, {**wanted, **self.constants})
        return reasons + [reason for aspect in self.aspects for reason in aspect.mismatches(said)]

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
            for key, arg in self._compared().items()
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
        said |= self.filling(said)
        ffn, dropout = self._key("ffn_hidden_size"), self._key("attention_dropout")
        if said.get(ffn) is None and self.defaults.get(ffn, 0) is None:
            said[ffn] = 4 * whole(said, self._key("hidden_size"), CONFIG)
        return {**said, dropout: said.get(dropout) or 0.0}

    def _key(self, arg: str) -> str:
        """The key of config.json for one of Megatron's sizes and numbers."""
        return next((key for key, its in {**self.sizes, **self.numbers}.items() if its == arg), arg)

    def _translate(self, hf: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
        """Args, and what they lose."""
        said, facts = self._filled(hf), self.facts(hf)
        epsilon = number(said, self.norm_eps, CONFIG)
        same = {**_SAME, **self.constants}
        dtype = dtype_name(hf.get("dtype") or hf.get("torch_dtype"))
        args: dict[str, object] = {
            **{arg: whole(said, key, CONFIG) for key, arg in self.sizes.items()},
            "seq_length": said.get(self._key("max_position_embeddings")),
            **{arg: number(said, key, CONFIG) for key, arg in self.numbers.items()},
            "norm_epsilon": epsilon,
            "vocab_size": facts["vocab"],
            "untie_embeddings_and_output_weights": facts["untied"],
            **same,
            **_WRITTEN,
            **{new: {**same, "norm_epsilon": epsilon}[old] for new, old in RENAMED.items()},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        }
        lost = self._of_others(hf)
        for aspect in self.aspects:
            more, unsayable = aspect.to_args(said, facts)
            args |= more
            lost += unsayable
        return args, lost

    def _of_others(self, hf: Mapping[str, object]) -> list[str]:
        """Keys by which another family, read as this one (``--model-type``), would compute something else."""
        known = {*self._compared(), *self.only}
        lost = [
            f"{key} {value!r:.60}: {self.model_type} computes nothing with it"
            for key, value in sorted(hf.items())
            if key not in known and rescales(key, value)
        ]
        lost += [
            f"{key} {hf[key]!r:.60}: only {value!r} is what this family has on both sides"
            for key, value in self.only.items()
            if key in hf and hf[key] != value and (hf[key] or value)  # unset, false and 0 are the same
        ]
        named = hf.get("architectures") or [hf.get("model_type")]
        own = isinstance(named, list) and named[0] in (self.architecture, self.model_type)
        slides = hf.get("sliding_window") is not None and hf.get("use_sliding_window") is not False
        if self.window.layers == "none" and slides and not own:
            lost.append(f"sliding_window {hf['sliding_window']!r:.60}: {self.model_type} has no such layers")
        return lost

    def _describe(self, said: Mapping[str, object]) -> dict[str, object]:
        """config.json without its vocabulary, for args that went through `read`."""
        hf: dict[str, object] = {"architectures": [self.architecture], "model_type": self.model_type}
        hf |= {key: whole(said, arg, ARGS) for key, arg in self.sizes.items()}
        hf |= {key: number(said, arg, ARGS) for key, arg in {**self.numbers, self.norm_eps: "norm_epsilon"}.items()}
        hf |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **self.only}
        hf["tie_word_embeddings"] = not flag(said, "untie_embeddings_and_output_weights", ARGS)
        for aspect in self.aspects:
            hf |= aspect.to_hf(said)
        flags = "bfloat16" if said.get("bf16") else "float16" if said.get("fp16") else "float32"
        hf["torch_dtype"] = dtype_name(said.get("params_dtype")) or flags  # 4.x reads only this name, 5.x both
        return hf

    def _compared(self) -> dict[str, str]:
        """Keys of config.json that a stale one is found by, with an arg that is behind each."""
        compared = {key: arg for key, arg in self.sizes.items() if arg != "max_position_embeddings"}
        compared |= {self.norm_eps: "norm_epsilon", "tie_word_embeddings": "untie_embeddings_and_output_weights"}
        for aspect in self.aspects:
            compared |= aspect.compared
        return compared
