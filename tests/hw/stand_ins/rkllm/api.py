"""A stand-in for RKLLM's toolkit: it holds callers to the real one's contract and fails in each way that one can.

``STAND_IN_FAILS`` in the environment names the way. What it writes is a record of what it was told.
"""

import json
import os
import sys
import time
from pathlib import Path

FAILS = os.environ.get("STAND_IN_FAILS", "")
CHIPS = {
    "rk3588": ("w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"),
    "rk3576": ("w8a8", "w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128"),
    "rk3562": ("w8a8", "w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128"),
}


def refuse(why):
    print("E RKLLM:", why, file=sys.stderr)
    return -1


class RKLLM:
    def __init__(self):
        self.said = {}

    def load_huggingface(
        self, model, model_lora=None, device="cpu", dtype="float32", custom_config=None, load_weight=True
    ):
        config = json.loads(Path(model, "config.json").read_text())
        if not any(name.endswith(".safetensors") for name in os.listdir(model)):
            return refuse("no weights")
        if {"scale_emb", "scale_depth", "dim_model_base"} & set(config):
            return refuse("muP scalars: who applies them?")
        self.said["config"] = config
        if FAILS == "load":
            return refuse(f"Not support {config['architectures'][0]}")
        return 0

    def build(
        self, do_quantization, optimization_level, quantized_dtype, quantized_algorithm, target_platform, num_npu_core,
        extra_qparams, dataset, hybrid_rate=0, max_context=4096,
    ):  # fmt: skip
        if target_platform not in CHIPS:
            return refuse(f"target_platform {target_platform}")
        if do_quantization:
            if quantized_dtype not in CHIPS[target_platform]:
                return refuse(f"{quantized_dtype} on {target_platform}")
            if quantized_algorithm != {"w8": "normal", "w4": "grq"}[quantized_dtype[:2]]:
                return refuse(f"algorithm {quantized_algorithm}")
            texts = json.loads(Path(dataset).read_text())
            if not texts or any(set(text) != {"input", "target"} or not all(text.values()) for text in texts):
                return refuse("calibration data")
            self.said["texts"] = len(texts)
        elif dataset is not None:
            return refuse("calibration data without quantisation")
        if max_context % 32 or max_context > 16384:
            return refuse(f"max_context {max_context}")
        self.said |= {
            "platform": target_platform,
            "dtype": quantized_dtype,
            "cores": num_npu_core,
            "context": max_context,
        }
        if FAILS == "build":
            return refuse("Catch exception when converting model")
        if FAILS == "crash":
            os.abort()
        if FAILS == "hang":
            while True:
                time.sleep(1)
        if FAILS == "full":
            sys.exit("OSError: [Errno 28] No space left on device")
        return 0

    def export_rkllm(self, path):
        if FAILS == "export":
            return refuse("export")
        if FAILS != "nothing":
            with open(path, "w") as file:
                file.write("" if FAILS == "empty" else "RKLLM stand-in " + json.dumps(self.said))
        return 0
