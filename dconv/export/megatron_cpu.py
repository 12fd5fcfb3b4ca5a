"""Runs megatron-core where there is no GPU: patches, process group and worker processes.

megatron-core 0.16.1 assumes CUDA in a handful of places that have nothing to do with the mathematics (where a tensor
is put, which random state is forked). `cpu_patches` turns exactly these into their CPU meaning; no layer, mask or
projection is replaced, so that what runs is still NVIDIA's own forward pass and can judge a converter.

torch and megatron-core are imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dconv.errors import DconvError, Refused, ToolMissing

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_GRACE = 3.0  # seconds that the other ranks get to report after a first failure: it is often not the cause
_LEAVE = 0.5  # seconds that ranks which delivered their result get to leave by themselves
#: What a server process imports once, of which all ranks are then forks: each would need seconds for it. A module that
#: is not there is left out. Read when this process starts its first rank.
PRELOADED = ["torch.distributed", "megatron.core.models.gpt", "megatron.core.dist_checkpointing"]
_patched = False
_worlds: Counter[tuple[str, int]] = Counter()


def require_megatron() -> None:
    """Import megatron-core.

    Raises:
        ToolMissing: (exit code 7) it cannot be imported.
    """
    try:
        importlib.import_module("megatron.core")
    except ImportError as error:
        raise ToolMissing(
            "megatron-core cannot be imported", found=str(error), do="pip install megatron-core==0.16.1"
        ) from error


def cpu_patches() -> None:
    """Make megatron-core run on a CPU over gloo. Idempotent; does nothing where CUDA is available.

    Each patch answers an error that was observed with megatron-core 0.16.1 without CUDA:

    - ``torch.cuda.current_device`` names the CPU (buffers, checkpoint flags), ``synchronize`` returns at once;
    - ``Tensor.cuda`` returns its tensor (tied embeddings are moved explicitly);
    - the CUDA random state is not forked: dropout is off here, nothing draws from it;
    - the two attention masks ask for ``device="cuda"`` literally: the original functions run with it redirected;
    - the MoE router looks up ``te_general_gemm``, which is unbound without Transformer Engine;
    - multi-latent attention takes Transformer Engine for installed, since the import that it tries does not fail;
    - the torch_dist writer measures its memory with psutil for a debug message, and hangs where psutil is missing:
      there it measures nothing.

    Raises:
        ToolMissing: megatron-core cannot be imported.
    """
    global _patched
    require_megatron()
    import torch

    if _patched or torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing apex and Transformer Engine are expected here
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.fusions import fused_softmax
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = _nothing
    # another type than declared
    setattr(torch.Tensor, "cuda", _itself)  # noqa: B010
    setattr(CudaRNGStatesTracker, "fork", _no_fork)  # noqa: B010
    for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
        setattr(fused_softmax, name, _cuda_means_cpu(getattr(fused_softmax, name)))
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):  # a mock stands for it
        multi_latent_attention.HAVE_TE = False
    if importlib.util.find_spec("psutil") is None:
        setattr(filesystem_async, "_process_memory", lambda: 0)  # noqa: B010  a private name
    _patched = True


def _nothing(*_: Any) -> None:
    """In the place of ``torch.cuda.synchronize``."""


def _itself(tensor: Any, *_: Any, **__: Any) -> Any:
    """In the place of ``torch.Tensor.cuda``."""
    return tensor


def _no_fork(*_: Any) -> nullcontext[None]:
    """In the place of ``CudaRNGStatesTracker.fork``."""
    return nullcontext()


def _cuda_means_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch.overrides import TorchFunctionMode

    class Redirect(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    @wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with Redirect():
            return function(*args, **kwargs)

    return on_cpu


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    """Environment variables set for the duration, then as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def parallel_world(
    tp: int,
    pp: int,
    vpp: int = 1,
    ep: int = 1,
    etp: int = 1,
    *,
    rank: int,
    world: int,
    init_method: str,
    timeout: float = 300.0,
) -> Generator[None]:
    """A gloo process group with Megatron's parallel state on it, taken down at the end.

    Ranks are numbered as Megatron numbers them: tensor parallel fastest, then data (expert) parallel, then pipeline.
    May be entered again in the same process, also with another size (every rank of a world must enter it the same
    number of times).

    Args:
        tp: tensor parallel size.
        pp: pipeline parallel size; ``tp * pp`` divides ``world``.
        vpp: model chunks a pipeline stage (interleaved schedule); needs ``pp > 1``.
        ep: expert parallel size, inside what is left of the world.
        etp: tensor parallel size of the experts.
        rank: this process.
        world: number of processes.
        init_method: a ``file://`` address that all ranks share; traffic stays on the loopback device.
        timeout: seconds that a collective may take.

    Raises:
        Refused: the sizes do not fit together, or CUDA is visible (megatron-core would put tensors there, and gloo
            cannot move them; `spawn` hides it).
        ToolMissing: megatron-core cannot be imported.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state

    if torch.cuda.is_available():
        raise Refused(
            "the CPU runtime of megatron-core sees a GPU",
            expected="no visible CUDA device in this process",
            found=f"{torch.cuda.device_count()} devices",
            do="run it through spawn(), or set CUDA_VISIBLE_DEVICES to nothing",
        )
    if world % (tp * pp) or world % (ep * etp * pp):
        raise Refused(
            "the parallel sizes do not fill the world",
            expected="tp x pp and ep x etp x pp divide the number of processes",
            found=f"tp {tp}, pp {pp}, ep {ep}, etp {etp}, {world} processes",
        )
    if vpp > 1 and pp == 1:
        raise Refused("model chunks (vpp) need more than one pipeline stage", found=f"vpp {vpp}, pp {pp}")
    # a file store cannot be used twice, so each world of one address gets a file of its own
    address = f"{init_method}-{world}-{_worlds[init_method, world]}"
    _worlds[init_method, world] += 1
    with _environment({"GLOO_SOCKET_IFNAME": _LOOPBACK}):
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        try:
            parallel_state.initialize_model_parallel(
                tp,
                pp,
                vpp if vpp > 1 else None,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
            )
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def spawn(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 600.0, imported: bool = True) -> list[Any]:
    """Run ``fn(rank, world, init_method, *args)`` in ``world`` new processes of one thread each.

    The processes see no GPU, talk over loopback only, and end with this call (or with this process, however it
    ends). What they print goes to a scratch file, of which a crash report shows the end.

    Args:
        fn: a function that its module's importer finds (pickled by name), as its arguments and result are pickled.
        world: number of processes.
        *args: what ``fn`` gets behind the three.
        timeout: seconds for the whole run.
        imported: the processes begin with `PRELOADED`; False, with nothing.

    Returns:
        The results, by rank.

    Raises:
        DconvError: the one that a rank raised, its traceback in a note.
        ToolMissing: (exit code 7) any other exception, a crash or the time-out, with the tracebacks of the ranks.
    """
    if imported:
        multiprocessing.set_forkserver_preload([*PRELOADED])
    context: Any = multiprocessing.get_context("forkserver" if imported else "spawn")
    processes: list[Any] = []
    receivers: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="dconv-ranks-") as scratch:
        init_method = f"file://{scratch}/rendezvous"
        logs = [Path(scratch, f"rank{rank}.log") for rank in range(world)]
        try:
            # set before the children start: torch reads both when it is imported
            with _environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}):
                for rank in range(world):
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_rank_main, args=(fn, rank, world, init_method, args, sender, str(logs[rank]))
                    )
                    process.start()
                    sender.close()
                    processes.append(process)
                    receivers.append(receiver)
            return _collect(processes, receivers, logs, timeout)
        finally:
            leaving = time.monotonic() + _LEAVE
            for process in processes:
                wait([process.sentinel], max(0.0, leaving - time.monotonic()))
                _end(process)
            for receiver in receivers:
                receiver.close()


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    init_method: str,
    args: tuple[Any, ...],
    sender: Connection,
    log: str,
) -> None:
    """A worker process: own process group, output to ``log``, one pickled ``(ok, value)`` to ``sender``."""
    os.setsid()  # megatron-core forks writers: the group lets all of them be ended together
    threading.Thread(target=_follow_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)  # gloo writes to standard output, which belongs to the caller's --json
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    try:
        message = pickle.dumps((True, fn(rank, world, init_method, *args)))
    except BaseException as error:  # whatever it was, the parent reports it with its traceback
        typed = error if isinstance(error, DconvError) else None
        message = pickle.dumps((False, (typed, traceback.format_exc())))
    sender.send_bytes(message)
    sender.close()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _collect(processes: list[Any], receivers: list[Connection], logs: list[Path], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, tuple[DconvError | None, str]] = {}
    waiting = dict(enumerate(receivers))
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        # in ticks: a writer that a crashed rank forked keeps the pipe open, so that no end of file tells of the crash
        wait(list(waiting.values()), min(left, 1.0))
        for rank, receiver in list(waiting.items()):
            outcome = _receive(processes[rank], receiver, logs[rank])
            if outcome is None:
                continue
            del waiting[rank]
            ok, value = outcome
            if ok:
                results[rank] = value
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + _GRACE)
            failures[rank] = value
    if not failures and not waiting:
        return [results[rank] for rank in range(len(receivers))]
    report = "\n".join(f"rank {rank}: {text.strip()}" for rank, (_, text) in sorted(failures.items()))
    for typed, _ in failures.values():
        if typed is not None:
            typed.add_note(report)
            raise typed
    if failures:
        raise ToolMissing(f"megatron-core failed on rank {', '.join(map(str, sorted(failures)))}", found=report)
    silent = ", ".join(map(str, waiting))
    tails = "\n".join(f"rank {rank}: {_tail(logs[rank])}" for rank in waiting)
    raise ToolMissing(f"megatron-core did not finish in {timeout:.0f} s: rank {silent}", found=tails)


def _receive(process: Any, receiver: Connection, log: Path) -> tuple[bool, Any] | None:
    """What a rank delivered, or how it ended without; None while it works."""
    gone = process.exitcode is not None  # asked first: what it sent before its end is in the pipe by now
    try:
        if receiver.poll():
            return receiver.recv()
    except EOFError:
        process.join(_GRACE)
        gone = True
    if not gone:
        return None
    return False, (None, f"ended with code {process.exitcode}\n{_tail(log)}")


def _tail(log: Path, size: int = 2000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else "(no output)"


def _end(process: Any) -> None:
    """End a worker and what it forked: megatron-core's writers may outlive a crash."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of its group, or it had not yet made one
        process.kill()
    process.join()
    process.close()
