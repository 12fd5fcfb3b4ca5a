"""`inspect --html`: one page that needs nothing else, says what --json says, and shows every name as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dconv.report.page import page
from dconv.report.precision import precision_of
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv
from tests.fp8 import write_fp8
from tests.models import tensors

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "dt", "dd", "ul", "li", "div", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "script", "code", "strong", "i"),
}
VOID = {"meta"}
#: Attributes by which a page would fetch, go somewhere or run something.
ACTIVE = {"src", "href", "action", "srcset", "data", "poster", "background", "formaction"}


class Read(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in attrs}
        assert tag in ALLOWED, tag
        assert not ACTIVE & said.keys() and not any(key.startswith("on") for key in said), said
        if "data-c" in said:
            self.cells.append(said)
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open and self._open[-1] == "script" else self.words).append(data)

    @property
    def report(self) -> Any:
        return json.loads(self.scripts[0])


def made(dconv: Dconv, model: Path) -> tuple[str, Any]:
    """The page and what --json said when it was made."""
    file = model.parent / "page.html"
    ran = dconv("inspect", model, "--html", file, "--json")
    assert ran.code == 0, ran.err
    return file.read_text(), ran.json


def test_it_says_what_json_says(dconv: Dconv, tmp_path: Path) -> None:
    listed = ["gate", "lm_head", *(f"model.layers.{i}.self_attn" for i in range(4))]
    model = write_fp8(tmp_path / "model", quantization={"modules_to_not_convert": listed})
    text, said = made(dconv, model)
    read, precision = Read(text), said["precision"]
    assert len(read.scripts) == 2
    for key in ("family", "parameters", "dtypes", "stored_bytes", "mup", "refused"):
        assert read.report[key] == said[key]
    for key in ("cells", "classes", "faults", "scales", "block", "not_converted"):
        assert read.report["precision"][key] == precision[key]
    assert read.report["precision"]["with_scales"] == len(precision["with_scales"]) == 64
    shown = {cell["data-c"].split("\n")[0]: cell["data-c"] for cell in read.cells}
    assert set(shown) == {cell["name"] for cell in precision["cells"]} and len(read.cells) == len(shown)
    cell = next(cell for cell in precision["cells"] if cell["name"] == "model.layers.3.block_sparse_moe.experts.*.w2")
    words = shown[cell["name"]]
    assert words.split("\n")[1] == "4 tensors: f8_e4m3 with scales"
    assert f"shape 32 x 48   {cell['bytes']:,} bytes" in words
    assert f"scales {cell['scales']['count']} values from {cell['scales']['low']:.3g}" in words
    by_look = {cell["data-c"].split("\n")[0]: cell["class"] for cell in read.cells}
    assert (by_look["model.layers.0.self_attn.q_proj"], by_look["lm_head"]) == ("fp8", "bf16")
    together = "\n".join(read.words)
    assert precision["faults"][0]["what"] in together and "model.layers.{0..3}.self_attn.v_proj" in together
    bars = [part.split('"')[1] for part in text.split("<i style=")[1:]]
    assert len(bars) >= len(precision["scales"]["bins"])


def test_it_needs_nothing_else(dconv: Dconv, tmp_path: Path) -> None:
    text, _ = made(dconv, write_fp8(tmp_path / "model"))
    lower = text.lower()
    for word in ("http:", "https:", "//", "url(", "@import", "<link", "<img", "fetch(", "import("):
        assert word not in lower, word
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "default-src 'none'" in text


HOSTILE = [
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a' onfocus='alert(1)", "{{json}}",
    "<!--", "&lt;b&gt;", "model.layers.0.<svg onload=alert(1)>.weight", "\u202etxt.exe", "x" * 4000, "a." * 2000 + "b",
    "]]>", "a\\u003c/script>", "\x00\x07",
]  # fmt: skip


def test_names_are_text(dconv: Dconv, tmp_path: Path) -> None:
    """Tensors, list entries and method with markup in their names: `Read` would see a tag or an attribute of theirs."""

    def edit(specs: dict[str, TensorSpec]) -> None:
        for name in filter(str.isprintable, HOSTILE):  # others are no names of tensors, and are refused
            specs[f"{name}.weight"] = TensorSpec(f"{name}.weight", (32, 32), "bf16")

    quantization = {"modules_to_not_convert": ["gate", "lm_head", *HOSTILE], "activation_scheme": HOSTILE[0]}
    model = write_fp8(tmp_path / "<b>model</b>", edit=edit, quantization=quantization)
    text, said = made(dconv, model)
    read = Read(text)
    assert len(read.scripts) == 2 and read.report["refused"] == said["refused"]
    names = {cell["data-c"].split("\n")[0] for cell in read.cells}
    assert {*HOSTILE[:4], "x" * 300 + "…"} <= names
    assert "<b>model</b>" in "".join(read.words)


def test_a_packed_method_with_markup(dconv: Dconv, tmp_path: Path) -> None:
    text, _ = made(dconv, write_fp8(tmp_path / "model", quantization={"quant_method": HOSTILE[0]}))
    assert len(Read(text).scripts) == 2


def test_a_page_without_precision_and_without_layers(tmp_path: Path) -> None:
    from dconv.checkpoint.detect import open_source

    assert Read(page("title", [("path", "x")], {"refused": "why"}, None)).report == {"refused": "why"}
    model = write_fp8(tmp_path / "model", edit=lambda specs: [specs.pop(n) for n in list(specs) if "layers" in n])
    precision = precision_of(open_source(model), None, {})
    assert len(Read(page("title", [], {}, precision)).cells) == len(tensors(model)) == 3


def test_names_by_the_thousand(tmp_path: Path) -> None:
    """The page stays small where a header has more layers and classes than any model."""
    from dconv.checkpoint.detect import open_source

    def edit(specs: dict[str, TensorSpec]) -> None:
        specs.clear()
        for i in range(30_000):
            specs[f"model.layers.{i}.part{i % 300}"] = TensorSpec(f"model.layers.{i}.part{i % 300}", (1,), "u8")

    precision = precision_of(open_source(write_fp8(tmp_path / "model", edit=edit)), None, {})
    text = page("title", [], {}, precision)
    assert len(text) < 20_000_000
    assert "The map is cut" in text


def test_only_a_page_is_replaced(dconv: Dconv, tmp_path: Path) -> None:
    model = write_fp8(tmp_path / "model")
    file = tmp_path / "page.html"
    assert dconv("inspect", model, "--html", file).code == 0
    file.write_text(file.read_text().replace("</html>", "old</html>"))
    assert dconv("inspect", model, "--html", file).code == 0
    assert "old</html>" not in file.read_text()
    weights = (model / "model.safetensors").read_bytes()
    ran = dconv("inspect", model, "--html", model / "model.safetensors")
    assert ran.code == 2 and "no page of dconv inspect" in ran.err
    assert (model / "model.safetensors").read_bytes() == weights
    assert dconv("inspect", model, "--html", tmp_path / "nowhere" / "page.html").code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "page.html"]


@pytest.mark.parametrize("word", ["--html", "--json"])
def test_help_names_them(dconv: Dconv, word: str) -> None:
    assert word in dconv("inspect", "--help").out
