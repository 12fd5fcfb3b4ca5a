"""A stand-in for rknn-toolkit2: what the driver calls, in the order of the real one, and each way of failing."""

import os
import struct
import sys
import time
from pathlib import Path

FAILS = os.environ.get("STAND_IN_FAILS", "")
DTYPES = {
    "rk3588": ("w8a8", "w16a16i_dfp"),
    "rk3576": ("w8a8", "w4a16", "w16a16i_dfp"),
    "rk3562": ("w8a8", "w8a16", "w4a16", "w16a16i_dfp"),
}
#: The compiler's table of operators: number, operator, dtype, where it runs.
TABLE = "D RKNN: [00:00:00.000] {}  {}  FLOAT16  {}  (1,1)\n"


class RKNN:
    def __init__(self, verbose=False):
        self.target, self.graph = "", Path()

    def config(self, target_platform, quantized_dtype="w8a8", **_):
        if target_platform not in DTYPES:
            raise ValueError(f"Invalid target_platform '{target_platform}'")
        if quantized_dtype not in DTYPES[target_platform]:
            raise ValueError(f"quantized_dtype = '{quantized_dtype}' not support in '{target_platform}'")
        self.target = target_platform
        return 0

    def load_onnx(self, model):
        self.graph = Path(model)
        return 0 if self.graph.stat().st_size else -1

    def build(self, do_quantization, dataset=None):
        if do_quantization and not Path(dataset).read_text().split():
            return -1
        if FAILS == "crash":
            os.abort()
        if FAILS == "hang":
            time.sleep(1000)
        if FAILS == "full":  # the compiler's C code says it, and returns a number
            print("E build: fwrite: No space left on device", flush=True)
            return -1
        if FAILS == "errors":
            print("E build: Catch exception when building RKNN model!", flush=True)
            return -1
        sys.stdout.write(TABLE.format(0, "InputOperator", "CPU") + TABLE.format(1, "OutputOperator", "CPU"))
        sys.stdout.write(TABLE.format(2, "Gather", "CPU"))
        if FAILS != "cpu":
            sys.stdout.write(TABLE.format(3, "ConvExSwish", "NPU"))
        return 0

    def export_rknn(self, path):
        body = f"{self.target} compiler version: 2.5.0 (stand-in)".encode()
        tail = b"{}"
        data = b"RKNN".ljust(16, b"\0") + struct.pack("<Q", len(body)) + b"\0" * 40
        data += body + struct.pack("<Q", len(tail)) + tail
        if FAILS == "absent":
            return 0
        Path(path).write_bytes({"empty": b"", "cut": data[:-1]}.get(FAILS, data))
        return 0

    def release(self):
        pass
