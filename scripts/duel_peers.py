"""What each program is asked to do, the way its documentation says; `duel_stage` runs these in processes of their own.

A function returns the tensors that a loader loaded, or None where the result is on disk. Nothing of a program is
replaced but CUDA's device, which megatron-core asks for on a machine that has none.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from duel_stage import DconvSaid, Tensor

#: What would wait for something in its end; the process ends without.
_kept: list[object] = []


def _held(state: Any) -> dict[str, Tensor]:
    """Tensors as data."""
    import torch

    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
            found[name] = str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes()
    return found


def versions(bridge: str) -> dict[str, str]:
    """Of the packages that are here, and of Megatron-Bridge in its environment."""
    found = {}
    for name in ("torch", "transformers", "safetensors", "megatron-core", "gguf", "xllamacpp", "dconv"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    there = {}
    for path in Path(bridge).glob("lib/*/site-packages/megatron_*-*.dist-info"):
        name, _, number = path.name.removesuffix(".dist-info").partition("-")
        there[name] = number
    if there:
        found["megatron-bridge"] = f"{there['megatron_bridge']} (with megatron-core {there['megatron_core']})"
    return found


def dconv(*words: str) -> None:
    """The command line. Raises `DconvSaid` with the exit code where it is not 0."""
    from dconv.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main([*words])
        except SystemExit as end:
            code = int(end.code or 0)
    print(said.getvalue(), file=sys.stderr)
    if code:
        lines = said.getvalue().strip().splitlines() or ["no words"]
        first = lines[0].partition(")  ")[2] or lines[0]
        raise DconvSaid(f"exit {code}: {first}")


# ------------------------------------------------------------------------------------- torch.distributed.checkpoint


def consolidate(source: str, out: str, files: dict[str, int]) -> None:
    """DCP's shards of safetensors become a HuggingFace directory."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    consolidate_safetensors_files(source, out, files)


def dcp_load(folder: str) -> dict[str, Tensor]:
    """A DCP directory becomes one file of torch, which is then loaded."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as work:
        dcp_to_torch_save(folder, f"{work}/all.pt")
        return _held(torch.load(f"{work}/all.pt", weights_only=False))


def dcp_save(file: str, out: str) -> None:
    """A file of torch becomes a DCP directory."""
    from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

    torch_save_to_dcp(file, out)


def torch_load(file: str) -> dict[str, Tensor]:
    import torch

    return _held(torch.load(file))


# ---------------------------------------------------------------------------------------- transformers, safetensors


def transformers_load(folder: str) -> dict[str, Tensor]:
    import torch
    from transformers import AutoModelForCausalLM

    return _held(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict())


def transformers_save(folder: str, out: str, shard: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(out, max_shard_size=shard)


def safetensors_load(file: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return _held(load_file(file))


# ------------------------------------------------------------------------------------------- megatron-core, gguf-py


def megatron_load(folder: str) -> dict[str, Tensor]:
    """Every tensor of a torch_dist directory, and its common.pt, by megatron-core's own dist_checkpointing."""
    import torch
    import torch.distributed as dist

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None
    with tempfile.TemporaryDirectory() as work:
        dist.init_process_group("gloo", init_method=f"file://{work}/meet", rank=0, world_size=1)
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load_plain_tensors(folder)
        dist_checkpointing.load_common_state_dict(folder)
        dist.destroy_process_group()
    return _held(state)


def gguf_load(file: str) -> dict[str, Tensor]:
    """Every tensor of a GGUF, bf16 as the bytes that it is."""
    from gguf import GGUFReader

    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), tensor.data.tobytes())
        for tensor in GGUFReader(file).tensors
    }


def llama_load(file: str) -> dict[str, Tensor]:
    """llama.cpp loads it as a server does; it does not give tensors back."""
    from importlib import import_module

    xllamacpp: Any = import_module("xllamacpp")  # as tests do: it has no types
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = 1
    _kept.append(xllamacpp.Server(params))
    return {}


def bridge(python: str, source: str, out: str) -> None:
    """Megatron-Bridge's import, in its own environment."""
    import subprocess

    script = Path(__file__).with_name("bridge_peer.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), source, out], capture_output=True, text=True, check=False, env=environment
    )
    print(done.stdout, done.stderr)
    if done.returncode:
        raise RuntimeError(next(iter(done.stderr.strip().splitlines()[::-1]), "no words"))
