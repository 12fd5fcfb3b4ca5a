"""The rows of the duel about damage: something is missing, or wrong, in the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import duel_inputs as inputs
import torch
from duel_inputs import LAST
from duel_rows import (
    BRIDGE,
    CONSOLIDATION,
    DCP,
    DIST,
    GGUF,
    HF,
    LLAMA,
    MEGATRON,
    SAFETENSORS,
    SAME,
    TRANSFORMERS,
    Row,
    Stage,
)
from duel_stage import Seen, difference, judged

# ------------------------------------------------------------------------------------------- torch_dist: the same bytes


def _damaged_dist(stage: Stage, key: str, damage: Callable[[Path], object]) -> Path:
    def make(to: Path) -> None:
        damage(inputs.copied(stage.release.parent, to) / "release")

    return stage.made(f"dist-{key}", make)


def _dist_us(key: str, damage: Callable[[Path], object], unknown: str, stage: Stage) -> Seen:
    return stage.once(
        f"dist-{key}", lambda: stage.dconv(_damaged_dist(stage, key, damage), stage.truth, unknown=unknown)
    )


def _dist_them(key: str, action: str, damage: Callable[[Path], object], unknown: str, stage: Stage) -> Seen:
    folder = _damaged_dist(stage, key, damage) / "release"
    return judged(stage.peer(action, str(folder)), stage.megatron_truth, unknown=unknown)


def dist(key: str, part: str, done: str, damage: Callable[[Path], object], unknown: str = "") -> list[Row]:
    """A damage to a torch_dist directory, which torch, megatron-core and dconv read."""
    us = partial(_dist_us, key, damage, unknown)
    return [
        Row(f"{key}, {short}", part, done, name, SAME, partial(_dist_them, key, action, damage, unknown), us)
        for short, name, action in (("DCP", DCP, "dcp_load"), ("megatron-core", MEGATRON, "megatron_load"))
    ]


# ---------------------------------------------------------------------------------------- DCP's shards of safetensors

Shards = list[dict[str, tuple[torch.Tensor, tuple[int, ...]]]]


def _two(stage: Stage) -> dict[str, torch.Tensor]:
    held = inputs.tensors_of(stage.model)
    return {name: held[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}


X: Final = "model.embed_tokens.weight"


def _consolidated(
    make: Callable[[Stage, Shards], object],
    stage: Stage,
    *,
    tensors: Callable[[Stage], Mapping[str, torch.Tensor]] = _two,
    more: Mapping[str, int] | None = None,
    after: Callable[[Path], object] = lambda _: None,
    unknown: str = "",
) -> Seen:
    """Four ranks' shards of some tensors, spoiled, consolidated into one file, or with ``more`` into others."""
    held = tensors(stage)
    shards = inputs.by_rows(held, 4)
    make(stage, shards)
    source, out = stage.fresh("dcp-shards"), stage.empty("consolidated")
    inputs.dcp_shards(source, *shards)
    after(source)
    files = dict.fromkeys(held, 1) | dict(more or {})
    return judged(
        stage.peer("consolidate", str(source), str(out), files), inputs.as_data(held), out, unknown=unknown
    )  # fmt: skip


def _as_it_is(_: Stage, __: Shards) -> None:
    pass


def _gap(_: Stage, shards: Shards) -> None:
    del shards[1][X]


def _without_last(_: Stage, shards: Shards) -> None:
    del shards[3]


def _overlap(stage: Stage, shards: Shards) -> None:
    shards.append({X: (_two(stage)[X][:16], (8, 0))})


def _other_dtype(_: Stage, shards: Shards) -> None:
    shards[1][X] = shards[1][X][0].to(torch.float16), shards[1][X][1]


def _cut_last(source: Path) -> None:
    inputs.cut(max(source.iterdir()))


def _coded(stage: Stage) -> Path:
    return stage.made("coded", inputs.coded)


def _packed(stage: Stage) -> Path:
    return stage.made("packed", inputs.packed)


GUESS: Final = "a guess which of two is right"


def consolidation(key: str, part: str, done: str, us: Callable[[Stage], Seen], ours: str, **options: Any) -> Row:
    make = options.pop("make", _as_it_is)
    fast = options.pop("fast", False)
    return Row(
        f"{key}, consolidation", part, done, CONSOLIDATION, ours, partial(_consolidated, make, **options), us, fast
    )


# ------------------------------------------------------------------------------------------- HuggingFace's directories


def _damaged(stage: Stage, key: str, damage: Callable[[Path], object]) -> Path:
    return stage.made(f"hf-{key}", lambda to: damage(inputs.copied(stage.model, to)))


