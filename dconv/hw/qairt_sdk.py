"""Qualcomm's QAIRT SDK, recognised by its files, and what its tools are called with.

Sources: Qualcomm's documents 80-63442-10 (``qairt_converter``, ``qairt_quantizer``, ``htp_backend``: inputs and outputs
keep their layouts; the quantizer fills in what the converter was given no codes for) and 80-87189-2
(``genai_backend_extensions``); ExecuTorch, ``examples/qualcomm/README.md``, for ``qnn-context-binary-utility``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dconv.errors import ToolMissing
from dconv.hw.driver import VARIABLE, named_python
from dconv.hw.target import OUT, Ask, Tool

#: Names the SDK's folder; Qualcomm's own scripts set the first, its installer the second.
ROOT: Final = "QNN_SDK_ROOT"
_ROOTS: Final = (ROOT, "QAIRT_SDK_ROOT")
_HOST: Final = "x86_64-linux-clang"
#: Python, of the SDK's own packages.
_SCRIPTS: Final = ("qairt-converter", "qairt-quantizer")
_PROGRAMS: Final = ("qnn-context-binary-generator", "qnn-context-binary-utility")
_LIBRARIES: Final = (
    "libQnnHtp.so", "libHtpPrepare.so", "libQnnHtpNetRunExtensions.so", "libQnnModelDlc.so", "libQnnSystem.so",
)  # fmt: skip
_PACKAGES: Final = "lib/python/qti/aisw/converters"
_VERSION: Final = re.compile(r"^version:\s*[\"']?(\d+(?:\.\d+)+)", re.MULTILINE)
_MODULES: Final = ("numpy", "onnx")
_PROBING: Final = 60.0
INSTALL: Final = (
    f"the QAIRT SDK (Qualcomm AI Runtime, Community edition) from Qualcomm's Software Center; {ROOT}=FOLDER names it,\n"
    "--toolchain-python an interpreter of the version it asks for, with what bin/check-python-dependency lists"
)


def find(ask: Ask) -> Tool:
    """The SDK.

    Raises:
        ToolMissing: no variable names it, or half of it is there.
        UsageError: the interpreter that was named is none.
    """
    said = next(((name, root) for name in _ROOTS if (root := ask.environment.get(name))), None)
    if said is None:
        raise _missing("the environment", f"neither {' nor '.join(_ROOTS)} is set")
    name, root = said[0], Path(said[1])
    lacks = _lacks(root)
    version = _version(root)
    if version is None:
        lacks.append("sdk.yaml with a version")
    if lacks:
        raise _missing(f"{name}={root}", f"it lacks {', '.join(lacks)}")
    python = _python(ask)
    details = {"root": str(root), "version": version, "python": python}
    return Tool(f"QAIRT {version}", {ROOT: str(root.resolve()), VARIABLE: python}, details)


def _lacks(root: Path) -> list[str]:
    wanted = {f"bin/{_HOST}/{name}": b"" for name in _SCRIPTS}
    wanted |= {f"bin/{_HOST}/{name}": b"" for name in _PROGRAMS}
    wanted |= {f"lib/{_HOST}/{name}": b"\x7fELF" for name in _LIBRARIES}
    found = [name for name, magic in wanted.items() if not _is_whole(root / name, magic)]
    return found if (root / _PACKAGES).is_dir() else [*found, _PACKAGES]


def _is_whole(path: Path, magic: bytes) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _version(root: Path) -> str | None:
    try:
        found = _VERSION.search((root / "sdk.yaml").read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _python(ask: Ask) -> str:
    """The interpreter of the SDK's scripts, which has what they import."""
    found = named_python(ask) or shutil.which("python3", path=ask.environment.get("PATH"))
    asked = f"from importlib.util import find_spec as f; print(*(m for m in {_MODULES} if f(m) is None))"
    try:
        done = subprocess.run([found or "python3", "-c", asked], capture_output=True, text=True, timeout=_PROBING,
                              stdin=subprocess.DEVNULL, env={**ask.environment}, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError) as fault:
        raise _missing(str(found or "python3"), str(fault)[:300]) from fault
    if lacking := done.stdout.split():
        raise _missing(str(found), f"no module {', '.join(lacking)}")
    return str(found)


