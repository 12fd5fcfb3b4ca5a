"""Every command of docs/migration.md runs, on small models under the names that the document uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.cli import main
from tests.models import config_of, tensors, write_random

DOCUMENT = Path(__file__).parents[2] / "docs" / "migration.md"
COMMANDS = re.findall(r"\| `dconv ([^`]+)` \|", DOCUMENT.read_text())

#: HuggingFace directories: name -> family.
MODELS = {
    "llama-2-7b": "llama", "mistral-7b": "mistral", "mixtral-8x7b": "mixtral", "minicpm-2b": "minicpm",
    "minicpm4-8b": "minicpm", "deepseek-moe-16b": "deepseek", "nemotron-h-8b": "nemotron_h", "llava-7b": "llava",
}  # fmt: skip
#: Checkpoints that some of them are converted to first: name -> (of which, words of the command).
MADE = {
    "mixtral-megatron": ("mixtral-8x7b", "megatron --ep 2"),
    "minicpm4-megatron": ("minicpm4-8b", "megatron --tp 2"),
    "deepseek-megatron": ("deepseek-moe-16b", "megatron --ep 2"),
    "minicpm-legacy": ("minicpm-2b", "megatron --tp 2 --pp 2 --megatron-format legacy"),
    "minicpm-megatron": ("minicpm-2b", "megatron --tp 2"),
    "minicpm-bmtrain": ("minicpm-2b", "bmtrain"),
    "nemotron-h-megatron": ("nemotron-h-8b", "megatron"),
    "llava-megatron": ("llava-7b", "megatron --tp 2"),
    "distilled-megatron": ("minicpm-2b", "megatron --teacher llama-2-7b"),
}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a checkpoint of the document, and what it is made from, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def prepare(name: str) -> None:
        if Path(name).exists():
            return
        if name in MODELS:
            family = by_name(MODELS[name])
            config = config_of(family, num_key_value_heads=4, vocab_size=64)
            if name == "minicpm-2b":  # no sparse attention yet
                config = {
                    key: value for key, value in config.items() if key not in ("sparse_config", "mup_denominator")
                }
            write_random(Path(name), family, config, small=True)
            return
        source, words = MADE[name]
        for other in (source, *(word for word in words.split() if word in MODELS)):
            prepare(other)
        assert main(["convert", source, *words.split(), "-o", name, "--quiet"]) == 0

    return prepare


def test_the_document_has_commands() -> None:
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command: str, prepared: Callable[[str], None]) -> None:
    words = command.split()
    for word in words:
        if word in MODELS or word in MADE:
            prepared(word)
    assert main([*words, "-o", "out", "--quiet"]) == 0
    source = MADE[words[1]][0] if words[1] in MADE else words[1]
    if words[2] == "hf" and "--mup2llama" not in words:
        assert tensors(Path("out")) == tensors(Path(source))
