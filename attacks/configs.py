"""JSON, YAML and tokenizer files that are deep, long, wrong or programs, and tensors named like paths."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from attacks.corpus import Attack, Canary, edit_json, edit_pickle
from attacks.ggufs import rename_first
from attacks.megatron import laughs
from attacks.pickles import call, text
from attacks.twins import field, piece, varint, whole

_CONFIG: Final = "config.json"
_JSON: Final = "is not valid JSON"


def _written(file: str, content: str | bytes) -> Callable[[Path, Canary], object]:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda folder, _canary: (folder / file).write_bytes(data)


def _said(**values: Any) -> Callable[[Path, Canary], object]:
    return lambda folder, _canary: edit_json(folder / _CONFIG, lambda config: config.update(values))


def _literal(key: str, value: str) -> Callable[[Path, Canary], object]:
    """A value that Python's json would not write."""

    def spoil(folder: Path, canary: Canary) -> None:
        _said(**{key: "@"})(folder, canary)
        path = folder / _CONFIG
        path.write_text(path.read_text().replace('"@"', value))

    return spoil


def _hole(file: str, size: int) -> Callable[[Path, Canary], object]:
    """A file of so many bytes that takes no room."""

    def spoil(folder: Path, _canary: Canary) -> None:
        with (folder / file).open("r+b" if (folder / file).exists() else "wb") as opened:
            opened.truncate(size)

    return spoil


def _tokens(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Canary], object]:
    return lambda folder, _canary: edit_json(folder / "tokenizer.json", change)


def _merges(value: Any) -> Callable[[Path, Canary], object]:
    return _tokens(lambda file: file["model"].update(merges=value))


#: Of files that only a conversion reads.
_COPIED: Final = ("tokenizer-", "pieces-", "side-", "config-epsilon", "config-rope")
_PIECE: Final = piece("a", -1.0, 1)

