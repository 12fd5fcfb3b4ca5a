"""A real model from six Megatron shards to each format on three ranks, each run in its own runtime.

    bash scripts/quickstart.sh && python scripts/exports.py        work/quickstart/smollm2 is the model
    python scripts/exports.py MODEL --work DIR --only onnx         another one; some of the formats

MODEL goes to Megatron TP 3 x PP 2, and from there to every row of `ROWS` with ``--nproc 3``. A runtime gets what is
written and a prompt, and gives logits and a greedy text; transformers says the same of MODEL itself. No runtime knows
of dconv: this file imports none of it. Printed is a table in Markdown: the largest difference of a logit as a part of
the largest logit, how many greedy tokens are the same, and what is tolerated. Codes are judged against what they are
worth, decoded by dconv and run by transformers in fp32; what they cost is the column before. A runtime that is not
installed is a row that says so; exit code 1 where one is off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[1]
PROMPT: Final = "The three laws of thermodynamics say that"
NEW_TOKENS: Final = 24


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        runtime: one of `RUNTIMES`.
        tolerated: of a logit, as a part of the largest; None where nothing judges: what a graph's codes are worth is
            held by tests (``tests/formats/test_onnx_codes.py``), and MLX multiplies scales and codes in the scales'
            own dtype, so that its codes are judged with scales in fp32. llama.cpp rounds activations to 8 bits.
        against: dtype that transformers computes the reference in.
    """

    format: str
    options: tuple[str, ...]
    runtime: str
    tolerated: float | None
    against: str = "float32"


ROWS: Final = (
    Row("hf", (), "transformers", 1e-4),
    Row("gguf", ("--dtype", "f32"), "transformers-gguf", 1e-4),
    Row("gguf", ("--dtype", "bf16"), "transformers-gguf", 1e-4),
    Row("gguf", ("--dtype", "f16"), "transformers-gguf", 2e-2),
    Row("gguf", ("--quant", "q8_0"), "transformers-gguf", 1e-4),
    Row("gguf", ("--quant", "q4_0"), "transformers-gguf", 1e-4),
    Row("gguf", ("--dtype", "f32"), "llama.cpp", 1e-4),
    Row("gguf", ("--dtype", "bf16"), "llama.cpp", 2e-2),
    Row("gguf", ("--quant", "q8_0"), "llama.cpp", 2e-2),
    Row("gguf", ("--quant", "q4_0"), "llama.cpp", 2e-2),
    Row("onnx", ("--dtype", "f32"), "onnxruntime", 1e-4),
    Row("onnx", ("--dtype", "f16"), "onnxruntime", 2e-2),
    Row("onnx", ("--dtype", "f32"), "onnxruntime-genai", 1e-4),
    Row("onnx", ("--dtype", "f32", "--quant", "int4"), "onnxruntime-genai", None),
    Row("torch_export", ("--dtype", "f32"), "torch.export", 1e-4),
    Row("torch_export", ("--dtype", "bf16"), "torch.export", 2e-2, "bfloat16"),
    Row("torchscript", ("--dtype", "f32"), "torch.jit", 1e-4),
    Row("torchscript", ("--dtype", "bf16"), "torch.jit", 2e-2, "bfloat16"),
    Row("mlx", ("--dtype", "f32"), "mlx-lm", 1e-4),
    Row("mlx", ("--dtype", "bf16"), "mlx-lm", 2e-2, "bfloat16"),
    Row("mlx", ("--quant", "4bit", "--dtype", "f32"), "mlx-lm", 1e-4),
    Row("mlx", ("--quant", "4bit"), "mlx-lm", None),
)

#: Of a path, the prompt's tokens and how many to add: fp32 logits [tokens, vocabulary], and what was added.
Said = tuple[np.ndarray, list[int]]
Runtime = Callable[[Path, list[int], int], Said]


def greedily(step: Callable[[list[int], int], np.ndarray], tokens: list[int], count: int) -> Said:
    """The loop of a runtime that has none: ``step`` takes new tokens and how many it was given before."""
    logits = step(tokens, 0)
    made = [int(logits[-1].argmax())]
    while len(made) < count:
        made.append(int(step(made[-1:], len(tokens) + len(made) - 1)[-1].argmax()))
    return logits, made


