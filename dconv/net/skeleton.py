"""A model of transformers without storage: what a config describes, ready to be given weights.

No code of a checkpoint is run, and nothing is fetched.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dconv.arch.family import Family
from dconv.errors import DconvError, ToolMissing
from dconv.net import own

#: transformers turns torch's initialisation off for the whole process, and puts back what it found: of two threads that
#: do so at once the second puts back the first one's nothing.
_ALONE: Final = threading.Lock()


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Without what transformers tells a person at a terminal."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def built(
    folder: Path,
    auto: str,
    root: Path,
    attention: str = "eager",
    family: Family | None = None,
    dtype: str = "float32",
    experts: str = "eager",
) -> Any:
    """The model that a directory's config.json describes, without storage.

    Args:
        folder: where config.json is.
        auto: transformers' class that picks a model by its config.
        root: the source, for an error.
        attention: transformers' name of the implementation.
        family: of the model, for one that transformers lacks (`dconv.net.own`).
        dtype: torch's name of the parameters' dtype.
        experts: transformers' name of how fused experts are computed; ``eager`` takes an expert's matrix at a time.

    Raises:
        ToolMissing: transformers does not build it.
        Refused: see `dconv.net.own.model`.
    """
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    try:
        with _ALONE, quiet():
            said = json.loads((folder / "config.json").read_text())
            if family is not None and own.is_ours(family, said):
                with torch.device("meta"), no_init_weights():
                    net = own.model(family, said, attention, dtype)
                net.tie_weights()
                return net
            config = config_of(folder)
            config._experts_implementation = experts
            with torch.device("meta"), no_init_weights():
                net = getattr(transformers, auto).from_config(
                    config, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
                )
            net.tie_weights()
            _keep_wide(net, getattr(torch, dtype))
            return net
    except DconvError:
        raise
    except Exception as error:  # whatever a framework raises about one config
        raise ToolMissing(
            "transformers cannot build this model", where=str(root), found=f"{type(error).__name__}: {error}"[:600]
        ) from error


def _keep_wide(net: Any, dtype: Any) -> None:
    """fp32 for the parameters that transformers keeps in it where it loads a model in a narrower dtype."""
    import torch

    named: set[str] = set()
    if dtype != torch.float32:
        named |= set(net._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        named |= set(net._keep_in_fp32_modules or ())
    if not named:
        return
    wide = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in sorted(named)))
    for name, value in net.state_dict(keep_vars=True).items():
        if wide.search(name):
            value.data = value.data.to(torch.float32)


def config_of(folder: Path) -> Any:
    """The config of a directory, as transformers has it.

    ``head_dim: null`` means the width of all heads divided by their number, as a missing key does: some classes of
    transformers compute that of the missing key alone. It is the only key that their code asks for in this way.
    """
    config = import_module("transformers").AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if "head_dim" in vars(config) and config.head_dim is None:
        del config.head_dim
    return config


def fill_computed(module: Any, owner: Any) -> None:
    """Give buffers that follow from the config alone (rotary frequencies) their values, as a loader does."""
    import torch

    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        fill_computed(child, owner)
    hollow = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
    for name in hollow:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
    if hollow:
        owner._init_weights(module)


def layers_of(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The members of the outermost lists of modules, with their names."""
    import torch

    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{prefix}{name}.{i}", layer) for i, layer in enumerate(child))
        else:
            yield from layers_of(child, f"{prefix}{name}.")
