"""The engines behind FORMAT, each with `convert`, `validate` and `can_infer`, for a program that wants yes or no.

`dconv.api` raises errors that say what is wrong; here an error is an answer. Entry points of the group
``dconv.formats`` add engines from outside the tree: an object each with these three methods, by the FORMAT's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from dconv import api, matrix
from dconv.describe import describe_model
from dconv.errors import DconvError, Refused
from dconv.request import FORMATS
from dconv.sharding.receipt import read_receipt
from dconv.targets import OUTSIDE, engine_of


class Engine(Protocol):
    """What makes a FORMAT, and judges what was made."""

    def convert(self, model: str | Path, out: str | Path, **options: Any) -> tuple[bool, dict[str, Any] | None]:
        """Convert; whether it went well, and what is to be said of it."""
        ...

    def validate(self, path: str | Path) -> bool:
        """Whether what is at a path is whole: all bytes as they were written, and a model of its container."""
        ...

    def can_infer(self, path: str | Path) -> bool:
        """Whether its runtime is here and computes finite logits of it."""
        ...


@dataclass(frozen=True)
class BuiltIn:
    """An engine of this tree.

    Attributes:
        format: one of `dconv.matrix.outputs`.
    """

    format: str

    def convert(self, model: str | Path, out: str | Path, **options: Any) -> tuple[bool, dict[str, Any] | None]:
        """Convert in this process.

        Args:
            model: a checkpoint's directory, or its file.
            out: the output's directory.
            options: as for `dconv.convert`.

        Returns:
            True, and ``out``, ``plan``, ``files`` and the number of ``tensors``; or False, and the ``error`` with the
            ``exit_code`` that the command would end with.
        """
        try:
            api.convert(model, self.format, out, **options)
            receipt: dict[str, Any] = read_receipt(Path(out)) or {}
        except DconvError as error:
            return False, {"error": str(error), "exit_code": error.exit_code}
        return True, {
            "out": str(out),
            "plan": receipt["plan"],
            "files": sorted({*receipt["frames"], *receipt["closing"]}),
            "tensors": len(receipt["tensors"]),
        }

    def validate(self, path: str | Path) -> bool:
        """See `Engine.validate`. Bytes are compared with the receipt where there is one; weights are not run."""
        try:
            api.check(path, run=False)
        except DconvError:
            return False
        return True

    def can_infer(self, path: str | Path) -> bool:
        """See `Engine.can_infer`; False, too, where the runtime is missing or memory is short (`dconv.check` says)."""
        try:
            return api.check(path).run is not None
        except DconvError:
            return False


@runtime_checkable
class Planning(Protocol):
    """An engine from outside that says what it would do."""

    def plan(self, model: str | Path, **options: Any) -> Mapping[str, Any]:
        """For ``dconv plan``: labels and values; writes nothing.

        Raises:
            DconvError: what `Engine.convert` would answer no to.
        """
        ...


def outsiders() -> Mapping[str, str]:
    """FORMATs of entry points, each with what it names; none of them is loaded."""
    return {point.name: point.value for point in entry_points(group=OUTSIDE) if point.name not in FORMATS}


def planned(format: str, model: Path, described: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an engine from outside would make of a model: as it says itself, else what dconv knows without it.

    Args:
        format: one of `outsiders`.
        model: path of the source.
        described: of the source, what `dconv.describe.describe_model` takes.
        options: that were given.

    Raises:
        Refused: no family, or tensors that none of its rows has.
        Damaged: a source that is not whole.
    """
    made = outside(format)
    if isinstance(made, Planning):
        return {"format": format, **made.plan(model, **options)}
    source = describe_model(model, config_alone=True, **described)
    return {
        "format": format,
        "engine": outsiders()[format],
        "source": f"{source.source.format}, {source.family.name}",
        "read": sum(spec.nbytes for spec in source.logical.specs.values()),
        "tensors": len(source.logical.specs),
        "note": "the source is whole, as far as its headers tell; what is written the engine alone knows",
    }


def engines() -> Mapping[str, Engine]:
    """Every engine by its FORMAT, those of entry points last.

    Raises:
        Refused: an entry point bears a name of this tree.
    """
    found: dict[str, Engine] = {format: BuiltIn(format) for format in matrix.outputs()}
    for point in entry_points(group=OUTSIDE):
        if point.name in found:
            raise Refused("an engine from outside bears a FORMAT's name", where=f"{OUTSIDE}: {point.value}")
        found[point.name] = cast(Engine, point.load())
    return found


def outside(format: str) -> Engine | None:
    """The engine of an entry point, for a FORMAT that this tree does not know; None where there is none."""
    if format in FORMATS:
        return None
    for point in entry_points(group=OUTSIDE, name=format):
        return cast(Engine, point.load())
    return None


def engine(format: str) -> Engine:
    """The engine of a FORMAT, in any of its spellings.

    Raises:
        Refused: there is none.
    """
    found = outside(format)
    if found is not None:
        return found
    made = engine_of(format)
    return BuiltIn(format if format in matrix.outputs() else made)
