"""What the documentation says of the code is what the code says: tables, help, variables, examples; and the site."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from scripts import docs_hooks, docs_reference
from tests.docs.commands import DOCS, ROOT, read

MKDOCS: Final = ROOT / ".venvs" / "docs" / "bin" / "python"
#: Variables of dconv, of launchers and of vendors' software.
_NAMED: Final = re.compile(
    r"RANK|WORLD_SIZE|ZDOTDIR|(?:LOCAL|GROUP|SLURM|TORCHELASTIC|MASTER|DCONV|RAY|QNN|QAIRT|XDG|MTK|PULSAR2|CONDA)_[A-Z0-9_]+"
)


def _read_by_name(tree: ast.Module) -> set[str]:
    """Names that stand where the environment is asked, as text or as a constant of the module."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign | ast.Assign)
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            of, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            of, key = node.value, node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            of, key = node.comparators[0], node.left
        else:
            continue
        if ast.unparse(of).rpartition(".")[2] not in ("environ", "environment", "variables"):
            continue
        said = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key).rpartition(".")[2])
        if isinstance(said, str) and said.isupper():
            found.add(said)
    return found


def _variables() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "dconv").rglob("*.py"):
        if "drivers" in path.parts:  # of the toolchain's own process
            continue
        tree = ast.parse(path.read_text())
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= {text for text in texts if _NAMED.fullmatch(text)} | _read_by_name(tree)
    return found


def test_the_page_has_every_variable_and_no_other() -> None:
    page = (DOCS / "reference" / "environment.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([A-Z0-9_]+)`", rows)) == _variables()


@pytest.mark.parametrize("page", docs_reference.MADE)
def test_generated_pages_are_what_the_code_says(page: str) -> None:
    """``scripts/docs_reference.py --write`` puts it in."""
    if page == "reference/cli.md" and sys.version_info >= (3, 13):
        pytest.skip("argparse spells options otherwise from Python 3.13 on")
    assert (DOCS / page).read_text() == docs_reference.filled(page)


def test_examples_are_the_plugin_that_is_tested() -> None:
    """The pages about extending show the files of tests/plugin, letter by letter."""
    shown = {}
    for path in sorted((DOCS / "extend").glob("*.md")):
        for block in read(path).blocks:
            if block.file.startswith("dconv-house/"):
                shown[block.file.removeprefix("dconv-house/")] = block.text + "\n"
    assert shown.keys() == {"dconv_house/arch.py", "dconv_house/npz.py", "dconv_house/chip.py", "pyproject.toml"}
    for name, text in shown.items():
        assert text == (ROOT / "tests" / "plugin" / name).read_text(), name


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_exit_code_has_a_section() -> None:
    from dconv import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DconvError)]
    page = (DOCS / "troubleshooting.md").read_text()
    for kind in kinds:
        assert re.search(rf"^\| \[{kind.exit_code}\].* \| `{kind.label}` \|", page, re.MULTILINE), kind
        assert re.search(rf"^## {kind.exit_code}: ", page, re.MULTILINE), kind


def test_links_lead_somewhere() -> None:
    """In a clone, where no site is built: every relative link of a page is a file, its anchor a heading of it."""
    for path in DOCS.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if "://" in target:
                continue
            other = (path.parent / name).resolve() if name else path
            assert other.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{path.name}: {target}"


def test_diagrams_are_drawn_into_the_page() -> None:
    class Here:
        class file:
            src_uri = "concepts/plan.md"

    text = "before\n\n![What & how](../img/plan.svg)\n\nafter"
    drawn = docs_hooks.on_page_markdown(text, page=Here, config={"docs_dir": str(DOCS)}, files=None)
    assert 'aria-label="What &amp; how"' in drawn
    assert "<svg" in drawn
    assert "<style>" not in drawn  # it would be the whole page's
    assert "\n\n" not in drawn.partition("<figure")[2].partition("</figure>")[0]  # Markdown would go on there
    picture = "![a terminal](../img/terminal.svg)"  # has colours of its own
    assert docs_hooks.on_page_markdown(picture, page=Here, config={"docs_dir": str(DOCS)}, files=None) == picture
    for path in (DOCS / "img").glob("*.svg"):
        assert ("currentColor" in path.read_text()) == (path.name != "terminal.svg")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text())


@pytest.mark.skipif(not MKDOCS.exists(), reason="bash scripts/docs.sh makes the environment")
def test_the_site_is_built_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(["bash", "scripts/docs.sh", str(site)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(\S+?)[\">\s]", page.read_text())
        loaded += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preload|icon)[^>]*href=\"?(\S+?)[\">\s]", page.read_text()
        )
        assert [url for url in loaded if "//" in url and not url.startswith("data:")] == [], page
    assert "weight_scale_inv" in (site / "search" / "search_index.json").read_text()
