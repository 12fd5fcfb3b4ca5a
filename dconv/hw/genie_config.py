"""What Genie reads beside its context binaries: ``genie_config.json``, and how the HTP is set.

Sources: quic/ai-hub-models (BSD-3-Clause), ``qai_hub_models/utils/llm_helpers.py`` (``create_genie_config``,
``save_htp_config_for_genie_bundle``), and the files in quic/ai-hub-apps, ``tutorials/llm_on_genie/configs``. Sampling
is theirs, too; generation_config.json has no seed and no bounds that hold for every use. Their ``factor`` of Llama 3's
scaling is a constant; here it is the model's, as are all other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.arch.rope import rope_parameters
from dconv.errors import Refused
from dconv.export.genai import special_tokens
from dconv.export.genie import KINDS
from dconv.hw.hexagon import Chip

CONFIG: Final = "genie_config.json"
HTP: Final = "htp_backend_ext_config.json"
TOKENIZER: Final = "tokenizer.json"
#: Genie's key of each number of Llama 3's scaling.
_LLAMA3: Final = {
    "factor": "factor",
    "low-freq-factor": "low_freq_factor",
    "high-freq-factor": "high_freq_factor",
    "original-max-position-embeddings": "original_max_position_embeddings",
}


def rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """How angles are computed, in Genie's words, ``rope-dim`` aside, which the graph says.

    Raises:
        Refused: a kind that Genie has no public word for, or a base that is no whole number.
        Damaged: see `dconv.arch.rope.rope_parameters`.
    """
    rope = rope_parameters(config)
    kind, base = str(rope["rope_type"]), float(str(rope["rope_theta"]))
    if kind not in KINDS or base != int(base):
        raise Refused("Genie cannot compute the positions of this model, nothing was written", where="config.json",
                      expected=f"rope_type {' or '.join(KINDS)}, and rope_theta a whole number",
                      found=f"{kind}, {base:g}", do='"toolkit": "onnxruntime"')  # fmt: skip
    said: dict[str, Any] = {"type": "rope", "rope-theta": int(base)}
    if kind == "llama3":
        lacking = [name for name in _LLAMA3.values() if name not in rope]
        if lacking:
            raise Refused("Llama 3's scaling lacks numbers, nothing was written", where="config.json",
                          expected=", ".join(lacking))  # fmt: skip
        said["rope-scaling"] = {"rope-type": kind, **{key: rope[name] for key, name in _LLAMA3.items()}}
    return said


def angles(said: Mapping[str, Any], places: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of a rotation, [1, 1, places, rope-dim] each.

    Llama 3's scaling: of wavelengths longer than the original text the frequency is divided by the factor, shorter ones
    stay, and between the two it is mixed (transformers ``modeling_rope_utils.py``, ``_compute_llama3_parameters``).

    Args:
        said: of `rotation`, with ``rope-dim``: half a head's width.
        places: positions, [places].
    """
    count = int(said["rope-dim"])
    turns = 1.0 / np.float64(said["rope-theta"]) ** (np.arange(count) / count)
    if scaling := said.get("rope-scaling"):
        original, factor = scaling["original-max-position-embeddings"], scaling["factor"]
        low, high = scaling["low-freq-factor"], scaling["high-freq-factor"]
        waves = original * turns / (2 * np.pi)  # in the original text
        share = np.clip((waves - low) / (high - low), 0, 1)
        turns = share * turns + (1 - share) * turns / factor
    found = (places[:, None] * turns)[None, None]
    return np.cos(found).astype(np.float32), np.sin(found).astype(np.float32)


def ends(model: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tokens that begin and end a text.

    Args:
        model: config.json.
        generation: generation_config.json, whose tokens win.

    Raises:
        Refused: none ends it.
    """
    tokens = special_tokens(model, generation)
    first, last = (tokens.get(key) for key in ("bos_token_id", "eos_token_id"))
    if last is None or last == []:
        raise Refused("no token ends a text, and Genie would not stop, nothing was written",
                      where="config.json, generation_config.json", expected="eos_token_id")  # fmt: skip
    return first, last


def config_of(
    model: Mapping[str, Any],
    generation: Mapping[str, Any],
    rope: Mapping[str, Any],
    sizes: Mapping[str, int],
    binary: str,
) -> dict[str, Any]:
    """``genie_config.json``.

    Args:
        model: config.json.
        generation: generation_config.json; see `ends`.
        rope: of `rotation`, with ``rope-dim``.
        sizes: ``context``, ``vocabulary`` and ``width`` of a head.
        binary: the file with the graphs, beside this one.

    Raises:
        Refused: see `ends`.
    """
    first, last = ends(model, generation)
    htp: dict[str, Any] = {
        "version": 1, "use-mmap": True, "spill-fill-bufsize": 0, "mmap-budget": 0, "poll": True, "cpu-mask": "0xe0",
        "kv-dim": sizes["width"], "allow-async-init": False,
    }  # fmt: skip
    engine = {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": [binary]}}
    if "rope-scaling" in rope:
        engine["positional-encoding"] = dict(rope)
    else:
        htp |= {"pos-id-dim": rope["rope-dim"], "rope-theta": rope["rope-theta"]}
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": {
                "version": 1,
                "size": sizes["context"],
                "n-vocab": sizes["vocabulary"],
                "bos-token": -1 if first is None else first,  # as their files of models without one have it
                "eos-token": last,
            },
            "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
            "tokenizer": {"version": 1, "path": TOKENIZER},
            "engine": {
                "version": 1,
                "n-threads": 3,
                "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": htp, "extensions": HTP},
                "model": engine,
            },
        }
    }


def on_device(chip: Chip) -> dict[str, Any]:
    """How the HTP is set where Genie runs: the file `HTP`, which ``genie_config.json`` names as ``extensions``."""
    core = {"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}
    return {
        "devices": [{"soc_model": chip.model, "dsp_arch": f"v{chip.arch}", "cores": [core]}],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }


def at_compile(chip: Chip, graphs: list[str]) -> dict[str, Any]:
    """How the HTP is set where graphs are compiled.

    Args:
        chip: what they are compiled for.
        graphs: their names, all of them: a graph that is not named would be compiled with defaults.
    """
    return {
        "graphs": [{"graph_names": graphs, "O": 3}],
        "devices": [{"soc_model": chip.model, "dsp_arch": f"v{chip.arch}"}],
        "context": {"weight_sharing_enabled": True},
    }
