"""Every cell of ``dconv archs --format``: a small model of the family is planned, refused where the cell is empty."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dconv
from dconv import directions
from dconv.arch.about import lines
from dconv.arch.family import Family
from dconv.arch.gguf import ARCHS
from dconv.arch.registry import families
from dconv.describe import describe_model
from dconv.directions import Column, columns, way
from dconv.errors import DconvError, Refused
from dconv.export.prompt import kind_of
from dconv.hw.registry import adapter
from dconv.hw.target import Ask
from dconv.hw.toolkits import Toolkits
from dconv.pipeline import Request, prepare
from dconv.request import CALIBRATED
from dconv.sharding.coords import Parallel
from dconv.targets import GRAPHS
from tests.formats import gguf_models, gguf_tokenizers, mlx_models, test_meta
from tests.quant.models import write_normal

COLUMNS = columns()
BY_GROUP = {group: [one for one in COLUMNS if one.group == group] for group in ("from", "to", "compiler")}
#: A family of each kind: their sources are written and read by default, those of all with ``--long``.
FEW = ("llama", "mistral", "mixtral", "gpt_oss", "deepseek_v3", "mamba2", "minicpm", "blockffn", "bert", "t5", "llava")
#: What every form of a family holds; a config that says otherwise is refused by some, whatever the table says.
PLAIN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {"pad_token_id": None},
    "glm": {"pad_token_id": None},
    "glm4": {"pad_token_id": None},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "deepseek_v2": {"qk_rope_head_dim": 8},
    "deepseek_v3": {"num_nextn_predict_layers": 0, "qk_rope_head_dim": 8},
    "glm4_moe": {"num_nextn_predict_layers": 0},
    "minicpm": {"sparse_config": None, "mup_denominator": None},
    "minicpm3": {"qk_rope_head_dim": 8},
    "blockffn_mla": {"qk_rope_head_dim": 8},
    "megatron-bert": {"tie_word_embeddings": True},
    "bert": {"tie_word_embeddings": True},
    "t5": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family, str], Path]:
    """A model of a family for a FORMAT: what GGUF and MLX take for granted is in models of their own."""
    root = tmp_path_factory.mktemp("directions")
    np.save(root / "ids.npy", np.random.default_rng(0).integers(0, 60, (4, 64)))

    def write(family: Family, format: str) -> Path:
        kind = format if format in ("gguf", "mlx") else "plain"
        folder = root / f"{family.name}-{kind}"
        if folder.exists():
            return folder
        if kind == "gguf" and family.name in gguf_models.MODELS:
            gguf_models.write_model(folder, family.name)
        elif kind == "mlx" and family.name in mlx_models.MODELS:
            mlx_models.write_model(folder, family.name)
        else:
            write_normal(folder, family, **PLAIN.get(family.name, {}))
        return gguf_tokenizers.byte_pairs(folder, small=True) if kind == "gguf" else folder

    return write


def options(folder: Path, format: str) -> dict[str, Any]:
    if format not in CALIBRATED:
        return {"dtype": "f32"} if format == "onnx" else {}
    told = {"bits": 4, "group_size": 32, "nsamples": 2, "seqlen": 32}
    return {"calibration": str(folder.parent / "ids.npy"), "quantization_config": json.dumps(told)}


def refusal(request: Request) -> str:
    """Why a plan is refused; empty where it is not. What is neither is a fault of the sample, and raised."""
    try:
        prepare(request)
    except Refused as error:
        return error.what
    return ""


def by(group: str, *, slow: Callable[[Family, Column], bool]) -> list[Any]:
    return [
        pytest.param(family, column, id=f"{family.name}-{column.name}", marks=[pytest.mark.long] * slow(family, column))
        for family in families().values()
        for column in BY_GROUP[group]
    ]


def is_traced(family: Family, column: Column) -> bool:
    """Whether this cell takes seconds: a graph that is not refused. One is always tried."""
    traced = column.name in GRAPHS and way(family, column) != "none"
    return traced and (family.name, column.name) != ("llama", "torchscript")


@pytest.mark.parametrize(("family", "column"), by("to", slow=is_traced))
def test_what_is_written(sample: Callable[[Family, str], Path], tmp_path: Path, family: Family, column: Column) -> None:
    found, format = way(family, column), column.name
    model = sample(family, format)
    request = Request(model, format, tmp_path / "out", **options(model, format))
    folded = Request(model, format, tmp_path / "out", mup2llama=True, **options(model, format))
    why = refusal(request)
    assert (why == "") == (found in ("exact", "coded", "calibrated")), why or found
    if found == "folded":
        assert refusal(folded) == ""
    elif found == "none" and family.mup:
        assert refusal(folded)


@pytest.mark.parametrize(("family", "column"), by("from", slow=lambda family, column: family.name not in FEW))
def test_what_is_read(sample: Callable[[Family, str], Path], tmp_path: Path, family: Family, column: Column) -> None:
    """What dconv itself writes for other trainers and readers comes back as a model of the family."""
    megatron = {name: {"format": "megatron", "megatron_format": name} for name in ("torch_dist", "legacy", "model_pt")}
    made = megatron.get(column.name, {"format": column.name})
    model = sample(family, made["format"])
    if column.name == "huggingface":
        assert describe_model(model).family.name == family.name and way(family, column) == "exact"
        return
    if column.name == "meta":
        assert way(family, column) == ("exact" if family.name == "llama" else "none")
        return
    try:
        dconv.convert(model, made["format"], tmp_path / "out", **{k: v for k, v in made.items() if k != "format"})
    except Refused:
        assert way(family, column) == "none"
        return
    source = next((tmp_path / "out").glob("*.gguf"), tmp_path / "out")
    back = describe_model(source).family.name
    assert refusal(Request(source, "huggingface", tmp_path / "back")) == ""
    kin = {family.name}
    if column.name == "gguf":  # an architecture of several families is read as one of them
        kin |= next(set(arch.families) for arch in ARCHS.values() if family.name in arch.families)
    assert (back in kin) == (way(family, column) == "exact"), back


def test_metas_release_is_a_llama(tmp_path: Path) -> None:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64, "norm_eps": 1e-5}
    params["vocab_size"] = test_meta.VOCAB
    test_meta.release(tmp_path / "meta", params, test_meta.model(params))
    found = describe_model(tmp_path / "meta")
    (column,) = (one for one in BY_GROUP["from"] if one.name == "meta")
    assert [name for name, family in families().items() if way(family, column) == "exact"] == [found.family.name]


def is_compiled_from_a_graph(family: Family, column: Column) -> bool:
    slow = column.name == "qnn" or (column.name == "rk" and kind_of(family) != "decoder")
    return slow and way(family, column) == "handed"


@pytest.mark.parametrize(("family", "column"), by("compiler", slow=is_compiled_from_a_graph))
def test_what_is_handed(sample: Callable[[Family, str], Path], tmp_path: Path, family: Family, column: Column) -> None:
    """By one of the vendor's toolkits at least: planned, and each of the artifacts that it is handed planned, too."""
    model = sample(family, "huggingface")
    whole = adapter(column.name)
    toolkits = list(whole.toolkits) if isinstance(whole, Toolkits) else [""]
    said: list[str] = []
    for name in toolkits:
        said.append(handing(model, column.name, name, tmp_path))
        if not said[-1]:
            break
    assert ("" in said) == (way(family, column) == "handed"), said


