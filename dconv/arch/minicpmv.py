"""MiniCPM-V 2.6: a SigLIP tower, a resampler of queries that attend to its patches, and a Qwen2 that reads them.

Megatron-LM has no such model. What Megatron has of it is the language model, a Qwen2 of its own; tower and resampler
travel beside it, whole on every rank. transformers has no class either: the checkpoints bring their code, which is not
run. Tensors, shapes and defaults are those of that code (``modeling_minicpmv.py``, ``configuration_minicpm.py``,
``modeling_navit_siglip.py``, ``resampler.py``; public copies), and versions those of vLLM's ``minicpmv.py``. The
resampler's positions are computed.

Other versions have the same ``model_type`` and architecture, and another language model; a config.json that says no
version is 2.0 or 2.5 (vLLM's ``minicpmv.py`` tells them apart by their sizes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.carried import Kept
from dconv.arch.config import QWEN2 as QWEN2_CONFIG
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.fields import deep, flag, table, whole
from dconv.arch.layouts import copied
from dconv.arch.llama import QWEN2
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Refused

_VERSION: Final = 2.6
#: The language models of the others.
_OTHERS: Final = {"2.0": "MiniCPM", "2.5": "Llama 3", "4.0": "Llama", "4.5": "Qwen3"}
#: ``SiglipVisionConfig``, for keys that a ``vision_config`` omits; and the one that stands where there is none.
_TOWER: Final[Mapping[str, object]] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip
_SIGLIP_400M: Final[Mapping[str, object]] = {
    "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "siglip",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip
#: The own arg that holds all that config.json says of seeing.
_ARG: Final = "minicpmv_vision"
_SEEN: Final = Kept({
    "vision_config": "a SigLIP tower, whose tensors travel beside the model",
    "query_num": "a resampler, whose tensors travel beside the model",
    **dict.fromkeys((
        "drop_vision_last_layer", "image_size", "patch_size", "slice_config", "slice_mode", "batch_vision_input",
        "use_image_id", "vision_batch_size",
    ), ""),
}, table=_ARG)  # fmt: skip


@dataclass(frozen=True)
class Sight:
    """The version, and the sizes of tower and resampler; a `dconv.arch.translate.Aspect`. `Kept` carries their keys."""

    owns: tuple[str, ...] = ()

    @property
    def compared(self) -> Mapping[str, str]:
        """No key: `Kept` has those of the tower."""
        return {}

    def facts(self, said: Said) -> dict[str, Any]:
        """Sizes of the tower and the resampler.

        Returns:
            vision_layers (those that are stored), vision_hidden, vision_ffn, vision_channels, patch, vision_places,
            queries; narrowed: the tower is of another width than the language model, so that a matrix is between them.

        Raises:
            Refused: another version.
        """
        _require_version(said)
        tower = {**_TOWER, **table(said, "vision_config", CONFIG)}
        hidden, patch = whole(tower, "hidden_size", CONFIG), whole(tower, "patch_size", CONFIG)
        layers = deep(tower, "num_hidden_layers", CONFIG)
        return {
            "vision_layers": layers - flag(said, "drop_vision_last_layer", CONFIG),
            "vision_hidden": hidden,
            "vision_ffn": whole(tower, "intermediate_size", CONFIG),
            "vision_channels": whole(tower, "num_channels", CONFIG),
            "vision_places": (whole(tower, "image_size", CONFIG) // patch) ** 2,
            "patch": patch,
            "queries": whole(said, "query_num", CONFIG),
            "narrowed": hidden != whole(said, "hidden_size", CONFIG),
        }

    def to_args(self, _said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """None: `Kept` carries the keys."""
        return {}, []

    def to_hf(self, _said: Said) -> dict[str, object]:
        """The one version that is here."""
        return {"version": _VERSION}

    def mismatches(self, said: Said) -> list[str]:
        """A model without a tower."""
        return [] if said.get(_ARG) else [f"{_ARG} is not set, this family has a vision tower"]

    def needs(self, _said: Said) -> list[str]:
        """Nothing: `Kept` says what the tower needs."""
        return []


def _require_version(said: Said) -> None:
    """Raises Refused for a MiniCPM-V of another version, by what that one is."""
    version = said.get("version")
    if str(version) == str(_VERSION):
        return
    if version is None:
        version = "2.0" if (said.get("hidden_size"), said.get("query_num")) == (2304, 64) else "2.5"
    language = _OTHERS.get(str(version))
    raise Refused(
        f"MiniCPM-V {version!s:.20} is not here, nothing was written",
        where=f"{CONFIG}: version",
        expected=f"{_VERSION}, whose language model is a Qwen2",
        found=f"{version!s:.20}" + (f", whose language model is a {language}" if language else ""),
    )


MINICPMV_CONFIG: Final = DecoderConfig(
    "minicpmv", "MiniCPMV",
    {
        **QWEN2_CONFIG.defaults, "version": None, "query_num": 64, "image_size": 448, "drop_vision_last_layer": True,
        "batch_vision_input": True, "use_image_id": True, "vision_batch_size": 16, "slice_mode": True,
        "vision_config": _SIGLIP_400M,
    },
    bias=QWEN2_CONFIG.bias,
    window=QWEN2_CONFIG.window,
    more=(Sight(), _SEEN),
    constants={"vision_model_type": "minicpmv"},
)  # fmt: skip

_H, _F = "vision_hidden", "vision_ffn"
#: What the checkpoint calls a block of the model, and what its tensors are called beside Megatron's.
_TOWER_NAMES: Final = ("vpm.", "beside_the_model.vision.")
_RESAMPLER_NAMES: Final = ("resampler.", "beside_the_model.resampler.")


def _beside(names: tuple[str, str], tensor: str, *dims: str, when: str = "") -> Row:
    theirs, ours = names
    megatron = ours + tensor.removeprefix("encoder.")
    stack = "vision_layers" if "*" in tensor else "layers"
    return Row(megatron, theirs + tensor, copied(*dims), when=when, stack=stack, stage="first", beside=True)


def _pair(names: tuple[str, str], module: str, *dims: str) -> tuple[Row, Row]:
    """Weight and bias; a bias, and a norm's weight, has one axis."""
    return _beside(names, f"{module}.weight", *dims), _beside(names, f"{module}.bias", dims[0])


