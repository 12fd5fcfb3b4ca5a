"""dconv: move large-language-model checkpoints between where they were trained and where they will run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dconv.api import check as check
    from dconv.api import convert as convert
    from dconv.api import diff as diff
    from dconv.api import handoff as handoff
    from dconv.api import inspect as inspect
    from dconv.api import plan as plan
    from dconv.formats import engine as engine
    from dconv.formats import engines as engines

__version__ = "0.1.0"

_PUBLIC = ("check", "convert", "diff", "handoff", "inspect", "plan")
_ENGINES = ("engine", "engines")


def __getattr__(name: str) -> Any:
    # on first use: a rank that only moves bytes starts quicker without them
    if name in _PUBLIC:
        from dconv import api

        return getattr(api, name)
    if name in _ENGINES:
        from dconv import formats

        return getattr(formats, name)
    raise AttributeError(f"module 'dconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC, *_ENGINES]
