"""The ``dconv`` command: options in, one call, text or JSON out. Nothing is converted or decided here."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from dconv.commands.table import COMMANDS, complete, overview, run
from dconv.errors import DconvError, StorageFault, storage_fault
from dconv.launch.process import say, tolerate
from dconv.launch.terminal import show_json, tell

__all__ = ["COMMANDS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see ``dconv --help``)."""
    if "_ARGCOMPLETE" in os.environ and argv is None:
        complete()
    tolerate()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] not in COMMANDS:
            overview().parse_args(words)
            raise AssertionError("unreachable")
        return run(words[0], words[1:])
    except SystemExit as left:  # argparse's way out: 0 after --help, 2 after a wrong option
        return left.code if isinstance(left.code, int) else 2
    except DconvError as error:
        return _told(error, words)
    except OSError as fault:
        return _told(storage_fault(fault), words)
    except MemoryError:
        return _told(StorageFault("out of memory"), words)
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    except Exception as fault:
        if "--debug" in words:
            traceback.print_exc()
        hint = "" if "--debug" in words else ", --debug shows where"
        say(f"internal error: {type(fault).__name__}: {fault}{hint}", sys.stderr)
        return 1


def _told(error: DconvError, words: Sequence[str]) -> int:
    if "--json" in words:
        show_json(error.to_dict())
    else:
        tell(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