def transformers_of(path: Path, tokens: list[int], count: int, dtype: str = "float32", **load: Any) -> Said:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **load).eval()
    given = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(given).logits[0].float().numpy()
        # one token at a time, as every runtime here: a model's own stop tokens are not heeded
        made = model.generate(given, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return logits, made[0, len(tokens) :].tolist()


def of_gguf(path: Path, tokens: list[int], count: int) -> Said:
    (file,) = path.glob("*.gguf")
    return transformers_of(path, tokens, count, gguf_file=file.name)


def of_llama_cpp(path: Path, tokens: list[int], count: int) -> Said:
    """Log-probabilities of what follows the prompt, [1, vocabulary]: all that this package's server says."""
    from gguf import GGUFReader

    xllamacpp: Any = import_module("xllamacpp")  # it has no types

    (file,) = path.glob("*.gguf")
    vocabulary = len(GGUFReader(file).fields["tokenizer.ggml.tokens"].data)
    params: Any = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server: Any = xllamacpp.Server(params)
    said = {"prompt": tokens, "max_tokens": count, "temperature": 0, "logprobs": vocabulary, "ignore_eos": True}
    (choice,) = server.handle_completions(said)["choices"]
    content = choice["logprobs"]["content"]
    found = np.full((1, vocabulary), np.nan, np.float32)
    for token in content[0]["top_logprobs"]:
        found[0, token["id"]] = token["logprob"]
    return found, [token["id"] for token in content]


def of_onnxruntime(path: Path, tokens: list[int], count: int) -> Said:
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    cache = {}
    for one in session.get_inputs():
        if one.name.startswith("past_key_values."):
            kind = np.float16 if "float16" in one.type else np.float32
            cache[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), kind)

    def step(new: list[int], past: int) -> np.ndarray:
        given = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, past + len(new)), np.int64),
            "position_ids": np.arange(past, past + len(new), dtype=np.int64)[None],
        }
        found: dict[str, Any] = dict(zip(names, session.run(None, given | cache), strict=True))
        for name in cache:
            cache[name] = found[name.replace("past_key_values", "present")]
        return found["logits"][0].astype(np.float32)

    return greedily(step, tokens, count)


def of_genai(path: Path, tokens: list[int], count: int) -> Said:
    genai: Any = import_module("onnxruntime_genai")
    model = genai.Model(str(path))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(tokens) + count, min_length=len(tokens) + count)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(tokens, np.int32))
    logits = None
    while not generator.is_done():
        generator.generate_next_token()
        if logits is None:
            logits = np.array(generator.get_output("logits"), np.float32)[0]
    assert logits is not None
    return logits, [int(token) for token in generator.get_sequence(0)[len(tokens) :]]


def _of_torch(call: Callable[..., Any], ports: dict[str, Any], tokens: list[int], count: int) -> Said:
    import torch

    dtype = getattr(torch, ports["outputs"][0]["dtype"])
    shapes = [port["axes"] for port in ports["inputs"] if port["name"].startswith("past_key_values.")]
    cache = [torch.zeros(1, axes[1], 0, axes[3], dtype=dtype) for axes in shapes]

    def step(new: list[int], past: int) -> np.ndarray:
        mask, places = torch.ones(1, past + len(new), dtype=torch.long), torch.arange(past, past + len(new))[None]
        with torch.no_grad():
            logits, *cache[:] = call(torch.tensor([new]), mask, places, *cache)
        return logits[0].float().numpy()

    return greedily(step, tokens, count)


def of_torch_export(path: Path, tokens: list[int], count: int) -> Said:
    import torch

    extra: dict[str, Any] = {"ports.json": ""}
    call = torch.export.load(str(path / "model.pt2"), extra_files=extra).module()
    return _of_torch(call, json.loads(extra["ports.json"]), tokens, count)


def of_torchscript(path: Path, tokens: list[int], count: int) -> Said:
    import torch

    extra: dict[str, Any] = {"ports.json": ""}
    call = torch.jit.load(str(path / "model.pt"), _extra_files=extra)
    return _of_torch(call, json.loads(extra["ports.json"]), tokens, count)


def of_mlx(path: Path, tokens: list[int], count: int) -> Said:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model, _ = load_model(path, strict=True)
    cache = make_prompt_cache(model)
    return greedily(lambda new, _: np.array(model(mx.array([new]), cache=cache)[0].astype(mx.float32)), tokens, count)


@dataclass(frozen=True)
class Place:
    """How a runtime is run: in an environment of ``.venvs``, or in this interpreter where it has ``module``."""

    run: Runtime
    module: str
    environment: str = ""

    def python(self) -> Path | None:
        own = ROOT / ".venvs" / self.environment / "bin" / "python"
        if self.environment and own.exists():
            return own
        return Path(sys.executable) if find_spec(self.module) else None


