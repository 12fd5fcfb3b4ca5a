"""The pages in a real browser, on a phone and on a desktop, light and dark: all fits, no script fails, no network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dconv.arch.llama import LLAMA
from tests.cli.conftest import Dconv, dconv
from tests.fp8 import write_fp8
from tests.launched import OPTIONS, small_llama
from tests.models import config_of, write_random
from tests.processes import ROOT

__all__ = ["dconv"]


def script() -> ModuleType:
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("screenshot")


COMMAND = script().chromium()
needs_chromium = pytest.mark.skipif(COMMAND is None, reason="no Chromium here: bash scripts/browser.sh installs it")
LONG = "a-directory-whose-name-is-so-long-that-no-telephone-has-room-for-it-on-one-line" * 2


def faults(*pages: Path) -> list[str]:
    """What is wrong, at all widths and in both schemes."""
    return [f"{seen.page.name} {seen.width} {seen.scheme}: {fault}"
            for seen in script().looked(pages, COMMAND) for fault in seen.faults]  # fmt: skip


@needs_chromium
def test_the_pages_fit(dconv: Dconv, tmp_path: Path) -> None:
    """A report of layouts, one of codes with their errors, one of many files with long names, and `inspect`'s page."""
    coded = write_fp8(tmp_path / "fp8")
    many = write_random(tmp_path / LONG, LLAMA, config_of(LLAMA, num_hidden_layers=40), shard_size=20_000)
    model = small_llama(tmp_path)
    for words in (
        ("convert", model, "megatron", "-o", tmp_path / "a", *OPTIONS, "--report", "--verify", "digest"),
        ("convert", coded, "mx", "--quant", "mxfp8", "-o", tmp_path / "b", "--report"),
        ("convert", many, "hf", "--shard-size", "15kB", "-o", tmp_path / "c", "--report"),
        ("inspect", coded, "--html", tmp_path / "d.html"),
        ("inspect", many, "--html", tmp_path / "e.html"),
    ):
        ran = dconv(*words)
        assert ran.code == 0, ran.err
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == 5
    assert faults(*pages) == []


@needs_chromium
def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    """Each fault by itself: else the other test would show nothing."""
    wrong = {
        "wide": '<p style="width: 3000px">x</p>',
        "cut": '<svg viewBox="0 0 100 20" width="100"><text x="60">a long label</text></svg>',
        "error": "<script>nowhere()</script>",
        "asks": '<img src="https://example.com/x.png" alt="">',
    }
    signs = {"wide": "sideways", "cut": "cut: ", "error": "nowhere", "asks": "asks for"}
    for name, body in wrong.items():
        page = tmp_path / f"{name}.html"
        page.write_text(f'<!doctype html><meta name="viewport" content="width=device-width"><body>{body}')
        found = faults(page)
        assert any(signs[name] in fault for fault in found), (name, found)
