"""Load what dconv's calibrated quantisation writes with the programs that it is for, and compare logits with ours.

    python scripts/gptq_oracles.py                     on small models that are made up
    python scripts/gptq_oracles.py --model DIR         on a model of yours instead
    python scripts/gptq_oracles.py --kind awq          these kinds alone (what their names begin with)

GPTQModel (its torch kernels) and AutoGPTQ run in the environments that ``scripts/gptq_env.sh`` makes; transformers with
compressed-tensors in the one that runs this. Each computes in fp16 on a CPU. Its logits are held against transformers'
in fp32 on the weights that dconv itself decodes (``dconv convert OUT hf --dtype f32``): the largest difference by the
largest logit, the first number of a cell. The second is what rounding alone makes of it: the same decoded weights, run
by transformers in fp16 (bf16 rounds eight times as far). The bound of the first is `ROOM` times the second. A zero
point off by one, or columns in another order, are off by tens of percents.

Prints a table of the two for each kind; exits with 1 where a model is beyond its bound, or does not load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

ROOT: Final = Path(__file__).resolve().parent.parent
#: How many times the noise of rounding an answer may be off: what is rounded, and which sums are in order, differ.
ROOM: Final = 3.0
#: Of calibration, and tokens of each; one more is what logits are computed for.
SAMPLES: Final = 16
TOKENS: Final = 64


@dataclass(frozen=True)
class Kind:
    """One way to quantise.

    Attributes:
        oracles: who loads it.
        refusing: words of an oracle that by its own rules does not; of a mixture alone where "experts" is behind it.
    """

    format: str
    quant: str
    settings: Mapping[str, Any]
    oracles: tuple[str, ...]
    refusing: Mapping[str, str] = field(default_factory=dict)


_GPTQ: Final = ("GPTQModel", "AutoGPTQ")
_PACKED: Final = ("transformers",)
#: transformers 5.23 decodes no experts with zero points (`dconv.coded.compressed_packed_encode.Packed.note`).
_NO_EXPERTS: Final = {"transformers, experts": "automatic conversion"}
#: GPTQModel takes zero points in the first format from its own writer alone (`dconv.coded.gptq_encode.GPTQ.note`).
_V1_ZEROS: Final = {"GPTQModel": "sym=False"}
KINDS: Final[dict[str, Kind]] = {
    "gptq, symmetric": Kind("gptq", "gptq", {}, _GPTQ),
    "gptq, desc_act": Kind("gptq", "gptq", {"desc_act": True}, _GPTQ),
    "gptq, zero points": Kind("gptq", "gptq", {"sym": False}, _GPTQ, _V1_ZEROS),
    "gptq, zero points, desc_act": Kind("gptq", "gptq", {"sym": False, "desc_act": True}, _GPTQ, _V1_ZEROS),
    "gptq, 8 bits": Kind("gptq", "gptq", {"bits": 8}, _GPTQ),
    "gptq, 3 bits": Kind("gptq", "gptq", {"bits": 3}, _GPTQ),
    "gptq, 2 bits": Kind("gptq", "gptq", {"bits": 2}, _GPTQ),
    "gptq, whole rows": Kind("gptq", "gptq", {"group_size": -1}, _GPTQ),
    "gptq_v2, symmetric": Kind("gptq", "gptq_v2", {}, _GPTQ[:1]),
    "gptq_v2, zero points": Kind("gptq", "gptq_v2", {"sym": False}, _GPTQ[:1]),
    "gptq_v2, zero points, desc_act": Kind("gptq", "gptq_v2", {"sym": False, "desc_act": True}, _GPTQ[:1]),
    "gptq_v2, zero points, 3 bits": Kind("gptq", "gptq_v2", {"sym": False, "bits": 3}, _GPTQ[:1]),
    "awq": Kind("awq", "awq", {}, _GPTQ[:1]),
    "pack-quantized, symmetric": Kind("gptq", "pack-quantized", {}, _PACKED),
    "pack-quantized, zero points": Kind("gptq", "pack-quantized", {"sym": False}, _PACKED, _NO_EXPERTS),
    "pack-quantized, 8 bits": Kind("gptq", "pack-quantized", {"bits": 8}, _PACKED),
}
#: Without TORCHDYNAMO_DISABLE GPTQModel compiles every layer, for minutes.
_ENVIRONMENT: Final = {
    "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip
#: Who loads the small mixtures. GPTQModel 7.7.0 looks for Mixtral's experts under the names of transformers 5
#: (mlp.experts.*.gate_proj), which no published checkpoint and not vLLM has; AutoGPTQ has no Qwen2-MoE.
_MIXTURES: Final = {"mixtral": ("AutoGPTQ", "transformers"), "qwen2_moe": ("GPTQModel", "transformers")}


def loaded(oracle: str, folder: Path) -> Any:
    """A model as the oracle loads it, on the CPU in fp16; runs in the oracle's environment."""
    import torch

    said = json.loads((folder / "config.json").read_text())
    if oracle == "GPTQModel":
        from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]  # its own environment has it

        method = said["quantization_config"]["quant_method"]
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.TORCH
        return GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    if oracle == "AutoGPTQ":
        from auto_gptq import AutoGPTQForCausalLM  # pyright: ignore[reportMissingImports]

        told: dict[str, Any] = {"device": "cpu", "use_triton": False, "torch_dtype": torch.float16}
        plain: Any = {"disable_exllama": True, "disable_exllamav2": True}
        model = AutoGPTQForCausalLM.from_quantized(str(folder), **told, **plain).model
        if said["tie_word_embeddings"]:
            from safetensors.torch import load_file

            # of two that are one it fills neither
            model.get_input_embeddings().weight.data.copy_(
                load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
            )
        return model
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if "quantization_config" not in said:  # our own decoding
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, oracle))
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **more)


