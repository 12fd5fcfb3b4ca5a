"""Run by LiteRT's interpreter: what the driver makes of outcomes that its vendor's compiler can have.

python litert_vendor.py MODEL.tflite WORK      prints a line of JSON: outcome -> what the driver said
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flatbuffers
from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

sys.path.append(str(Path(__file__).parents[2] / "dconv" / "hw" / "drivers"))
import litert_driver  # pyright: ignore[reportMissingImports]


def compiled(content: bytes, left: int) -> bytes:
    """The model with all operators but some in the hands of an NPU, as LiteRT spells that."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.customCode = 32, 32, b"DISPATCH_OP"
    model.operatorCodes.append(code)
    for graph in model.subgraphs:
        for operator in graph.operators[left:]:
            operator.opcodeIndex = len(model.operatorCodes) - 1
            operator.builtinOptionsType, operator.builtinOptions = 0, None
        left = 0
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def main(model: Path, work: Path) -> dict[str, Any]:
    plain = model.read_bytes()
    outcomes = {
        "whole": compiled(plain, 0),
        "partly": compiled(plain, 3),
        "untouched": plain,
        "empty": b"",
        "cut": compiled(plain, 0)[:64],
        "other": b"\0" * 4096,
        "absent": None,
        "failed": compiled(plain, 0),
        "two": compiled(plain, 0),
    }
    said = {}
    for name, content in outcomes.items():
        for cpu_ops in (False, True):
            folder = work / f"{name}-{cpu_ops}"
            folder.mkdir()
            made = folder / "aot.tflite"
            if content is not None:
                made.write_bytes(content)
            one = (SimpleNamespace(), SimpleNamespace(path=made))
            result = SimpleNamespace(
                failed_backends=[(SimpleNamespace(target_id="MediaTek_MT6991"), "no")] if name == "failed" else [],
                models_with_backend=[one, one] if name == "two" else [one],
                compilation_report=lambda: "said by nobody",
            )
            litert_driver.vendor_compile = lambda model, target, out, result=result: result
            artifact = folder / "model_MT6991.tflite"
            try:
                evidence = litert_driver._ahead_of_time(model, None, artifact, cpu_ops)
                answer = {"operators_on_cpu": evidence["operators_on_cpu"], "npu_ops": evidence["npu_ops"]}
            except litert_driver.Failed as fault:
                answer = str(fault)
            said[f"{name}{', cpu_ops' if cpu_ops else ''}"] = [answer, artifact.exists()]
            shutil.rmtree(folder)
    return said


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
