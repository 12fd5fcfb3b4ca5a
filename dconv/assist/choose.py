"""A small local model that chooses between FORMATs: the one that it finds likeliest after the sentence.

It writes no word of its own: each candidate's log-likelihood behind a short prompt is summed over its tokens and
divided by their number, and the greatest wins. Nothing is fetched, and no code of the model's directory is run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dconv.errors import Damaged, ToolMissing, UsageError

_PROMPT = """Sentence: my llama for ollama
Format: gguf
Sentence: train it in Megatron
Format: megatron
Sentence: {sentence}
Format: {format}"""


def likeliest(model: Path, sentence: str, candidates: Sequence[str]) -> str:
    """One of ``candidates``.

    Args:
        sentence: what a person asked for.
        candidates: FORMATs, of which there is at least one.
        model: a HuggingFace directory with weights and a tokenizer.

    Raises:
        UsageError: ``model`` is no directory.
        ToolMissing: torch or transformers is not installed.
        Damaged: it is no causal language model that transformers reads.
    """
    if not model.is_dir():
        raise UsageError("--with names no directory", where=str(model), expected="a HuggingFace model of this machine")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks at it
    try:
        import torch

        transformers: Any = importlib.import_module("transformers")
    except ImportError as fault:
        raise ToolMissing(
            "--with needs torch and transformers", found=str(fault), do="bash scripts/install.sh transformers"
        ) from fault
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        net = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True, use_safetensors=True)
    except Exception as fault:  # whatever a config or a tokenizer of any kind makes it raise
        raise Damaged("transformers does not read this model", where=str(model), found=f"{fault!s:.300}") from fault
    net.eval()
    scores: list[float] = []
    with torch.no_grad():
        shared = tokenizer(_PROMPT.format(sentence=sentence[-1000:], format="").rstrip())["input_ids"]
        for candidate in candidates:
            tokens = tokenizer(_PROMPT.format(sentence=sentence[-1000:], format=candidate))["input_ids"]
            # tokens that the candidate has no part in are the same for all
            begun = next((i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b), len(shared))
            logits = net(torch.tensor([tokens])).logits[0, :-1].float()
            likely = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]]
            scores.append(float(likely[max(begun - 1, 0) :].mean()))
    return candidates[max(range(len(candidates)), key=lambda i: (scores[i] == scores[i], scores[i]))]
