"""Small good inputs of each target, to start from:  python fuzz/seeds.py  writes them to ``fuzz/corpus/TARGET/``."""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT)]
os.environ["DCONV_HISTORY"] = "off"

from dconv.arch.registry import by_name, families
from dconv.errors import DconvError
from fuzz import folders
from fuzz.mutators import as_varint
from fuzz.targets import TARGETS
from tests.models import config_of

#: Forms of codes that this package makes of any model.
_CODED = (
    ("fp8", "fp8_block"), ("fp8", "fp8_tensor"), ("fp8", "fp8_channel"), ("mx", "mxfp4"), ("mx", "mxfp8"),
    ("mx", "mxfp6_e2m3"), ("mx", "nvfp4"), ("mlx", "4bit"), ("neuron", None),
)  # fmt: skip


def seeds() -> Iterator[tuple[str, bytes]]:
    """(target, input)."""
    whole = folders.whole
    yield "safetensors", _safetensors()
    yield "safetensors_index", (whole("sharded") / "model.safetensors.index.json").read_bytes()
    yield from (("huggingface", _json(said)) for said in _coded())
    yield "pickle", folders.pickled_in(whole("pt") / "pytorch_model.bin")
    yield "pickle", folders.pickled_in(whole("torch_dist") / "release" / "common.pt")
    yield "torch_zip", (whole("torch_dist") / "release" / "common.pt").read_bytes()
    yield (
        "torch_zip",
        folders.torch_zip([("a/data.pkl", folders.pickled_tensors("f32", {"0": (2, 3)})), ("a/data/0", bytes(24))]),
    )
    yield "torch_frame", _torch_frame()
    yield "state_dict", folders.pickled_in(whole("pt") / "pytorch_model.bin")
    yield "megatron_legacy", folders.pickled_in(whole("legacy") / "release/mp_rank_00/model_optim_rng.pt")
    yield "megatron_common", folders.pickled_in(whole("torch_dist") / "release/common.pt")
    yield "dcp_metadata", (whole("torch_dist") / "release" / ".metadata").read_bytes()
    yield "megatron_run_config", (whole("torch_dist") / "release" / "run_config.yaml").read_bytes()
    yield "model_pt", (whole("model_pt") / "metadata.json").read_bytes()
    yield from (("megatron_tracker", text) for text in (b"release", b"0000007", b" 12\n"))
    yield "bmtrain", (whole("bmtrain") / "config.json").read_bytes()
    yield (
        "meta_params",
        _json({"dim": 32, "multiple_of": 32, "n_heads": 4, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1}),
    )
    more = {"n_kv_heads": 4, "ffn_dim_multiplier": 1.0, "rope_theta": 5e5, "use_scaled_rope": True}
    yield (
        "meta_params",
        _json({"model": {"dim": 32, "multiple_of": 96, "n_heads": 4, "n_layers": 1, "norm_eps": 1e-5, **more}}),
    )
    for said in _ggufs():
        yield "gguf", _json(said)
    yield "gguf_header", _gguf_header()
    yield "onnx", _onnx()
    yield from (("graph_records", _json(said)) for said in _graphs())
    yield from (("graph_archive", _archive(said)) for said in _graphs())
    for family in families().values():
        config = config_of(family)
        yield "config", _json(config)
        try:
            yield "megatron_args", _json(family.config.to_args(config))
        except DconvError:
            continue
    yield from (("tokenizer_json", _json(said)) for said in _tokenizers())
    yield from (("calibration_tokenizer", _json(said)) for said in _tokenizers())
    yield (
        "sentencepiece",
        b"".join(_field(1, _piece(f"p{n}", -n / 2, kind)) for n, kind in enumerate((2, 3, 3, 1, 6, 1))),
    )
    yield "sentencepiece_beside", _json({"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "x", "special": True}}},
                                         "added_tokens.json": {"y": 4}, "tokenizer.json": {"added_tokens": []}})  # fmt: skip
    yield (
        "run_yaml",
        b"model: a\nformat: megatron\ntp: 2\npp: 2\ndtype: bf16\ndrop: ['a.*', b]\nmax-memory: 1GiB\nresume: true\n",
    )
    yield "run_yaml", b"format: mx\nquant: mxfp4\nshard-size: 5GB\nblock-size: 128x128\nverify: digest\nnproc: 2\n"
    yield "batch_yaml", b"models: [a, {model: b, out: c, tp: 4}]\nformat: megatron\npp: 2\ndtype: bf16\n"
    yield "rename_yaml", b"model.layers.*.mlp.*: decoder.*.mlp.*\nbackbone.*: model.*\n"
    yield "rename_yaml", b'{"model.*.up_proj.weight": "m.*.up"}'
    yield (
        "fake_yaml",
        b"dimensions: {num_hidden_layers: 4}\nshapes: {'*.up_proj.weight': [4, 8]}\nfill: zeros\nfills: {'*.weight': {constant: 1.5}}\n",
    )
    for path in sorted((_ROOT / "dconv" / "quant" / "presets").glob("*.json"))[:6]:
        yield "quantization_yaml", path.read_bytes()
    yield (
        "quantization_yaml",
        b"bits: 4\ngroup_size: 128\nsym: true\ndata: x\noverrides:\n- {pattern: '*.down_proj', bits: 8}\n",
    )
    manifest = {
        "kind": "a",
        "target": "b",
        "platform": "c",
        "settings": {"x": 1},
        "files": {"a": {"sha256": "0", "bytes": 1}},
    }
    yield "handoff", _json(manifest)
    yield "calibration_json", _json([{"text": "a"}, {"text": "b"}])
    yield "calibration_json", _json([{"messages": [{"role": "user", "content": "a"}]}])
    yield "calibration_json", b"[1, 2, 3]\n[4, 5]\n"
    yield "calibration_json", _json([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    yield "calibration_numbers", b"\0" + _npy()
    yield "calibration_numbers", b"\1" + _ids()
    yield "calibration_numbers", b"\2some text"
    yield (
        "calibration_folder",
        _json({"dataset_dict.json": {"splits": ["train"]}, "train/state.json": {"_data_files": [{"filename": "a"}]}}),
    )
    yield "receipt", (whole("again") / "dconv.json").read_bytes()
    names = ["00000000000000000001-1-aa-4-0", "00000000000000000001-1-bb-4-1"]
    track = '[[1,4,"node"],[1700000000.5,0,0,0]]\n[1700000001.0,5,6,7]\n'
    ranks = {"0.json": {"done": 1, "total": 2, "peak": 3}}
    yield "working_state", _json({"ends": names, "ranks": ranks, "tracks": {"1-7-9": track}})
    yield "journal", b"done 1 0123456789abcdef\nkept 3 aa\nclaim 2\nretract 00000000000000000001-1-aa 1\ndone 2 ff\n"


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _safetensors() -> bytes:
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]}}  # fmt: skip
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + bytes(26)


