"""A real model from Megatron shards to hardware compilers; what they wrote is held against what transformers says.

    bash scripts/quickstart.sh && bash scripts/toolchains.sh rknn qnn litert && python scripts/handoffs.py
    python scripts/handoffs.py MODEL --work DIR --layers 4 --only "qnn SM8750"      another one; some of the rows

The first ``--layers`` of MODEL (0: all) go to Megatron, and from there by ``dconv convert`` to every row of `ROWS`.
A compiler that is public compiles, and what can be run of it is run: RKNN's simulator, LiteRT on the CPU. Qualcomm's
binaries run on no CPU: what they say of themselves is read, and the graph that they are compiled of is run. For the
others a bundle is compiled in another folder by a stand-in (``tests/hw/stand_ins``), which insists on its vendor's
contract, and the checkpoint in it is run. Printed is a table in Markdown. A row whose toolchain is not here says so;
exit code 1 where one is off.

To add a row: a line of `ROWS`, and where it is shown in a new way, a function of `SHOWN`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[1]
PROMPT: Final = "The laws of thermodynamics say that energy is conserved, entropy grows, nothing gets as cold as it can"
#: Of the text that every graph takes.
TOKENS: Final = 16


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        shown: one of `SHOWN`.
        allowed: `SAME`, `HALF` or `CODES`, where the reasons are.
        toolchain: of ``scripts/toolchains.sh``; of ``tests.hw.stand_ins`` for a bundle.
        parts: of a bundle: patterns of files, and how many of them ``compile.sh`` writes; 0 is one a layer.
    """

    target: str
    chip: str
    settings: Mapping[str, Any]
    shown: str
    allowed: float
    toolchain: str
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        said = [str(value) for key, value in self.settings.items() if key in ("toolkit", "dtype", "weight_type")]
        past = self.settings.get("past")
        return " ".join([self.target, self.chip, *said, *([f"past{past}"] if past else [])])


#: Largest difference of a logit as a part of the largest logit, for what computes as transformers does:
#: in fp32, in another order of sums; in half precision, as the NPU does (11 bits, over layers and sums of 1536).
SAME: Final = 1e-4
HALF: Final = 2e-2
#: 1 - correlation of logits, for codes of 4 and 8 bits: it judges a path and not a precision. A matrix that is
#: transposed, swapped or scaled wrongly leaves none; another text of the same model has what is printed beside it.
CODES: Final = 0.1

_GRAPH: Final = {"sequence": TOKENS}
#: What the repository is told, and few samples for the codes that it takes.
_CLOUD: Final = {"model_size": "0_5B", "group_size": 64, "nsamples": 4, "seqlen": 32}
_STEP: Final = {"sequence": 1, "past": TOKENS - 1}
ROWS: Final = (
    Row("rk", "RK3588", {"toolkit": "rknn", "dtype": "fp16", **_GRAPH}, "simulator", HALF, "rknn"),
    Row("rk", "RK3588", {"toolkit": "rknn", "dtype": "fp16", **_STEP}, "simulator", HALF, "rknn"),
    Row("rk", "RK3588", {"toolkit": "rknn", "dtype": "w8a8", **_GRAPH}, "simulator", CODES, "rknn"),
    Row("rk", "RK3576", {"toolkit": "rknn", "dtype": "w4a16", **_GRAPH}, "simulator", CODES, "rknn"),
    Row("qnn", "SM8750", {"dtype": "fp16", **_GRAPH}, "binary", SAME, "qnn"),
    Row("qnn", "SM8750", {"dtype": "fp16", **_STEP}, "binary", SAME, "qnn"),
    Row("qnn", "SM8750", {"dtype": "w8a16", **_GRAPH}, "binary", SAME, "qnn"),
    Row("qnn", "SM8650", {"dtype": "fp16", **_GRAPH}, "binary", SAME, "qnn"),
    Row("qnn", "SM8650", {"dtype": "w8a16", **_GRAPH}, "binary", SAME, "qnn"),
    Row("mtk", "MT6991", {"toolkit": "litert", "aot": False, **_GRAPH}, "litert", SAME, "litert"),
    Row("rk", "RK3588", {"toolkit": "rkllm", "dtype": "w8a8"}, "bundle", SAME, "rkllm", (("model.rkllm", 1),)),
    Row("rk", "RK3576", {"toolkit": "rkllm", "dtype": "w4a16_g32"}, "bundle", SAME, "rkllm", (("model.rkllm", 1),)),
    Row("mtk", "MT6991", _CLOUD, "bundle", SAME, "mtk_cloud", (("*.tflite", 2),)),
    Row("neuron", "trn2", {"tp_degree": 1, "seq_len": 128}, "bundle", SAME, "neuron",
        (("model.pt", 1), ("weights/tp*_sharded_checkpoint.safetensors", 1), ("neuron_config.json", 1))),
    Row(
        "ax", "AX650", {"weight_type": "s8"}, "bundle", SAME, "pulsar2",
        (("*_l*_together.axmodel", 0), ("*_post.axmodel", 1), ("model.embed_tokens.weight.bfloat16.bin", 1)),
    ),
)  # fmt: skip


