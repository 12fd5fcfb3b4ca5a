"""A stand-in for onnxruntime with Qualcomm's provider: it insists that the CPU is shut out, and fails as it is told."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from onnx import helper, save

FAILS = os.environ.get("STAND_IN_FAILS", "")
#: (soc_model, htp_arch) -> the name that a binary bears.
CHIPS = {("69", "79"): "SM8750", ("57", "75"): "SM8650", ("93", "68"): "QCS6490"}
VERSION = "v2.51.0.000000000000"
_devices = []


def set_default_logger_severity(number):
    pass


def get_ep_devices():
    return list(_devices)


def register_execution_provider_library(name, path):
    if not Path(path).read_bytes().startswith(b"\x7fELF"):
        raise RuntimeError(f"{path} is no library")
    _devices.append(SimpleNamespace(ep_name=name))


class SessionOptions:
    def __init__(self):
        self.provided, self.entries, self.log_severity_level = {}, {}, 2

    def add_provider_for_devices(self, devices, provided):
        self.provided = provided if devices else {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value


class InferenceSession:
    def __init__(self, source, sess_options, enable_fallback=1):
        said = sess_options.entries
        chip = CHIPS[sess_options.provided["soc_model"], sess_options.provided["htp_arch"]]
        if enable_fallback or said["session.disable_cpu_ep_fallback"] != "1" or said["ep.context_enable"] != "1":
            raise RuntimeError("the CPU would compute it")
        if not Path(source).stat().st_size:
            raise RuntimeError("no graph")
        if FAILS == "crash":
            os.abort()
        if FAILS == "hang":
            time.sleep(1000)
        if FAILS == "full":
            raise OSError(28, "No space left on device")
        if FAILS == "errors":
            raise RuntimeError("QNN: Failed to finalize the graph. Error code: 1002")
        wrapper = Path(said["ep.context_file_path"])
        binary = wrapper.with_name(f"{wrapper.stem}_qnn.bin")
        other = "SM8650" if chip != "SM8650" else "SM8750"
        text = f"{VERSION} soc_type={other if FAILS == 'other' else chip};arch={sess_options.provided['htp_arch']};"
        if FAILS != "few":
            binary.write_bytes(b"" if FAILS == "empty" else text.encode())
        attributes = {"ep_cache_context": binary.name, "embed_mode": 0, "main_context": 1}
        nodes = [helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", **attributes)]
        if FAILS == "cpu":
            nodes.append(helper.make_node("Gather", ["y", "x"], ["z"]))
        if FAILS != "absent":
            save(helper.make_model(helper.make_graph(nodes, "stand-in", [], [])), wrapper)
        print("compiled by a stand-in", file=sys.stderr)
