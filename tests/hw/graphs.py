"""Small graphs for hardware compilers: an MLP, two layers of Llama, and some that a compiler has to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.functional import silu

#: Of the Llama: tokens, width, heads, heads of keys and values, width of the MLP, vocabulary.
TOKENS, WIDTH, HEADS, SHARED, INNER, VOCABULARY = 16, 64, 4, 2, 128, 96
#: What every compiler here takes; rknn-toolkit2 takes 19 at most.
OPSET = 17


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.up(x)))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Layer(nn.Module):
    """Attention by query groups with rotary positions, and a gated MLP; the length is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = WIDTH // HEADS
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, SHARED * self.head), "v": (WIDTH, SHARED * self.head)}
        shapes |= {"o": (WIDTH, WIDTH), "gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
        self.of = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.before, self.between = Norm(), Norm()
        turns = torch.outer(torch.arange(TOKENS), 1e4 ** -(torch.arange(0, self.head, 2) / self.head)).repeat(1, 2)
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (self.of[name](y).view(1, TOKENS, -1, self.head).transpose(1, 2) for name in "qkv")
        k, v = (part.repeat_interleave(HEADS // SHARED, 1) for part in (self.turned(k), v))
        seen = torch.softmax(self.turned(q) @ k.transpose(-1, -2) / self.head**0.5 + self.mask, -1) @ v
        x = x + self.of["o"](seen.transpose(1, 2).reshape(1, TOKENS, -1))
        y = self.between(x)
        return x + self.of["down"](silu(self.of["gate"](y)) * self.of["up"](y))

    def turned(self, x: Tensor) -> Tensor:
        low, high = x[..., : self.head // 2], x[..., self.head // 2 :]
        return x * self.cos + torch.cat([-high, low], -1) * self.sin


def mlp(folder: Path) -> Path:
    """x [1, 64] -> y [1, 32], with its weights inside."""
    torch.manual_seed(0)
    return _export(MLP(), torch.randn(1, WIDTH), folder / "mlp.onnx", "x", "y")


def llama(folder: Path) -> Path:
    """ids [1, 16] int32 -> logits [1, 16, 96], with its weights in a file beside it."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), Layer(), Layer(), Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
    )
    ids = torch.zeros(1, TOKENS, dtype=torch.int32)
    inside = onnx.load(_export(model, ids, folder / "llama-inside.onnx", "ids", "logits"))
    path = folder / "llama.onnx"
    onnx.save(inside, path, save_as_external_data=True, location="llama.onnx.data", size_threshold=0)
    return path


def _export(model: nn.Module, example: Tensor, path: Path, given: str, made: str) -> Path:
    names: dict[str, Any] = {"input_names": [given], "output_names": [made]}
    torch.onnx.export(model.eval(), (example,), path, dynamo=False, opset_version=OPSET, **names)
    return path


def graph(
    path: Path, steps: Sequence[str], axes: Sequence[int | str] = (1, 4, 4), opset: int = OPSET, columns: int = 4
) -> Path:
    """x -> y through operators by name, of which MatMul has a random matrix of 4 rows."""
    names = ["x", *(f"after{k}" for k in range(len(steps) - 1)), "y"]
    nodes = [
        helper.make_node(step, [names[k], *(["w"] if step == "MatMul" else [])], [names[k + 1]])
        for k, step in enumerate(steps)
    ]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, columns), np.float32), "w")
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "graph", ports, out, [weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def two_inputs(path: Path) -> Path:
    """a [1, 2, 3, 4] times b [1, 2, 4, 5]: inputs whose axes must not be read as channels that come last."""
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in {"a": [1, 2, 3, 4], "b": [1, 2, 4, 5], "y": [1, 2, 3, 5]}.items()
    ]
    made = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "graph", ports[:2], ports[2:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9), path)
    return path


def on_cpu(path: Path, **inputs: NDArray[Any]) -> NDArray[Any]:
    """The first output, by onnxruntime in fp32."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