def answer(oracle: str, ids: list[int], out: Path, folders: list[Path]) -> None:
    """Every folder's logits, or the words of its failure, into ``out``: what runs in the oracle's environment."""
    import torch

    for at, folder in enumerate(folders):
        try:
            with torch.no_grad():
                logits = loaded(oracle, folder).eval()(torch.tensor([ids]), use_cache=False).logits
            torch.save(logits.float(), out / f"{at}.pt")
        except Exception as error:  # whatever a program raises about one directory is its answer
            (out / f"{at}.txt").write_text(f"{type(error).__name__}: {error}"[:2000])


def small_models(folder: Path) -> list[Path]:
    """A Llama with one embedding and an unusual rotary base, a Mixtral and a Qwen2-MoE, of random weights.

    Every expert takes part in every token: a router's choice between two that are close would turn on a rounding.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    shape: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "pad_token_id": None,
    }  # fmt: skip
    mixtral = {"num_local_experts": 4, "num_experts_per_tok": 4}
    qwen = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128}  # fmt: skip
    wanted: dict[str, dict[str, Any]] = {"llama": {"tie_word_embeddings": True}, "mixtral": mixtral, "qwen2_moe": qwen}
    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(512)}, unk_token="w0"))  # noqa: S106
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")  # noqa: S106
    for name, more in wanted.items():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **shape, **more))
        torch.manual_seed(0)
        for value in model.parameters():
            if value.dim() > 1:
                value.data.normal_(0, 1.5 * value.shape[-1] ** -0.5)
        model.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)  # GPTQModel loads nothing without one
    return [folder / name for name in wanted]


def dense(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-dense")


def quantised(model: Path, work: Path, kinds: Mapping[str, Kind], samples: Path) -> dict[str, Path]:
    """The model quantised in every way, each beside our own decoding of it to fp32 (`dense`)."""
    import dconv

    found = {}
    for name, kind in kinds.items():
        found[name] = out = work / f"{model.name}-{name.replace(',', '').replace(' ', '-')}"
        both = {"bits": 4, "group_size": 32, "nsamples": SAMPLES, "seqlen": TOKENS} | dict(kind.settings)
        told = {"calibration": samples, "quantization_config": json.dumps(both), "quant": kind.quant}
        dconv.convert(model, kind.format, out, **told)
        dconv.convert(out, "hf", dense(out), dtype="f32")
    return found


def answers(oracle: str, python: str | Path, folders: list[Path], ids: list[int], out: Path) -> list[Any]:
    """Logits in fp32 by folder, or words."""
    import torch

    out.mkdir()
    command = [str(python), __file__, "--answer", oracle, json.dumps(ids), str(out), *map(str, folders)]
    done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{oracle}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    files = [next(out.glob(f"{at}.*")) for at in range(len(folders))]
    return [torch.load(file) if file.suffix == ".pt" else file.read_text() for file in files]


@dataclass(frozen=True)
class Line:
    """What one oracle makes of one directory.

    Attributes:
        error: of the largest logit, a part of it; words where it is not loaded.
        noise: what rounding alone makes of it.
    """

    model: str
    kind: str
    oracle: str
    error: float | str
    noise: float
    right: bool

    @property
    def words(self) -> str:
        """Of a table."""
        if isinstance(self.error, str):
            return "refuses" if self.right else f"**fails**: {self.error:.120}".replace("\n", " ")
        return f"{self.error:.4f} / {self.noise:.4f}{'' if self.right else ' **beyond**'}"


def table(found: list[Line]) -> list[str]:
    """Markdown: for every kind and program, the error and that of rounding alone."""
    places = list(dict.fromkeys((line.model, line.oracle) for line in found))
    cells = {(line.kind, line.model, line.oracle): line.words for line in found}
    said = [f"| | {' | '.join(f'{model}, {oracle}' for model, oracle in places)} |", "|---" * (len(places) + 1) + "|"]
    for kind in dict.fromkeys(line.kind for line in found):
        said.append(f"| {kind} | {' | '.join(cells.get((kind, *place), '') for place in places)} |")
    return said


def lines(model: Path, work: Path, kinds: Mapping[str, Kind], venvs: Path) -> Iterator[Line]:
    """What every oracle makes of every kind of one model."""
    draw = random.Random(0)  # noqa: S311
    rows = [[draw.randrange(512) for _ in range(TOKENS)] for _ in range(SAMPLES + 1)]
    samples, ids = work / "samples.jsonl", rows.pop()
    samples.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    pythons = {"GPTQModel": venvs / "gptqmodel/bin/python", "AutoGPTQ": venvs / "autogptq/bin/python"}
    experts = any("experts" in key for key in json.loads((model / "config.json").read_text()))
    folders = quantised(model, work, kinds, samples)

    def ask(oracle: str, names: list[str], of: Callable[[Path], Path] = Path) -> dict[str, Any]:
        python = pythons.get(oracle, sys.executable)
        out = work / f"{model.name}-{oracle}"
        return dict(zip(names, answers(oracle, python, [of(folders[name]) for name in names], ids, out), strict=True))

    def off(found: torch.Tensor, name: str) -> float:
        return ((found - ours[name]).abs().max() / ours[name].abs().max()).item()

    ours = ask("float32", list(kinds), dense)
    noise = {name: off(found, name) for name, found in ask("float16", list(kinds), dense).items()}
    for oracle in ("GPTQModel", "AutoGPTQ", "transformers"):
        names = [name for name, kind in kinds.items() if oracle in kind.oracles]
        if not names or oracle not in _MIXTURES.get(model.name, (oracle,)):
            continue
        for name, found in ask(oracle, names).items():
            if isinstance(found, str):
                rules = [
                    kinds[name].refusing.get(key) for key in (oracle, *([f"{oracle}, experts"] if experts else []))
                ]
                expected = any(rule and rule in found for rule in rules)
                yield Line(model.name, name, oracle, found, 0.0, expected)
            else:
                error = off(found, name)
                yield Line(model.name, name, oracle, error, noise[name], error <= ROOM * noise[name])


def main() -> None:
    if sys.argv[1:2] == ["--answer"]:
        oracle, ids, out, *folders = sys.argv[2:]
        return answer(oracle, json.loads(ids), Path(out), [Path(folder) for folder in folders])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="a directory; may be given again")
    parser.add_argument("--kind", action="append", help="what names of kinds begin with; may be given again")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs", help="what gptq_env.sh made")
    args = parser.parse_args()
    kinds = {name: kind for name, kind in KINDS.items() if name.startswith(tuple(args.kind or [""]))}
    os.environ["TQDM_DISABLE"] = "1"
    found: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="gptq-oracles-") as folder:
        for model in args.model or small_models(Path(folder)):
            for line in lines(model, Path(folder), kinds, args.venvs):
                print(f"{line.model}, {line.kind}, {line.oracle}: {line.words}", file=sys.stderr, flush=True)
                found.append(line)
    print("\n".join(table(found)))
    raise SystemExit(0 if all(line.right for line in found) else 1)


if __name__ == "__main__":
    main()
