"""Records what GPTQModel and auto-gptq make of integer tensors, whose pins clash with those of the test environment.

By hand, in an environment with gptqmodel 7.7.0 and auto-gptq 0.7.1 (whose sources are enough)::

    PYTHONPATH=. GPTQMODEL_CPU_WORKERS=2 python tests/codec/record_gptq.py > tests/codec/recorded/gptq.json

The tensors are functions of a number (`Case`), so that only digests of the answers are kept; the tests make the same
tensors again. auto-gptq's layers are loaded as files, since its package wants an old transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

COUNT = 240


def stream(*key: object, size: int) -> NDArray[np.uint8]:
    """Bytes that are a function of ``key`` on every machine and version."""
    return np.frombuffer(hashlib.shake_256(repr(key).encode()).digest(size), np.uint8).copy()


def digest(array: NDArray[np.generic]) -> str:
    """Of the values: zeros have no sign, NaN is one value."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array + array.dtype.type(0))
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """One layer: ``layout`` is how its codes are packed, ``top`` whether zeros may be stored as all ones."""

    number: int
    layout: str = "stream"
    top: bool = False

    @property
    def bits(self) -> int:
        return {"stream": (4, 2, 3, 8), "planar": (5, 6, 7, 3), "awq": (4, 4, 2, 3, 4, 5, 8, 7)}[self.layout][
            self.number % (8 if self.layout == "awq" else 4)
        ]

    @property
    def columns(self) -> int:
        return 32 * (1 + self.number // 4 % 3)

    @property
    def rows(self) -> int:
        return 32 * (1 + self.number // 12 % 2)

    @property
    def group(self) -> int:
        return (16, 32, 64, 128)[self.number // 3 % 4]

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    def _codes(self, what: str, rows: int, columns: int, low: int, high: int) -> NDArray[np.uint8]:
        raw = stream(what, self, size=rows * columns).reshape(rows, columns).astype(np.int16)
        return (low + raw % (high - low)).astype(np.uint8)

    @cached_property
    def codes(self) -> NDArray[np.uint8]:
        """[out, in]"""
        return self._codes("codes", self.rows, self.columns, 0, 1 << self.bits)

    @cached_property
    def zeros(self) -> NDArray[np.uint8]:
        """[out, groups], 1 and up where they are to be stored less one."""
        return self._codes("zeros", self.rows, self.groups, 0 if self.top else 1, 1 << self.bits)

    @cached_property
    def scales(self) -> NDArray[np.float16]:
        """[out, groups], below 256, so that no product overflows; denormals and zeros among them."""
        raw = stream("scales", self, size=self.rows * self.groups * 2).view("<u2")
        return (raw & np.uint16(0xDBFF)).view(np.float16).reshape(self.rows, self.groups)

    @cached_property
    def wild(self) -> NDArray[np.float16]:
        """As ``scales``, but any bits at all: infinities and NaN too."""
        return stream("wild", self, size=self.rows * self.groups * 2).view(np.float16).reshape(self.rows, self.groups)

    @cached_property
    def g_idx(self) -> NDArray[np.int32]:
        """In order, or in the order of activations."""
        plain = (np.arange(self.columns) // self.group).astype(np.int32)
        if self.number % 5 != 4:
            return plain
        return plain[np.argsort(stream("order", self, size=self.columns), kind="stable")]


def cases(layout: str = "stream", top: bool = False) -> list[Case]:
    return [Case(number, layout, top) for number in range(COUNT)]


def _record() -> dict[str, object]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
    from gptqmodel.quantization.config import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    cuda, cuda_old = _auto_gptq("qlinear_cuda"), _auto_gptq("qlinear_cuda_old")

    def given(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    def exact(case: Case) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
        """A layer that quantises to exactly these codes: scales are powers of two."""
        scales = np.ldexp(np.ones(case.zeros.shape, np.float32), case.zeros.astype(np.int32) % 7 - 9)
        linear = torch.nn.Linear(case.columns, case.rows, bias=False)
        difference = case.codes.astype(np.float32) - case.zeros.astype(np.float32)[:, case.g_idx]
        linear.weight.data = given(difference * scales[:, case.g_idx])
        return linear, given(scales), given(case.zeros.astype(np.float32))

    def model(case: Case) -> TorchLinear:
        layer = TorchLinear(
            bits=case.bits,
            group_size=case.group,
            sym=False,
            desc_act=True,
            in_features=case.columns,
            out_features=case.rows,
            bias=False,
            format=FORMAT.GPTQ_P if case.layout == "planar" else FORMAT.GPTQ_V2,
            register_buffers=True,
        )
        linear, scales, zeros = exact(case)
        layer.pack_original(linear, scales, zeros.to(torch.int32), given(case.g_idx))
        return layer

    def weights(layer: TorchLinear, scales: NDArray[np.float16]) -> NDArray[np.generic]:
        layer.scales = given(scales.T.copy())
        layer._init_wf_unsqueeze_buffers()
        return layer.dequantize_weight().numpy().T

    found: dict[str, list[object]] = {}

    def keep(key: str, value: object) -> None:
        found.setdefault(key, []).append(value)

    for layout in ("stream", "planar"):
        for case in cases(layout):
            layer = model(case)
            keep(f"gptqmodel {layout} qweight", digest(layer.qweight.numpy()))
            keep(f"gptqmodel {layout} qzeros", digest(layer.qzeros.numpy()))
            keep(f"gptqmodel {layout} weight", digest(weights(layer, case.scales)))
            keep(f"gptqmodel {layout} wild", digest(weights(layer, case.wild)))

    for top in (False, True):
        for case in cases(top=top):
            layer = model(case)
            convert_gptq_v2_to_v1_format_module(
                layer, type("Config", (), {"bits": case.bits, "pack_dtype": torch.int32})
            )
            stored = layer.qzeros.numpy().copy()
            keep(f"gptqmodel v1 qzeros{' with 0' * top}", digest(stored))
            convert_gptq_v1_to_v2_format_module(layer, case.bits, torch.int32)
            keep(f"gptqmodel v1 weight{' with 0' * top}", digest(weights(layer, case.scales)))

    for case in cases():
        linear, scales, zeros = exact(case)
        args = (case.bits, case.group, case.columns, case.rows, False)
        layer = cuda(*args)
        layer.pack(linear, scales, zeros, given(case.g_idx))
        keep("auto-gptq qweight", digest(layer.qweight.numpy()))
        keep("auto-gptq qzeros", digest(layer.qzeros.numpy()))
        for key, kind in (("qlinear_cuda", cuda), ("qlinear_cuda_old", cuda_old)):
            if kind is cuda_old and (case.number % 5 == 4 or case.columns % case.group):
                keep(f"auto-gptq {key} weight", None)  # it knows no order and no short group
                continue
            other = kind(*args)
            other.qweight, other.qzeros = layer.qweight, layer.qzeros
            other.g_idx, other.scales = given(case.g_idx), given(case.scales.T.copy())
            identity = torch.eye(case.columns, dtype=torch.float16)
            keep(f"auto-gptq {key} weight", digest(other(identity).detach().numpy().T))

    for case in cases("awq", top=True):
        qweight, qzeros = pack_awq(given(case.codes.T).int(), given(case.zeros.T).int(), case.bits)
        keep("gptqmodel awq qweight", digest(qweight.numpy()))
        keep("gptqmodel awq qzeros", digest(qzeros.numpy()))
        scales = given(case.scales.T)
        if case.columns % case.group:
            keep("gptqmodel awq weight", None)
            continue
        weight = dequantize_gemm(qweight, qzeros, scales, case.bits, case.group)
        keep("gptqmodel awq weight", digest(weight.numpy().T))

    return {"versions": _versions(), "zero stored as all ones": _all_ones(model, weights, cuda, cuda_old), **found}


def _all_ones(model, weights, cuda, cuda_old) -> dict[str, dict[str, list[int]]]:
    """The first zeros that each reader sees, where the first of each word is stored as all ones and the others as 0."""
    import torch
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    found: dict[str, dict[str, list[int]]] = {}
    for number, bits in enumerate((4, 2, 3, 8)):
        case = Case(number)
        qzeros = torch.full((case.groups, case.rows * bits // 32), (1 << bits) - 1, dtype=torch.int32)
        qweight = torch.zeros((case.columns * bits // 32, case.rows), dtype=torch.int32)
        scales = torch.ones((case.groups, case.rows), dtype=torch.float16)
        seen = {}
        layer = model(case)
        layer.qweight, layer.qzeros = qweight, qzeros.clone()
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        seen["gptqmodel"] = weights(layer, scales.numpy().T)[:2, 0]
        for key, kind in (("qlinear_cuda", cuda), ("qlinear_cuda_old", cuda_old)):
            other = kind(bits, case.group, case.columns, case.rows, False)
            other.qweight, other.qzeros, other.scales = qweight, qzeros, scales
            seen[f"auto-gptq {key}"] = other(torch.eye(case.columns, dtype=torch.float16)).detach().numpy().T[:2, 0]
        found[str(bits)] = {key: [-int(value) for value in values] for key, values in seen.items()}
    return found


def _auto_gptq(name: str):
    root = importlib.util.find_spec("auto_gptq")
    assert root is not None and root.submodule_search_locations
    path = f"{root.submodule_search_locations[0]}/nn_modules/qlinear/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gptqmodel", "auto-gptq", "torch", "numpy")}


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # its banner is not part of the record
    recorded = _record()
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items()]
    out.write("{\n" + ",\n".join(lines) + "\n}\n")
