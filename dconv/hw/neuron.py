"""AWS Neuron: a HuggingFace directory, or a Neuron FP8 checkpoint, compiled by NxD Inference's ``inference_demo``.

FORMAT ``neuron`` without a chip is the checkpoint alone (`dconv.neuron`). Sources: see `dconv.hw.neuron_models` for
models and chips, ``drivers/neuron_driver.py`` for the command.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.arch.neuron import ROWS, lay_out, left_plain
from dconv.arch.rope import LONGROPE, for_older_loaders, rope_parameters
from dconv.checkpoint import safetensors
from dconv.checkpoint.files import read_json
from dconv.checkpoint.graphs import TORN
from dconv.describe import Described
from dconv.errors import Damaged, Refused, ToolMissing, UsageError, VerifyFailed
from dconv.hw import settings
from dconv.hw.driver import Driver
from dconv.hw.mup import folded
from dconv.hw.neuron_models import (
    CHIPS,
    FAMILIES,
    FP8_FAMILIES,
    Sizes,
    heads_of,
    known_config,
    plain,
    sizes_of,
    widths,
)
from dconv.hw.target import Ask, Handing, Step, Takes, Terms, Tool
from dconv.neuron import QUANT
from dconv.request import Request
from dconv.sharding.parsed import is_dict
from dconv.sharding.region import Index

_HF: Final = "hf"
_FP8: Final = "neuron"
EXCLUSIONS: Final = "modules_to_not_convert.json"
MODEL: Final = "model.pt"
CONFIG: Final = "neuron_config.json"
_SHARD: Final = re.compile(r"tp(\d+)_sharded_checkpoint\.safetensors")
_DONE: Final = re.compile(r"Compiling and tracing time: [0-9.]+ seconds")
#: Of every archive of torch.jit, below its own name.
_INSIDE: Final = ("data.pkl", "version")
#: Settings that the vendor's config repeats under the same name.
_REPEATED: Final = ("tp_degree", "batch_size", "seq_len", "max_context_length", "logical_nc_config")


@dataclass(frozen=True)
class Neuron:
    """The adapter."""

    title: str = "AWS Neuron NxD Inference"
    install: str = (
        "pip install neuronx-cc==2.* torch-neuronx==2.9.* neuronx-distributed neuronx-distributed-inference\n"
        "from the vendor's own index (the public one has placeholders of these names) in an environment of its own,\n"
        "or an AWS deep learning image; then --toolchain-python DIR/bin/python. A chip is not needed to compile"
    )

    @property
    def platforms(self) -> Mapping[str, str]:
        """Instance families, and what they are."""
        return {name: chip.words for name, chip in CHIPS.items()}

    @property
    def _driver(self) -> Driver:
        return Driver("neuron", self.install)

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Those that inference_demo has a class for."""
        return (Takes(("decoder",), families=FAMILIES),)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """A directory in bf16 or Neuron's FP8 form; unless it is named, ``tp_degree`` is the smallest that fits."""
        name = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        chip = CHIPS[name]
        known = {
            "dtype": settings.among("bf16", "bf16", QUANT),
            "tp_degree": settings.whole(None, 1, 1024),
            "batch_size": settings.whole(1, 1, 1024),
            "seq_len": settings.whole(None, 16, 1 << 20),
            "max_context_length": settings.whole(None, 16, 1 << 20),
            "logical_nc_config": settings.among(next(iter(chip.logical)), *chip.logical),
            "on_device_sampling": settings.flag(False),
            "enable_bucketing": settings.flag(False),
            "save_sharded_checkpoint": settings.flag(True),
        }
        settings.require_of_use(ask, self.title, "--calibration", "--task")
        given = settings.asked(ask, "dtype", known["dtype"])
        found = settings.settled({**given, **_degree(ask)}, known, ask.where)
        compiled = plain(model)
        said = known_config(compiled, name)
        _require_numbers(request, name, str(found["dtype"]), compiled.family.name)
        found |= _lengths(found, said, ask.where)
        fp8 = found["dtype"] == QUANT
        found["tp_degree"], sizes = _cores(found, compiled, said, name)
        cores = int(str(found["tp_degree"]))
        if fp8 and said["intermediate_size"] % cores:
            raise Refused("rows of scales are not padded, nothing was written", where=f"tp_degree {cores}",
                          expected="a part of intermediate_size", found=str(said["intermediate_size"]))  # fmt: skip
        step, mup, notes = folded(model, replace(request, dtype="bf16"))
        if fp8:
            step = replace(step, format="neuron", quant=QUANT)
        facts = {
            "layers": said["num_hidden_layers"],
            "mup": mup,
            "model_type": compiled.family.name,
            "plain": list(_plain_of(compiled)) if fp8 else [],
        }
        notes = (*notes, *_notes(said, found, name, sizes))
        # the whole checkpoint, the part of a core at a time, and what is written
        return Handing(Terms(name, found, facts), (Step(_FP8 if fp8 else _HF, step),), model, notes, 3 * sizes.weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The interpreter with NxD Inference, whose inference_demo must have a class for the model."""
        tool = self._driver.find(ask)
        types = tool.details.get("model_types")
        if terms is not None and terms.facts["model_type"] not in (types if isinstance(types, list) else ()):
            raise ToolMissing(f"{tool.words} has no such model, nothing was written",
                              where=str(tool.details.get("python")), expected=str(terms.facts["model_type"]),
                              found=f"{types}", do=self.install)  # fmt: skip
        return tool

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write the driver, its job, and for FP8 the list of modules that have no codes."""
        (step,), terms = handing.steps, handing.terms
        path = work / step.role / "config.json"
        # a class of transformers 4 takes its defaults for a rotation that is said in newer keys alone
        config = for_older_loaders(read_json(path, what=path.name))
        path.write_text(f"{json.dumps(config, indent=2)}\n")
        source = {"model": step.role}
        if terms.settings["dtype"] == QUANT:
            listed = exclusions(work / step.role)
            if listed != terms.facts["plain"]:
                raise VerifyFailed("the checkpoint is not quantised as was planned", where=str(work / step.role),
                                   expected=f"{terms.facts['plain']}", found=f"{listed}")  # fmt: skip
            (work / EXCLUSIONS).write_text(f"{json.dumps({'modules_to_not_convert': listed}, indent=2)}\n")
            source["exclusions"] = EXCLUSIONS
        agreed = {**terms.settings, "model_type": terms.facts["model_type"]}
        self._driver.lay_out(handing, work, source, agreed)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """The line of success, a whole archive of torch.jit, a config that says what was asked for, weights by core."""
        said = self._driver.result(out)
        done = _DONE.search(log)
        if done is None or said["evidence"].get("said") != done.group():
            raise VerifyFailed("inference_demo ended well without a word of it", expected=_DONE.pattern)
        _judge_archive(out / MODEL)
        _judge_config(out / CONFIG, terms)
        weights = _judge_weights(out, terms)
        return {"said": done.group(), "bytes": (out / MODEL).stat().st_size, **weights}


def _degree(ask: Ask) -> dict[str, int]:
    """``--tp``, which says the same as ``tp_degree``."""
    if ask.tp is None:
        return {}
    inside = ask.settings.get("tp_degree")
    if inside not in (None, ask.tp):
        raise UsageError("two parallel sizes are named, nothing was written", where=f"--tp {ask.tp}",
                         found=f"tp_degree: {inside!s:.40}")  # fmt: skip
    return {"tp_degree": ask.tp}


def _require_numbers(request: Request, chip: str, dtype: str, family: str) -> None:
    if request.dtype not in (None, "bf16"):
        raise UsageError("what is not in FP8 is compiled in bf16, nothing was written", where="--dtype",
                         expected="bf16", found=str(request.dtype), do="leave it out")  # fmt: skip
    if dtype != QUANT:
        if request.neuron_rescale is not None or request.neuron_scale is not None:
            raise UsageError("bf16 has no codes and no scales, nothing was written",
                             where="--neuron-rescale, --neuron-scale", expected="--quant fp8 beside it")  # fmt: skip
        return
    if not CHIPS[chip].fp8:
        has = ", ".join(name for name, one in CHIPS.items() if one.fp8)
        raise Refused(f"FP8 is not documented for {chip}, nothing was written", where=f"{chip} and {dtype}",
                      expected="bf16", do=f"{has} has it")  # fmt: skip
    if family not in FP8_FAMILIES:
        raise Refused(f"NxD Inference's {family} reads no FP8 checkpoint, nothing was written",
                      expected=", ".join(FP8_FAMILIES), do="bf16")  # fmt: skip
    if request.neuron_scale == "reciprocal":
        raise UsageError("NxD Inference multiplies by its scales, nothing was written",
                         where="--neuron-scale reciprocal", expected="multiplier", do="leave it out")  # fmt: skip


def _lengths(found: Mapping[str, object], said: Mapping[str, Any], where: str) -> dict[str, int]:
    """Tokens of a sequence, and of a prompt.

    Raises:
        Refused: more than the model has, or a prompt longer than a sequence; or a rotation that changes in its midst.
    """
    most = int(said.get("max_position_embeddings") or 1 << 20)
    rope = rope_parameters(said)
    short = rope.get("original_max_position_embeddings", said.get("original_max_position_embeddings"))
    length = int(str(found["seq_len"] or min(2048, most)))
    prompt = int(str(found["max_context_length"] or length))
    if length > most:
        raise Refused("a sequence is longer than the model's positions, nothing was written", where=where,
                      expected=f"seq_len up to max_position_embeddings {most}", found=str(length))  # fmt: skip
    if prompt > length:
        raise Refused("a prompt is no longer than the sequence, nothing was written", where=where,
                      expected=f"max_context_length up to seq_len {length}", found=str(prompt))  # fmt: skip
    if rope["rope_type"] == LONGROPE and isinstance(short, int) and length > short:
        raise Refused("a graph has one of longrope's two lists of factors, nothing was written", where=where,
                      expected=f"seq_len up to original_max_position_embeddings {short}", found=str(length),
                      do="transformers changes from the one to the other behind that many tokens")  # fmt: skip
    return {"seq_len": length, "max_context_length": prompt}


def _cores(found: Mapping[str, object], model: Described, said: Mapping[str, Any], name: str) -> tuple[int, Sizes]:
    """The parallel size that was asked for, or the smallest that holds the model.

    Raises:
        Refused: the runtime has no such one, the widths are no multiple of it, or the model is too large for it.
    """
    together = int(str(found["logical_nc_config"]))
    memory, degrees = CHIPS[name].logical[together]
    tokens = int(str(found["batch_size"])) * int(str(found["seq_len"]))
    asked = found["tp_degree"]
    if asked is not None and asked not in degrees:
        raise Refused(f"{name} has no such parallel size, nothing was written", where="tp_degree, --tp",
                      expected=", ".join(map(str, degrees)) + f" (logical_nc_config {together})", found=str(asked),
                      do=f"its largest instance has {max(CHIPS[name].instances.values())} cores"
                      if isinstance(asked, int) and asked > degrees[-1] else "")  # fmt: skip
    least, uneven = None, None
    for cores in (asked,) if isinstance(asked, int) else degrees:
        least = sizes_of(model, said, cores, tokens, found["dtype"] == QUANT)
        if least.weights + least.cache > cores * memory:
            continue
        width = next((key for key in widths(said) if said[key] % cores), None)
        if width is None:
            return cores, least
        uneven = uneven or (width, cores)
    if uneven is not None:
        raise Refused("a width is not divided by the parallel size, nothing was written", where=uneven[0],
                      expected=f"a multiple of {uneven[1]}", found=str(said[uneven[0]]))  # fmt: skip
    raise Refused(
        f"the model does not fit into {name}'s memory, nothing was written",
        where=f"tp_degree {asked or degrees[-1]}, batch_size {found['batch_size']}, seq_len {found['seq_len']}",
        expected=f"{memory / 1e9:.1f} GB a core",
        found="" if least is None else f"{least.weights / 1e9:.1f} GB of weights, {least.cache / 1e9:.1f} GB of cache",
    )


def _notes(said: Mapping[str, Any], found: Mapping[str, object], name: str, sizes: Sizes) -> tuple[str, ...]:
    cores = int(str(found["tp_degree"]))
    queries, keys = said["num_attention_heads"], said["num_key_value_heads"]
    padded, copied = heads_of(said, cores)
    notes = [f"{cores} cores: {sizes.weights / cores / 1e9:.2f} GB of weights and "
             f"{sizes.cache / cores / 1e9:.2f} GB of cache each"]  # fmt: skip
    if found["logical_nc_config"] == next(iter(CHIPS[name].logical)):
        fits = [instance for instance, count in CHIPS[name].instances.items() if count >= cores]
        notes[0] += f", as {', '.join(fits)} has" if fits else ""
    if (padded, copied) != (queries, keys):
        notes.append(f"NxD Inference makes {padded} query heads of {queries} and {copied} key heads of {keys}, "
                     "by padding and by copies, for that many cores")  # fmt: skip
    if not found["save_sharded_checkpoint"]:
        notes.append(
            "weights are not part of what is compiled: the runtime cuts them at every start, from --model-path"
        )
    return tuple(notes)


def _plain_of(model: Described) -> tuple[str, ...]:
    held = lay_out(model.family, model.facts)
    return left_plain({one.name: one.shape for one in held}, {one.name for one in held if one.fp8 == ROWS})


def exclusions(folder: Path) -> list[str]:
    """``modules_to_not_convert`` of a Neuron checkpoint, as its tensors are.

    Raises:
        Damaged: see `dconv.checkpoint.safetensors.read_header`.
    """
    shapes: dict[str, Index] = {}
    quantised: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in safetensors.read_header(file).items():
            shapes[name] = stored.spec.shape
            if stored.spec.dtype == "f8_e4m3":
                quantised.add(name)
    return list(left_plain(shapes, quantised))


def _judge_archive(path: Path) -> None:
    """Raise where this is no whole archive of torch.jit."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
            broken = archive.testzip()
    except TORN as fault:
        raise VerifyFailed("the compiled model is no archive of torch.jit", where=MODEL, found=str(fault)) from fault
    if lacking := [name for name in _INSIDE if name not in names]:
        raise VerifyFailed("the compiled model is no archive of torch.jit", where=MODEL, expected=", ".join(lacking))
    if broken:
        raise VerifyFailed("the compiled model is damaged", where=f"{broken} in {MODEL}")


def _judge_config(path: Path, terms: Terms) -> None:
    """Raise where the vendor's config does not repeat what was asked for."""
    try:
        inner = read_json(path, what=path.name).get("neuron_config")
    except (Damaged, OSError) as fault:
        raise VerifyFailed(
            "the compiled model's config cannot be read", where=CONFIG, found=str(fault)[:300]
        ) from fault
    said: Mapping[str, object] = inner if is_dict(inner) else {}
    fp8 = terms.settings["dtype"] == QUANT
    wanted = {key: terms.settings[key] for key in _REPEATED} | {"torch_dtype": "bfloat16", "quantized": fp8}
    wanted["save_sharded_checkpoint"] = terms.settings["save_sharded_checkpoint"]
    if fp8:
        wanted |= {"quantization_dtype": "f8e4m3", "quantization_type": "per_channel_symmetric",
                   "modules_to_not_convert": terms.facts["plain"]}  # fmt: skip
    if wrong := {key: said.get(key) for key, value in wanted.items() if said.get(key) != value}:
        raise VerifyFailed(
            "something else was compiled than was asked for",
            where=CONFIG,
            expected=", ".join(f"{key} {wanted[key]}" for key in wrong),
            found=", ".join(f"{key} {value!s:.80}" for key, value in wrong.items()),
        )


def _judge_weights(out: Path, terms: Terms) -> dict[str, object]:
    """Raise where there is not one whole file of weights for each core."""
    there = {path.name: path for path in sorted((out / "weights").glob("*"))}
    ranks = sorted(int(found[1]) for name in there if (found := _SHARD.fullmatch(name)))
    cores = int(str(terms.settings["tp_degree"])) if terms.settings["save_sharded_checkpoint"] else 0
    if ranks != list(range(cores)) or len(there) != cores:
        raise VerifyFailed("parts of the weights are missing, or too many", where="weights",
                           expected=f"a file for each of {cores} cores", found=", ".join(there) or "none")  # fmt: skip
    for path in there.values():
        try:
            tensors = safetensors.read_header(path)
        except (Damaged, OSError) as fault:
            raise VerifyFailed("a file of weights is not whole", where=path.name, found=str(fault)[:300]) from fault
        if not tensors:
            raise VerifyFailed("a file of weights has none", where=path.name)
    return {"shards": cores, "weights": sum(path.stat().st_size for path in there.values())}


ADAPTER: Final = Neuron()
