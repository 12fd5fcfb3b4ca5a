"""Axera: a HuggingFace directory becomes an .axmodel a layer by ``pulsar2 llm_build2``, in its docker image or on PATH.

Sources: pulsar2-docs ``source/appendix/build_llm.md`` for the command, the files and the lines of success; AXERA-TECH
ax-llm for what its runtime opens: layers, the output layer, and the embedding as bf16 rows.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

from dconv.arch.layouts import size
from dconv.checkpoint import safetensors
from dconv.describe import Described
from dconv.errors import Damaged, Refused, ToolMissing, UsageError, VerifyFailed
from dconv.export.prompt import kind_of
from dconv.hw import settings
from dconv.hw.driver import write_script
from dconv.hw.mup import folded
from dconv.hw.target import OUT, Ask, Handing, Step, Takes, Terms, Tool
from dconv.request import Request

_TAKES: Final = Takes(("decoder",))
_ROLE: Final = "hf"
#: Names the image where there is more than one; compile.sh asks for it, too.
IMAGE: Final = "PULSAR2_IMAGE"
_WEIGHTS: Final = ("s8", "s4", "fp8_e5m2", "fp8_e4m3", "fp16", "bf16", "fp32")
EMBEDDING: Final = "model.embed_tokens.weight.bfloat16.bin"
#: What the compiler says when it is done, and when it has compared the layers with its own reference.
_DONE: Final = ("build llm model done!", "check llm model done!")
_LAYER: Final = re.compile(r".*_p\d+_l(\d+)_together\.axmodel")
#: pulsar2 in an answer to ``docker image ls``: repository:tag.
_PULSAR: Final = re.compile(r"^\S*pulsar2\S*:(\S+)$", re.MULTILINE)
_ASKING: Final = 60.0
#: The end of the embedding's name in a HuggingFace directory.
_TABLE: Final = "embed_tokens.weight"
_PART: Final = 1 << 24


@dataclass(frozen=True)
class Axera:
    """The adapter."""

    title: str = "Axera Pulsar2"
    install: str = (
        "docker load -i ax_pulsar2_<version>.tar.gz, the vendor's image (32 GB of memory and more);\n"
        f"{IMAGE}=NAME:TAG names it, or run inside of it, where pulsar2 is on PATH"
    )

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips with what each is sold as, and the types of weights that pulsar2 has."""
        known = {"AX650": "AX650A, AX650N, AX8850", "AX620E": "AX630C and its kin"}
        return {chip: f"{those}; weights {', '.join(_WEIGHTS)}" for chip, those in known.items()}

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Decoders, as HuggingFace has them."""
        return (_TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """Decoders alone, with an embedding in bf16; settings are pulsar2's own options, by their names."""
        kind = kind_of(model.family)
        if kind not in _TAKES.kinds:
            raise Refused("Pulsar2's llm_build2 takes language models, nothing was written",
                          found=f"{model.family.name}, {kind}", expected="a decoder")  # fmt: skip
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        known = {
            "weight_type": settings.among("s8", *_WEIGHTS),
            "post_weight_type": settings.among("bf16", *_WEIGHTS),
            "hidden_state_type": settings.among("bf16", "bf16", "fp16", "fp32"),
            "max_context": settings.whole(1024, 128, 1 << 17),
            "prefill_len": settings.whole(512, 128, 1 << 16),
            "prefill_step_size": settings.whole(128, 1, 1 << 12),
            "parallel": settings.whole(8, 1, 256),
            "tensor_parallel_size": settings.whole(0, 0, 16),
            "check": settings.among(1, 0, 1, 2),
        }
        settings.require_of_use(ask, self.title, "--calibration", "--task", "--toolchain-python")
        given = settings.asked(ask, "weight_type", known["weight_type"])
        found = settings.settled(given, known, ask.where)
        if int(str(found["prefill_len"])) > int(str(found["max_context"])):
            raise Refused("a prompt is no longer than the context, nothing was written", where=ask.where,
                          expected=f"prefill_len up to max_context {found['max_context']}",
                          found=str(found["prefill_len"]))  # fmt: skip
        if request.dtype not in (None, "bf16"):
            raise UsageError("the runtime opens an embedding in bf16, nothing was written", where="--dtype",
                             expected="bf16", found=str(request.dtype), do="leave it out")  # fmt: skip
        step, mup, notes = folded(model, replace(request, dtype="bf16"))
        vocabulary, hidden = size(model.facts, "vocab"), size(model.facts, "hidden")
        facts = {"layers": size(model.facts, "layers"), "mup": mup, "vocabulary": vocabulary, "hidden": hidden}
        weights = sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, found, facts), (Step(_ROLE, step),), model, notes, memory=8 * weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """pulsar2 on PATH, else its one docker image, or the one that ``PULSAR2_IMAGE`` names."""
        path = ask.environment.get("PATH")
        here = shutil.which("pulsar2", path=path)
        if here is not None:
            return Tool("pulsar2", {}, {"path": here})
        docker = shutil.which("docker", path=path)
        lacks = "neither pulsar2 nor docker is on PATH"
        if docker is not None:
            images = self._images(docker, ask)
            named = ask.environment.get(IMAGE)
            found = [name for name in images if named in (None, name)]
            if len(found) == 1:
                return Tool(f"pulsar2 ({found[0]})", {IMAGE: found[0]}, {"docker": docker, "image": found[0]})
            lacks = f"docker has {', '.join(images) or 'no image of pulsar2'}"
            if named is not None or len(images) > 1:
                lacks += f"; {IMAGE} is {named or 'not set'}"
        raise ToolMissing("Axera's compiler is not here, nothing was written", found=lacks,
                          do=f"{self.install}\n--bundle writes what it compiles, for where it is")  # fmt: skip

    def _images(self, docker: str, ask: Ask) -> list[str]:
        try:
            done = subprocess.run(
                [docker, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], capture_output=True, text=True,
                timeout=_ASKING, env={**ask.environment}, stdin=subprocess.DEVNULL, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as fault:
            raise ToolMissing("docker does not answer, nothing was written", where=docker, found=str(fault)[:300],
                              do=self.install) from fault  # fmt: skip
        return [found[0] for found in _PULSAR.finditer(done.stdout)]

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write ``compile.sh`` and the embedding's rows in bf16, which the runtime opens beside the layers."""
        found = handing.terms.settings
        words = [
            "pulsar2", "llm_build2", "--input_path", _ROLE, "--output_path", OUT,
            "--chip", handing.terms.platform, "--hidden_state_type", str(found["hidden_state_type"]),
            "--max_context", str(found["max_context"]), "--prefill_len", str(found["prefill_len"]),
            "--prefill_step_size", str(found["prefill_step_size"]), "--parallel", str(found["parallel"]),
            "-w", str(found["weight_type"]), "--post_weight_type", str(found["post_weight_type"]),
            "-c", str(found["check"]),
        ]  # fmt: skip
        if found["tensor_parallel_size"]:
            words += ["--tensor_parallel_size", str(found["tensor_parallel_size"])]
        command = shlex.join(words)
        write_script(
            work,
            f"""export FLOAT_MATMUL_USE_CONV_EU=1
if command -v pulsar2 >/dev/null; then
    {command}
else
    docker run --rm --env FLOAT_MATMUL_USE_CONV_EU -v "$PWD:/data" -w /data "${{{IMAGE}:?names the docker image}}" \\
        {command}
fi
cp {EMBEDDING} {OUT}/
for file in config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model; do
    if [[ -f {_ROLE}/$file ]]; then
        cp "{_ROLE}/$file" {OUT}/
    fi
done""",
            self.install,
        )
        _write_embedding(work / _ROLE, work / EMBEDDING)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """pulsar2's words of success, a file for each layer, one output layer, and an embedding of the right size."""
        wanted = _DONE if terms.settings["check"] else _DONE[:1]
        if silent := [line for line in wanted if line not in log]:
            raise VerifyFailed("pulsar2 ended well without a word of it", expected="\n".join(silent))
        files = {path.name: path.stat().st_size for path in sorted(out.glob("*.axmodel"))}
        layers = sorted(int(found[1]) for name in files if (found := _LAYER.fullmatch(name)))
        posts = [name for name in files if name.endswith("_post.axmodel")]
        expected = int(str(terms.facts["layers"]))
        if layers != list(range(expected)) or len(posts) != 1:
            raise VerifyFailed("parts of the model are missing", expected=f"{expected} layers and an output layer",
                               found=f"layers {layers}, {', '.join(posts) or 'no output layer'}")  # fmt: skip
        if empty := [name for name, nbytes in files.items() if not nbytes]:
            raise VerifyFailed("parts of the model are empty", found=", ".join(empty))
        rows = 2 * int(str(terms.facts["vocabulary"])) * int(str(terms.facts["hidden"]))
        if not (out / EMBEDDING).is_file() or (out / EMBEDDING).stat().st_size != rows:
            raise VerifyFailed("the embedding is not whole", where=EMBEDDING, expected=f"{rows:,} bytes")
        return {"layers": expected, "bytes": sum(files.values()), "said": list(wanted)}


def _write_embedding(folder: Path, path: Path) -> None:
    """Write the rows of the embedding, as they lie in the checkpoint, which is bf16.

    Raises:
        Refused: the checkpoint calls its embedding otherwise.
        Damaged: its file ends before the rows do.
    """
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in safetensors.read_header(file).items():
            if name.endswith(_TABLE):
                (extent,) = stored.extents
                with file.open("rb") as source, path.open("wb") as target:
                    source.seek(extent.offset)
                    left = stored.spec.nbytes
                    while left:
                        part = source.read(min(left, _PART))
                        if not part:
                            raise Damaged("the embedding is cut short", where=str(file), found=f"{left:,} bytes fewer")
                        target.write(part)
                        left -= len(part)
                return
    raise Refused("there is no embedding by this name, nothing was written", where=str(folder), expected=_TABLE)


ADAPTER: Final = Axera()
