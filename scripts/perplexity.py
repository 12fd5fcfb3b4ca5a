"""Perplexity of a HuggingFace directory on a text, in fp32 on a CPU.

    python scripts/perplexity.py MODEL                 on the held-out speech of prose.py, its first 10,240 tokens
    python scripts/perplexity.py MODEL TEXT --length 1024 --stride 512 --tokens 0 --json

A model in any codes that dconv decodes (GPTQ, AWQ, pack-quantized, FP8, MX …) is decoded to fp32 first, so that all are
run by the same layers in the same arithmetic and the difference between two is that of their weights.

Windows of ``--length`` tokens begin every ``--stride`` tokens; each scores the tokens that none before it has scored
and that have a token before them in the window. No token is added to the text; what does not fill a window is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import prose

if TYPE_CHECKING:
    import torch

ROOT: Final = Path(__file__).resolve().parent.parent
#: Where the prose is kept.
PROSE: Final = ROOT / "work" / "prose"


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood of a token.
        nll: that mean, in nats.
        scored: tokens that it is the mean of.
    """

    perplexity: float
    nll: float
    scored: int
    windows: int
    length: int
    stride: int
    seconds: float


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where each window over ``count`` tokens begins, and the first of its tokens that it scores.

    Raises:
        ValueError: a window of fewer than two tokens, a stride that leaves tokens out, or a text below one window.
    """
    if not 1 <= stride <= length or length < 2 or count < length:
        raise ValueError(f"no windows of {length} tokens every {stride} in {count}")
    for start in range(0, count - length + 1, stride):
        yield start, max(1, length - stride) if start else 1


def score(model: torch.nn.Module, ids: Sequence[int], length: int, stride: int) -> Score:
    """Perplexity of a causal model on token ids; logits of one window are in memory at a time."""
    import torch

    began = time.perf_counter()
    total, scored, count = 0.0, 0, 0
    text = torch.tensor(ids)
    with torch.inference_mode():
        for start, first in windows(len(ids), length, stride):
            window = text[start : start + length]
            logits = model(window[None], use_cache=False).logits[0, first - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits.float(), window[first:], reduction="none")
            total += losses.double().sum().item()
            scored += len(losses)
            count += 1
    nll = total / scored
    return Score(math.exp(nll), nll, scored, count, length, stride, time.perf_counter() - began)


def load(folder: Path) -> Any:
    """The model of a HuggingFace directory in fp32, decoded by dconv where its config says that it is in codes."""
    import torch
    from transformers import AutoModelForCausalLM

    import dconv

    def plain(place: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    said = "quantization_config" in json.loads((folder / "config.json").read_text())
    if not said and not (folder / "quantize_config.json").exists():
        return plain(folder)
    with tempfile.TemporaryDirectory(prefix="perplexity-") as place:
        dconv.convert(folder, "hf", Path(place) / "dense", dtype="f32")
        return plain(Path(place) / "dense")


def of_directory(folder: Path, text: str, *, length: int = 512, stride: int = 512, tokens: int = 10_240) -> Score:
    """Perplexity of ``folder`` on the first ``tokens`` of ``text`` (all where it is 0) by its own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return score(load(folder), ids[: tokens or None], length, stride)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="?", help="a file; the held-out speech by default")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    parser.add_argument("--tokens", type=int, default=10_240, help="of the text, from its beginning; 0 takes all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    text = args.text.read_text() if args.text else prose.speeches(PROSE)[prose.HELD_OUT]
    found = of_directory(args.model, text, length=args.length, stride=args.stride, tokens=args.tokens)
    if args.json:
        print(json.dumps(asdict(found)))
        return
    print(f"perplexity {found.perplexity:.4f}   {found.scored} tokens, {found.windows} windows of {found.length} "
          f"every {found.stride}   {found.seconds:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
