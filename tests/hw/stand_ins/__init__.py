"""Vendors' toolchains, played by scripts that hold a caller to the contract and fail as ``STAND_IN_FAILS`` says.

Those of RKNN and QNN stand in for what ``scripts/toolchains.sh`` installs, so that each way of failing can be tried
anywhere; the others for what is not public.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
#: What the stand-ins of QNN's libraries and its binaries bear.
QNN_VERSION: Final = "v2.51.0.000000000000"


@dataclass(frozen=True)
class Package:
    """A toolchain of Python, as its driver recognises it.

    Attributes:
        distribution: its name on an index, with its version.
        modules: file in this folder -> its place among the packages.
        libraries: place -> content.
    """

    distribution: tuple[str, str]
    modules: Mapping[str, str]
    libraries: Mapping[str, bytes]


_RKNN: Final = "rknn/api/lib/linux-x86_64"
_QNN: Final = ("libQnnHtp.so", "libHtpPrepare.so", "libQnnSystem.so", "libonnxruntime_providers_qnn.so")
PACKAGES: Final[Mapping[str, Package]] = {
    "rkllm": Package(
        ("rkllm-toolkit", "1.3.0"), {"rkllm/api.py": "rkllm/api.py"}, {"rkllm/librkllm.so": b"\x7fELF stand-in"}
    ),
    "rknn": Package(
        ("rknn-toolkit2", "2.5.0"),
        {"rknn/api.py": "rknn/api.py"},
        {f"{_RKNN}/{name}": b"\x7fELF stand-in" for name in ("librknnc.so", "librknn_api.so")},
    ),
    "qnn": Package(
        ("onnxruntime-qnn", "2.7.0"),
        {"qnn/onnxruntime.py": "onnxruntime.py"},
        {"onnxruntime_qnn/__init__.py": b""}
        | {f"onnxruntime_qnn/{name}": b"\x7fELF stand-in " + QNN_VERSION.encode() for name in _QNN},
    ),
}


def python(name: str, folder: Path) -> Path:
    """An interpreter that has a toolchain of `PACKAGES`, as far as anyone can see: ``folder/python``."""
    played, packages = PACKAGES[name], folder / "toolchain"
    for place in (*played.modules.values(), *played.libraries):
        (packages / place).parent.mkdir(parents=True, exist_ok=True)
    for source, place in played.modules.items():
        shutil.copyfile(HERE / source, packages / place)
        if Path(place).parent != Path():
            (packages / place).with_name("__init__.py").touch()
    for place, content in played.libraries.items():
        (packages / place).write_bytes(content)
    distribution, version = played.distribution
    information = packages / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    made = folder / "python"
    made.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    made.chmod(0o755)
    return made


def neuron(folder: Path) -> Path:
    """An interpreter that has NxD Inference, as far as anyone can see."""
    packages, bins = folder / "toolchain", folder / "toolchain" / "bin"
    nxd = packages / "neuronx_distributed_inference"
    for package in (bins, nxd / "models", packages / "torch_neuronx", packages / "neuronx_distributed"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (nxd / "__init__.py").touch()
    shutil.copyfile(HERE / "neuron" / "inference_demo.py", nxd / "inference_demo.py")
    shutil.copyfile(HERE / "neuron" / "application_base.py", nxd / "models" / "application_base.py")
    for name, version in (
        ("neuronx-distributed-inference", "0.9.0"), ("neuronx-distributed", "0.18.0"),
        ("torch-neuronx", "2.9.0.2.12.0"), ("neuronx-cc", "2.23.1"),
    ):  # fmt: skip
        information = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    compiler = bins / "neuronx-cc"
    compiler.write_text("#!/bin/sh\necho NeuronX Compiler version 2.23.1+stand-in\n")
    compiler.chmod(0o755)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPATH="{bins}:$PATH" PYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def environment(name: str, folder: Path) -> dict[str, str]:
    """What a bundle's ``compile.sh`` is told where a stand-in plays its toolchain.

    Args:
        name: one of `PACKAGES`, or ``neuron``, ``mtk_cloud``, ``pulsar2``.
        folder: for what has to be written.
    """
    if name in PACKAGES:
        return {"TOOLCHAIN_PYTHON": str(python(name, folder))}
    if name == "neuron":
        return {"TOOLCHAIN_PYTHON": str(neuron(folder))}
    if name == "mtk_cloud":
        return {"MTK_CLOUD_PATH": str(shutil.copytree(HERE / "mtk_cloud", folder / "mtk_cloud"))}
    return {"PATH": f"{HERE / 'bin'}:{os.environ['PATH']}"}
