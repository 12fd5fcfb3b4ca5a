"""Completion for bash, zsh and fish: the answer to a shell that asks, and the script that makes it ask."""

from __future__ import annotations

import os
import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from dconv.errors import ToolMissing, UsageError, storage_faults

SHELLS: Final = ("bash", "zsh", "fish")
#: argcomplete's, set by a shell that asks.
ASKED: Final = "_ARGCOMPLETE"
#: Stands in every line that is written into a person's own file, and nowhere else.
_MARK: Final = "# dconv completion"


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation came to.

    Attributes:
        script: the file that holds the script.
        startup: the shell's own file, of which some lines are ours; None where it needs none.
        changed: which of the two were written now.
    """

    script: Path
    startup: Path | None
    changed: tuple[Path, ...]

    def text(self) -> str:
        """For a person."""
        if not self.changed:
            said = [f"was there    {self.script}"]
        else:
            said = [f"wrote        {path}" for path in self.changed]
        undo = f"rm {shlex.quote(str(self.script))}"
        if self.startup is not None:
            undo += f"; sed -i --follow-symlinks '/{_MARK}$/d' {shlex.quote(str(self.startup))}"
        return "\n".join([*said, f"undo         {undo}", "from now on  in every new shell"])


def answer(overview: Callable[[], ArgumentParser], commands: Mapping[str, Callable[[], ArgumentParser]]) -> NoReturn:
    """Tell the shell that asked what may stand at its cursor, and end this process.

    Args:
        overview: makes the parser of ``dconv`` alone.
        commands: each with what makes its parser; that of the typed one is made, and no other.
    """
    try:
        _answer(overview, commands)
    finally:
        os._exit(1)  # which a shell takes for no answer; argcomplete's own way out comes before


def _answer(overview: Callable[[], ArgumentParser], commands: Mapping[str, Callable[[], ArgumentParser]]) -> None:
    import argcomplete
    from argcomplete.completers import ChoicesCompleter
    from argcomplete.lexers import split_line

    from dconv.assist.completers import attach

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    made = commands.get(words[1]) if len(words) > 1 else None
    if made is None and len(words) > 1 and not words[1].startswith("-"):
        return  # no command of ours
    parser = (made or overview)()
    attach(parser)
    if made is not None:
        os.environ[ASKED] = "2"  # the line's second word is then what a parser takes for the program's name
    none = ChoicesCompleter({})  # for what has no completer; argcomplete's own would start a bash
    argcomplete.autocomplete(parser, always_complete_options=False, default_completer=none)


def shell_of(said: str, environment: Mapping[str, str] = os.environ) -> str:
    """The shell that is meant: the one that is said, or else ``$SHELL``.

    Raises:
        UsageError: none that is completed.
    """
    found = said or Path(environment.get("SHELL", "")).name
    if found not in SHELLS:
        raise UsageError(
            "which shell?",
            where="--install-completion, --show-completion",
            expected=", ".join(SHELLS),
            found=said or f"SHELL={environment.get('SHELL', '')!r:.80}",
            do="dconv --install-completion bash",
        )
    return found


def script(shell: str) -> str:
    """What a shell reads.

    Raises:
        ToolMissing: argcomplete is not installed.
    """
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as fault:
        raise ToolMissing("completion needs argcomplete", found=str(fault), do="pip install argcomplete") from fault
    return f"{shellcode(['dconv'], shell=shell).rstrip()}\n{_MARK}\n"


@storage_faults()
def install(shell: str, environment: Mapping[str, str] = os.environ) -> Installed:
    """Write the script to where a shell looks for it; nothing is changed where that has been done.

    Raises:
        UsageError: a file of that name is there, and is not ours.
        ToolMissing: see `script`.
        StorageFault: it cannot be written.
    """
    path, startup, lines = _places(shell, environment)
    text = script(shell)
    changed: list[Path] = []
    before = path.read_text("utf-8", "replace") if path.exists() else None
    if before is not None and _MARK not in before.splitlines():
        raise UsageError(
            "a completion of another's is there, nothing was written",
            where=str(path),
            do="move it away, or dconv --show-completion prints what would be written",
        )
    if before != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            fresh.write_text(text)
            fresh.replace(path)  # a shell that starts meanwhile reads the one or the other
        finally:
            fresh.unlink(missing_ok=True)
        changed.append(path)
    if startup is not None:
        there = startup.read_text("utf-8", "replace") if startup.exists() else ""
        missing = [line for line in lines if line not in there.splitlines()]
        if missing:
            startup.parent.mkdir(parents=True, exist_ok=True)
            with startup.open("a") as file:  # appended to, so that it stays the link that it may be
                file.write("\n" * bool(there and not there.endswith("\n")) + "".join(f"{line}\n" for line in missing))
            changed.append(startup)
    return Installed(path, startup, tuple(changed))


def _places(shell: str, environment: Mapping[str, str]) -> tuple[Path, Path | None, list[str]]:
    """The script's file, the shell's startup file, and the lines that this needs."""
    home = Path(environment.get("HOME") or Path.home())
    data = _folder(environment, "XDG_DATA_HOME", home / ".local/share")
    if shell == "fish":
        return _folder(environment, "XDG_CONFIG_HOME", home / ".config") / "fish/completions/dconv.fish", None, []
    if shell == "zsh":
        path = data / "dconv/zsh/_dconv"
        lines = [f"fpath=({shlex.quote(str(path.parent))} $fpath)", "autoload -Uz compinit && compinit"]
        startup = _folder(environment, "ZDOTDIR", home) / ".zshrc"
    else:
        # the package bash-completion finds it there by itself, when it is first needed; plain bash by the line
        path = data / "bash-completion/completions/dconv"
        quoted = shlex.quote(str(path))
        lines, startup = [f"[ ! -r {quoted} ] || . {quoted}"], home / ".bashrc"
    return path, startup, [f"{line}  {_MARK}" for line in lines]


def _folder(environment: Mapping[str, str], name: str, otherwise: Path) -> Path:
    said = environment.get(name, "")
    return Path(said) if os.path.isabs(said) else otherwise