def _ids() -> bytes:
    text = _json({"input_ids": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]}})
    return struct.pack("<Q", len(text)) + text + bytes(32)


def _npy() -> bytes:
    head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2), }"
    head += b" " * (118 - len(head) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(32)


def _torch_frame() -> bytes:
    """Protocol, system, tree, keys, each a pickle; then the storage."""
    import pickle

    from dconv.checkpoint.torchzip import _LEGACY_MAGIC

    parts = [1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    tree = folders.pickled_tensors("f32", {"0": (2, 3)})
    return b"".join([_LEGACY_MAGIC, *(pickle.dumps(part, 2) for part in parts), tree, pickle.dumps(["0"], 2),
                     struct.pack("<q", 6), bytes(24)])  # fmt: skip


def _coded() -> Iterator[dict[str, Any]]:
    from dconv.pipeline import Request, convert
    from tests.models import write_random

    family = by_name("llama")
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        config = config_of(family, num_hidden_layers=1, hidden_size=128, intermediate_size=128, head_dim=32)
        model = write_random(top / "model", family, config)
        path = model / "model.safetensors"
        folders.safetensors(path, _shapes([path]))  # numbers, not random bits: NaN has no code
        for number, (form, quant) in enumerate(_CODED):
            out = top / str(number)
            convert(Request(model, form, out, quant=quant))
            config_there = json.loads((out / "config.json").read_text())
            yield {"config": config_there, "tensors": _shapes(sorted(out.rglob("*.safetensors")))}
    for method in _METHODS:
        tensors = {"model.norm.weight": ["BF16", [128]], "model.embed_tokens.weight": ["BF16", [61, 128]],
                   **{f"model.layers.0.{name}": said for name, said in _integers(method).items()}}  # fmt: skip
        yield {"config": {**config, "quantization_config": _METHODS[method]}, "tensors": tensors}


def _shapes(paths: list[Path]) -> dict[str, Any]:
    from dconv.checkpoint.safetensors import read_header
    from dconv.sharding.dtypes import TO_SAFETENSORS

    return {name: [TO_SAFETENSORS[it.spec.dtype], list(it.spec.file_shape)]
            for path in paths for name, it in read_header(path).items()}  # fmt: skip


_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
_METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "packed": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _GROUP}},
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}  # fmt: skip


def _integers(method: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"input_layernorm.weight": ["BF16", [128]]}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"):
        if method == "modelopt":
            found |= {
                f"{name}.weight": ["F8_E4M3", [128, 128]],
                f"{name}.weight_scale": ["F32", []],
                f"{name}.input_scale": ["F32", []],
            }
        elif method == "packed":
            found |= {f"{name}.weight_packed": ["I32", [128, 16]], f"{name}.weight_scale": ["BF16", [128, 4]],
                      f"{name}.weight_shape": ["I64", [2]]}  # fmt: skip
        else:
            packed = [16, 128] if method == "gptq" else [128, 16]
            found |= {
                f"{name}.qweight": ["I32", packed],
                f"{name}.qzeros": ["I32", [4, 16]],
                f"{name}.scales": ["F16", [4, 128]],
            }
            found |= {f"{name}.g_idx": ["I32", [128]]} if method == "gptq" else {}
    return found