class Failed(Exception):
    """A row that went wrong."""


class NotRun(Exception):
    """One that this machine, or this tree, cannot show."""


@dataclass(frozen=True)
class Shown:
    """What a row found.

    Attributes:
        written: artifact -> bytes.
        found: words, of which the number in ``off`` is judged.
    """

    written: Mapping[str, int]
    compared: str
    found: str
    off: float


@dataclass(frozen=True)
class Case:
    """What every row is shown on.

    Attributes:
        model: the HuggingFace directory that all began with.
        shards: the same as Megatron has it.
        tokens: of the text, [1, TOKENS]; ``other``: of another one.
    """

    model: Path
    shards: Path
    work: Path
    tokens: np.ndarray
    other: np.ndarray

    @property
    def layers(self) -> int:
        return int(json.loads((self.model / "config.json").read_text())["num_hidden_layers"])

    def out(self, row: Row, kind: str = "") -> Path:
        return self.work / "-".join([*row.name.split(), kind]).strip("-")

    def inputs(self, row: Row) -> dict[str, np.ndarray]:
        """Of a graph: the last ``sequence`` tokens, and transformers' own cache of those before."""
        past = int(row.settings.get("past", 0))
        new = self.tokens[:, past:]
        given = {"input_ids": new, "attention_mask": np.ones_like(self.tokens),
                 "position_ids": np.arange(past, past + new.shape[1], dtype=np.int64)[None]}  # fmt: skip
        if past:
            for number, layer in enumerate(asked(self.model, self.tokens[:, :past])[1]):
                for name, values in zip(("key", "value"), layer, strict=True):
                    given[f"past_key_values.{number}.{name}"] = values
        return given

    def expected(self, row: Row) -> np.ndarray:
        """transformers' logits of the tokens that a graph is asked, [1, sequence, vocabulary]."""
        return asked(self.model, self.tokens)[0][:, int(row.settings.get("past", 0)) :]


def asked(model: Path, tokens: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """transformers' logits in fp32, and keys and values of each layer."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(torch.from_numpy(tokens), use_cache=True)
    layers = [(layer.keys.numpy(), layer.values.numpy()) for layer in found.past_key_values.layers]
    return found.logits.numpy(), layers


def cut(model: Path, layers: int, out: Path) -> Path:
    """The first layers of a HuggingFace directory, as one of its own."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    if not 0 < layers < config["num_hidden_layers"]:
        return model
    kept = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                parts = name.split(".layers.")
                if len(parts) == 1 or int(parts[1].split(".")[0]) < layers:
                    kept[name] = file.get_tensor(name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in model.glob("tokenizer*"):
        shutil.copyfile(path, out / path.name)
    return out


def ran(what: str, command: list[str | Path], **environment: str) -> str:
    """What a command says, with this tree's dconv; raises Failed where it fails."""
    told = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=told)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "not a word").splitlines()[-1]
        raise Failed(f"{what}: exit code {done.returncode}: {last[:300]}")
    return done.stdout


def convert(*words: str | Path) -> dict[str, Any]:
    """What ``dconv convert … --json`` says; raises NotRun where there is no such FORMAT."""
    try:
        said = ran("dconv convert", [sys.executable, "-m", "dconv", "convert", *words, "--overwrite", "--json"])
    except Failed as fault:
        if "no format is called" not in str(fault):
            raise
        raise NotRun(f"there is no FORMAT {words[1]} here") from fault
    return json.loads(said.strip().splitlines()[-1])


def hand(case: Case, row: Row, kind: str = "", *options: str) -> tuple[Path, dict[str, Any]]:
    """A row's OUT, and its manifest."""
    out = case.out(row, kind)
    told = ["--platform", row.chip, "--quantization-config", json.dumps(row.settings), "-o", out]
    return out, convert(case.shards, row.target, *told, *options)