def handing(model: Path, compiler: str, toolkit: str, out: Path) -> str:
    """Why a toolkit is not handed a model; empty where it is."""
    whole = adapter(compiler)
    chips = whole.toolkits[toolkit].platforms if isinstance(whole, Toolkits) else whole.platforms
    told: dict[str, object] = {"toolkit": toolkit} if toolkit else {}
    if toolkit == "mtk_cloud":
        told |= {"nsamples": 2, "seqlen": 32, "group_size": -1, "model_size": "0_5B"}
    elif toolkit == "qairt":
        told |= {"context": 64, "prefill": 16}
    elif compiler == "ax":
        told |= {"max_context": 128, "prefill_len": 128}
    ask = Ask(next(iter(chips)), told, "a test", None, os.environ, calibration=str(model.parent / "ids.npy"))
    try:
        handed = whole.plan(describe_model(model), Request(model, "huggingface"), ask)
        for step in handed.steps:
            request = step.request
            prepare(Request(**{**vars(request), "out": out / step.role}))
    except Refused as error:
        return error.what
    return ""


SIZES = {
    "TP": Parallel(tp=2, etp=2),
    "PP": Parallel(pp=2),
    "VPP": Parallel(pp=2, vpp=2),
    "EP": Parallel(ep=2),
    "ETP": Parallel(tp=1, etp=2),
}


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_layouts(sample: Callable[[Family, str], Path], tmp_path: Path, family: Family) -> None:
    ((_, _, said, _, _),) = lines([family])
    model = sample(family, "megatron")
    found = [
        name for name, sizes in SIZES.items()
        if not refusal(Request(model, "megatron", tmp_path / "out", parallel=sizes))
    ]  # fmt: skip
    assert " ".join(found) == said


def test_without_transformers_graphs_and_calibration_are_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not refused, and not promised; what needs no transformers is as it was."""
    real = directions.calibrate.importlib.util.find_spec
    llama, llava, gpt2 = (families()[name] for name in ("llama", "llava", "gpt2"))
    before = {column: way(llama, column) for column in COLUMNS}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else real(name))
    for column in COLUMNS:
        needs = column.name in (*GRAPHS, *CALIBRATED) or (column.group == "compiler" and column.name == "qnn")
        assert way(llama, column) == ("unsaid" if needs else before[column]), column
    graph, gptq = (next(one for one in COLUMNS if one.name == name) for name in ("onnx", "gptq"))
    assert way(llava, graph) == way(gpt2, gptq) == "none"


def test_a_family_that_nobody_computes_is_refused_before_it_is_calibrated(
    sample: Callable[[Family, str], Path], tmp_path: Path
) -> None:
    model = sample(families()["blockffn"], "gptq")
    with pytest.raises(DconvError, match="a blockffn is not computed here, nothing was written") as error:
        dconv.convert(model, "gptq", tmp_path / "out", **options(model, "gptq"))
    assert error.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == []


def calibrated() -> list[Any]:
    (column,) = (one for one in BY_GROUP["to"] if one.name == "gptq")
    found = [family for family in families().values() if way(family, column) == "calibrated"]
    # Bamba's model takes apart what a layer answers
    return [pytest.param(one, id=one.name, marks=[pytest.mark.long] * (one.name != "bamba")) for one in found]


@pytest.mark.parametrize("family", calibrated())
def test_calibration_goes_through_the_layers(
    sample: Callable[[Family, str], Path], tmp_path: Path, family: Family
) -> None:
    """More than a plan: what it promises is carried out."""
    model = sample(family, "gptq")
    if family.name == "nemotron_h":  # its experts are in no linear layers of transformers', and are refused
        model = write_normal(tmp_path / "model", family, hybrid_override_pattern="M*-M")
    told = options(sample(family, "gptq"), "gptq")
    assert dconv.convert(model, "gptq", tmp_path / "out", **told)
    assert dconv.engine("gptq").validate(tmp_path / "out")
