"""A tokenizer in the files of before tokenizer.json, vocab.json and merges.txt, as a tokenizer.json.

Which text it is split into before the merges is in neither: transformers' class of the tokenizer knows it, and makes
the file that `save_pretrained` would write. Code of a checkpoint's own is not run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.gguf_tokens import CONFIG, bytes_of
from dconv.checkpoint.source import Side
from dconv.errors import Refused, ToolMissing

PAIRS: Final = ("vocab.json", "merges.txt")
_MORE: Final = (CONFIG, "special_tokens_map.json", "added_tokens.json")


def as_json(side: Side, config: Mapping[str, object]) -> bytes:
    """The bytes of a tokenizer.json, made by transformers of a vocabulary and merges in files of their own.

    Args:
        side: files that travel with the model, by name.
        config: config.json, by whose ``model_type`` the class is found where no file names it.

    Raises:
        ToolMissing: no transformers.
        Refused: it makes no tokenizer of them.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as fault:
        raise ToolMissing(
            f"a tokenizer of {' and '.join(PAIRS)} is read by transformers",
            found=str(fault),
            do="pip install transformers; or bring tokenizer.json along",
        ) from None
    kind: Any = AutoTokenizer  # its stubs leave the class open
    with tempfile.TemporaryDirectory(prefix="dconv-tokenizer-") as scratch:
        folder = Path(scratch)
        for name in (*PAIRS, *_MORE):
            if name in side:
                (folder / name).write_bytes(bytes_of(side, name))
        (folder / "config.json").write_text(json.dumps({"model_type": config.get("model_type")}))
        try:
            tokenizer: Any = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return tokenizer.backend_tokenizer.to_str().encode()
        except Exception as fault:  # of a library, on what files say
            raise Refused(
                "transformers makes no tokenizer of these files, nothing was written",
                where=", ".join(name for name in (*PAIRS, *_MORE) if name in side),
                found=f"{type(fault).__name__}: {fault}"[:200],
                do="--hf-config DIR brings config.json and a tokenizer.json along",
            ) from fault
