"""MediaTek by its closed ``mtk_cloud`` repository: a HuggingFace directory and its GPTQ form become parts in .tflite.

What the repository is told and what it writes is in `dconv.hw.mtk_contract`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

from dconv.checkpoint.files import read_json
from dconv.describe import Described
from dconv.errors import Refused, UsageError
from dconv.export.prompt import kind_of
from dconv.hw import mtk_contract, settings
from dconv.hw.driver import write_script
from dconv.hw.finish import LOG
from dconv.hw.manifest import NAME
from dconv.hw.mup import folded
from dconv.hw.target import OUT, Ask, Handing, Step, Takes, Terms, Tool
from dconv.request import Request

_MODEL: Final = "hf"
_GPTQ: Final = "gptq"
_TAKES: Final = Takes(("decoder", "sighted"), ("huggingface", _GPTQ))
#: Variables that are paths, and where those lie in the work folder.
_PATHS: Final = {"MODEL_PATH": _MODEL, "GPTQ_MODELPATH": _GPTQ, "OUTPUT_DIR": OUT}
#: What tells .tflite files that were there from those that the script wrote.
_BEGAN: Final = ".began"


@dataclass(frozen=True)
class MtkCloud:
    """The adapter's part for the closed repository."""

    title: str = "MediaTek mtk_cloud"
    install: str = f"mtk_cloud comes from MediaTek; {mtk_contract.VARIABLE}=DIR says where it is"

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips that the repository takes."""
        return mtk_contract.PLATFORMS

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Language models, those that see among them, as HuggingFace has them and calibrated."""
        return (_TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """A language model and its GPTQ form, which is calibrated here or copied from ``gptq_path``."""
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        found = mtk_contract.settled(ask.settings, ask.where)
        settings.require_of_use(ask, self.title, "--toolchain-python",
                                *(["--calibration"] if found["gptq_path"] is not None else []))  # fmt: skip
        if ask.quant not in (None, _GPTQ):
            raise UsageError("mtk_cloud takes a GPTQ model, nothing was written", where=f"--quant {ask.quant}",
                             expected="weight_bit 4 or 8 of --quantization-config")  # fmt: skip
        multimodal = mtk_contract.is_multimodal(model.config, ask.task)
        if kind_of(model.family) not in _TAKES.kinds:
            raise Refused("mtk_cloud takes language models, nothing was written",
                          found=f"{model.family.name}, {kind_of(model.family)}", expected="a decoder")  # fmt: skip
        parameters = sum(prod(spec.shape) for spec in model.logical.specs.values())
        asked = found["model_size"]
        size = mtk_contract.model_size(parameters, None if asked is None else str(asked))
        plain, mup, notes = folded(model, request) if found["fold_mup"] else (request, "as they are", ())
        steps = (Step(_GPTQ, self._calibrated(plain, found, ask)), Step(_MODEL, plain))
        facts = {"mup": mup, "parameters": parameters, "size": size, "multimodal": multimodal}
        agreed = {key: value for key, value in found.items() if key not in ("mtk_cloud_path", "gptq_path")}
        return Handing(Terms(chip, agreed, facts), steps, model, notes, memory=8 * parameters)

    def _calibrated(self, plain: Request, found: Mapping[str, object], ask: Ask) -> Request:
        """What makes the codes: calibration, or a copy of those that are there already."""
        if found["gptq_path"] is not None:
            path = Path(str(found["gptq_path"])).expanduser()
            bits = mtk_contract.quantize_config(read_json(path / "config.json", what="config.json"))["bits"]
            if bits != found["weight_bit"]:
                raise Refused("the GPTQ model has other bits than mtk_cloud is told, nothing was written",
                              where=str(path), expected=f"bits {found['weight_bit']}, as weight_bit says",
                              found=f"bits {bits}")  # fmt: skip
            return Request(path, _GPTQ, shard_size=plain.shard_size)
        told = {"bits": found["weight_bit"], **{key: found[key] for key in ("group_size", "nsamples", "seqlen")}}
        return replace(plain, format=_GPTQ, quantization_config=json.dumps(told), calibration=ask.calibration)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The repository, by ``mtk_cloud_path`` of the settings or by ``MTK_CLOUD_PATH``."""
        multimodal = terms is not None and bool(terms.facts["multimodal"])
        said = ask.settings.get("mtk_cloud_path")
        found = mtk_contract.repository(None if said is None else str(said), ask.environment, multimodal=multimodal)
        return Tool("mtk_cloud", {mtk_contract.VARIABLE: str(found.path)}, {"script": str(found.script)})

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write ``quantize_config.json``, and a script that sets the repository's variables and runs its own."""
        terms = handing.terms
        config = mtk_contract.quantize_config(read_json(work / _GPTQ / "config.json", what="config.json"))
        (work / _GPTQ / "quantize_config.json").write_text(f"{json.dumps(config, indent=2)}\n")
        mtk_contract.require_gptq(work / _GPTQ, int(str(terms.settings["weight_bit"])))
        here = work.resolve()
        told = mtk_contract.environment(
            terms.settings, platform=terms.platform, size=str(terms.facts["size"]),
            multimodal=bool(terms.facts["multimodal"]), model=here / _MODEL, gptq=here / _GPTQ, out=here / OUT,
            inherited=ask.environment,
        )  # fmt: skip
        exports = [f'export {name}="$PWD/{_PATHS[name]}"' if name in _PATHS else f"export {name}={shlex.quote(value)}"
                   for name, value in told.items()]  # fmt: skip
        script = mtk_contract.VLM if terms.facts["multimodal"] else mtk_contract.LLM
        write_script(
            work,
            "\n".join(exports)
            + f"""
began="$PWD/{_BEGAN}"
trap 'rm -f "$began"' EXIT
touch "$began"
cd -- "${{{mtk_contract.VARIABLE}:?says where mtk_cloud is}}"
bash {script}
beside=$(find . -name '*.tflite' -newer "$began")
if [[ -n $beside ]]; then
    printf 'mtk_cloud wrote beside the folder that it was given:\\n%s\\n' "$beside" >&2
    exit 1
fi""",
            self.install,
        )

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """The parts, by name and by what they hold; see `dconv.hw.mtk_contract.judge`."""
        parts = terms.settings["parts"]
        own = (NAME, LOG)
        return mtk_contract.judge(out, parts=None if parts is None else int(str(parts)), log=log, own=own)

    def adopt(self, folder: Path, ask: Ask) -> Terms | None:
        """A folder of .tflite files without a config.json is taken for one that mtk_cloud wrote."""
        if not folder.is_dir() or (folder / "config.json").exists() or not any(folder.glob("*.tflite")):
            return None
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        found = mtk_contract.settled(ask.settings, ask.where)
        return Terms(chip, {"parts": found["parts"]}, {})
