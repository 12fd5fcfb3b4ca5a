"""A GGUF's vocabulary as HuggingFace's tokenizer files, which transformers makes of it.

Only where it is known how the text is split before the merges (``tokenizer.ggml.pre``): a tokenizer that splits it in
another way loads, and is wrong. Source of the names: ``llama_vocab::impl::load`` and ``llm_tokenizer_bpe`` in
llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import Made, read_small, stamp
from dconv.errors import Refused, ToolMissing
from dconv.sharding.tensor import FileStamp

_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
_TEMPLATE: Final = "chat_template.jinja"
#: As GPT-2 does, which is what transformers takes where it is told nothing else.
_PLAIN: Final = ("gpt-2", "phi-2", "olmo", "mpt")
#: The same, with each digit for itself.
_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell")
#: Those that transformers knows by name.
_KNOWN: Final = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken", "dbrx", "smaug-bpe", "qwen2",
    "deepseek-r1-qwen", "megrez", "qwen35", "gpt-4o", "llama4", "minimax-m2",
)  # fmt: skip
#: The same expression as another's.
_ALIKE: Final = {"glm4": "llama-bpe", "chatglm-bpe": "llama-bpe"}
#: Architectures of whose text transformers knows that no space is put before it.
_UNSPACED: Final = ("gemma", "gemma2", "gemma3")
_DO: Final = "--hf-config DIR brings the model's own tokenizer along"


def side(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Made], tuple[str, ...]]:
    """The files, made when they are asked for, or none and why.

    Args:
        path: the file that has the vocabulary.
        values: its metadata.
    """
    kind, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind is None or "tokenizer.ggml.tokens" not in values:
        return {}, (f"no tokenizer in the output: the GGUF has no vocabulary; {_DO}",)
    if kind not in ("gpt2", "llama"):
        return {}, (f"no tokenizer in the output: a vocabulary of the kind {kind!r:.40}; {_DO}",)
    if kind == "gpt2" and split not in (*_PLAIN, *_DIGITS, *_KNOWN, *_ALIKE):
        return {}, (f"no tokenizer in the output: how {split!r:.40} splits text is not known here; {_DO}",)
    spaced = values.get("tokenizer.ggml.add_space_prefix", True)
    if kind == "llama" and not spaced and values.get("general.architecture") not in _UNSPACED:
        return {}, (f"no tokenizer in the output: transformers would put a space before the text; {_DO}",)
    if find_spec("transformers") is None:
        return {}, ("no tokenizer in the output: transformers makes it (pip install transformers)",)
    names = (*_FILES, _TEMPLATE) if isinstance(values.get("tokenizer.chat_template"), str) else _FILES
    how = str(split) if kind == "gpt2" else ""
    return {name: Made(partial(_file, path, stamp(path), how, name)) for name in names}, ()


def _file(path: Path, seen: FileStamp, split: str, name: str) -> bytes:
    return _files(path, seen, split)[name]


@lru_cache(maxsize=1)
def _files(path: Path, seen: FileStamp, split: str) -> dict[str, bytes]:
    """The tokenizer's files as transformers writes them, by name; empty where it writes none.

    Args:
        path: the file that has the vocabulary.
        seen: what it was when it was described: of another file of its name the tokenizer is made anew.
        split: how it splits text, as llama.cpp calls it; "" for pieces.

    Raises:
        ToolMissing: a transformers that does not read it so.
        Refused: it makes no tokenizer of it.
    """
    del seen  # for the cache alone
    try:
        from tokenizers import Regex, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
    except ImportError as fault:
        raise ToolMissing(
            "the tokenizer of a GGUF is made by transformers 5.23 or later",
            where=str(path),
            found=str(fault),
            do=f"pip install --upgrade transformers; or {_DO}",
        ) from None
    kind: Any = PreTrainedTokenizerFast
    known = SPLITS.get(_ALIKE.get(split, split))
    if split not in (*_PLAIN, *_DIGITS, "") and known is None:
        raise ToolMissing(f"this transformers does not know how {split} splits text", where=str(path), do=_DO)
    try:
        tokenizer: Any = kind.from_pretrained(path.parent, gguf_file=path.name)
        if split in _DIGITS:
            apart = pre_tokenizers.Digits(individual_digits=True)
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, level])
        elif split in _ALIKE:
            cut = pre_tokenizers.Split(Regex(str(known)), behavior="isolated")
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
        with tempfile.TemporaryDirectory(prefix="dconv-tokenizer-") as scratch:
            tokenizer.save_pretrained(scratch)
            found = {entry.name: read_small(entry, what=entry.name) for entry in Path(scratch).iterdir()}
        return {name: found.get(name, b"") for name in (*_FILES, _TEMPLATE)}
    except Exception as fault:  # of a library, on what a file says
        raise Refused(
            "transformers makes no tokenizer of this vocabulary, nothing was written",
            where=str(path),
            found=f"{type(fault).__name__}: {fault}"[:200],
            do=_DO,
        ) from fault