def drive(name: str, verb: str, folder: Path, job: Mapping[str, Any]) -> Path:
    """The folder that a driver wrote into, run by its toolchain."""
    (folder / f"{verb}.json").write_text(json.dumps(job))
    driver = ROOT / "dconv/hw/drivers" / f"{name}_driver.py"
    ran(driver.name, [ROOT / ".venvs" / name / "bin/python", driver, verb, folder / f"{verb}.json"], PYTHONPATH="")
    return folder / job["out"]


def listed(made: Mapping[str, Any], suffix: str) -> dict[str, int]:
    """Files of a manifest with their bytes."""
    return {name: one["bytes"] for name, one in made["files"].items() if name.endswith(suffix)}


def agreement(case: Case, row: Row, found: np.ndarray) -> tuple[str, float]:
    """How far logits are from transformers', in words and in the measure of the row's bound."""
    expected = case.expected(row)
    if found.shape != expected.shape:
        raise Failed(f"logits {found.shape} where transformers has {expected.shape}")
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    words = f"off by {off:.2g}, {same} of {expected.shape[1]} tokens the same"
    if row.allowed != CODES:
        return words, off
    texts = [one.ravel() for one in (expected, found, asked(case.model, case.other)[0])]
    one, other = map(float, np.corrcoef(texts)[0, 1:])
    return f"correlation {one:.3f} ({other:.2f} of another text), {words}", 1 - one if one > other else np.inf


def by_simulator(case: Case, row: Row) -> Shown:
    """Compiled; and built once more from what was compiled, in the vendor's simulator."""
    _, made = hand(case, row)
    bundle, _ = hand(case, row, "bundle", "--bundle")
    job = json.loads((bundle / "job.json").read_text())
    np.savez(bundle / "inputs.npz", **case.inputs(row))  # pyright: ignore[reportArgumentType]
    job["source"]["inputs"], job["out"] = "inputs.npz", "simulated"
    words, off = agreement(case, row, np.load(drive("rknn", "run", bundle, job) / "outputs.npz")["logits"])
    evidence = made["evidence"]
    left = ", ".join(f"{count} {kind}" for kind, count in evidence["cpu"].items()) or "none"
    words = f"{words}; {evidence['npu']} operators on the NPU, on the CPU {left}"
    return Shown(listed(made, ".rknn"), "logits in the vendor's simulator", words, off)


def by_binary(case: Case, row: Row) -> Shown:
    """A context binary that names its chip, in a wrapper of one operator; the graph it was made of, in onnxruntime."""
    import onnx
    import onnxruntime

    out, made = hand(case, row)
    named = f"soc_type={row.chip};".encode() in (out / "model_ctx_qnn.bin").read_bytes()
    kinds = [node.op_type for node in onnx.load(out / "model_ctx.onnx", load_external_data=False).graph.node]
    bundle, _ = hand(case, row, "bundle", "--bundle")
    session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    logits: Any = session.run(["logits"], case.inputs(row))[0]
    words, off = agreement(case, row, logits)
    codes = made["evidence"].get("correlation", {}).get("logits")
    if codes is not None:
        words += f", of its codes correlation {codes:.3f}"
    fine = named and kinds == ["EPContext"] and (codes is None or 1 - codes <= CODES)
    words = f"{'names' if named else 'does not name'} {row.chip}; operators {', '.join(kinds)}; graph {words}"
    return Shown(listed(made, ".bin"), "its words; its graph's logits in onnxruntime", words, off if fine else np.inf)


def by_litert(case: Case, row: Row) -> Shown:
    """A .tflite without code for an NPU, whose compiler is not public."""
    out, made = hand(case, row)
    (artifact,) = sorted(out.glob("*.tflite"))
    folder = case.out(row, "ran")
    folder.mkdir(exist_ok=True)
    np.savez(folder / "inputs.npz", **case.inputs(row))  # pyright: ignore[reportArgumentType]
    job = {"source": {"artifact": str(artifact), "inputs": "inputs.npz"}, "out": "ran"}
    words, off = agreement(case, row, np.load(drive("litert", "run", folder, job) / "outputs.npz")["logits"])
    return Shown(listed(made, ".tflite"), "logits in LiteRT on the CPU", words, off)