#: name, idea, what dconv says, twin, what is done.
_ATTACKS: Final[tuple[tuple[str, str, str, str, Callable[[Path, Canary], object]], ...]] = (
    ("config-deep", "config.json of 100,000 levels", _JSON, "huggingface", _written(_CONFIG, '{"a":' * 100_000)),
    ("config-layers-1e9", "a billion layers", "num_hidden_layers", "huggingface", _said(num_hidden_layers=10**9)),
    ("config-layers-1e5", "layers by the hundred thousand, of which two are there", "num_hidden_layers", "huggingface",
     _said(num_hidden_layers=100_000)),
    ("config-layers-digits", "a number of layers of 4000 digits", "num_hidden_layers", "huggingface",
     _said(num_hidden_layers=10**4000)),
    ("config-digits", "a number of a million digits", _JSON, "huggingface",
     _literal("rope_theta", "1" + "0" * 1_000_000)),
    ("config-hidden-2-63", "a width of 2^63", "hidden_size", "huggingface", _said(hidden_size=1 << 63)),
    ("config-heads-0", "no heads, to divide by", "num_attention_heads", "huggingface", _said(num_attention_heads=0)),
    ("config-negative", "a negative width of heads", "head_dim", "huggingface", _said(head_dim=-8)),
    ("config-nan", "NaN for a number of layers", "num_hidden_layers", "huggingface",
     _literal("num_hidden_layers", "NaN")),
    ("config-infinite", "1e400 for a vocabulary", "vocab_size", "huggingface", _literal("vocab_size", "1e400")),
    ("config-bool", "true for a number of layers", "num_hidden_layers", "huggingface", _said(num_hidden_layers=True)),
    ("config-text", "a text for a number", "hidden_size", "huggingface", _said(hidden_size="32")),
    ("config-list", "a list for a number", "vocab_size", "huggingface", _said(vocab_size=[64])),
    ("config-architectures", "architectures that hold no text", "architectures", "huggingface",
     _said(architectures=[["LlamaForCausalLM"]])),
    ("config-epsilon", "NaN for the norm's epsilon", "rms_norm_eps", "huggingface", _literal("rms_norm_eps", "NaN")),
    ("config-rope", "a rope scaling that is a list", "rope", "huggingface", _said(rope_scaling=[[[]]])),
    ("config-twice", "hidden_size twice", "stands there twice", "huggingface",
     _written(_CONFIG, '{"model_type": "llama", "hidden_size": 32, "hidden_size": 64}')),
    ("config-invalid-utf-8", "no UTF-8", _JSON, "huggingface", _written(_CONFIG, b'{"a": "\xff\xfe"}')),
    ("config-surrogate", "half of a surrogate pair", _JSON, "huggingface", _said(name="\ud800")),
    ("config-hole", "a config of a terabyte that takes no room", "implausibly large", "huggingface",
     _hole(_CONFIG, 1 << 40)),
    ("config-empty", "an empty file", _JSON, "huggingface", _written(_CONFIG, b"")),
    ("config-text-alone", "a JSON text alone", "is not a JSON object", "huggingface", _written(_CONFIG, '"llama"')),
    ("quantised-2-31", "codes in groups of 2^31", "quantization_config", "huggingface",
     _said(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 1 << 31, "sym": []})),
    ("side-hole", "a tokenizer.json of a terabyte that takes no room", "implausibly large", "huggingface",
     _hole("tokenizer.json", 1 << 40)),
    ("index-deep", "an index of 100,000 levels", _JSON, "huggingface",
     _written("model.safetensors.index.json", '{"weight_map":' * 100_000)),
    ("index-twice", "weight_map twice", "stands there twice", "huggingface",
     _written("model.safetensors.index.json", '{"weight_map": {}, "weight_map": {}}')),
    ("tokenizer-deep", "a tokenizer of 100,000 levels", _JSON, "tokenizer.json",
     _written("tokenizer.json", '{"model":' * 100_000)),
    ("tokenizer-ids", "a token's id of 2^62: as many rows", "a token that the model has no row for", "tokenizer.json",
     _tokens(lambda file: file["model"]["vocab"].update(a=1 << 62))),
    ("tokenizer-negative", "a negative id, which writes over the last token", "a token that the model has no row for", "tokenizer.json",
     _tokens(lambda file: file["model"]["vocab"].update(a=-1))),
    ("tokenizer-added", "an added token without a text", "an added token that none is", "tokenizer.json",
     _tokens(lambda file: file.update(added_tokens=[{"id": 1, "content": None}]))),
    ("tokenizer-merge", "a merge of three parts", "a merge that none is", "tokenizer.json", _merges(["a b c"])),
    ("tokenizer-merge-number", "a merge that is a number", "a merge that none is", "tokenizer.json", _merges([7])),
    ("tokenizer-merges-object", "merges that are an object", "a part of a tokenizer that none is", "tokenizer.json", _merges({"a": "b"})),
    ("tokenizer-vocab-list", "a vocabulary that is a list", "a part of a tokenizer that none is", "tokenizer.json",
     _tokens(lambda file: file["model"].update(vocab=[["a", 0.0]]))),
    ("tokenizer-model-list", "a model that is a list", "a part of a tokenizer that none is", "tokenizer.json",
     _tokens(lambda file: file.update(model=[]))),
    ("pieces-length", "a piece of 2^60 bytes", "tokenizer.model", "tokenizer.model",
     _written("tokenizer.model", varint(1 << 3 | 2) + varint(1 << 60))),
    ("pieces-varint", "a length that never ends", "tokenizer.model", "tokenizer.model",
     _written("tokenizer.model", varint(1 << 3 | 2) + b"\xff" * 100_000)),
    ("pieces-many", "2 million pieces", "a token that the model has no row for", "tokenizer.model",
     _written("tokenizer.model", field(1, _PIECE) * 2_000_000)),
    ("pieces-nested", "groups in groups, of a kind that was given up", "tokenizer.model", "tokenizer.model",
     _written("tokenizer.model", b"\x0b" * 100_000)),
    ("pieces-kind", "a piece of kind 2^40", "tokenizer.model", "tokenizer.model",
     _written("tokenizer.model", field(1, field(1, b"a") + b"\x15" + struct.pack("<f", 0.0) + whole(3, 1 << 40)))),
    ("pieces-pickle", "a pickle for a tokenizer.model", "tokenizer.model", "tokenizer.model",
     lambda folder, canary: (folder / "tokenizer.model").write_bytes(
         b"\x80\x02" + call("posix", "system", text(canary.command)) + b".")),
    ("yaml-tag", "a YAML tag that calls os.system, in --config", "a YAML file with a tag", "run config",
     lambda folder, canary: (folder / "run.yaml").write_text(
         f"tp: !!python/object/apply:os.system [{canary.command!r}]\n")),
    ("yaml-tag-new", "a YAML tag that makes a Popen, in --config", "a YAML file with a tag", "run config",
     _written("run.yaml", "tp: !!python/object/new:subprocess.Popen [[touch, x]]\n")),
    ("yaml-laughs", "2^40 texts in forty lines of YAML, in --config", "aliases in the config file", "run config",
     _written("run.yaml", laughs() + "tp: *a39\n")),
    ("yaml-deep", "50,000 brackets in --config", "implausibly deep", "run config", _written("run.yaml", "[" * 50_000)),
    ("yaml-hole", "a --config of a terabyte that takes no room", "implausibly large", "run config",
     _hole("run.yaml", 1 << 40)),
    ("yaml-cycle", "a map that holds itself, in --config", "aliases in the config file", "run config",
     _written("run.yaml", "tp: &a [*a]\n")),
    ("rename-tag", "a YAML tag that calls os.system, in --rename", "a YAML file with a tag", "renaming",
     lambda folder, canary: (folder / "rename.yaml").write_text(
         f"? !!python/object/apply:os.system [{canary.command!r}]\n: x\n")),
    ("rename-deep", "50,000 brackets in --rename", "implausibly deep", "renaming",
     _written("rename.yaml", "a: " + "[" * 50_000)),
    ("rename-json-deep", "100,000 levels of JSON in --rename", _JSON, "JSON renaming",
     _written("rename.json", '{"a":' * 100_000)),
    ("rename-json-twice", "a pattern twice", "stands there twice", "JSON renaming",
     _written("rename.json", '{"a": "b", "a": "c"}')),
    ("fake-tag", "a YAML tag that calls os.system, in --fake-weight-config", "a YAML file with a tag",
     "made-up weights", lambda folder, canary: (folder / "fake.yaml").write_text(
         f"fill: !!python/object/apply:os.system [{canary.command!r}]\n")),
    ("fake-deep", "50,000 brackets there", "implausibly deep", "made-up weights",
     _written("fake.yaml", "fills: " + "[" * 50_000)),
)  # fmt: skip


