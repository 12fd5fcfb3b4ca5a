"""One function for each parser of dconv that reads bytes which somebody else may have written: bytes in, nothing out.

A refusal in dconv's own words passes. All else that a parser raises does not, and neither does a refusal that nobody
could read. ``fuzz/run.py`` feeds them; plain Python can: ``TARGETS["gguf"].run(data)``.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from fuzz import folders
from fuzz.mutators import behind_length, in_json, in_pickle, in_protobuf
from fuzz.target import TARGETS, Target, as_text, mapping, part, target

__all__ = ["TARGETS", "Target"]

# containers -----------------------------------------------------------------------------------------------------------


@target("checkpoint/safetensors.py", "sharding/dtypes.py", form=lambda words: behind_length(in_json(words)))
def safetensors(data: bytes) -> None:
    """The header of one file."""
    from dconv.checkpoint.safetensors import framework, read_header

    path = folders.put("one.safetensors", data)
    read_header(path)
    framework(path)


@target("checkpoint/huggingface.py", "checkpoint/files.py", form=in_json)
def safetensors_index(data: bytes) -> None:
    """``model.safetensors.index.json`` beside the files that it should name."""
    model = folders.checkpoint("sharded")
    (model / "model.safetensors.index.json").write_bytes(data)
    _describe(model)


@target("coded/*.py", "checkpoint/signs.py", "checkpoint/mlx.py", "checkpoint/neuron.py", "arch/mlx*.py",
        "arch/neuron.py", form=in_json)  # fmt: skip
def huggingface(data: bytes) -> None:
    """A directory: its config, and headers that are whole, of which quantised forms are told.

    The input is ``{"config": {}, "beside": {name: {}}, "tensors": {name: [dtype, shape]}}``.
    """
    said = mapping(data)
    model = folders.scratch() / "coded"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(said.get("config")))
    folders.safetensors(model / "model.safetensors", part(said, "tensors"))
    _describe(model)


@target("checkpoint/allowed.py", "checkpoint/inert.py", form=in_pickle)
def pickle(data: bytes) -> None:
    """A pickle, read as data."""
    from dconv.checkpoint import inert, pickled

    pickled.bounded(inert.load(data, where="pickle"), where="pickle")


@target("checkpoint/torchzip.py", most=16384)
def torch_zip(data: bytes) -> None:
    """A file of ``torch.save``, byte by byte."""
    _torch_file(folders.put("one.pt", data))


@target("checkpoint/torchzip.py", "checkpoint/allowed.py", form=in_pickle)
def torch_frame(data: bytes) -> None:
    """A file of ``torch.save`` of before torch 1.6."""
    from dconv.checkpoint.torchzip import _LEGACY_MAGIC

    _torch_file(folders.put("one.pt", _LEGACY_MAGIC + data.removeprefix(_LEGACY_MAGIC)))


def _torch_file(path: Path) -> None:
    from dconv.checkpoint import torchzip
    from dconv.checkpoint.pickled import TensorRef

    found = torchzip.read(path)
    values = found.tree.values() if isinstance(found.tree, dict) else [found.tree]
    for value in values:
        if isinstance(value, TensorRef):
            found.locate(value)


@target("checkpoint/allowed.py", "checkpoint/pt.py", "checkpoint/state_dict.py", form=in_pickle)
def state_dict(data: bytes) -> None:
    """The pickle of a plain state dict, in a file that is whole."""
    _pickled("pt", "pytorch_model.bin", data)


@target("checkpoint/allowed.py", "checkpoint/legacy.py", "checkpoint/megatron.py", form=in_pickle, most=16384)
def megatron_legacy(data: bytes) -> None:
    """The pickle of ``mp_rank_00``, in a file that is whole."""
    _pickled("legacy", "release/mp_rank_00/model_optim_rng.pt", data)


@target("checkpoint/allowed.py", "checkpoint/torch_dist.py", form=in_pickle, most=16384)
def megatron_common(data: bytes) -> None:
    """The pickle of a torch_dist checkpoint's ``common.pt``."""
    _pickled("torch_dist", "release/common.pt", data)


def _pickled(kind: str, name: str, data: bytes) -> None:
    model = folders.checkpoint(kind)
    whole = folders.whole(kind) / name
    (model / name).write_bytes(folders.with_pickle(whole, data))
    _describe(model)


@target("checkpoint/dcp.py", "checkpoint/allowed.py", form=in_pickle, most=16384)
def dcp_metadata(data: bytes) -> None:
    """``.metadata`` of torch_dist, beside the files that it speaks of."""
    model = folders.checkpoint("torch_dist")
    (model / "release" / "common.pt").write_bytes((folders.whole("torch_dist") / "release" / "common.pt").read_bytes())
    (model / "release" / ".metadata").write_bytes(data)
    _describe(model)


