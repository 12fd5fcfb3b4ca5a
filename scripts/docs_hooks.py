"""Hooks of MkDocs: diagrams are drawn into the page, so that they have its colours and the site needs no other file.

In Markdown a diagram is an image, ``![what it shows](../img/plan.svg)``, which every reader of Markdown shows. In the
site its SVG stands in the page itself: ``currentColor`` is then the text's colour, light or dark. A picture that has
colours of its own stays an image.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any, Final

_IMAGE: Final = re.compile(r"^!\[([^\]]+)\]\(([^)]+\.svg)\)$", re.MULTILINE)
#: What a file has for readers of its own: a declaration, colours where no page gives any.
_OWN: Final = re.compile(r"<\?xml.*?\?>|<style>.*?</style>|<!--.*?-->", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Put the SVG files of a page into it.

    Raises:
        OSError: there is no such file, which ends the build.
    """
    folder = posixpath.dirname(page.file.src_uri)

    def drawn(found: re.Match[str]) -> str:
        path = Path(config["docs_dir"]) / posixpath.normpath(posixpath.join(folder, found[2]))
        text = path.read_text()
        if "currentColor" not in text:
            return found[0]
        svg = "\n".join(line for line in _OWN.sub("", text).splitlines() if line.strip())
        said = html.escape(found[1])
        return f'<figure class="diagram" role="img" aria-label="{said}">\n{svg}\n</figure>'

    return _IMAGE.sub(drawn, markdown)
