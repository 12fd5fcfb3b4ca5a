"""What a path is, at a glance: its kind, its family and its sizes, from names and headers alone.

A shell waits for this at every key, so no weights are read, nothing is fetched, and a config.json is believed without
the tensors that it speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv import directions, matrix
from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import bmtrain, detect, graphs, megatron, safetensors, signs
from dconv.checkpoint.files import listed, read_json
from dconv.coded import encode
from dconv.errors import DconvError, UsageError
from dconv.export.prompt import kind_of
from dconv.request import CALIBRATED
from dconv.sharding.parsed import mapping_or_empty
from dconv.targets import GRAPHS

#: More than the index of any model that is published.
_LARGEST_INDEX: Final = 1 << 24
#: ``quant_method`` of a config.json -> a key of `dconv.matrix.INPUTS`.
_CODED: Final = {"gptq": "gptq", "awq": "awq", "fp8": "fp8", "mxfp4": "mx", "quark": "mx", "compressed-tensors": "fp8"}
#: FORMATs that are a hardware compiler's.
COMPILERS: Final = ("mtk", "rk", "qnn", "ax", "neuron")


@dataclass(frozen=True)
class Glance:
    """What is known of a checkpoint without a look at its weights.

    Attributes:
        kind: a key of `dconv.matrix.INPUTS`.
        family, config, facts: None and empty where it is a graph, or does not say them.
    """

    path: Path
    kind: str
    family: Family | None
    config: Mapping[str, object]
    facts: Facts

    @property
    def words(self) -> str:
        """For a person."""
        name = f"{self.family.name}, " if self.family else ""
        return f"{name}{matrix.INPUTS[self.kind].words}"

    def formats(self) -> tuple[str, ...]:
        """FORMATs that it becomes, by their first spelling, hardware compilers' among them."""
        made = [one for one in matrix.outputs() if matrix.numbers(self.kind, one) != "refused"]
        if self.family is None:
            return tuple(made)
        made = [one for one in made if self._family_has(self.family, one)]
        if matrix.INPUTS[self.kind].graph:
            return tuple(made)
        return (*made, *(one for one in COMPILERS if one not in made and self._family_has(self.family, one)))

    def _family_has(self, family: Family, format: str) -> bool:
        """Whether a FORMAT has a form for this family at all."""
        if format == "bmtrain":  # of which this very config decides
            return bmtrain.has_form(family, self.facts, self.config)
        if format in COMPILERS and directions.is_for(family, format) is not False:
            return True
        if format in GRAPHS:  # here and below all but what transformers knows, which takes longer than a shell waits
            return kind_of(family) != "sighted"
        if format in CALIBRATED:
            return encode.has_codes(family, stacked=False)
        return format in matrix.outputs() and directions.is_made(family, format) is True


def glance(
    path: Path,
    *,
    source_format: str | None = None,
    model_type: str | None = None,
    hf_config: Path | None = None,
) -> Glance:
    """Look at a checkpoint that is here.

    Raises:
        UsageError: there is nothing at ``path``; it may be a name on the hub, which is not asked.
        DconvError: it is nothing that dconv reads.
    """
    path = path.expanduser()
    if not path.exists():
        raise UsageError("there is no such checkpoint here", where=str(path))
    if graph := graphs.archive_of(path):
        return Glance(path, graph.kind, None, {}, {})
    if signs.is_onnx(path):
        return Glance(path, "onnx", None, {}, {})
    own = None if path.is_file() or hf_config else _own_config(path)
    if own is not None and not source_format:
        config, names, kind = own
        family = registry.by_name(model_type) if model_type else registry.detect(config, None, names)
        return Glance(path, kind, family, config, family.facts(config))
    source = detect.open_source(path, source_format, config_alone=True)
    config = read_json(hf_config.expanduser() / "config.json", what="config.json") if hf_config else source.config
    family = registry.by_name(model_type) if model_type else registry.detect(config, source.args, source.shapes)
    if config is None:
        config = family.config.to_hf(source.args or {})
    kind = source.format if source.format in matrix.INPUTS else "huggingface"
    if kind == "gguf" and source.coded:
        kind = "gguf_blocks"
    return Glance(path, kind, family, config, family.facts(config, source.shapes))


def _own_config(path: Path) -> tuple[Mapping[str, object], Sequence[str], str] | None:
    """HuggingFace's config.json of a directory, names of its tensors where they are quickly read, and its kind.

    None where its container has to be opened.
    """
    folder = megatron.find_iteration(path)
    if listed(folder, "*.distcp") or listed(folder, "mp_rank_*"):
        config = megatron.sides(folder)[0]
        return None if config is None else (config, (), "torch_dist" if listed(folder, "*.distcp") else "legacy")
    if not (folder / "config.json").exists() or listed(folder, f"*{signs.GGUF}"):
        return None
    config = read_json(folder / "config.json", what="config.json")
    if "hidden_size" not in config and "dim_model" in config:  # BMTrain's
        return None
    if not (listed(folder, "*.safetensors") or listed(folder, "pytorch_model*.bin")):
        others = [name for name in ("*.pth", "*.pt", "*.bin") if listed(folder, name)]
        return None if others else (config, (), "huggingface")
    kind = _kind(folder, config)
    return config, _names(folder), kind


def _kind(folder: Path, config: Mapping[str, object]) -> str:
    found = "neuron" if signs.is_neuron(folder) else "mlx" if signs.is_mlx(folder) else "huggingface"
    coded = config.get("quantization_config")
    method = mapping_or_empty(coded).get("quant_method")
    if found == "mlx":
        return "mlx_codes" if isinstance(config.get("quantization"), Mapping) else "mlx"
    if found == "neuron":
        return "neuron_fp8" if coded else "neuron"
    return _CODED.get(str(method), "huggingface") if method else "huggingface"


def _names(folder: Path) -> Sequence[str]:
    """Names of stored tensors, of the index or of the one file's header; none where they are not as they should be."""
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file() and index.stat().st_size <= _LARGEST_INDEX:
            said = read_json(index, what=index.name).get("weight_map")
            return tuple(map(str, mapping_or_empty(said)))
        return tuple(safetensors.read_header(one)) if one.is_file() else ()
    except DconvError:
        return ()
