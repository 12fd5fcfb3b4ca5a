"""Qualcomm's QAIRT SDK: a decoder becomes a bundle for Genie, two graphs over one cache in one context binary.

``prompt_arN_clC_1_of_1`` reads N tokens at once, ``token_ar1_clC_1_of_1`` one behind up to C - 1: lengths in a graph's
name mean them to Genie (quic/ai-hub-models 0.46, ``_shared/llm/model.py``, ``construct_qnn_context_graph_name``;
``dconv.export.genie`` has the graphs themselves). The binary has their weights once. What was not tried, for want of
the SDK and of a device, is the SDK itself: `judge` therefore asks its own utility what the binary has.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from dconv.arch.layouts import size
from dconv.checkpoint.files import read_json
from dconv.describe import Described
from dconv.errors import Damaged, Refused, ToolMissing, VerifyFailed
from dconv.export.genai import generation_of
from dconv.export.genie import NAME
from dconv.export.prompt import kind_of
from dconv.export.runtimes import missing
from dconv.hw import genie_config, genie_samples, qairt_sdk, settings
from dconv.hw.driver import require_files, write_script
from dconv.hw.hexagon import CHIPS
from dconv.hw.mup import folded
from dconv.hw.target import Ask, Handing, Step, Takes, Terms, Tool
from dconv.quant.data import DEFAULT_WARNING, load
from dconv.quant.settings import Calibration
from dconv.request import Request

_DTYPES: Final = ("fp16", "w8a16")
_TAKES: Final = Takes(("decoder",), ("onnx",))
_ROLES: Final = ("prompt", "token")
#: onnxruntime-qnn takes it, too; the converter reads up to 22.
_OPSET: Final = 18
#: Bytes of a context binary at most: its offsets are 32 bits wide (reported of ExecuTorch's, too, pytorch/executorch
#: issue 17782), and Qualcomm's own models come in parts of one to two GB.
_LARGEST: Final = 1 << 31
BINARY: Final = "model_part_1_of_1.bin"
#: What the binary has, as the SDK's utility says it, and what it should have.
INFO: Final = "model_part_1_of_1.json"
METADATA: Final = "metadata.json"
_SETTINGS: Final = "htp_compile.json"
#: In a binary: the compiler's settings, of which these two say what it is for.
_TARGET: Final = re.compile(rb"soc_type=(\w+);arch=(\d+)")


@dataclass(frozen=True)
class Qairt:
    """The adapter's part for decoders that Genie runs."""

    title: str = "QAIRT for Genie"
    install: str = qairt_sdk.INSTALL

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips that Genie runs on, and the precisions that their HTP computes in."""
        return {name: ", ".join(_DTYPES[not chip.half :]) for name, chip in CHIPS.items()}

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Decoders, as ONNX graphs of given lengths."""
        return (_TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """Two graphs of a decoder, for a prompt and for one token, over one cache as long as the context."""
        kind = kind_of(model.family)
        if kind not in _TAKES.kinds:
            raise Refused("Genie runs language models, nothing was written", found=f"{model.family.name}, {kind}",
                          expected="a decoder")  # fmt: skip
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        longest = model.config.get("max_position_embeddings")
        longest = longest if type(longest) is int else 4096
        known = {
            "dtype": settings.among("fp16", *_DTYPES),
            "context": settings.whole(min(4096, longest), 8, 1 << 17),
            "prefill": settings.whole(128, 2, 4096),
            "nsamples": settings.whole(8, 1, 1024),
        }
        found = settings.settled(settings.asked(ask, "dtype", known["dtype"]), known, ask.where)
        dtype = str(found["dtype"])
        settings.require_of_use(ask, self.title, "--task", *(["--calibration"] if dtype == "fp16" else []))
        if dtype == "fp16" and not CHIPS[chip].half:
            raise Refused(f"the HTP of {chip} has no half precision, nothing was written", where=f"{chip} and fp16",
                          expected="w8a16", do="--quant w8a16")  # fmt: skip
        context, prefill = int(str(found["context"])), int(str(found["prefill"]))
        if not prefill + genie_samples.STEPS <= context <= longest:
            raise Refused("a prompt fits into the context, and this into the model, nothing was written",
                          where=ask.where, found=f"prefill {prefill}, context {context}",
                          expected=f"prefill + {genie_samples.STEPS} <= context <= {longest}")  # fmt: skip
        rope = _require_runnable(model, context)
        step, mup, notes = folded(model, request)
        _require_size(model, dtype)
        if dtype != "fp16":
            if module := missing("onnx"):
                raise ToolMissing("samples of a cache are computed by onnxruntime, nothing was written",
                                  found=f"no module {module}", do="pip install 'dconv[onnx]'")  # fmt: skip
            notes = (*notes, *(() if ask.calibration else (DEFAULT_WARNING,)))
        base = replace(step, format="onnx", dtype="f32", opset=_OPSET, ports=NAME)
        steps = tuple(
            Step(role, replace(base, lengths=(length, context - length)))
            for role, length in zip(_ROLES, (prefill, 1), strict=True)
        )
        graphs = {
            role: f"{role}_ar{length}_cl{context}_1_of_1" for role, length in zip(_ROLES, (prefill, 1), strict=True)
        }
        facts = {"layers": size(model.facts, "layers"), "mup": mup, "graphs": graphs, "rope": rope,
                 "soc_model": CHIPS[chip].model, "arch": CHIPS[chip].arch}  # fmt: skip
        weights = sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, found, facts), steps, model, notes, memory=12 * weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The SDK that ``QNN_SDK_ROOT`` or ``QAIRT_SDK_ROOT`` names; see `dconv.hw.qairt_sdk.find`."""
        return qairt_sdk.find(ask)

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write what Genie reads beside the binary, the HTP's settings, samples for codes, and ``compile.sh``."""
        facts: Mapping[str, Any] = handing.terms.facts
        graphs: dict[str, str] = dict(facts["graphs"])
        chip = CHIPS[handing.terms.platform]
        ports = {name: _ports(work / role / "model.onnx") for role, name in graphs.items()}
        given = ports[graphs["token"]]
        rope: dict[str, Any] = {**facts["rope"], "rope-dim": given["inputs"]["position_ids_cos"]["shape"][3]}
        sizes = {
            "context": given["inputs"]["attention_mask"]["shape"][3],
            "vocabulary": given["outputs"]["logits"]["shape"][2],
            "width": given["inputs"]["past_key_0_in"]["shape"][2],
        }
        model = handing.model
        config = genie_config.config_of(model.config, generation_of(model), rope, sizes, BINARY)
        genie = work / "genie"
        genie.mkdir(exist_ok=True)
        _write(genie / genie_config.CONFIG, config)
        _write(genie / genie_config.HTP, genie_config.on_device(chip))
        _write(genie / METADATA, {"graphs": ports})
        (genie / genie_config.TOKENIZER).write_bytes((work / "token" / genie_config.TOKENIZER).read_bytes())
        _write(work / _SETTINGS, genie_config.at_compile(chip, list(graphs.values())))
        quantised = handing.terms.settings["dtype"] != "fp16"
        if quantised:
            _calibrate(handing, work, ask, graphs, rope)
        names = [(name, role) for role, name in graphs.items()]
        folder = genie_samples.FOLDER if quantised else None
        write_script(work, qairt_sdk.script(names, BINARY, folder, _SETTINGS, INFO), self.install)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """What the SDK's own utility finds in the binary: chip, graphs, their ports, and one coding of the cache."""
        names = (genie_config.CONFIG, genie_config.HTP, genie_config.TOKENIZER)
        require_files(out, [BINARY, INFO, METADATA, *names])
        try:
            info: Any = read_json(out / INFO, what="what the SDK says of the binary").get("info")
            wanted: Any = read_json(out / METADATA, what=METADATA)["graphs"]
            said = {str(graph["info"]["graphName"]): _said(graph["info"]) for graph in info["graphs"]}
            _require_chip(terms, info, out / BINARY)
            if sorted(said) != sorted(wanted):
                raise VerifyFailed("the binary has other graphs", where=BINARY, expected=", ".join(sorted(wanted)),
                                   found=", ".join(sorted(said)) or "none")  # fmt: skip
            for name, ports in wanted.items():
                _require_ports(name, ports, said[name])
            _require_one_cache(said)
        except (Damaged, KeyError, TypeError, AttributeError) as fault:  # its JSON has another form than is known here
            raise VerifyFailed("the SDK does not say what is in the binary", where=INFO,
                               found=f"{type(fault).__name__}: {fault}"[:300]) from fault  # fmt: skip
        return {"chip": terms.platform, "soc_model": terms.facts["soc_model"], "graphs": sorted(said),
                "bytes": (out / BINARY).stat().st_size, "sdk": str(info.get("buildId", ""))}  # fmt: skip


