"""A model of transformers as an ONNX graph whose weights are elsewhere: torch's own exporter, given no weights.

The parameters are torch's fake tensors: they have shapes and no storage. So a model of any size is traced in the memory
that its graph takes. What is written of the graph does not depend on who traced it: no names of files, no stack traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Final

from dconv import __version__
from dconv.errors import Refused, ToolMissing
from dconv.export.graph import Port
from dconv.export.onnx_fixed import FOLDING, settle
from dconv.export.onnx_opset import convert, nodes
from dconv.export.traced import Weightless, exported, silent
from dconv.net.finite_mask import HIDDEN, finite_mask
from dconv.net.real_rotary import real_rotary
from dconv.net.skeleton import quiet

#: How the axes of `dconv.export.graph.LENGTHS` are called in the file, as onnxruntime-genai and optimum call them.
AXES: Final = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past": "past_sequence_length",
    "total": "total_sequence_length",
    "replies": "decoder_sequence_length",
}
#: What torch's exporter writes (opset 20 from torch 2.13 on), and what onnxscript converts that to without loss.
OPSETS: Final = range(18, 26)
#: Of onnxscript's rules, those that find something in a graph of torch's; without ``_rule``.
_RULES: Final = (
    "add_0", "sub_0", "mul_by_1", "div_by_1", "cast_cast", "no_op_cast", "no_op_expand", "no_op_transpose",
    "transpose_transpose", "reshape_reshape", "squeeze_reshape_1d", "unsqueeze_unsqueeze", "collapse_slice",
    "collapse_slice2", "materialize_reshape_shape", "no_op_dynamic_scatter_nd", "no_op_static_scatter_nd",
    "one_reshape_matmul_reshape", "two_reshapes_matmul_reshape", "cast_constant_of_shape",
    "cast_constant_of_shape_without_value",
)  # fmt: skip
#: What is installed for a graph to be written.
MODULES: Final = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir")


def require(modules: tuple[str, ...] = MODULES) -> None:
    """Raise where a package is missing, before anything is read.

    Raises:
        ToolMissing: with what to install.
    """
    from importlib.util import find_spec

    if lacking := [name for name in modules if find_spec(name) is None]:
        raise ToolMissing(
            "ONNX needs packages that are not installed, nothing was written",
            found=f"no module {', '.join(lacking)}",
            do="pip install 'dconv[onnx]'",
        )


def traced(model: Weightless, opset: int | None = None, hidden: float = HIDDEN) -> Any:
    """The graph (``onnx_ir.Model``); weights are inputs behind the graph's own, under the names of its parameters.

    Args:
        model: whose parameters have no storage.
        opset: one of `OPSETS`; None leaves torch's.
        hidden: of a graph of given lengths, what its masks add to a score.

    Raises:
        Refused: torch cannot trace the model for lengths of any kind, or the opset has not all of its operations.
    """
    import torch
    import torch.onnx
    from torch._subclasses.fake_tensor import FakeTensor

    exporter: Any = torch.onnx  # whose functions have types in part
    is_fixed = model.graph.is_fixed
    with real_rotary(), finite_mask(hidden) if is_fixed else nullcontext():
        program = exported(model)
    ports = (*model.graph.inputs, *model.graph.outputs)
    try:
        with quiet(), silent(), torch.no_grad():
            made = exporter.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[port.name for port in model.graph.inputs],
                output_names=[port.name for port in model.graph.outputs],
            )
            held = [it for it in made.model.graph.initializers.values()
                    if isinstance(getattr(it.const_value, "raw", None), FakeTensor)]  # fmt: skip
            for value in held:  # an optimizer would ask constants for their numbers
                value.const_value = None
                del made.model.graph.initializers[value.name]
                made.model.graph.inputs.append(value)
            simplify(made.model, **(FOLDING if is_fixed else {}))
            if opset is not None:
                convert(made.model, opset)
            if is_fixed:
                settle(made.model, len(model.graph.inputs))
    except Refused:
        raise
    except Exception as error:  # whatever a framework raises about one model
        first = error
        while first.__cause__:
            first = first.__cause__
        raise Refused(
            "torch has no ONNX graph of this model, nothing was written",
            where=type(model.net).__name__,
            found=f"{type(first).__name__}: {first}"[:600],
            do="FORMAT hf, gguf or mlx",
        ) from error
    require_opset(made.model, opset)
    clean(made.model, {port.name: port for port in ports})
    return made.model


def simplify(model: Any, **limits: Any) -> None:
    """Constants computed, and operations that do nothing taken out: onnxscript's `optimize`, but for one of its rules.

    That one, two slices to a split, looks through the whole graph at each node: half of the time of an export.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
        limits: which constants are computed, of ``fold_constants_ir``.
    """
    from onnx_ir.passes import PassManager, Sequential, common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    kept = [getattr(rules, f"{name}_rule") for name in _RULES]
    Sequential(common.InlinePass())(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True, **limits)
        PassManager([RewritePass(kept), common.RemoveUnusedNodesPass()])(model)
    Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def require_opset(model: Any, opset: int | None) -> None:
    """Raise where a graph did not become one of an opset.

    Raises:
        Refused: it has operations that there is no way for.
    """
    if opset is not None and model.opset_imports[""] != opset:
        raise Refused(
            "this graph has no form in that opset, nothing was written",
            where=f"--opset {opset}",
            expected=f"{model.opset_imports['']}, as it is",
        )


def clean(model: Any, ports: Mapping[str, Port]) -> None:
    """Take out what tells of the tracer, and name axes, in place.

    Args:
        model: an ``onnx_ir.Model``.
        ports: inputs and outputs by name, whose axes are written as `AXES` calls them.
    """
    import onnx_ir as ir

    model.producer_name, model.producer_version = "dconv", __version__
    model.graph.name, model.graph.doc_string = "main_graph", None
    for held in (model.metadata_props, model.graph.metadata_props):
        held.clear()
    for number, node in enumerate(nodes(model.graph)):
        node.name, node.doc_string = f"{node.op_type}_{number}", None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # their axes have the tracer's names
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
        if port := ports.get(value.name):
            value.shape = ir.Shape([AXES[axis] if isinstance(axis, str) else axis for axis in port.axes])