def _hf_them(key: str, action: str, file: str, damage: Callable[[Path], object], own: bool, stage: Stage) -> Seen:
    folder = _damaged(stage, key, damage)
    if file:  # of one file, all that is asked is whether it is taken
        return judged(stage.peer(action, str(folder / file)), {}, unknown="the file was taken")
    truth = inputs.truth_of(folder) if own else stage.truth
    return judged(stage.peer(action, str(folder)), truth)


def _hf_us(key: str, damage: Callable[[Path], object], own: bool, stage: Stage) -> Seen:
    folder = _damaged(stage, key, damage)
    return stage.once(f"hf-{key}", lambda: stage.dconv(folder, inputs.truth_of(folder) if own else stage.truth))


def hf(
    key: str, part: str, done: str, damage: Callable[[Path], object], *, file: str = "", own: bool = False
) -> list[Row]:
    """A damage to a HuggingFace directory, which transformers and dconv read.

    Args:
        file: safetensors' own loader is asked for it, too.
        own: what is in the damaged directory is what has to come out.
    """
    us = partial(_hf_us, key, damage, own)
    them = partial(_hf_them, key, "transformers_load", "", damage, own)
    rows = [Row(f"{key}, transformers", part, done, TRANSFORMERS, SAME, them, us)]
    if file:
        them = partial(_hf_them, key, "safetensors_load", file, damage, own)
        rows.append(Row(f"{key}, safetensors", part, done, SAFETENSORS, SAME, them, us))
    return rows


def _forget(name: str, *files: str) -> Callable[[Path], None]:
    """A tensor that the files no longer have, and the index only where ``files`` says so."""

    def damage(folder: Path) -> None:
        inputs.rewritten(folder / LAST, lambda tensors: tensors.pop(name))
        if "index" in files:
            inputs.reindexed(folder, lambda weight_map: weight_map.pop(name))

    return damage


def _added(folder: Path) -> None:
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    inputs.rewritten(folder / LAST, lambda tensors: tensors.update({name: torch.ones(64, 128, dtype=torch.bfloat16)}))
    inputs.reindexed(folder, lambda weight_map: weight_map.update({name: LAST}))


def _reshaped(folder: Path) -> None:
    inputs.rewritten(folder / LAST, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:48]}))


