"""Converts the models of ``gguf_models.py`` with llama.cpp's own converter, which is no package.

By hand, in an environment with torch, transformers and gguf, and with a copy of llama.cpp's source (that of
llama-cpp-python 0.3.36 was used)::

    python -m tests.formats.record_gguf LLAMA_CPP tests/formats/recorded/gguf.zip
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.formats.gguf_models import MODELS, write_model


def main(llama_cpp: Path, out: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import gguf
    import torch
    from conversion import get_model_class  # pyright: ignore[reportMissingImports]

    def token_ids(model: Any) -> None:
        """Instead of a vocabulary."""
        model.gguf_writer.add_bos_token_id(1)
        model.gguf_writer.add_eos_token_id(2)

    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z,
    ):
        for name in MODELS:
            folder, file = write_model(Path(scratch) / name, name), Path(scratch) / f"{name}.gguf"
            config = json.loads((folder / "config.json").read_text())
            vocabulary = {str(token): token for token in range(config["vocab_size"])}
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
            kind = get_model_class(config["architectures"][0])
            kind.set_vocab = token_ids
            with torch.inference_mode():
                kind(folder, gguf.LlamaFileType.MOSTLY_BF16, file).write()
            z.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
