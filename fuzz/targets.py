"""One function for each parser of dconv that reads bytes which somebody else may have written: bytes in, nothing out.

A refusal in dconv's own words passes. All else that a parser raises does not, and neither does a refusal that nobody
could read. ``fuzz/run.py`` feeds them; plain Python can: ``TARGETS["gguf"].run(data)``.
"""

from __future__ import annotations

import ast
import functools
import json
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.errors import DconvError
from fuzz import folders
from fuzz.mutators import Mutator, behind_length, in_json, in_pickle, in_protobuf

_ROOT: Final = Path(__file__).resolve().parent.parent
#: What a person is shown of a refusal; a file has no say in how much that is.
_MOST_LINES, _MOST_SAID = 40, 20_000


@dataclass(frozen=True)
class Target:
    """A parser to be fed.

    Attributes:
        reads: modules below ``dconv/`` whose words are worth trying.
        form: makes the mutator that keeps an input's form, of these words; None has libFuzzer's alone.
        most: bytes of an input.
    """

    name: str
    run: Callable[[bytes], None]
    reads: tuple[str, ...]
    form: Callable[[list[str]], Mutator] | None
    most: int

    def words(self) -> list[str]:
        """Texts that the parser itself has: keys, kinds, names."""
        return sorted({word for pattern in self.reads for word in _words(pattern)})

    def mutator(self) -> Mutator | None:
        return self.form(self.words()) if self.form else None


#: By name.
TARGETS: Final[dict[str, Target]] = {}