@target("checkpoint/run_config.py", "arch/args.py")
def megatron_run_config(data: bytes) -> None:
    """``run_config.yaml`` of Megatron-Bridge."""
    from dconv.arch.registry import detect
    from dconv.checkpoint.run_config import read_args

    args, _ = read_args(folders.put("run_config.yaml", data))
    if args is not None:
        detect(None, args).config.to_hf(args)


@target("checkpoint/model_pt.py", "arch/args.py", form=in_json)
def model_pt(data: bytes) -> None:
    """``metadata.json`` beside a ``model.pt``, which has nothing else to say what it is."""
    model = folders.checkpoint("model_pt")
    (model / "metadata.json").write_bytes(data)
    (model / "huggingface" / "config.json").unlink(missing_ok=True)
    _describe(model)


@target("checkpoint/megatron.py", "checkpoint/detect.py", most=256)
def megatron_tracker(data: bytes) -> None:
    """``latest_checkpointed_iteration.txt``."""
    model = folders.checkpoint("legacy")
    (model / "latest_checkpointed_iteration.txt").write_bytes(data)
    _describe(model)


@target("arch/bmtrain.py", form=in_json)
def bmtrain(data: bytes) -> None:
    """The config.json beside a state dict of BMTrain."""
    model = folders.checkpoint("bmtrain")
    (model / "config.json").write_bytes(data)
    _describe(model)


@target("arch/meta.py", "checkpoint/meta.py", form=in_json)
def meta_params(data: bytes) -> None:
    """``params.json`` beside Meta's shards."""
    model = folders.checkpoint("meta")
    (model / "params.json").write_bytes(data)
    _describe(model)


@target("checkpoint/gguf_header.py", "arch/gguf_metadata.py")
def gguf_header(data: bytes) -> None:
    """A GGUF's header, byte by byte."""
    from dconv.checkpoint.gguf_header import raw_values, read_header

    path = folders.put("one.gguf", data)
    read_header(path)
    raw_values(path)


@target("arch/gguf*.py", "checkpoint/gguf.py", "checkpoint/gguf_vocabulary.py", form=in_json)
def gguf(data: bytes) -> None:
    """What a GGUF says, in a file that is whole: ``{"values": {key: value}, "tensors": {name: [type, shape]}}``."""
    said = mapping(data)
    path = folders.scratch() / "model.gguf"
    folders.gguf(path, part(said, "values"), part(said, "tensors"))
    _describe(path)


@target("checkpoint/onnx.py", form=lambda _: in_protobuf)
def onnx(data: bytes) -> None:
    """A graph of ONNX, its external data beside it."""
    folders.put("graph/model.onnx.data", bytes(256))
    _describe(folders.put("graph/model.onnx", data))


@target("checkpoint/graphs.py", most=16384)
def graph_archive(data: bytes) -> None:
    """An archive of torch.export or TorchScript, looked at and written for another device."""
    from dconv.checkpoint import graphs

    found = graphs.archive_of(folders.put("archive/model.pt2", data))
    if found is not None:
        graphs.device_of(found)
        graphs.placed_anew(found, "cuda:0")


@target("checkpoint/graphs.py", form=in_json)
def graph_records(data: bytes) -> None:
    """Records of such an archive, in a zip that is whole: ``{name: text or JSON}``."""
    records = [
        (f"model/{name}"[:99], as_text(value).encode("utf-8", "replace")) for name, value in mapping(data).items()
    ]
    with suppress(ValueError):  # a name that no zip has
        graph_archive(folders.torch_zip(records))


# what says which model it is ------------------------------------------------------------------------------------------


@target("arch/*.py", "describe.py", "checkpoint/config_alone.py", form=in_json)
def config(data: bytes) -> None:
    """A config.json of any family: what a plan makes of it alone, as Megatron's args too."""
    from dconv.describe import describe_model

    path = folders.put("alone/config.json", data)
    found = describe_model(path.parent, config_alone=True)
    found.family.config.to_args(found.config)


@target("arch/*.py", form=in_json)
def megatron_args(data: bytes) -> None:
    """Megatron's args of any family, as JSON has them."""
    from dconv.arch.registry import detect

    args = mapping(data)
    detect(None, args).config.to_hf(args)


def _describe(path: Path) -> None:
    """As every command begins: which container it is, which model, and where each of its tensors lies."""
    from dconv.describe import describe_model

    describe_model(path)


from fuzz import small_targets  # noqa: F401 - they join the others
