#!/usr/bin/env python3
"""The four tools of Qualcomm's SDK that dconv calls, played: they hold a caller to their contract.

A DLC is JSON here: the graph's name (the stem of the file that the converter writes), its inputs and outputs, and the
codes of these. STAND_IN_FAILS says how it fails.
"""

import argparse
import json
import os
import re
import struct
import sys
import time
from pathlib import Path

FAILS = os.environ.get("STAND_IN_FAILS", "")
LIBRARIES = Path(__file__).parents[2] / "lib" / "x86_64-linux-clang"
HALF = "QNN_DATATYPE_FLOAT_16"


def stop(why: str) -> None:
    sys.exit(f"stand-in: {why}")


def converter() -> None:
    parser = argparse.ArgumentParser("qairt-converter", allow_abbrev=False)
    parser.add_argument("--input_network", type=Path, required=True)
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--float_bitwidth", choices=["16", "32"], default="32")
    parser.add_argument("--quantization_overrides", type=Path)
    args = parser.parse_args()
    if "lib/python" not in os.environ.get("PYTHONPATH", ""):
        stop("the SDK's packages are not on PYTHONPATH")
    if FAILS == "crash":
        stop("ERROR_OP_NOT_SUPPORTED")
    if FAILS == "hang":
        time.sleep(1000)
    import onnx

    graph = onnx.load(args.input_network).graph  # its weights, too
    said: dict = {"name": args.output_path.stem, "inputs": {}, "outputs": {}, "half": args.float_bitwidth == "16"}
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        for value in values:
            shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            if not all(shape):
                stop(f"{value.name} has axes that are no numbers")
            whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT32
            said[side][value.name] = {"shape": shape, "whole": whole}
    codes = {}
    if args.quantization_overrides:
        codes = json.loads(args.quantization_overrides.read_text())["activation_encodings"]
        for name, (one,) in codes.items():
            steps = (1 << one["bitwidth"]) - 1
            if abs(one["scale"] * (one["offset"] + steps) - one["max"]) > 1e-4 * abs(one["max"]):
                stop(f"{name}: the numbers of its codes contradict each other")
    said["codes"] = {name: one for name, (one,) in codes.items()}
    args.output_path.write_text(json.dumps(said))