def _require_runnable(model: Described, context: int) -> dict[str, Any]:
    """How the model rotates, in Genie's words.

    Raises:
        Refused: it has what Genie's mask, positions or bundle cannot say.
    """
    config = model.config
    window = config.get("sliding_window")
    if type(window) is int and window < context and config.get("use_sliding_window") is not False:
        raise Refused("Genie has one mask, and this model's windows another, nothing was written", where="config.json",
                      expected=f"a context of {window} at most", found=f"sliding_window {window}",
                      do=f'"context": {window}')  # fmt: skip
    if config.get("kv_lora_rank"):
        raise Refused("Genie keeps keys and values, and latent attention has others, nothing was written",
                      where="config.json", found="kv_lora_rank", do='"toolkit": "onnxruntime"')  # fmt: skip
    if genie_config.TOKENIZER not in model.source.side:
        raise Refused("Genie reads a tokenizer, nothing was written", where=str(model.source.root),
                      expected=genie_config.TOKENIZER, do="--hf-config DIR, of one that has it")  # fmt: skip
    genie_config.ends(config, generation_of(model))
    return genie_config.rotation(config)


def _require_size(model: Described, dtype: str) -> None:
    """Raise where the weights are more than a binary holds.

    Raises:
        Refused: with the size; parts are not made.
    """
    of = 2 if dtype == "fp16" else 1
    specs = model.logical.specs
    numbers = sum(prod(spec.shape) for spec in specs.values())
    if model.facts.get("tied"):  # looked up in one place, multiplied with in another
        numbers += size(model.facts, "vocab") * size(model.facts, "hidden")
    if numbers * of >= _LARGEST:
        raise Refused(
            "the model is more than one context binary holds, and dconv makes no parts, nothing was written",
            expected=f"less than {_LARGEST:,} bytes",
            found=f"{numbers * of:,} bytes of weights in {dtype}",
            do="--quant w8a16" if of == 2 and numbers < _LARGEST else "quic/ai-hub-models splits its own models",
        )


