"""HuggingFace directories as they are written: safetensors, an index, the config and what lies beside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dconv.checkpoint import safetensors
from dconv.checkpoint.source import Side, seal, side_bytes
from dconv.coded.beside import GPTQ, GPTQ_FILE
from dconv.coded.decode import KEY, method_of
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.tensor import Slot, TensorSpec


def lay_out(
    specs: Iterable[TensorSpec],
    *,
    config: Mapping[str, object] | None,
    side: Side,
    shard_size: int,
    left_out: dict[str, str],
    twins: Mapping[str, str] | None = None,
) -> Target:
    """A HuggingFace directory to be written: weight files of at most ``shard_size`` bytes, index, config, side files.

    Args:
        specs: the logical tensors, in the order to write them.
        config: config.json's content; None copies the one among ``side`` as it is.
        side: files that travel with the model, by name.
        shard_size: bytes of tensors in a weight file, at most (one tensor at least).
        left_out: stored tensors that are not written, each with the reason.
        twins: names under which logical tensors are written once more, with the tensors' own.
    """
    twins = twins or {}
    known = {spec.name: spec for spec in specs}
    again = (replace(known[name], name=twin) for twin, name in twins.items())
    whole = [(spec, (Slot.whole(twins.get(spec.name, spec.name), spec.shape),)) for spec in (*known.values(), *again)]
    return lay_out_slots(whole, config=config, side=side, shard_size=shard_size, left_out=left_out)


def lay_out_slots(
    held: Iterable[tuple[TensorSpec, tuple[Slot, ...]]],
    *,
    config: Mapping[str, object] | None,
    side: Side,
    shard_size: int,
    left_out: dict[str, str],
    indexed: bool = False,
    framework: str = "pt",
) -> Target:
    """The same for tensors that are made of several; see `lay_out`.

    Args:
        held: tensors under their names in the files, and where their elements come from.
        config: config.json's content; None copies the one among ``side`` as it is.
        side: files that travel with the model, by name.
        shard_size: bytes of tensors in a weight file, at most (one tensor at least).
        left_out: stored tensors that are not written, each with the reason.
        indexed: write an index of a single file, too.
        framework: see `dconv.checkpoint.safetensors.lay_out`.
    """
    held = list(held)
    places = {spec.name: slots for spec, slots in held}
    parts = safetensors.by_size((spec for spec, _ in held), shard_size)
    files: list[TargetFile] = []
    tensors: list[TargetTensor] = []
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        size, first, offsets = safetensors.lay_out(part, framework)
        files.append(TargetFile(name, size, ((0, first),)))
        for spec, offset in zip(part, offsets, strict=True):
            tensors.append(TargetTensor(spec.name, name, offset, spec, places[spec.name]))

    def closing() -> Iterable[tuple[str, bytes]]:
        if len(parts) > 1 or indexed:
            total = sum(tensor.spec.nbytes for tensor in tensors)
            weight_map = {tensor.spec.name: tensor.file for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            yield "model.safetensors.index.json", json.dumps(index, indent=2).encode()
        yield from side_bytes(config, side)
        if config and method_of(config) == GPTQ:
            yield GPTQ_FILE, (json.dumps(config[KEY], indent=2) + "\n").encode()

    return Target(tuple(files), tuple(tensors), closing, seal(config, side), left_out=left_out)


def with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """A config that says another dtype (torch's name), under the keys that it uses: transformers 4 and 5 differ."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}
