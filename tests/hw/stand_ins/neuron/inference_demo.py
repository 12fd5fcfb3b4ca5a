"""A stand-in for NxD Inference's inference_demo: it holds callers to the real one's contract and fails in each way.

``STAND_IN_FAILS`` in the environment names the way. model.pt is an archive as torch.jit writes them, with a record of
what it was told; weights are slices of one tensor.
"""

import argparse
import json
import os
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

from neuronx_distributed_inference.models.application_base import NeuronApplicationBase

FAILS = os.environ.get("STAND_IN_FAILS", "")
MODEL_TYPES = {
    "llama": {"causal-lm": NeuronApplicationBase},
    "mistral": {"causal-lm": NeuronApplicationBase},
    "mixtral": {"causal-lm": NeuronApplicationBase},
    "qwen2": {"causal-lm": NeuronApplicationBase},
    "qwen3": {"causal-lm": NeuronApplicationBase},
    "qwen3_moe": {"causal-lm": NeuronApplicationBase},
}
DEGREES = {"trn1": (1, 2, 8, 16, 32), "trn2": (1, 2, 4, 8, 16, 32, 64), "inf2": (1, 2, 4, 8, 24)}
#: The code of 240 in e4m3; the next one up is infinity on the chip.
LARGEST = 0x77


def parsed():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-type", choices=MODEL_TYPES, required=True)
    parser.add_argument("--task-type", required=True)
    run = parser.add_subparsers().add_parser("run", allow_abbrev=False)
    run.add_argument("--prompt", dest="prompts", action="append", required=True)
    for name in ("--model-path", "--compiled-model-path"):
        run.add_argument(name, required=True)
    run.add_argument("--torch-dtype", choices=["bfloat16", "float16", "float32"])
    for name in ("--tp-degree", "--batch-size", "--max-context-length", "--seq-len", "--logical-nc-config"):
        run.add_argument(name, type=int)
    for name in ("--quantized", "--compile-only", "--save-sharded-checkpoint", "--on-device-sampling",
                 "--enable-bucketing"):  # fmt: skip
        run.add_argument(name, action="store_true")
    run.add_argument("--quantized-checkpoints-path")
    run.add_argument("--quantization-type", default="per_tensor_symmetric")
    run.add_argument("--quantization-dtype", default="int8")
    run.add_argument("--modules-to-not-convert-file", type=lambda at: json.loads(Path(at).read_text()))
    return parser.parse_args()


def header_of(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return header, file.read()


def tensors_of(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        header, body = header_of(path)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], body[low:high])
    assert found, f"Can not find model.safetensors in {folder}"
    return found


def check_environment(args):
    target = os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"]
    assert args.tp_degree in DEGREES[target], f"{args.tp_degree} cores of {target}"
    assert args.logical_nc_config in ((1, 2) if target == "trn2" else (1,))
    assert "NEURON_LOGICAL_NC_CONFIG" not in os.environ
    assert not os.environ["BASE_COMPILE_WORK_DIR"].startswith("/tmp/nxd_model")  # noqa: S108
    if args.quantized:
        assert target == "trn2"
        assert os.environ["UNSAFE_FP8FNCAST"] == os.environ["XLA_HANDLE_SPECIAL_SCALAR"] == "1"
    return target


def check_config(args):
    config = json.loads(Path(args.model_path, "config.json").read_text())
    assert config["model_type"] == args.model_type
    assert "rope_theta" in config, "transformers 4 takes a default"
    assert not {"scale_emb", "scale_depth", "dim_model_base"} & set(config), "muP scalars: who applies them?"
    assert args.max_context_length <= args.seq_len <= config["max_position_embeddings"]
    return config


