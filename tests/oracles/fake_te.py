"""A transformer_engine of empty classes, so that megatron-core defines its modules for it: their names and shapes.

Only `GroupedLinear` has parameters, which are those of TransformerEngine: ``weight0``, ``weight1`` …, one an expert,
[out, in]. How they are cut and saved is then megatron-core's own code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any, ClassVar

import torch

NAME = "transformer_engine"


class GroupedLinear(torch.nn.Module):
    """The parameters of ``transformer_engine.pytorch.GroupedLinear``."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, tp_size: int, parallel_mode: str | None, **_: Any
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, False
        self.fp8, self.fp8_calibration, self.fp8_meta = False, False, {"fp8_checkpoint": False}
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(rows, columns)))

    def init_fp8_metadata(self, **_: Any) -> None:
        pass

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


class Fake(types.ModuleType):
    """A module in which every name is there: a class, or a module that may be called."""

    __path__: ClassVar[list[str]] = []
    __version__ = "2.1.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = Fake(name)
        if name == "GroupedLinear":
            found = GroupedLinear
        elif name[0].isupper():
            found = type(name, (torch.nn.Module,), {})
        setattr(self, name, found)
        return found

    def __call__(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None  # a context and what synchronises it, of the one function that is called


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the fake and all that is below it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        ours = fullname.partition(".")[0] == NAME
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> Any:
        return Fake(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def install() -> None:
    """For this process, which may not have imported megatron-core yet."""
    assert "megatron.core" not in sys.modules
    sys.meta_path.insert(0, Finder())
