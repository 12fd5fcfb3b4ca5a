"""The README's picture: what commands print at a terminal, as an SVG without a font or a script from elsewhere.

`bash scripts/quickstart.sh` makes the model, then `python scripts/picture.py` writes docs/img/terminal.svg.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

_ROOT = Path(__file__).resolve().parent.parent
_MODEL = _ROOT / "work" / "quickstart" / "smollm2"
_WIDTH = 104  # what a plan needs, unfolded
_COMMANDS = (
    "dconv plan smollm2 megatron --tp 3 --pp 2",
    "dconv convert smollm2 megatron --tp 3 --pp 2 -o shards --nproc 2 --verify digest",
    "dconv diff smollm2 shards",
    "dconv convert smollm2 megatron --tp 4",
)
_THEME = TerminalTheme(
    (22, 27, 34), (220, 226, 232),
    [(72, 79, 88), (255, 123, 114), (126, 231, 135), (242, 204, 96), (121, 192, 255), (210, 168, 255), (86, 212, 221),
     (200, 206, 212)],
)  # fmt: skip


def main() -> None:
    """See above."""
    if not _MODEL.is_dir():
        sys.exit("picture: bash scripts/quickstart.sh makes the model")
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "smollm2").symlink_to(_MODEL)
        for command in _COMMANDS:
            console.print(Text.assemble(("$ ", "green"), (command, "bold")), soft_wrap=True)
            console.print(Text.from_ansi(_shown(command, Path(folder))), soft_wrap=True)
            console.print()
    svg = console.export_svg(title="dconv", theme=_THEME)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would be fetched from elsewhere
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    svg = svg.replace("font-family: arial", "font-family: sans-serif")
    (_ROOT / "docs" / "img" / "terminal.svg").write_text(svg)


def at_terminal(words: Sequence[str], cwd: Path, width: int, env: Mapping[str, str]) -> str:
    """All that a module of Python's writes to a terminal of so many columns."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    unset = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    own = {key: value for key, value in os.environ.items() if key not in unset}
    own |= {"TERM": "xterm-256color", **env}
    command = [sys.executable, "-m", *words]
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=own, cwd=cwd)
    os.close(there)
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
        while some := os.read(here, 1 << 16):
            said += some
    os.close(here)
    process.wait()
    return said.decode().replace("\r\n", "\n")


def _shown(command: str, folder: Path) -> str:
    """What a command leaves on a terminal; a progress bar is gone by then."""
    text = at_terminal(shlex.split(command), folder, _WIDTH, {"DCONV_HISTORY": "off"})
    parts = re.split(r"\x1b\[[0-9]*[AK]|\x1b\[\?25[hl]|\r", text)  # a bar is drawn over, and erased at the end
    return "".join(part for part in parts if "%  " not in part and not part.startswith("[")).rstrip("\n")


if __name__ == "__main__":
    main()