def _calibrate(handing: Handing, work: Path, ask: Ask, graphs: Mapping[str, str], rope: Mapping[str, Any]) -> None:
    prefill, context = (int(str(handing.terms.settings[name])) for name in ("prefill", "context"))
    pieces = min(2, (context - genie_samples.STEPS) // prefill)
    asked = Calibration(ask.calibration, int(str(handing.terms.settings["nsamples"])),
                        pieces * prefill + genie_samples.STEPS)  # fmt: skip
    texts = load(asked, work / "token", size(handing.model.facts, "vocab")).tokens
    prompt, token = (genie_samples.Graph.opened(graphs[role], work / role / "model.onnx", rope) for role in _ROLES)
    genie_samples.write(work, prompt, token, texts)


def _ports(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Inputs and outputs of a graph, its weights not read."""
    import onnx

    library: Any = onnx  # whose functions have types in part
    graph = library.load(str(path), load_external_data=False).graph

    def said(values: Any) -> dict[str, dict[str, Any]]:
        kind = library.helper.tensor_dtype_to_np_dtype
        return {
            one.name: {
                "shape": [axis.dim_value for axis in one.type.tensor_type.shape.dim],
                "dtype": str(kind(one.type.tensor_type.elem_type)),
            }
            for one in values
        }

    return {"inputs": said(graph.input), "outputs": said(graph.output)}


def _write(path: Path, said: Any) -> None:
    path.write_text(f"{json.dumps(said, indent=2)}\n")


def _said(graph: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Inputs and outputs by name, as the SDK's utility spells them."""
    return {
        side: {one["info"]["name"]: one["info"] for one in graph[key]}
        for side, key in (("inputs", "graphInputs"), ("outputs", "graphOutputs"))
    }


def _require_chip(terms: Terms, info: Mapping[str, Any], binary: Path) -> None:
    """Raise where the binary is for another chip, or does not say for which.

    Raises:
        VerifyFailed: with both.
    """
    facts = terms.facts
    chips: list[tuple[object, object]] = []  # what is said, and what should be
    if (number := info.get("socModel")) is not None:
        chips.append((number, facts["soc_model"]))
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        written = _TARGET.search(data)
        if written:
            chips += [(written[1].decode(), terms.platform), (written[2].decode(), str(facts["arch"]))]
    inside = info.get("contextMetadata", {}).get("info", {}).get("dspArch")
    archs = [] if inside is None else [(inside, facts["arch"])]
    if not chips or any(said != wanted for said, wanted in (*chips, *archs)):
        raise VerifyFailed("the binary does not say that it is for this chip", where=BINARY,
                           expected=f"{terms.platform}, soc_model {facts['soc_model']}, v{facts['arch']}",
                           found=", ".join(str(said) for said, _ in (*chips, *archs)) or "no chip")  # fmt: skip


def _require_ports(name: str, wanted: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where a graph has not the ports that Genie opens.

    Raises:
        VerifyFailed: inputs or outputs of other names or shapes, by which Genie finds them.
    """
    for side in ("inputs", "outputs"):
        expected = {port: one["shape"] for port, one in wanted[side].items()}
        found = {port: list(one.get("dimensions", ())) for port, one in said[side].items()}
        if expected != found:
            other = sorted(port for port in {*expected, *found} if expected.get(port) != found.get(port))
            raise VerifyFailed(f"{side} of {name} are not those that Genie opens", where=BINARY,
                               expected=", ".join(f"{port} {expected.get(port)}" for port in other[:4]),
                               found=", ".join(f"{port} {found.get(port)}" for port in other[:4]))  # fmt: skip


def _require_one_cache(said: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Raise where the cache is not one for all graphs.

    Raises:
        VerifyFailed: bytes of keys and values mean other numbers to one graph than to another.
    """
    meant: dict[str, dict[str, str]] = {}
    for name, sides in said.items():
        for ports in sides.values():
            for port, one in ports.items():
                if port.startswith("past_"):
                    codes = one.get("quantizeParams", {}).get("scaleOffset", {})
                    means = f"{one.get('dataType')} {codes.get('scale')} {codes.get('offset')}"
                    meant.setdefault(port.rpartition("_")[0], {})[f"{name} {port}"] = means
    for held in meant.values():
        if len(set(held.values())) > 1:
            raise VerifyFailed("the graphs do not agree on what the cache holds", where=BINARY,
                               found="\n".join(f"{port}: {means}" for port, means in held.items()))  # fmt: skip
