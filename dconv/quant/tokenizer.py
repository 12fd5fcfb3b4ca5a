"""Texts and conversations as token ids, by the tokenizer beside the model. Code in a checkpoint is never run.

``tokenizer.json`` is read by ``tokenizers`` alone; transformers is asked where there is none, and for conversations,
whose template it renders in a sandbox.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import read_json
from dconv.checkpoint.gguf_tokens import asked
from dconv.errors import Refused, ToolMissing
from dconv.sharding.parsed import is_mapping

_FILE: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"


class Tokenizer:
    """The tokenizer of a folder, loaded when it is first asked.

    Args:
        folder: the model's; None where it has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def ids(self, text: str) -> list[int]:
        """The ids of a text: special tokens where it spells them, no others.

        Raises:
            Refused: there is no tokenizer.
            Damaged: one that cannot be read.
            ToolMissing: neither ``tokenizers`` nor transformers reads it here.
        """
        return self._encode(text)

    def conversation(self, turns: list[Any]) -> list[int]:
        """The ids of a conversation in the tokenizer's chat template.

        Raises:
            Refused: there is no template, or it does not take these turns.
            ToolMissing, Damaged: see `ids`.
        """
        tokenizer = self._whole
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(
                "conversations need a chat template, and the tokenizer has none",
                where=str(self._folder),
                expected=f"chat_template in {_CONFIG}, or chat_template.jinja",
                do="records with text instead of messages, or the tokenizer of the instructed model",
            )
        try:
            made = tokenizer.apply_chat_template(turns, tokenize=False)
            return list(tokenizer(made, add_special_tokens=False)["input_ids"])
        except Exception as fault:  # a template raises what it likes
            raise Refused(
                "the chat template does not take a conversation",
                where=f"{turns!r:.200}",
                found=f"{type(fault).__name__}: {fault}"[:200],
            ) from fault

    def end(self) -> int | None:
        """The id that ends a text; None where the tokenizer's config names none."""
        path = (self._folder or Path()) / _CONFIG
        if self._folder is None or not path.is_file():
            return None
        said = read_json(path.resolve(), what=_CONFIG).get("eos_token")  # `beside` makes links
        text = said.get("content") if is_mapping(said) else said
        found = self._special(text) if isinstance(text, str) else None
        return found if isinstance(found, int) and found >= 0 else None

    def digest(self) -> str:
        """sha256 of what the ids depend on; "" where there is no tokenizer."""
        names = (_FILE, "tokenizer.model", _CONFIG, "chat_template.jinja", "vocab.json", "merges.txt")
        paths = [self._folder / name for name in names if self._folder and (self._folder / name).is_file()]
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest() if sums else ""

    def _special(self, text: str) -> int | None:
        return self._whole.convert_tokens_to_ids(text) if self._raw is None else self._raw.token_to_id(text)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        raw = self._raw
        if raw is not None:
            return lambda text: _ids(raw, text)
        whole = self._whole
        return lambda text: list(whole(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _raw(self) -> Any:
        """``tokenizers``' own; None where there is no such file or no such library."""
        path = (self._folder or Path()) / _FILE
        if self._folder is None or not path.is_file():
            return None
        try:
            import tokenizers
        except ImportError:
            return None
        with asked(str(path)):
            return tokenizers.Tokenizer.from_file(str(path))

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer of transformers, with template and all."""
        if self._folder is None:
            raise Refused("texts need a tokenizer, and the model has none", do="token ids: .npy, .safetensors, .json")
        try:
            auto = import_module("transformers").AutoTokenizer
        except ImportError as fault:
            raise ToolMissing(
                "this tokenizer needs transformers", where=str(self._folder), do="pip install transformers"
            ) from fault
        try:
            return auto.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        except Exception as fault:  # whatever a file may do to it
            raise Refused(
                "there is no tokenizer that is read here",
                where=str(self._folder),
                expected=f"{_FILE}, or another that transformers reads without code of the checkpoint",
                found=f"{type(fault).__name__}: {fault}"[:200],
                do="token ids need none: .npy, .safetensors, .json",
            ) from fault


def _ids(raw: Any, text: str) -> list[int]:
    with asked(_FILE):
        return raw.encode(text, add_special_tokens=False).ids