def by_stand_in(case: Case, row: Row) -> Shown:
    """A bundle, compiled in another folder by a stand-in; the checkpoint in it, in transformers."""
    out, made = hand(case, row, "", "--bundle")
    elsewhere = case.out(row, "elsewhere")
    shutil.rmtree(elsewhere, ignore_errors=True)
    handed = elsewhere / "handed"
    shutil.copytree(out, handed)
    shutil.rmtree(out)
    stand_ins: Any = import_module("tests.hw.stand_ins")
    ran("compile.sh", ["bash", handed / "compile.sh"], **stand_ins.environment(row.toolchain, elsewhere))
    parts = [(sorted((handed / "out").glob(pattern)), count or case.layers) for pattern, count in row.parts]
    whole = all(len(paths) == count and all(path.stat().st_size for path in paths) for paths, count in parts)
    models = {path.parent for path in handed.glob("*/*.safetensors")}
    (checkpoint,) = (at for at in models if "quantization_config" not in (at / "config.json").read_text())
    words, off = agreement(case, row, asked(checkpoint, case.tokens)[0])
    words = f"{sum(len(paths) for paths, _ in parts)} of {sum(count for _, count in parts)} files; {words}"
    size = {"bundle": sum(listed(made, "").values())}
    return Shown(size, "the stand-in's contract; its checkpoint's logits", words, off if whole else np.inf)


SHOWN: Final[Mapping[str, Callable[[Case, Row], Shown]]] = {
    "simulator": by_simulator, "binary": by_binary, "litert": by_litert, "bundle": by_stand_in
}  # fmt: skip


def prepare(model: Path, work: Path, layers: int) -> Case:
    """Cut, and cut up: Megatron of as many tensor parallel shards as its query groups allow, two stages, two ranks."""
    model = cut(model, layers, work / "model")
    config = json.loads((model / "config.json").read_text())
    tp = gcd(config["num_attention_heads"], config.get("num_key_value_heads") or 0)
    layout = ["--tp", str(tp), "--pp", "2" if config["num_hidden_layers"] > 1 else "1"]
    convert(model, "megatron", *layout, "-o", work / "megatron", "--nproc", "2")
    if (model / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
    else:
        tokens = np.random.default_rng(0).integers(0, config["vocab_size"], TOKENS + 8).tolist()
    ids = np.array([tokens], np.int64)
    return Case(model, work / "megatron", work, ids[:, :TOKENS], ids[:, -TOKENS:])


def shown(case: Case, row: Row) -> tuple[list[str], bool | None]:
    """A row's cells, and whether it is as it should be; None where it was not run."""
    try:
        if row.shown != "bundle" and not (ROOT / ".venvs" / row.toolchain / "toolchain-installed").exists():
            raise NotRun(f"its compiler is not here: bash scripts/toolchains.sh {row.toolchain}")
        found = SHOWN[row.shown](case, row)
    except (NotRun, Failed) as why:
        missing = isinstance(why, NotRun)
        return ["not run" if missing else "failed", "", "", str(why), ""], None if missing else False
    measure = "1 - correlation" if row.allowed == CODES else "off by"
    cells = [", ".join(found.written), f"{sum(found.written.values()):,}", found.compared, found.found,
             f"{measure} {row.allowed:g}"]  # fmt: skip
    return cells, bool(found.written) and all(found.written.values()) and found.off <= row.allowed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "work" / "quickstart" / "smollm2")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "handoffs")
    parser.add_argument("--layers", type=int, default=2, help="how many of the model's layers; 0: all")
    parser.add_argument("--only", action="append", metavar="WORDS", help='rows that have these: "qnn SM8750"')
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    rows = [row for row in ROWS if not args.only or any(set(one.split()) <= set(row.name.split()) for one in args.only)]
    if not rows:
        raise SystemExit(f"no row has these words; there are: {'; '.join(row.name for row in ROWS)}")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    case = prepare(args.model.resolve(), work, args.layers)
    print("| TARGET | chip and settings | written | bytes | compared | found | allowed |")
    print("|---|---|---|---|---|---|---|")
    off, missed = [], []
    for row in rows:
        cells, fine = shown(case, row)
        target, *rest = row.name.split()
        print(f"| `{target}` | {' '.join(rest)} | {' | '.join(cells)} |", flush=True)
        off += [row.name] if fine is False else []
        missed += [row.name] if fine is None else []
    if missed:
        print(f"\nnot run: {'; '.join(missed)}")
    if off:
        raise SystemExit(f"off: {'; '.join(off)}")


if __name__ == "__main__":
    main()