def check_fp8(args, config):
    """Each linear module as NxD would make it, FP8 or not, has what it needs in the checkpoint."""
    assert args.quantized_checkpoints_path == args.model_path
    assert (args.quantization_type, args.quantization_dtype) == ("per_channel_symmetric", "f8e4m3")
    listed = args.modules_to_not_convert_file["modules_to_not_convert"]
    tensors = tensors_of(args.quantized_checkpoints_path)
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    parts = ["self_attn.qkv_proj.q_proj", "self_attn.qkv_proj.k_proj", "self_attn.qkv_proj.v_proj",
             "self_attn.o_proj.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    modules = [f"layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts]
    for module in [*modules, "lm_head"]:
        dtype, shape, body = tensors[f"{module}.weight"]
        plain = any(entry in module for entry in listed)
        assert plain == (dtype == "BF16"), f"{module} is {dtype}, and listed: {plain}"
        if not plain:
            assert dtype == "F8_E4M3" and all(code & 0x7F <= LARGEST for code in body), f"{module} is beyond 240"
            assert tensors[f"{module}.scale"][:2] == ("F32", [shape[0], 1])


def check_bf16(args, config):
    tensors = tensors_of(args.model_path)
    assert {dtype for dtype, _, _ in tensors.values()} == {"BF16"}
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert config.get("quantization_config") is None


def write_shard(path, rank):
    body = bytes([rank % 256]) * 64
    header = json.dumps({"layers.0.weight": {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}}).encode()
    data = struct.pack("<Q", len(header)) + header + body
    path.write_bytes(data[:-1] if FAILS == "cut" else b"" if FAILS == "empty shard" else data)


def write(args, target):
    out = Path(args.compiled_model_path)
    tp = args.tp_degree // 2 if FAILS == "fewer cores" else args.tp_degree
    said = {key: getattr(args, key) for key in ("batch_size", "seq_len", "max_context_length", "logical_nc_config",
                                                "save_sharded_checkpoint", "quantized")}  # fmt: skip
    said |= {"tp_degree": tp, "torch_dtype": args.torch_dtype, "quantization_dtype": args.quantization_dtype,
             "quantization_type": args.quantization_type}  # fmt: skip
    if args.modules_to_not_convert_file:
        said |= args.modules_to_not_convert_file
    if FAILS != "no config":
        (out / "neuron_config.json").write_text(json.dumps({"neuron_config": said, "model_type": args.model_type}))
    with zipfile.ZipFile(out / "model.pt", "w") as archive:
        for name in ("code/__torch__.py", "constants.pkl", "version", *(() if FAILS == "no data" else ("data.pkl",))):
            archive.writestr(f"model/{name}", "stand-in")
        archive.writestr("model/extra/told.json", json.dumps({**vars(args), "target": target}))
    if FAILS == "zero bytes":
        (out / "model.pt").write_bytes(b"")
    if FAILS == "cut model":
        (out / "model.pt").write_bytes((out / "model.pt").read_bytes()[:-30])
    if args.save_sharded_checkpoint:
        (out / "weights").mkdir()
        for rank in range(args.tp_degree - (FAILS == "few")):
            write_shard(out / "weights" / f"tp{rank}_sharded_checkpoint.safetensors", rank)
        if FAILS == "many":
            write_shard(out / "weights" / f"tp{args.tp_degree}_sharded_checkpoint.safetensors", 0)


def main():
    args = parsed()
    assert args.task_type in MODEL_TYPES[args.model_type]
    assert args.compile_only, "there is no chip to run it on"
    target = check_environment(args)
    config = check_config(args)
    if args.quantized:
        names = types.SimpleNamespace(quantized_checkpoints_path=args.quantized_checkpoints_path)
        NeuronApplicationBase.save_quantized_state_dict(args.model_path, types.SimpleNamespace(neuron_config=names))
        check_fp8(args, config)
    else:
        check_bf16(args, config)
    print("\nCompiling and saving model...", flush=True)
    if FAILS == "compiler":
        sys.exit("[NCC_IXCG856] MATCH_REPLACE8")
    if FAILS == "crash":
        os.abort()
    if FAILS == "hang":
        while True:
            time.sleep(1)
    if FAILS == "full":
        sys.exit("OSError: [Errno 28] No space left on device")
    write(args, target)
    if FAILS != "silent":
        print("Compiling and tracing time: 1.5 seconds")


if __name__ == "__main__":
    main()