_LAYER: Final = "encoder.layers.*"
# fmt: off
MINICPMV = Family("minicpmv", MINICPMV_CONFIG, (
    *_pair(_TOWER_NAMES, "embeddings.patch_embedding",         _H, "vision_channels", "patch", "patch"),
    _beside(_TOWER_NAMES, "embeddings.position_embedding.weight", "vision_places", _H),
    *_pair(_TOWER_NAMES, f"{_LAYER}.layer_norm1",              _H),
    *(row for name in ("q_proj", "k_proj", "v_proj", "out_proj")
      for row in _pair(_TOWER_NAMES, f"{_LAYER}.self_attn.{name}", _H, _H)),
    *_pair(_TOWER_NAMES, f"{_LAYER}.layer_norm2",              _H),
    *_pair(_TOWER_NAMES, f"{_LAYER}.mlp.fc1",                  _F, _H),
    *_pair(_TOWER_NAMES, f"{_LAYER}.mlp.fc2",                  _H, _F),
    *_pair(_TOWER_NAMES, "post_layernorm",                     _H),
    _beside(_RESAMPLER_NAMES, "query",                         "queries", "hidden"),
    _beside(_RESAMPLER_NAMES, "kv_proj.weight",                "hidden", _H, when="narrowed"),
    _beside(_RESAMPLER_NAMES, "attn.in_proj_weight",           "3 hidden", "hidden"),
    _beside(_RESAMPLER_NAMES, "attn.in_proj_bias",             "3 hidden"),
    *_pair(_RESAMPLER_NAMES, "attn.out_proj",                  "hidden", "hidden"),
    *(row for name in ("ln_q", "ln_kv", "ln_post") for row in _pair(_RESAMPLER_NAMES, name, "hidden")),
    _beside(_RESAMPLER_NAMES, "proj",                          "hidden", "hidden"),
    *(replace(row, hf=f"llm.{row.hf}") for row in QWEN2.rows),
), recomputed=QWEN2.recomputed, head=f"llm.{QWEN2.head}")
# fmt: on
FAMILIES = (MINICPMV,)