def _overlapping_header(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        layer = "model.layers.1.self_attn."
        header[f"{layer}k_proj.weight"]["data_offsets"] = header[f"{layer}q_proj.weight"]["data_offsets"]

    inputs.headed(folder / LAST, change)


def _bridged(stage: Stage) -> Seen:
    """The tensor that is missing in files and index, once more."""
    if stage.bridge is None:
        return Seen("not installed", "`bash scripts/bridge_env.sh` installs it")
    folder = _damaged(stage, "dropped", _forget(DOWN, "index"))
    out = stage.fresh("bridge")
    ending = stage.peer("bridge", str(stage.bridge), str(folder), str(out))
    made = next(out.rglob(".metadata"), None)
    if not ending.ok or made is None:
        return judged(ending, {}, out)
    dtype, shape, data = stage.peer("dcp_load", str(made.parent)).value["decoder.layers.mlp.linear_fc2.weight"]
    layers = {f"model.layers.{at}.mlp.down_proj.weight": at * len(data) // 2 for at in (0, 1)}
    got = {name: (dtype, shape[1:], data[low : low + len(data) // 2]) for name, low in layers.items()}
    wrong = difference({name: stage.truth[name] for name in layers}, got)
    return Seen("silent", f"success; {wrong}") if wrong else Seen("whole", "right")


DOWN: Final = "model.layers.1.mlp.down_proj.weight"


def _norm_of_nan(folder: Path) -> None:
    inputs.rewritten(folder / LAST, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


# ----------------------------------------------------------------------------------------------------------------- GGUF


def _damaged_gguf(stage: Stage, key: str, damage: Callable[[Path], object]) -> Path:
    def make(to: Path) -> None:
        inputs.copied(stage.gguf, to)
        damage(next(to.glob("*.gguf")))

    return next(stage.made(f"gguf-{key}", make).glob("*.gguf"))


def _gguf_them(key: str, action: str, damage: Callable[[Path], object], unknown: str, stage: Stage) -> Seen:
    return judged(stage.peer(action, str(_damaged_gguf(stage, key, damage))), {}, unknown=unknown)


def _gguf_us(key: str, damage: Callable[[Path], object], unknown: str, stage: Stage) -> Seen:
    return stage.once(
        f"gguf-{key}",
        lambda: stage.dconv(_damaged_gguf(stage, key, damage), stage.truth, "--dtype", "bf16", unknown=unknown),
    )


def ggufs(key: str, part: str, done: str, damage: Callable[[Path], object], unknown: str = "") -> list[Row]:
    """A damage to a GGUF, which gguf-py, llama.cpp and dconv read."""
    us = partial(_gguf_us, key, damage, unknown)
    return [
        Row(f"{key} of a GGUF, {short}", part, done, name, SAME, partial(_gguf_them, key, action, damage, unknown), us)
        for short, name, action in (("gguf-py", GGUF, "gguf_load"), ("llama.cpp", LLAMA, "llama_load"))
    ]


# ----------------------------------------------------------------------------------------------------------------- rows


def _gone(release: Path) -> None:
    (release / "__3_0.distcp").unlink()


def _cut_dist(release: Path) -> None:
    inputs.cut(release / "__3_0.distcp")


def _gap_dist(release: Path) -> None:
    inputs.without_rows(release, 16)


def _coded_us(stage: Stage) -> Seen:
    return stage.dconv(_coded(stage), inputs.decoded(_coded(stage)))


def _packed_us(stage: Stage) -> Seen:
    return stage.dconv(_packed(stage), inputs.unpacked(_packed(stage)))


_GAP, _LAST_GONE = "rows 16 to 31 of 64 are in no shard", "the last shard is missing"
_ABSENT, _CUT = "a tensor is listed, and is nowhere", "the last 100 bytes of a file are cut off"
_OVERLAP, _DTYPE = "two shards have the same rows, and disagree", "one shard is float16, the others bfloat16"
_DROPPED = "a tensor is missing in files and index"

LOST: Final = [
    consolidation("gap", "lost", _GAP, partial(_dist_us, "gap", _gap_dist, ""), DIST, make=_gap, fast=True),
    *dist("gap", "lost", _GAP, _gap_dist),
    consolidation("last shard", "lost", _LAST_GONE, partial(_dist_us, "last shard", _gone, ""), DIST,
                  make=_without_last, fast=True),
    *dist("last shard", "lost", _LAST_GONE, _gone),
    *hf("last shard", "lost", _LAST_GONE, lambda folder: (folder / LAST).unlink()),
    consolidation("absent", "lost", _ABSENT, partial(_hf_us, "absent", _forget(DOWN), False),
                  "the same damage in HuggingFace files", more={"model.layers.0.gone.weight": 2}, fast=True),
    *dist("absent", "lost", _ABSENT, inputs.without_places),
    *hf("absent", "lost", _ABSENT, _forget(DOWN)),
    *hf("dropped", "lost", _DROPPED, _forget(DOWN, "index")),
    Row("dropped, Megatron-Bridge", "lost", _DROPPED, BRIDGE, SAME, _bridged,
        partial(_hf_us, "dropped", _forget(DOWN, "index"), False)),
    *hf("no place", "lost", "a tensor that the model has no place for", _added, own=True),
    consolidation("scalars", "lost", "nothing: FP8 weights with 0-dim scales", _coded_us, HF,
                  tensors=lambda stage: inputs.tensors_of(_coded(stage)), fast=True),
    consolidation("integers", "lost", "nothing: int4 weights, as int32 and int64 tensors", _packed_us, HF,
                  tensors=lambda stage: inputs.tensors_of(_packed(stage)), fast=True),
]  # fmt: skip
WRONG: Final = [
    consolidation("overlap", "wrong", _OVERLAP, partial(_dist_us, "overlap", inputs.overlapping, GUESS), DIST,
                  make=_overlap, unknown=GUESS, fast=True),
    *dist("overlap", "wrong", _OVERLAP, inputs.overlapping, GUESS),
    consolidation("dtype", "wrong", _DTYPE, partial(_dist_us, "dtype", inputs.other_dtype, ""), DIST,
                  make=_other_dtype, fast=True),
    *dist("dtype", "wrong", _DTYPE, inputs.other_dtype),
    consolidation("cut", "wrong", _CUT, partial(_dist_us, "cut", _cut_dist, ""), DIST, after=_cut_last, fast=True),
    *dist("cut", "wrong", _CUT, _cut_dist),
    *hf("cut", "wrong", _CUT, lambda folder: inputs.cut(folder / LAST), file=LAST),
    *ggufs("cut", "wrong", _CUT, inputs.cut),
    *hf("shared bytes", "wrong", "a header gives two tensors the same bytes", _overlapping_header, file=LAST),
    *ggufs("shared bytes", "wrong", "a header gives two tensors the same bytes", inputs.shared_bytes, GUESS),
    *hf("shape", "wrong", "a tensor of another shape than the config says", _reshaped),
    *hf("NaN", "wrong", "a weight that is all NaN", _norm_of_nan, own=True),
]  # fmt: skip
