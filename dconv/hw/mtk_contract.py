"""What MediaTek's closed ``mtk_cloud`` repository is told, and what has to come out of it.

The repository is not public; its contract is. Scripts, variables and values are those that the public wrapper around
it sets (the ``mtk`` engine of model_converter_tool, ``_setup_mtk_environment``). That wrapper took any file for a
success and fell back on one person's folders; nothing here has a default that is a path, and what counts is what files
hold.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import parse_json
from dconv.errors import Refused, ToolMissing, UsageError, VerifyFailed
from dconv.hw import settings
from dconv.hw.settings import Setting
from dconv.quant.table import meant
from dconv.sharding.parsed import is_dict

#: Chip -> what it is sold as. Those that the repository takes; LiteRT knows more.
PLATFORMS: Final[Mapping[str, str]] = {
    "MT6991": "Dimensity 9400",
    "MT6989": "Dimensity 9300",
    "MT6897": "Dimensity 8300",
}
#: Name of a size -> parameters that it stands for.
SIZES: Final[Mapping[str, float]] = {
    "0_5B": 0.5e9, "0_58B": 0.58e9, "0_9B": 0.9e9, "1_2B": 1.2e9, "1_6B": 1.6e9, "8B": 8e9,
}  # fmt: skip
#: How far a model may be from a size, as a ratio. MiniCPM4-0.5B has 0.43 B parameters (1.15), MiniCPM-1B, a 1_2B, has
#: 1.36 B (1.14); a model of 7 B is no 8B (1.19).
NEAR: Final = 1.16
#: Where the repository is, unless an option says.
VARIABLE: Final = "MTK_CLOUD_PATH"
LLM: Final = "run_example_llm_cybertron.sh"
VLM: Final = "run_example_vlm_cybertron.sh"
#: At byte 4 of every .tflite.
MAGIC: Final = b"TFL3"

#: Keys of ``--quantization-config``: the repository's variables in lower case, and `_OURS`.
KNOWN: Final[Mapping[str, Setting]] = {
    "model_size": settings.among(None, *SIZES),
    "weight_bit": settings.among(4, 4, 8),
    "clen": settings.whole(512, 1, 1 << 20),
    "plen": settings.whole(128, 1, 1 << 20),
    "cloud_weight_num": settings.whole(1024, 1, 1 << 20),
    "cloud_act_num": settings.whole(256, 1, 1 << 20),
    "mtk_batch_size": settings.whole(2, 1, 1024),
    "disable_pgptq": settings.flag(False),
    "is_llama": settings.flag(False),
    "rate": settings.number(0, 0.0, 100.0),
    "skip_env_setup": settings.flag(True),
    "use_optimized_convert": settings.flag(True),
    "conda_env": settings.text(),
    "mtk_cloud_path": settings.text(),
    "gptq_path": settings.text(),
    "group_size": settings.among(128, -1, 32, 64, 128, 256, 512, 1024),
    "nsamples": settings.whole(128, 1, 1 << 20),
    "seqlen": settings.whole(2048, 1, 1 << 20),
    "fold_mup": settings.flag(True),
    "parts": settings.whole(None, 1, 1024),
}
#: Keys that are dconv's and no variable.
_OURS: Final = ("mtk_cloud_path", "gptq_path", "group_size", "nsamples", "seqlen", "fold_mup", "parts")
#: What the public wrapper says where no environment of conda is to be entered.
_NO_CONDA: Final = "SKIP_CONDA_ACTIVATION"
#: Keys of a config.json that only models that see have.
_SIGHT: Final = ("vision_config", "vision_tower", "vision_encoder", "mm_vision_tower", "image_processor", "image_size")
#: ``--task`` -> whether it is one for a model that sees.
TASKS: Final[Mapping[str, bool]] = {settings.TEXT: False, "image-text-to-text": True}
#: How a step that failed reads in a log of which the script said that all went well. A shell script goes on after one.
_FAILURES: Final = re.compile(
    r"^Traceback \(most recent call last\)|No space left on device|\bSegmentation fault\b|\bcore dumped\b"
    r"|^Killed\b|\bKilled\s+(?:python|bash)|: command not found$|MemoryError|CUDA out of memory",
    re.MULTILINE,
)
#: ``part1of4``, ``part_0_of_4``, ``00001-of-00004``: which of how many.
_NUMBERED: Final = re.compile(r"(\d+)[-_]?of[-_]?(\d+)")


def settled(given: Mapping[str, object], where: str) -> dict[str, object]:
    """All settings with their values, those that only go together checked.

    Raises:
        UsageError: an unknown key, a value that a key cannot have, or a prompt longer than the cache.
    """
    found = settings.settled(given, KNOWN, where)
    if int(str(found["plen"])) > int(str(found["clen"])):
        raise UsageError("a prompt is longer than the cache, nothing was written", where=where,
                         expected=f"plen of at most clen, {found['clen']}", found=f"plen {found['plen']}")  # fmt: skip
    return found


def environment(
    given: Mapping[str, object],
    *,
    platform: str,
    size: str,
    multimodal: bool,
    model: Path,
    gptq: Path,
    out: Path,
    inherited: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The repository's variables, all of them and no others.

    Args:
        given: of `settled`.
        platform: the chip, of `PLATFORMS`.
        size: of `SIZES`.
        multimodal: whether the model sees; see `is_multimodal`.
        model: a HuggingFace directory; as the next two, an absolute path.
        gptq: the directory of its GPTQ form.
        out: where parts are written.
        inherited: the process's own variables, of which ``CONDA_ENV`` counts where no setting names one.

    Raises:
        UsageError: a chip or a size that the repository does not take, or a path that it could not use.
    """
    for value, known, name in ((platform, PLATFORMS, "--platform"), (size, SIZES, "model_size")):
        if value not in known:
            raise UsageError("mtk_cloud knows no such thing, nothing was written", where=f"{name} {value:.40}",
                             expected=", ".join(known), do=meant(value, known))  # fmt: skip
    paths = {"MODEL_PATH": model, "GPTQ_MODELPATH": gptq, "OUTPUT_DIR": out}
    for name, path in paths.items():
        if not path.is_absolute() or not str(path).isprintable():
            raise UsageError("mtk_cloud cannot be told this path, nothing was written",
                             where=f"{name} {str(path)!r:.200}",
                             expected="an absolute one, of printable characters")  # fmt: skip
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise UsageError("mtk_cloud reads and writes different folders, nothing was written",
                         where="\n".join(f"{name} {path}" for name, path in paths.items()))  # fmt: skip
    told = {key: _spelled(value) for key, value in given.items() if key not in (*_OURS, "model_size", "conda_env")}
    conda = given.get("conda_env") or (inherited or {}).get("CONDA_ENV") or _NO_CONDA
    return {
        **{name: str(path) for name, path in paths.items()},
        "PLATFORM": platform,
        "MODEL_KIND": "multimodal" if multimodal else "word",
        "MODEL_SIZE": size,
        **{key.upper(): value for key, value in told.items()},
        "CONDA_ENV": str(conda),
    }