def _named(name: str) -> Callable[[Path, Canary], object]:
    """The first tensor of a GGUF under another name."""
    return lambda folder, _canary: rename_first(folder / "model.gguf", name.encode())


def _key(name: bytes) -> Callable[[Path, Canary], object]:
    """The first tensor of a state dict under another name."""
    before = b"X" + struct.pack("<I", 25) + b"model.embed_tokens.weight"

    def change(tree: bytes) -> bytes:
        at = tree.index(b"model.embed_tokens.weight") - 5
        return tree[:at] + b"X" + struct.pack("<I", len(name)) + name + tree[at + len(before) :]

    return lambda folder, _canary: edit_pickle(folder / "pytorch_model.bin", change)


_NAME: Final = "no name of a tensor"
_NAMES: Final = (
    Attack("names/gguf-dots", "../../ran as a GGUF tensor", _NAME, "gguf", _named("../../ran")),
    Attack("names/gguf-absolute", "an absolute path as a GGUF tensor", _NAME, "gguf", _named("/tmp/ran")),  # noqa: S108
    Attack("names/gguf-nul", "NUL in a GGUF tensor's name", _NAME, "gguf", _named("output.weight\0x")),
    Attack("names/gguf-backslash", "Windows' ..\\ as a GGUF tensor", _NAME, "gguf", _named("..\\..\\ran")),
    Attack("names/gguf-control", "a GGUF tensor's name that writes to a terminal", _NAME, "gguf", _named("\x1b[2J")),
    Attack("names/gguf-empty", "a GGUF tensor without a name", _NAME, "gguf", _named("")),
    Attack("names/bin-dots", "../../ran as a key of a state dict", _NAME, "bin", _key(b"../../ran")),
    Attack("names/bin-nul", "NUL in a key of a state dict", _NAME, "bin", _key(b"lm_head.weight\0")),
    Attack("names/bin-surrogate", "half of a surrogate pair there", _NAME, "bin", _key(b"\xed\xa0\x80")),
    Attack("names/bin-empty", "a key of no letters", _NAME, "bin", _key(b"")),
)

ATTACKS: Final = (
    *(
        Attack(f"configs/{name}", idea, says, twin, spoil, only=name.startswith(_COPIED))
        for name, idea, says, twin, spoil in _ATTACKS
    ),
    *_NAMES,
)
