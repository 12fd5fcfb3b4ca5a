"""The peer to measure against: Megatron-Bridge's own HuggingFace → Megatron import, on a machine without a GPU.

Run with the python of the environment that ``scripts/bridge_env.sh`` makes (not with dconv's; dconv is not imported):

    .venvs/bridge/bin/python scripts/bridge_peer.py SOURCE OUT            SOURCE (HuggingFace, Llama) → OUT (torch_dist)
    .venvs/bridge/bin/python scripts/bridge_peer.py SOURCE OUT --export   and OUT → OUT-hf, as HuggingFace again

Prints one JSON object, seconds of each part and the peak memory of the process::

    {"import": s, "load": s, "save": s, "total": s, "peak_mib": MiB}      and "export": s with --export

``total`` leaves out the end of the process (about 3 s: megatron-core's writer process is joined, torch is taken down);
time the whole process from outside.

What runs is ``AutoBridge.import_ckpt`` taken apart, with the arguments that it has: ``from_hf_pretrained``,
``to_megatron_provider``, ``provide_distributed_model`` and ``save_megatron_model(low_memory_save=True)``; tp 1, pp 1,
one process, bf16. Taken apart because between the provider and the model the layer spec has to become
megatron-core's local one (`on_cpu`): the default one is TransformerEngine's. No tokenizer is asked for: a benchmark
model has none. Nothing is fetched: the hub is switched off, and code from a model directory is never run.

**Shims.** A machine with CUDA, TransformerEngine and Python 3.12 needs none of what `before_core`, `before_bridge` and
`on_cpu` do. They stand in for modules and devices that an import touches and the conversion of a dense model on a CPU
never calls; no class that converts, builds or saves is replaced. Megatron-Bridge imports faster with them than with
the real packages, so that the ratio to it is, if anything, too kind to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import types
import typing
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class _AnythingMeta(type):
    """A class whose attributes are classes of the same kind, made when they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        return _attribute(cls, name)


class _Anything(metaclass=_AnythingMeta):
    """Stands for a class or a function of a package that is not there: can be derived from, annotated with, called."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, _item: Any) -> Any:
        return cls


class _FakeModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


def _attribute(owner: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    value = _AnythingMeta(name, (_Anything,), {})
    setattr(owner, name, value)
    return value


class _Fakes(MetaPathFinder, Loader):
    """Finds empty modules for the named packages, after everything else: a real package is always preferred."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None  # noqa: ARG002
    ) -> ModuleSpec | None:  # fmt: skip
        if any(fullname == name or fullname.startswith(name + ".") for name in self.names):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _FakeModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "triton":  # decorators must give back what they decorate
            module.__dict__.update(
                jit=lambda function=None, **_: function or (lambda wrapped: wrapped),
                autotune=lambda *_, **__: lambda wrapped: wrapped,
                heuristics=lambda *_, **__: lambda wrapped: wrapped,
            )
        module.__dict__.setdefault("__version__", "0.0.0")


_fakes = _Fakes()


def before_core() -> None:
    """Shims without which ``import megatron.core`` 0.19.2 fails here. Idempotent.

    - ``typing.override`` is of Python 3.12;
    - ``triton`` is imported unconditionally (a CPU build of torch brings none). torch itself is asked first whether
      there is one, and told the truth: its compiler must not meet the fake.
    """
    if not hasattr(typing, "override"):
        from typing_extensions import override

        setattr(typing, "override", override)  # noqa: B010  the type checker knows no such attribute
    if _fakes in sys.meta_path:
        return
    warnings.simplefilter("ignore")  # of apex and TransformerEngine, which are missing on purpose
    import_module("torch._inductor.runtime.triton_compat")
    from torch.utils import _triton

    _triton.has_triton_package()
    _triton.has_triton()
    _fakes.names.add("triton")
    sys.meta_path.append(_fakes)


def before_bridge() -> None:
    """Shims without which ``import megatron.bridge`` 0.6.2 fails here.

    - ``transformer_engine`` is imported unconditionally by its LoRA layers, ``megatron.energon`` by its data sets.
      megatron-core and modelopt are imported before: they must go on seeing that TransformerEngine is absent.
    """
    before_core()
    for name in ("megatron.core.extensions.transformer_engine", "megatron.core.models.gpt", "modelopt.torch.opt"):
        import_module(name)
    _fakes.names |= {"transformer_engine", "megatron.energon"}


def on_cpu() -> None:
    """Give the CUDA calls of building, saving and running a model their meaning on a CPU.

    The device is the CPU, there is nothing to wait for, and the random state of CUDA is not forked: nothing draws
    from it (weights are not initialised, dropout is off).
    """
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *_, **__: self
    setattr(CudaRNGStatesTracker, "fork", lambda *_: nullcontext())  # noqa: B010  another type than declared


def world_of_one(folder: str) -> None:
    """A gloo process group of this process alone, met through a file, with Megatron's parallel state on it."""
    import torch
    from megatron.core import parallel_state

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def peak_mib() -> float:
    """The peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def provider_for_cpu(bridge: Any) -> Any:
    """The provider of ``import_ckpt``, made to build what runs on a CPU."""
    provider = bridge.to_megatron_provider(load_weights=True)
    local_layers(provider)
    provider.finalize()
    return provider


def local_layers(provider: Any) -> None:
    """Let a provider build megatron-core's local layers, without fused CUDA kernels."""
    from megatron.bridge.models.gpt_provider import local_layer_spec  # pyright: ignore[reportMissingImports]

    provider.transformer_layer_spec = local_layer_spec
    for fusion in (
        "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
        "apply_rope_fusion", "cross_entropy_loss_fusion", "persist_layer_norm",
    ):  # fmt: skip
        setattr(provider, fusion, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a HuggingFace Llama directory")
    parser.add_argument("out", type=Path, help="the Megatron checkpoint to make")
    parser.add_argument("--export", action="store_true", help="also read it back and write OUT-hf")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    marks = [time.perf_counter()]
    seconds: dict[str, float] = {}

    def done(part: str) -> None:
        marks.append(time.perf_counter())
        seconds[part] = marks[-1] - marks[-2]

    report = os.dup(1)  # standard output carries the result alone; libraries write to it too
    os.dup2(2, 1)
    before_bridge()
    from megatron.bridge import AutoBridge  # pyright: ignore[reportMissingImports]

    import_module("megatron.bridge.training.model_load_save")  # save_megatron_model would import it
    on_cpu()
    done("import")
    with tempfile.TemporaryDirectory(prefix="bridge-peer-") as scratch:
        world_of_one(scratch)
        bridge = AutoBridge.from_hf_pretrained(str(args.source))
        model = provider_for_cpu(bridge).provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        done("load")
        bridge.save_megatron_model(model, args.out, low_memory_save=True)
        del model
        done("save")
        result = {**seconds, "total": marks[-1] - marks[0], "peak_mib": peak_mib()}
        if args.export:
            loaded = bridge.load_megatron_model(args.out)
            back = args.out.with_name(args.out.name + "-hf")
            back.mkdir(exist_ok=True)
            shutil.copy(args.source / "config.json", back)
            bridge.save_hf_weights(loaded, back, show_progress=False)  # save_hf_pretrained insists on a tokenizer
            done("export")
            result |= {"export": seconds["export"], "peak_mib": peak_mib()}
    os.write(report, (json.dumps({key: round(value, 2) for key, value in result.items()}) + "\n").encode())


if __name__ == "__main__":
    main()