RUNTIMES: Final = {
    "transformers": Place(transformers_of, "transformers"),
    "transformers-gguf": Place(of_gguf, "gguf"),
    "llama.cpp": Place(of_llama_cpp, "xllamacpp"),
    "onnxruntime": Place(of_onnxruntime, "onnxruntime"),
    "onnxruntime-genai": Place(of_genai, "onnxruntime_genai", "genai"),
    "torch.export": Place(of_torch_export, "torch"),
    "torch.jit": Place(of_torchscript, "torch"),
    "mlx-lm": Place(of_mlx, "mlx_lm", "mlx"),
}


def asked(runtime: str, path: Path, tokens: list[int], **options: Any) -> Said | str:
    """What a runtime says, in a process of its own; a string says why it could not be asked."""
    python = RUNTIMES[runtime].python()
    if python is None:
        return f"{RUNTIMES[runtime].module} is not installed"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "said.npz")
        job = {"runtime": runtime, "path": str(path), "tokens": tokens, "options": options, "out": str(out)}
        done = subprocess.run([python, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
        if done.returncode:
            return f"failed: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:200]}"
        found = np.load(out)
        return found["logits"], found["made"].tolist()


def logarithms(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def apart(found: Said, reference: Said) -> float:
    """The largest difference of a logit; of log-probabilities where a runtime gives no more."""
    expected = reference[0] if len(found[0]) > 1 else logarithms(reference[0][-1:])
    return float(np.abs(found[0] - expected).max() / np.abs(expected).max())


def decoding(out: Path) -> Path:
    """What a quantised output is worth, in fp32, in a folder beside it."""
    plain = out.with_name(f"{out.name}-decoded")
    source = next(iter(out.glob("*.gguf")), out)
    convert(str(source), "hf", "--dtype", "f32", "-o", str(plain), "--overwrite")
    return plain


def convert(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "dconv", "convert", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dconv convert {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "work" / "quickstart" / "smollm2")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "exports")
    parser.add_argument("--only", action="append", help="formats; all without it")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        logits, made = RUNTIMES[job["runtime"]].run(Path(job["path"]), job["tokens"], NEW_TOKENS, **job["options"])
        np.savez(job["out"], logits=logits, made=np.array(made))
        return
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(args.model)(PROMPT)["input_ids"]
    args.work.mkdir(parents=True, exist_ok=True)
    shards = args.work / "megatron"
    convert(str(args.model), "megatron", "--tp", "3", "--pp", "2", "-o", str(shards), "--overwrite", "--nproc", "3")
    references = {kind: asked("transformers", args.model, tokens, dtype=kind) for kind in ("float32", "bfloat16")}
    print(
        "| FORMAT | runtime | logits off by | codes, off by what they are worth | tolerated | greedy tokens | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    fine = True
    for row in ROWS:
        if args.only and row.format not in args.only:
            continue
        out = args.work / "-".join([row.format, *(word.strip("-") for word in row.options)])
        said = convert(str(shards), row.format, *row.options, "-o", str(out), "--overwrite", "--nproc", "3")
        found, reference = asked(row.runtime, out, tokens), references[row.against]
        assert not isinstance(reference, str), reference
        cells = [" ".join([row.format, *row.options]), row.runtime]
        if isinstance(found, str):
            fine &= "not installed" in found
            cells += [found, "", "", "", f"{said['seconds']:.1f}"]
        else:
            far, worth = apart(found, reference), ""
            same = next((i for i, (a, b) in enumerate(zip(found[1], reference[1], strict=True)) if a != b), NEW_TOKENS)
            judged = far
            if "--quant" in row.options and row.tolerated is not None:
                decoded = asked("transformers", decoding(out), tokens, dtype="float32")
                assert not isinstance(decoded, str), decoded
                judged = apart(found, decoded)
                worth = f"{judged:.2g}"
            fine &= row.tolerated is None or judged <= row.tolerated
            tolerated = "shown only" if row.tolerated is None else f"{row.tolerated:g}"
            cells += [f"{far:.2g}", worth, tolerated, f"{same} of {NEW_TOKENS}", f"{said['seconds']:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        shutil.rmtree(out)
    if not fine:
        raise SystemExit("a runtime is off")


if __name__ == "__main__":
    main()