def _target(
    *reads: str, form: Callable[[list[str]], Mutator] | None = None, most: int = 8192
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def kept(parse: Callable[[bytes], None]) -> Callable[[bytes], None]:
        @functools.wraps(parse)
        def run(data: bytes) -> None:
            try:
                parse(data)
            except DconvError as refusal:
                _check_said(refusal)

        TARGETS[parse.__name__] = Target(parse.__name__, run, reads, form, most)
        return run

    return kept


def _check_said(refusal: DconvError) -> None:
    said = str(refusal)
    json.dumps(refusal.to_dict())
    if said.count("\n") >= _MOST_LINES or len(said) > _MOST_SAID:
        raise AssertionError(f"a refusal of {len(said)} characters in {said.count(chr(10)) + 1} lines: {said[:400]!r}")


@functools.cache
def _words(pattern: str) -> frozenset[str]:
    found = set[str]()
    for path in (_ROOT / "dconv").glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 60:
                found.add(node.value)
    return frozenset(word for word in found if " " not in word or "_" in word)


def _mapping(data: bytes) -> dict[str, Any]:
    """An input that is JSON by its form; what is none is nobody's file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _part(said: dict[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key)
    return value if isinstance(value, dict) else {}


# containers -----------------------------------------------------------------------------------------------------------


@_target("checkpoint/safetensors.py", "sharding/dtypes.py", form=lambda words: behind_length(in_json(words)))
def safetensors(data: bytes) -> None:
    """The header of one file."""
    from dconv.checkpoint.safetensors import framework, read_header

    path = folders.put("one.safetensors", data)
    read_header(path)
    framework(path)


@_target("checkpoint/huggingface.py", form=in_json)
def safetensors_index(data: bytes) -> None:
    """``model.safetensors.index.json`` beside the files that it should name."""
    model = folders.checkpoint("sharded")
    (model / "model.safetensors.index.json").write_bytes(data)
    _describe(model)


@_target("coded/*.py", "arch/mlx*.py", "arch/neuron.py", "codec/*.py", form=in_json)
def huggingface(data: bytes) -> None:
    """A directory: its config, and headers that are whole, of which quantised forms are told.

    The input is ``{"config": {}, "beside": {name: {}}, "tensors": {name: [dtype, shape]}}``.
    """
    said = _mapping(data)
    model = folders.scratch() / "coded"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(said.get("config")))
    folders.safetensors(model / "model.safetensors", _part(said, "tensors"))
    _describe(model)


@_target("checkpoint/allowed.py", "checkpoint/inert.py", form=in_pickle)
def pickle(data: bytes) -> None:
    """A pickle, read as data."""
    from dconv.checkpoint import inert

    inert.bounded(inert.load(data, where="pickle"), where="pickle")


@_target("checkpoint/torchzip.py", most=16384)
def torch_zip(data: bytes) -> None:
    """A file of ``torch.save``, byte by byte."""
    _torch_file(folders.put("one.pt", data))


@_target("checkpoint/torchzip.py", "checkpoint/allowed.py", form=in_pickle)
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


@_target("checkpoint/allowed.py", "checkpoint/pt.py", "checkpoint/state_dict.py", form=in_pickle)
def state_dict(data: bytes) -> None:
    """The pickle of a plain state dict, in a file that is whole."""
    _pickled("pt", "pytorch_model.bin", data)


@_target("checkpoint/allowed.py", "checkpoint/legacy.py", "checkpoint/megatron.py", form=in_pickle, most=16384)
def megatron_legacy(data: bytes) -> None:
    """The pickle of ``mp_rank_00``, in a file that is whole."""
    _pickled("legacy", "release/mp_rank_00/model_optim_rng.pt", data)


@_target("checkpoint/allowed.py", "checkpoint/torch_dist.py", form=in_pickle, most=16384)
def megatron_common(data: bytes) -> None:
    """The pickle of a torch_dist checkpoint's ``common.pt``."""
    _pickled("torch_dist", "release/common.pt", data)


def _pickled(kind: str, name: str, data: bytes) -> None:
    model = folders.checkpoint(kind)
    whole = folders.whole(kind) / name
    (model / name).write_bytes(folders.with_pickle(whole, data))
    _describe(model)


@_target("checkpoint/dcp.py", "checkpoint/allowed.py", form=in_pickle, most=16384)
def dcp_metadata(data: bytes) -> None:
    """``.metadata`` of torch_dist, beside the files that it speaks of."""
    model = folders.checkpoint("torch_dist")
    (model / "release" / "common.pt").write_bytes((folders.whole("torch_dist") / "release" / "common.pt").read_bytes())
    (model / "release" / ".metadata").write_bytes(data)
    _describe(model)


@_target("checkpoint/run_config.py", "arch/args.py")
def megatron_run_config(data: bytes) -> None:
    """``run_config.yaml`` of Megatron-Bridge."""
    from dconv.arch.registry import detect
    from dconv.checkpoint.run_config import read_args

    args, _ = read_args(folders.put("run_config.yaml", data))
    if args is not None:
        detect(None, args).config.to_hf(args)


@_target("checkpoint/model_pt.py", "arch/args.py", form=in_json)
def model_pt(data: bytes) -> None:
    """``metadata.json`` beside a ``model.pt``, which has nothing else to say what it is."""
    model = folders.checkpoint("model_pt")
    (model / "metadata.json").write_bytes(data)
    (model / "huggingface" / "config.json").unlink(missing_ok=True)
    _describe(model)


@_target("checkpoint/megatron.py", most=256)
def megatron_tracker(data: bytes) -> None:
    """``latest_checkpointed_iteration.txt``."""
    model = folders.checkpoint("legacy")
    (model / "latest_checkpointed_iteration.txt").write_bytes(data)
    _describe(model)


@_target("arch/bmtrain.py", form=in_json)
def bmtrain(data: bytes) -> None:
    """The config.json beside a state dict of BMTrain."""
    model = folders.checkpoint("bmtrain")
    (model / "config.json").write_bytes(data)
    _describe(model)


@_target("arch/config.py", "checkpoint/meta.py", form=in_json)
def meta_params(data: bytes) -> None:
    """``params.json`` beside Meta's shards."""
    model = folders.checkpoint("meta")
    (model / "params.json").write_bytes(data)
    _describe(model)


@_target("checkpoint/gguf_header.py", "arch/gguf_metadata.py")
def gguf_header(data: bytes) -> None:
    """A GGUF's header, byte by byte."""
    from dconv.checkpoint.gguf_header import raw_values, read_header

    path = folders.put("one.gguf", data)
    read_header(path)
    raw_values(path)


@_target("arch/gguf*.py", "checkpoint/gguf.py", "checkpoint/gguf_vocabulary.py", form=in_json)
def gguf(data: bytes) -> None:
    """What a GGUF says, in a file that is whole: ``{"values": {key: value}, "tensors": {name: [type, shape]}}``."""
    said = _mapping(data)
    path = folders.scratch() / "model.gguf"
    folders.gguf(path, _part(said, "values"), _part(said, "tensors"))
    _describe(path)


@_target("checkpoint/onnx.py", form=lambda _: in_protobuf)
def onnx(data: bytes) -> None:
    """A graph of ONNX, its external data beside it."""
    folders.put("graph/model.onnx.data", bytes(256))
    _describe(folders.put("graph/model.onnx", data))


@_target("checkpoint/graphs.py", most=16384)
def graph_archive(data: bytes) -> None:
    """An archive of torch.export or TorchScript, looked at and written for another device."""
    from dconv.checkpoint import graphs

    found = graphs.archive_of(folders.put("archive/model.pt2", data))
    if found is not None:
        graphs.device_of(found)
        graphs.placed_anew(found, "cuda:0")


@_target("checkpoint/graphs.py", form=in_json)
def graph_records(data: bytes) -> None:
    """Records of such an archive, in a zip that is whole: ``{name: text or JSON}``."""
    records = [(f"model/{name}"[:99], _as_text(value).encode("utf-8", "replace")) for name, value in _mapping(data).items()]
    with suppress(ValueError):  # a name that no zip has
        graph_archive(folders.torch_zip(records))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# what says which model it is ------------------------------------------------------------------------------------------


@_target("arch/*.py", form=in_json)
def config(data: bytes) -> None:
    """A config.json of any family: what a plan makes of it alone, as Megatron's args too."""
    from dconv.describe import describe_model

    path = folders.put("alone/config.json", data)
    found = describe_model(path.parent, config_alone=True)
    found.family.config.to_args(found.config)


@_target("arch/*.py", form=in_json)
def megatron_args(data: bytes) -> None:
    """Megatron's args of any family, as JSON has them."""
    from dconv.arch.registry import detect

    args = _mapping(data)
    detect(None, args).config.to_hf(args)


# tokenizers -----------------------------------------------------------------------------------------------------------


@_target("checkpoint/gguf_*.py", form=in_json, most=16384)
def tokenizer_json(data: bytes) -> None:
    """tokenizer.json and what is beside it, as a GGUF's vocabulary: ``{file name: JSON or text}``."""
    from dconv.checkpoint.gguf_vocabulary import vocabulary

    side = {name: folders.put(f"tokenizer/{name}", _as_text(value).encode("utf-8", "surrogatepass"))
            for name, value in _mapping(data).items() if name in _TOKENIZER}  # fmt: skip
    vocabulary(side, {"bos_token_id": 1}, 64, "llama", None, "tokenizer")


_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


@_target("checkpoint/gguf_pieces.py", form=lambda _: in_protobuf)
def sentencepiece(data: bytes) -> None:
    """tokenizer.model, as a GGUF's vocabulary."""
    from dconv.checkpoint.gguf_vocabulary import vocabulary

    vocabulary({"tokenizer.model": folders.put("pieces/tokenizer.model", data)}, {}, 64, "llama", None, "pieces")


# what a person writes, or passes on -----------------------------------------------------------------------------------


@_target("launch/options.py", "launch/run_options.py", "request.py", most=4096)
def run_yaml(data: bytes) -> None:
    """The file of ``--config``, up to a request."""
    from dconv.launch.config_file import read_config
    from dconv.launch.options import to_request

    path, parser = folders.put("run.yaml", data), _parser()
    parser.set_defaults(model="m", format="hf")
    parser.set_defaults(**read_config(path, parser, parser))
    to_request(parser.parse_args([]))


def _parser() -> Any:
    from dconv.launch.batch import _parser as options

    return options()


@_target("launch/options.py", "launch/batch.py", most=4096)
def batch_yaml(data: bytes) -> None:
    """The file of ``dconv batch``."""
    from dconv.launch.batch import read

    read(folders.put("batch.yaml", data))


@_target("checkpoint/rename.py", most=4096)
def rename_yaml(data: bytes) -> None:
    """The file of ``--rename``, laid over a model's names."""
    from dconv.checkpoint.rename import renaming_of

    for suffix in ("yaml", "json"):
        with suppress(DconvError):
            rename = renaming_of(folders.put(f"rename.{suffix}", data))
            rename({f"model.layers.{layer}.mlp.{part}_proj.weight": 0 for layer in (0, 1) for part in ("up", "down")}, "m")
            rename.check_used("m")


@_target("checkpoint/fake_config.py", most=4096)
def fake_yaml(data: bytes) -> None:
    """The file of ``--fake-weight-config``, laid over a model's config."""
    from dconv.checkpoint.fake_config import read_wishes

    wishes = read_wishes(folders.put("fake.yaml", data))
    wishes.changed({"num_hidden_layers": 2, "rope_scaling": {"factor": 2.0}, "layer_types": ["a", "b"]})
    wishes.fill_of("model.layers.0.mlp.up_proj.weight")


@_target("quant/*.py", most=4096)
def quantization_yaml(data: bytes) -> None:
    """The file of ``--quantization-config``, and what it makes of a model's layers."""
    from dconv.quant.parse import quantization_of

    path = folders.put("quantization.yaml", data)
    for method in ("gptq", "awq"):
        with suppress(DconvError):
            quantization_of(str(path), method)


@_target("hw/settings.py", "hw/*.py", form=in_json, most=4096)
def handoff(data: bytes) -> None:
    """The manifest of a hand-off."""
    from dconv.hw.manifest import NAME, checked

    checked(folders.put(f"handoff/{NAME}", data).parent)


@_target("quant/documents.py", form=in_json)
def calibration_json(data: bytes) -> None:
    """Calibration data, as lines and as one list of JSON."""
    from dconv.quant.documents import read

    for suffix in ("jsonl", "json"):
        with suppress(DconvError):
            read(str(folders.put(f"samples.{suffix}", data)))


@_target("quant/documents.py")
def calibration_numbers(data: bytes) -> None:
    """Calibration data as token ids: the first byte says of which kind, then the file."""
    from dconv.quant.documents import read

    kinds = ("npy", "safetensors", "txt", "arrow", "parquet")
    if data:
        read(str(folders.put(f"samples.{kinds[data[0] % len(kinds)]}", data[1:])))


@_target("quant/documents.py", form=in_json)
def calibration_folder(data: bytes) -> None:
    """What a data set on disk says of its tables."""
    from dconv.quant.documents import read

    said = _mapping(data)
    (folders.scratch() / "set" / "train").mkdir(parents=True, exist_ok=True)
    for name in ("dataset_dict.json", "state.json", "train/state.json"):
        folders.put(f"set/{name}", json.dumps(said.get(name)).encode())
    read(str(folders.scratch() / "set"))


# what an earlier run of dconv left --------------------------------------------------------------------------------------


@_target("verify.py", "sharding/receipt.py", form=in_json)
def receipt(data: bytes) -> None:
    """A receipt: read back as ``check`` and a second run do."""
    from dconv.sharding.receipt import read_receipt
    from dconv.verify import plan_of, reread

    model = folders.checkpoint("again")
    (model / "dconv.json").write_bytes(data)
    read_receipt(model)
    plan_of(model)
    reread(model)


@_target("sharding/journal.py")
def journal(data: bytes) -> None:
    """Journals that other processes left: lines with a checksum of their own, or as they come."""
    from dconv.sharding.journal import _check

    folder = _journal()[0]
    good = "\n".join(f"{line} {_check(line)}" for line in data.decode("utf-8", "replace").split("\n"))
    (folder / "00000000000000000001-1-aa").write_bytes(data)
    (folder / "00000000000000000002-1-bb").write_bytes(good.encode())
    _journal()[1].read()


@functools.cache
def _journal() -> tuple[Path, Any]:
    from dconv.sharding.journal import Journal

    folder = folders.scratch() / "journal"
    folder.mkdir()
    return folder, Journal(folder)


def _describe(path: Path) -> None:
    """As every command begins: which container it is, which model, and where each of its tensors lies."""
    from dconv.describe import describe_model

    describe_model(path)