def _ggufs() -> Iterator[dict[str, Any]]:
    """Headers of files that llama.cpp's converter wrote, without their long arrays."""
    from dconv.checkpoint.gguf_header import TYPES, Long, read_header

    numbers = {kind: number for number, kind in TYPES.items()}
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(_ROOT / "tests/formats/recorded/gguf.zip") as archive,
    ):
        for name in archive.namelist():
            found = read_header(Path(archive.extract(name, scratch)))
            values = {key: value for key, value in found.values.items()
                      if not isinstance(value, Long) and not (isinstance(value, list) and len(value) > 64)}  # fmt: skip
            tensors = {it.name: [numbers[it.kind], list(it.shape)] for it in found.tensors.values()}
            yield {"values": values, "tensors": tensors}


def _gguf_header() -> bytes:
    values = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "a": True,
        "b": -1,
        "c": 0.5,
        "d": [1, 2],
        "e": ["x", "y"],
    }
    folders.gguf(path := folders.scratch() / "seed.gguf", values, {"v": [0, [3]], "w": [8, [2, 32]], "x": [1, []]})
    return path.read_bytes()


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return as_varint(number << 3) + as_varint(value)
    return as_varint(number << 3 | 2) + as_varint(len(value)) + value


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + as_varint(2 << 3 | 5) + struct.pack("<f", score) + _field(3, kind)


def _onnx() -> bytes:
    inside = _field(1, 2) + _field(1, 3) + _field(2, 1) + _field(8, b"w") + _field(9, bytes(24))
    places = [("location", "model.onnx.data"), ("offset", "64"), ("length", "24")]
    outside = _field(1, 2) + _field(1, 3) + _field(2, 1) + _field(8, b"v") + _field(14, 1)
    outside += b"".join(_field(13, _field(1, key.encode()) + _field(2, value.encode())) for key, value in places)
    packed = _field(1, b"\x02\x03") + _field(2, 7) + _field(8, b"i") + _field(7, b"\1\2\3\4\5\6")
    return _field(1, 8) + _field(7, _field(2, b"g") + _field(5, inside) + _field(5, outside) + _field(5, packed))


def _graphs() -> Iterator[dict[str, Any]]:
    ports = {"inputs": [{"name": "ids", "axes": ["batch"], "dtype": "int64"}], "outputs": [], "device": "cpu"}
    yield {
        "archive_format": "pt2", "byteorder": "little", "models/model.json": {"device": {"type": "cpu", "index": None}},
        "data/weights/model_weights_config.json": {"config": {}}, "data/weights/weight_0": "0123", "extra/ports.json": ports,
    }  # fmt: skip
    yield {
        "constants.pkl": "x", "data.pkl": "X\x03\x00\x00\x00cpu.", "code/m.py": 'torch.device("cpu")', "data/0": "0123",
        "extra/ports.json": ports, ".data/serialization_id": "1",
    }  # fmt: skip


def _archive(said: dict[str, Any]) -> bytes:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}
    return folders.torch_zip([(f"model/{name}", text.encode()) for name, text in texts.items()])


def _tokenizers() -> Iterator[dict[str, Any]]:
    added = [
        {
            "id": 5,
            "content": "<s>",
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
    ]
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                 "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    config = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "add_bos_token": True, "chat_template": "{{ x }}",
              "added_tokens_decoder": {"5": {"content": "<s>", "special": True}}}  # fmt: skip
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    pairs = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {"a": 0, "b": 1, "ab": 2},
             "merges": [["a", "b"]]}  # fmt: skip
    yield {"tokenizer.json": {**common, "normalizer": None, "pre_tokenizer": level, "post_processor": processor, "decoder": level,
                              "model": pairs}, "tokenizer_config.json": config}  # fmt: skip
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, "<0x0A>": 4}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}  # fmt: skip
    pieces = {**pairs, "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": ["\u2581 a"]}
    yield {"tokenizer.json": {**common, "normalizer": prepend, "pre_tokenizer": None, "post_processor": None, "decoder": None,
                              "model": pieces}, "tokenizer_config.json": {**config, "chat_template": [{"name": "default", "template": "x"}]}}  # fmt: skip


def main() -> None:
    counts = dict.fromkeys(TARGETS, 0)
    for name, data in seeds():
        folder = _ROOT / "fuzz" / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed-{counts[name]}").write_bytes(data)
        counts[name] += 1
        try:
            TARGETS[name].run(data)
        except Exception as fault:
            print(f"{name} seed-{counts[name] - 1}: {type(fault).__name__}: {fault}")
    if lacking := [name for name, count in counts.items() if not count]:
        sys.exit(f"no seed for {', '.join(lacking)}")


if __name__ == "__main__":
    main()