def _missing(where: str, found: str) -> ToolMissing:
    return ToolMissing("Qualcomm's QAIRT SDK is not here, or not all of it, nothing was written", where=where,
                       found=found, do=f"{INSTALL}\n--bundle writes what it compiles, for where it is")  # fmt: skip


def script(graphs: Sequence[tuple[str, str]], binary: str, quantised: str | None, settings: str, info: str) -> str:
    """What ``compile.sh`` does.

    Args:
        graphs: the name of each, and its folder; the SDK calls a graph as the file that it is converted into.
        binary: the file's name that holds them all.
        quantised: the folder of the samples; None computes in half precision.
        settings: the file of the HTP's.
        info: the file of what is in the binary.
    """
    lines = [
        *(f': "${{{ROOT}:=${{{name}:-}}}}"' for name in _ROOTS[1:]),
        f': "${{{ROOT}:?names the QAIRT SDK}}"',
        f"export {ROOT}",
        f'tools="${ROOT}/bin/{_HOST}"',
        f'libraries="${ROOT}/lib/{_HOST}"',
        f'python="${{{VARIABLE}:-python3}}"',
        f'export PYTHONPATH="${ROOT}/lib/python${{PYTHONPATH:+:$PYTHONPATH}}"',
        'export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"',
        "rm -rf dlc quantised",
        "mkdir -p dlc quantised",
    ]
    steps = len(graphs) * (2 if quantised else 1) + 2
    done = 0

    def told(what: str) -> None:
        nonlocal done
        lines.append(f"echo 'dconv-progress {done}/{steps} {what}'")
        done += 1

    for name, folder in graphs:
        told(f"convert {name}")
        how = "--quantization_overrides encodings.json" if quantised else "--float_bitwidth 16"
        lines.append(f'"$python" "$tools/qairt-converter" --input_network {folder}/model.onnx '
                     f"--output_path dlc/{name}.dlc {how}")  # fmt: skip
        if quantised:
            told(f"quantise {name}")
            lines.append(f'"$python" "$tools/qairt-quantizer" --input_dlc dlc/{name}.dlc '
                         f"--output_dlc quantised/{name}.dlc --input_list {quantised}/{name}/input_list.txt "
                         "--act_bitwidth 16 --weights_bitwidth 8 --bias_bitwidth 32 --use_per_channel_quantization "
                         "--use_per_row_quantization")  # fmt: skip
    told("compile")
    of = "quantised" if quantised else "dlc"
    backend = '{"backend_extensions": {"shared_library_path": "%s", "config_file_path": "%s"}}'
    lines += [
        # a folder's name as JSON has it
        r"""as_json() { printf '%s' "$1" | sed 's/[\\"]/\\&/g'; }""",
        f"printf '{backend}\\n' "
        f'"$(as_json "$libraries/libQnnHtpNetRunExtensions.so")" "$(as_json "$PWD/{settings}")" > dlc/backend.json',
        '"$tools/qnn-context-binary-generator" --backend "$libraries/libQnnHtp.so" '
        '--model "$libraries/libQnnModelDlc.so" '
        f"--dlc_path {','.join(f'{of}/{name}.dlc' for name, _ in graphs)} "
        f"--binary_file {binary.removesuffix('.bin')} --output_dir {OUT} --config_file dlc/backend.json",
    ]
    told("look into it")
    lines += [
        f'"$tools/qnn-context-binary-utility" --context_binary {OUT}/{binary} --json_file {OUT}/{info}',
        f"cp genie/* {OUT}/",
        f"echo 'dconv-progress {steps}/{steps} done'",
    ]
    return "\n".join(lines)
