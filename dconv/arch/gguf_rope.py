"""How positions are rotated, from a GGUF's metadata and from the tables that it stores as tensors."""

from __future__ import annotations

from math import inf, isclose, log, pi, sqrt
from typing import Any, Final

from dconv.arch.gguf_metadata import Metadata, inverse

#: llama.cpp's own where no key says otherwise (``rope_freq_base_train``).
_BASE: Final = 10000.0
FREQUENCIES: Final = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
#: Of ``rope_type: llama3`` a GGUF has the factors alone; what Meta's releases have in common.
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope(m: Metadata) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``.

    Raises:
        Refused: scaling of another kind; frequencies that are not those of Llama 3.1 and later.
    """
    base = m.real("rope.freq_base", _BASE)
    return {"rope_theta": base, "rope_scaling": _scaling(m, base)}


def _scaling(m: Metadata, base: float) -> dict[str, Any] | None:
    kind, factor = m.text("rope.scaling.type"), m.real("rope.scaling.factor", 0.0)
    factor = factor or m.real("rope.scale_linear", 0.0)
    m.fixed("rope.scaling.attn_factor", 1.0)
    m.fixed("rope.scaling.yarn_ext_factor", 1.0)
    if m.has(FREQUENCIES):
        if factor not in (0.0, 1.0):
            raise m.refused(f"{m.arch}.rope.scaling.factor", f"none beside {FREQUENCIES}", str(factor))
        return _llama3(m, base)
    if kind == "yarn":
        return _yarn(m, factor)
    if kind not in ("", "none", "linear"):
        raise m.refused(f"{m.arch}.rope.scaling.type", "none, linear or yarn", kind)
    m.get("rope.scaling.original_context_length")  # of a scaling that is not there
    if kind == "none" or factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "factor": factor}


def _yarn(m: Metadata, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor or 1.0,
        "original_max_position_embeddings": m.whole("rope.scaling.original_context_length"),
        "beta_fast": m.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": m.real("rope.scaling.yarn_beta_slow", 1.0),
    }
    if m.get("rope.scaling.yarn_attn_factor") is not None:
        found["attention_factor"] = m.real("rope.scaling.yarn_attn_factor")
    multiplier = m.real("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:  # one number in its graph: both of the config's are it
        both = inverse(multiplier, lambda scale: 0.1 * scale, multiplier * 10)
        found |= {"mscale": both, "mscale_all_dim": both}
    return found


def _llama3(m: Metadata, base: float) -> dict[str, Any]:
    """The scaling whose factors are those that are stored.

    Raises:
        Refused: they are not Meta's.
    """
    stored = m.numbers(FREQUENCIES)
    factor = max(stored, default=0.0)
    if not all(0 < number < inf for number in stored) or base <= 0:
        raise m.refused(FREQUENCIES, "numbers above 0, of a base above 0", f"{list(stored)[:4]!r:.80} … of {base:.6g}")
    said = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    wanted = llama3_factors(base, 2 * len(stored), said)
    if not stored or not all(isclose(a, b, rel_tol=1e-5) for a, b in zip(stored, wanted, strict=True)):
        raise m.refused(FREQUENCIES, f"the factors of rope_type llama3 with {_LLAMA3}", f"{list(stored)[:4]!r:.80} …")
    return said


def llama3_factors(base: float, rotated: int, said: dict[str, Any]) -> list[float]:
    """What each frequency is divided by. Source: ``_compute_llama3_parameters`` in transformers."""
    low, high, context = said["low_freq_factor"], said["high_freq_factor"], said["original_max_position_embeddings"]
    found: list[float] = []
    for at in range(0, rotated, 2):
        wavelength = 2 * pi * base ** (at / rotated)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(said["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / said["factor"] + smooth))
    return found


def longrope(m: Metadata, context: int) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of an architecture that may have a factor for each frequency.

    Raises:
        Refused: see `rope`; what attention is multiplied by is not what transformers computes.
    """
    if not m.has(LONG) and not m.has(SHORT):
        return rope(m)
    m.fixed("rope.scaling.type", "longrope", "none")
    m.fixed("rope.scaling.factor", 1.0)
    before = m.whole("rope.scaling.original_context_length", context)
    wanted = longrope_attention(context, before)
    attention = m.real("rope.scaling.attn_factor", 1.0)
    if not isclose(attention, wanted, rel_tol=1e-5):
        raise m.refused(f"{m.arch}.rope.scaling.attn_factor", f"{wanted:.6g}, as longrope has it", str(attention))
    return {
        "rope_theta": m.real("rope.freq_base", _BASE),
        "original_max_position_embeddings": before,
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": [inverse(number, lambda same: same) for number in m.numbers(LONG)],
            "short_factor": [inverse(number, lambda same: same) for number in m.numbers(SHORT)],
            "original_max_position_embeddings": before,
        },
    }


def longrope_attention(context: int, before: int) -> float:
    """What a longrope multiplies cosine and sine by, for both lengths in tokens.

    Source: ``_compute_longrope_parameters`` in transformers.
    """
    stretch = context / max(before, 1)
    return sqrt(1 + log(stretch) / log(before)) if stretch > 1 and before > 1 else 1.0