def _spelled(value: object) -> str:
    if isinstance(value, float):  # as JSON has them, 5.0 as a shell would have written it
        return repr(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else str(value)


def model_size(parameters: int, asked: str | None = None) -> str:
    """The size of `SIZES` that a model is: the one that was asked for, else the nearest as a ratio.

    Args:
        parameters: all of them, embeddings included, a tied head once.
        asked: the setting ``model_size``.

    Raises:
        UsageError: no such size was asked for.
        Refused: no size is within `NEAR`.
    """
    if asked is not None:
        if asked not in SIZES:
            raise UsageError("mtk_cloud knows no such size, nothing was written", where=f"model_size {asked:.40}",
                             expected=", ".join(SIZES), do=meant(asked, SIZES))  # fmt: skip
        return asked
    nearest = min(SIZES, key=lambda name: abs(log(max(parameters, 1) / SIZES[name])))
    if abs(log(max(parameters, 1) / SIZES[nearest])) > log(NEAR):
        raise Refused(
            "the model has no size that mtk_cloud knows, nothing was written",
            found=f"{parameters / 1e9:.2f} B parameters; nearest is {nearest}",
            expected=f"within {NEAR - 1:.0%} of one of {', '.join(SIZES)}",
            do='if it is one all the same: --quantization-config \'{"model_size": "…"}\'',
        )
    return nearest


def is_multimodal(config: Mapping[str, Any], task: str | None = None) -> bool:
    """Whether a model sees, by its ``config.json``; a path's name says nothing.

    Args:
        config: config.json.
        task: ``--task``, which has to agree with the config where it says text.

    Raises:
        UsageError: an unknown task.
        Refused: a task that the model cannot do.
    """
    sees = any(config.get(key) not in (None, {}, "") for key in _SIGHT)
    if task is None:
        return sees
    if task not in TASKS:
        raise UsageError("there is no such task, nothing was written", where=f"--task {task:.40}",
                         expected=", ".join(TASKS), do=meant(task, TASKS))  # fmt: skip
    if TASKS[task] and not sees:
        raise Refused("the model does not see, nothing was written", where=f"--task {task}",
                      expected=f"one of {', '.join(_SIGHT)} in config.json",
                      found=str(config.get("model_type")))  # fmt: skip
    return TASKS[task]


@dataclass(frozen=True)
class Repository:
    """A checkout of mtk_cloud.

    Attributes:
        script: which is run with ``bash``, in ``path``.
    """

    path: Path
    script: Path


def repository(option: str | None, environment: Mapping[str, str], *, multimodal: bool) -> Repository:
    """The repository: by option, then by `VARIABLE`; recognised by the script that is run.

    Args:
        option: the setting ``mtk_cloud_path``.
        environment: the process's variables.
        multimodal: which of the two scripts is run.

    Raises:
        ToolMissing: none is named, it is not there, or has no script that bash can read.
    """
    said, where = (option, "mtk_cloud_path") if option else (environment.get(VARIABLE), VARIABLE)
    if not said:
        raise ToolMissing(
            "mtk_cloud is not here, nothing was written",
            expected=f"its path in the setting mtk_cloud_path, or in {VARIABLE}",
            do="it comes from MediaTek; --bundle writes what it compiles, for where it is",
        )
    path = Path(said).expanduser().absolute()
    script = path / (VLM if multimodal else LLM)
    if not script.is_file():
        raise ToolMissing(
            "this is not mtk_cloud, or not all of it, nothing was written",
            where=f"{where} {path}",
            expected=script.name,
            found="no such script" if path.is_dir() else "no such folder",
        )
    bash = shutil.which("bash", path=environment.get("PATH"))
    if bash is None:
        raise ToolMissing("there is no bash, which mtk_cloud's scripts need, nothing was written", where="PATH")
    try:
        empty = not script.read_bytes().strip()
        read = subprocess.run([bash, "-n", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = "it is empty" if empty else read.stderr.strip() if read.returncode else ""
    except OSError as fault:
        found = str(fault)
    if found:
        raise ToolMissing("mtk_cloud's script cannot be run, nothing was written", where=str(script), found=found[:300])
    return Repository(path, script)


def quantize_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantize_config.json`` that belongs to a GPTQ model's ``config.json``, which AutoGPTQ's readers look for.

    Raises:
        Refused: the config says nothing of GPTQ.
    """
    said: object = config.get("quantization_config")
    if not is_dict(said) or said.get("quant_method", "gptq") != "gptq" or type(said.get("bits")) is not int:
        raise Refused("this is no GPTQ model, nothing was written", where="quantization_config of config.json",
                      expected="quant_method gptq, and bits", found=f"{said!r:.80}")  # fmt: skip
    return {"model_name_or_path": None, "model_file_base_name": None, **said, "quant_method": "gptq"}


def require_gptq(folder: Path, bits: int) -> None:
    """Raise where mtk_cloud would not take a folder for ``GPTQ_MODELPATH``.

    Raises:
        Refused: no ``quantize_config.json``, another number of bits, or no weights.
    """
    path = folder / "quantize_config.json"
    if not path.is_file() or not any(folder.glob("*.safetensors")):
        raise Refused("this is no GPTQ model, nothing was written", where=str(folder),
                      expected="quantize_config.json and .safetensors")  # fmt: skip
    config = parse_json(path.read_bytes(), where=str(path), what="quantize_config.json")
    if config.get("bits") != bits:
        raise Refused("the GPTQ model has other bits than mtk_cloud is told, nothing was written", where=str(path),
                      expected=f"bits {bits}, as weight_bit says", found=f"bits {config.get('bits')}")  # fmt: skip


def judge(out: Path, *, parts: int | None = None, log: str = "", own: Collection[str] = ()) -> dict[str, Any]:
    """The evidence that mtk_cloud wrote what it should: its parts, by name, with their bytes.

    Args:
        out: what was given as ``OUTPUT_DIR``.
        parts: how many there have to be; None takes what the names say (``1of4``), else at least one.
        log: all that the script printed.
        own: names in ``out`` that are not the script's.

    Raises:
        VerifyFailed: a part that is empty, of another kind or missing, or a step of which the log says that it failed.
    """
    files: list[Path] = []
    wrong: list[str] = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name in own:
            continue
        if path.is_symlink():
            wrong.append(f"{name}: a link")
        elif path.is_file():
            files.append(path)
            if not path.stat().st_size:
                wrong.append(f"{name}: 0 bytes")
    made = {path.relative_to(out).as_posix(): path for path in files if path.suffix == ".tflite"}
    for name, path in made.items():
        with path.open("rb") as file:
            head = file.read(8)
        if head and head[4:] != MAGIC:
            wrong.append(f"{name}: no .tflite; {head[4:]!r} at byte 4")
    wrong += _missing(made, parts)
    if wrong:
        wanted = ".tflite files" if parts is None else f"{parts} .tflite files"
        raise VerifyFailed("mtk_cloud ended well, but what it wrote is not whole", where=str(out),
                           expected=f"{wanted}, {MAGIC.decode()} at byte 4 of each",
                           found="\n".join(wrong[:8]))  # fmt: skip
    if failed := _FAILURES.search(log):
        raise VerifyFailed("mtk_cloud ended well, but a step of it failed", where="its log",
                           found=_around(log, failed.start()), do="what it wrote is not to be trusted")  # fmt: skip
    return {"parts": {name: path.stat().st_size for name, path in made.items()}}


def _missing(made: Collection[str], parts: int | None) -> list[str]:
    """What a set of parts lacks."""
    if not made:
        return ["no .tflite"]
    if parts is not None:
        return [] if len(made) == parts else [f"{len(made)} of {parts} parts"]
    wrong: list[str] = []
    series: dict[tuple[str, int], set[int]] = {}
    for name in made:
        if found := _NUMBERED.search(name):
            key = (f"{name[: found.start()]}*{name[found.end() :]}", int(found[2]))
            series.setdefault(key, set()).add(int(found[1]))
    for (name, count), numbers in series.items():
        if numbers not in (set(range(count)), set(range(1, count + 1))):
            wrong.append(f"{name}: {len(numbers)} of {count} parts")
    return wrong


def _around(log: str, at: int) -> str:
    """The line that says it, which of a traceback is its last."""
    lines = log[log.rfind("\n", 0, at) + 1 :].splitlines()
    if lines[0].startswith("Traceback"):
        lines = [line for line in lines[1:] if not line.startswith(" ")] or lines
    return lines[0][:400]
