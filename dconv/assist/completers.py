"""What may stand for an argument, by its name: what a shell is told when somebody presses the tab key.

A completer is given what is typed so far and answers with words. It raises nothing, prints nothing, and reads no more
than `dconv.assist.glance` does: a line that is half typed is no place for an error.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dconv.launch.arguments import arguments_of

if TYPE_CHECKING:
    from dconv.assist.glance import Glance

#: What is typed of the word, and the arguments before it.
Completer = Callable[[str, argparse.Namespace], Iterable[str]]

_MODELS: Final = (".pt", ".pth", ".bin", ".gguf", ".onnx", ".pt2")
_CONFIGS: Final = (".yaml", ".yml", ".json")
_SAMPLES: Final = (".txt", ".jsonl", ".json", ".parquet", ".npy")
#: Files of a directory that are looked at: a shell does not wait for a million.
_MOST: Final = 10_000


def paths(suffixes: tuple[str, ...] = (), *, files: bool = True) -> Completer:
    """Directories, with a slash behind them, and files with these ends (all, where none is named)."""

    def complete(prefix: str, _: argparse.Namespace) -> Iterable[str]:
        before, slash, begun = prefix.rpartition("/")
        folder = Path(before + slash).expanduser() if slash else Path()
        found: list[str] = []
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count == _MOST:
                    break
                hidden = entry.name.startswith(".") and not begun.startswith(".")
                if hidden or not entry.name.startswith(begun):
                    continue
                if entry.is_dir():
                    found.append(f"{before}{slash}{entry.name}/")
                elif files and (not suffixes or entry.name.endswith(suffixes)):
                    found.append(f"{before}{slash}{entry.name}")
        return sorted(found)

    return complete


def known(args: argparse.Namespace) -> Glance | None:
    """The model that is typed; None where there is none, or nothing is known of it."""
    from dconv.assist.glance import glance

    model = getattr(args, "model", None)
    if model is None:
        return None
    said: dict[str, Any] = {name: getattr(args, name, None) for name in ("source_format", "model_type", "hf_config")}
    try:
        return glance(Path(model), **said)
    except Exception:  # damaged, hostile, or not there: the command will say it
        return None


def formats(_: str, args: argparse.Namespace) -> Iterable[str]:
    """FORMATs that MODEL permits, or all."""
    from dconv.assist.glance import COMPILERS
    from dconv.formats import engines
    from dconv.request import FORMATS

    model = known(args)
    if model is None:
        return (*FORMATS, *COMPILERS, *(name for name in engines() if name not in FORMATS))
    made = model.formats()
    # hf is what people type; a verb such as hf2megatron is offered to nobody who does not know it
    return (*made, "hf") if "huggingface" in made else made


def sizes(name: str) -> Completer:
    """Numbers of a parallel size that MODEL permits; none where it is not known."""

    def complete(_: str, args: argparse.Namespace) -> Iterable[str]:
        from dconv.assist.sizes import permitted

        model = known(args)
        return () if model is None else map(str, permitted(args, name, model))

    return complete


def quants(_: str, args: argparse.Namespace) -> Iterable[str]:
    """Variants of FORMAT."""
    from dconv.coded.nbits_encode import VARIANTS as ONNX
    from dconv.gguf import TYPES
    from dconv.mlx import VARIANTS as MLX
    from dconv.neuron import QUANT
    from dconv.quantise import VARIANTS

    known_ones = {**VARIANTS, "gguf": TYPES, "mlx": MLX, "onnx": ONNX, "neuron": (QUANT,)}
    format = getattr(args, "format", None)
    return known_ones.get(format, ()) if format else (one for ones in known_ones.values() for one in ones)


def families(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``--model-type``."""
    from dconv.arch.registry import families as all_of_them

    return all_of_them()


def containers(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``--from``."""
    from dconv.checkpoint.detect import CONTAINERS

    return ("megatron", *CONTAINERS, "hf", "safetensors")


def platforms(_: str, args: argparse.Namespace) -> Iterable[str]:
    """Chips of FORMAT's compiler, or of all."""
    from dconv.hw.registry import adapter, adapters, target_of

    format = getattr(args, "format", None)
    target = target_of(format) if format else None
    if target is not None:
        return adapter(target).platforms
    return () if format else (chip for one in adapters().values() for chip in one.platforms)


def settings(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    """``--quantization-config``: presets, and files."""
    from dconv.quant.parse import presets

    return (*presets(), *paths(_CONFIGS)(prefix, args))


def dtypes(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``--dtype``."""
    return ("bf16", "f16", "f32")


def runs(_: str, __: argparse.Namespace) -> Iterable[str]:
    """Numbers of past runs, the last ones."""
    from dconv.launch import history

    path = history.place()
    return () if path is None or not path.exists() else (str(one["id"]) for one in history.runs(path, most=50))


def schemes(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``inspect --explain``."""
    from dconv.quantise import VARIANTS

    return (*VARIANTS, *(name for ones in VARIANTS.values() for name in ones))


def devices(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``--device``."""
    return ("auto", "cpu", "cuda", "mps")


def shells(_: str, __: argparse.Namespace) -> Iterable[str]:
    """``--install-completion``."""
    from dconv.assist.shells import SHELLS

    return SHELLS


def nothing(_: str, __: argparse.Namespace) -> Iterable[str]:
    """A word that only its author knows."""
    return ()


_DIRECTORIES: Final = paths(files=False)
_MODEL: Final = paths(_MODELS)
#: By the name that argparse keeps an argument under.
COMPLETERS: Final[dict[str, Completer]] = {
    "model": _MODEL, "path": _MODEL, "a": _MODEL, "b": _MODEL, "teacher": _MODEL, "hf_config": _DIRECTORIES,
    "format": formats, "out": paths(), "config": paths(_CONFIGS), "file": paths(_CONFIGS), "html": paths((".html",)),
    "report": paths((".html",)), "save_config": paths(_CONFIGS),
    "rename": paths(_CONFIGS), "fake_weight_config": paths(_CONFIGS), "stage_dir": _DIRECTORIES,
    "toolchain_python": paths(), "calibration": paths(_SAMPLES), "with_model": _DIRECTORIES,
    **{name: sizes(name) for name in ("tp", "pp", "vpp", "ep", "etp")},
    "quant": quants, "model_type": families, "source_format": containers, "platform": platforms,
    "quantization_config": settings, "dtype": dtypes, "number": runs, "explain": schemes, "device": devices,
    "install_completion": shells, "show_completion": shells,
}  # fmt: skip


def attach(parser: argparse.ArgumentParser) -> None:
    """Give each argument of a parser its completer, in argcomplete's way."""
    for action in arguments_of(parser):
        if not action.option_strings and action.nargs == "?":
            action.nargs = None  # else a word could be the second of them as well as the first
        if action.choices is None and action.nargs != 0:
            action.completer = _safe(COMPLETERS.get(action.dest, nothing))  # pyright: ignore[reportAttributeAccessIssue]


def _safe(completer: Completer) -> Callable[..., list[str]]:
    """The same, whatever happens; without names that would be more than one word of a shell."""

    def complete(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
        try:
            found = [word for word in completer(prefix, parsed_args) if word.startswith(prefix)]
        except Exception:
            return []
        return [word for word in dict.fromkeys(found) if word.isprintable()]

    return complete