def quantizer() -> None:
    parser = argparse.ArgumentParser("qairt-quantizer", allow_abbrev=False)
    for name in ("--input_dlc", "--output_dlc", "--input_list"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--act_bitwidth", choices=["8", "16"], required=True)
    parser.add_argument("--weights_bitwidth", choices=["8", "4"], required=True)
    parser.add_argument("--bias_bitwidth", choices=["8", "32"], required=True)
    parser.add_argument("--use_per_channel_quantization", action="store_true")
    parser.add_argument("--use_per_row_quantization", action="store_true")
    args = parser.parse_args()
    dlc = json.loads(args.input_dlc.read_text())
    lines = args.input_list.read_text().splitlines()
    if not lines:
        stop("no samples")
    for line in lines:
        files = dict(word.split(":=") for word in line.split())
        if set(files) != set(dlc["inputs"]):
            stop(f"inputs are {sorted(dlc['inputs'])}")
        for name, port in dlc["inputs"].items():
            size = 4
            for axis in port["shape"]:
                size *= axis
            if Path(files[name]).stat().st_size != size:  # fp32, whole numbers as well
                stop(f"{files[name]} is not {size} bytes")
        first = struct.unpack("<f", Path(files["input_ids"]).read_bytes()[:4])[0]
        if first != int(first) or first < 0:
            stop("tokens are no fp32 numbers")
    for name in (*dlc["inputs"], *dlc["outputs"]):  # it chooses by itself what the converter was not told
        dlc["codes"].setdefault(name, {"bitwidth": int(args.act_bitwidth), "scale": 0.5, "offset": -len(lines)})
    args.output_dlc.write_text(json.dumps({**dlc, "half": False}))


def generator() -> None:
    parser = argparse.ArgumentParser("qnn-context-binary-generator", allow_abbrev=False)
    for name in ("--backend", "--model", "--output_dir", "--config_file"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--dlc_path", required=True)
    parser.add_argument("--binary_file", required=True)
    args = parser.parse_args()
    if (args.backend, args.model) != (LIBRARIES / "libQnnHtp.so", LIBRARIES / "libQnnModelDlc.so"):
        stop("other libraries")
    if str(LIBRARIES) not in os.environ.get("LD_LIBRARY_PATH", ""):
        stop("libraries are not found")
    said = json.loads(args.config_file.read_text())["backend_extensions"]
    if Path(said["shared_library_path"]) != LIBRARIES / "libQnnHtpNetRunExtensions.so":
        stop("other extensions")
    settings = json.loads(Path(said["config_file_path"]).read_text())
    dlcs = [json.loads(Path(path).read_text()) for path in args.dlc_path.split(",")]
    names = [dlc["name"] for dlc in dlcs]
    (device,), (graphs,) = settings["devices"], settings["graphs"]
    if graphs["graph_names"] != names or len(set(names)) != len(names):
        stop(f"settings are for {graphs['graph_names']}, graphs are {names}")
    if not settings["context"]["weight_sharing_enabled"] or not re.fullmatch(r"v\d+", device["dsp_arch"]):
        stop("settings")
    if FAILS == "memory":
        os.kill(os.getpid(), 9)
    if FAILS == "full":
        stop("write failed: No space left on device")
    if FAILS == "one graph":
        dlcs.pop()
    if FAILS == "other codes":
        dlcs[0]["codes"]["past_key_0_out"] = {"bitwidth": 8, "scale": 0.25, "offset": -128}
    if FAILS == "layout":
        dlcs[0]["inputs"]["past_key_0_in"]["shape"].reverse()
    path = args.output_dir / f"{args.binary_file}.bin"
    chip = 43 if FAILS == "chip" else device["soc_model"]
    if FAILS != "nothing":
        text = json.dumps({"chip": chip, "arch": int(device["dsp_arch"][1:]), "graphs": dlcs})
        path.write_text("" if FAILS == "empty" else text)


def utility() -> None:
    parser = argparse.ArgumentParser("qnn-context-binary-utility", allow_abbrev=False)
    for name in ("--context_binary", "--json_file"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    if FAILS in ("nothing", "empty"):
        return  # as if it had nothing to say
    said = json.loads(args.context_binary.read_text())

    def tensors(dlc: dict, side: str) -> list:
        found = []
        for name, port in dlc[side].items():
            code = dlc["codes"].get(name)
            kind = "QNN_DATATYPE_INT_32" if port["whole"] else HALF
            info = {"name": name, "dimensions": port["shape"], "dataType": kind}
            if code and not port["whole"]:
                info["dataType"] = f"QNN_DATATYPE_UFIXED_POINT_{code['bitwidth']}"
                info["quantizeParams"] = {"scaleOffset": {"scale": code["scale"], "offset": code["offset"]}}
            found.append({"info": info})
        return found

    graphs = [
        {"info": {"graphName": dlc["name"], "graphInputs": tensors(dlc, "inputs"),
                  "graphOutputs": tensors(dlc, "outputs")}}
        for dlc in said["graphs"]
    ]  # fmt: skip
    info = {"buildId": "v2.48.40", "graphs": graphs, "contextMetadata": {"info": {"dspArch": said["arch"]}}}
    if FAILS != "silent":
        info["socModel"] = said["chip"]
    args.json_file.write_text(json.dumps({"info": {} if FAILS == "no graphs" else info}))


TOOLS = {
    "qairt-converter": converter,
    "qairt-quantizer": quantizer,
    "qnn-context-binary-generator": generator,
    "qnn-context-binary-utility": utility,
}
TOOLS[Path(sys.argv[0]).name]()
