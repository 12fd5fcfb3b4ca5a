"""The table of models by direction: its three forms say what `dconv.directions` says, and can be read everywhere."""

from __future__ import annotations

import html
import io
import json
import re
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from dconv import __version__
from dconv.arch.registry import families
from dconv.directions import MEANINGS, SIGNS, columns, lines
from dconv.errors import ToolMissing
from dconv.report.archs import TITLE, Directions, markdown, page
from dconv.report.archs_pdf import pdf
from tests.cli.conftest import Dconv, dconv, listing
from tests.report.test_pictures import faults, needs_chromium

__all__ = ["dconv"]
DAY = date(2026, 11, 22)


@pytest.fixture(scope="module")
def table() -> Directions:
    known = columns()
    return Directions(DAY, known, lines(families().values(), known))


@pytest.fixture(scope="module")
def hostile(table: Directions) -> Directions:
    """Models as another package may call them, more than a page of them."""
    names = ("a|b `c`\nd", "<script>alert(1)</script>", "書生 浦語 ✓", "one-word-" * 20)
    odd = [replace(line, models=name, note=name) for line, name in zip(table.lines, names, strict=False)]
    return replace(table, lines=[*odd, *table.lines])


def signs(table: Directions) -> list[list[str]]:
    return [[SIGNS[way] for way in line.ways.values()] for line in table.lines]


def test_signs_differ_and_every_font_has_them() -> None:
    assert len(set(SIGNS.values())) == len(SIGNS) == len(MEANINGS)
    assert "".join(SIGNS.values()).encode("latin-1")


def test_markdown_is_one_table(table: Directions, hostile: Directions) -> None:
    for each in (table, hostile):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown(each).splitlines() if line.startswith("|")]
        assert {len(row) for row in rows} == {len(each.columns) + 4}
        assert len(rows) == len(each.lines) + 2
        assert [[cell.strip() for cell in row[2:-2]] for row in rows[2:]] == signs(each)
    said = markdown(table)
    assert f"dconv {__version__}, 2026-11-22: {len(table.lines)} families" in said
    assert all(words in said for _, words in table.legend) and all(line.models in said for line in table.lines)
    assert "<script>" not in markdown(hostile)


def test_the_page_has_every_cell_and_a_json_of_them(table: Directions, hostile: Directions) -> None:
    for each in (table, hostile):
        body = page(each)
        rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", body, re.DOTALL)
        assert [re.findall(r"data-c=\"[^\"]*\"[^>]*>([^<]*)</td>", row) for row in rows] == signs(each)
        assert not re.search(r"(?:src|href)=|url\(|@import", body)
        data = json.loads(html.unescape(re.findall(r'id="report">(.*?)</script>', body)[0]))
        assert [family["family"] for family in data["families"]] == [line.name for line in each.lines]
        assert data["dconv"] == __version__ and data["date"] == "2026-11-22"
    assert "<script>alert" not in page(hostile)


@needs_chromium
def test_the_page_fits(hostile: Directions, tmp_path: Path) -> None:
    out = tmp_path / "archs.html"
    out.write_text(page(hostile))
    assert faults(out) == []


def test_a_pdf_is_read_back(table: Directions, hostile: Directions) -> None:
    """By another library: all names and signs are in it as text, the head is on every page, and no glyph is missing."""
    pytest.importorskip("fpdf")
    reader = pytest.importorskip("pypdf")
    for each in (table, hostile):
        read = reader.PdfReader(io.BytesIO(pdf(each)))
        texts = [one.extract_text() for one in read.pages]
        assert len(texts) > 1
        for text, one in zip(texts, read.pages, strict=True):
            assert TITLE in text and f"dconv {__version__}, 2026-11-22" in text
            assert (round(float(one.mediabox.width)), round(float(one.mediabox.height))) == (842, 595)
        for text in texts[:-1]:
            words = text.split()
            assert {column.name for column in each.columns} <= set(words) and {"layouts", "--model-type"} <= set(words)
        whole = "".join("".join(texts).split())
        for line in each.lines:
            spelled = line.models.encode("latin-1", "backslashreplace").decode("latin-1")
            assert "".join(spelled.split()) in whole and line.name in whole
        assert all("".join(words.split()) in whole for _, words in each.legend)
        drawn = Counter(
            str(given[0]) for one in read.pages for given, how in one.get_contents().operations if how == b"Tj"
        )
        every = Counter(sign for row in signs(each) for sign in row if sign)
        assert every.keys() == set("=cqhµ")
        assert {sign: drawn[sign] for sign in every} == {sign: count + 1 for sign, count in every.items()}  # the legend
        assert "�" not in whole
    info = reader.PdfReader(io.BytesIO(pdf(table))).metadata
    assert (info.title, info.creator) == (TITLE, "dconv archs")


def test_a_pdf_of_the_same_day_is_the_same(table: Directions) -> None:
    pytest.importorskip("fpdf")
    assert pdf(table) == pdf(table)


def test_without_its_package_a_pdf_says_how_to_get_it(
    dconv: Dconv, table: Directions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dconv.report.archs_pdf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolMissing, match=re.escape("pip install 'dconv[pdf]'")) as error:
        pdf(table)
    assert error.value.exit_code == 7
    monkeypatch.undo()


@pytest.mark.parametrize("form", ["md", "html", "pdf"])
def test_a_file_is_written_once(dconv: Dconv, tmp_path: Path, form: str) -> None:
    """Its end says its form; an older one is replaced when that is asked for, and a file of somebody else never."""
    if form == "pdf":
        pytest.importorskip("fpdf")
    out = tmp_path / f"table.{form}"
    ran = dconv("archs", "-o", out)
    assert (ran.code, ran.out) == (0, ""), ran.err
    first = out.read_bytes()
    assert first.startswith({"md": b"<!-- dconv archs -->", "html": b"<!doctype html>", "pdf": b"%PDF-"}[form])
    ran = dconv("archs", "--format", form, "-o", out)
    assert ran.code == 2 and "--overwrite replaces it" in ran.err
    out.write_bytes(first + b"\n")
    assert dconv("archs", "--format", form, "-o", out, "--overwrite").code == 0
    assert out.read_bytes() == first
    for other in (tmp_path / "notes.md", tmp_path / "link.md", tmp_path / "folder"):
        other.symlink_to(
            out
        ) if other.stem == "link" else other.mkdir() if other.stem == "folder" else other.write_text("mine")
        before = listing(tmp_path)
        ran = dconv("archs", "--format", form, "-o", other, "--overwrite")
        assert ran.code == 2 and "did not make" in ran.err
        assert listing(tmp_path) == before
    assert dconv("archs", "--format", form, "-o", tmp_path / "nowhere" / "table").code == 5


def test_what_cannot_be_written_leaves_nothing(dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dconv.report.parts.os.fsync", full)
    ran = dconv("archs", "-o", tmp_path / "table.md")
    assert ran.code == 5 and "No space left" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_options_that_mean_nothing(dconv: Dconv, tmp_path: Path) -> None:
    for words in (
        ("--format", "pdf"),
        ("--overwrite",),
        ("--markdown", "--format", "md"),
        ("--json", "-o", tmp_path / "t.md"),
    ):
        assert dconv("archs", *words).code == 2, words
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_it_is_printed(dconv: Dconv, table: Directions) -> None:
    assert dconv("archs", "--format", "md").out == markdown(replace(table, day=date.today())) + "\n"
    assert dconv("archs", "--format", "html").out.startswith("<!doctype html>")
