"""Meta's releases: what dconv makes of them computes, in transformers, what Meta's own formulas compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.oracles import hf

Weights = dict[str, Tensor]
Params = dict[str, Any]

#: multiple_of 16 and dim 64 give a feed-forward size of 176.
LLAMA1: Params = {
    "dim": 64, "multiple_of": 16, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1,
}  # fmt: skip
LLAMA3: Params = {
    "dim": 64, "multiple_of": 16, "n_heads": 8, "n_kv_heads": 4, "n_layers": 2, "norm_eps": 1e-5,
    "vocab_size": 96, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA32: Params = {**LLAMA3, "use_scaled_rope": True}
VOCAB = 96
TOKENS = torch.arange(2 * 48).reshape(2, 48) * 7 % VOCAB


def ffn_size(params: Params) -> int:
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
    return math.ceil(hidden / params["multiple_of"]) * params["multiple_of"]


def model(params: Params, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights under Meta's names, in the order of its files."""
    generator = torch.Generator().manual_seed(params["n_layers"])
    dim, ffn = params["dim"], ffn_size(params)
    kv = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(dim, generator=generator)).to(dtype)

    made = {"tok_embeddings.weight": matrix(VOCAB, dim), "norm.weight": norm()}
    made["output.weight"] = made["tok_embeddings.weight"] if tied else matrix(VOCAB, dim)
    for i in range(params["n_layers"]):
        for name, rows, columns in (
            ("attention.wq", dim, dim),
            ("attention.wk", kv, dim),
            ("attention.wv", kv, dim),
            ("attention.wo", dim, dim),
            ("feed_forward.w1", ffn, dim),
            ("feed_forward.w2", dim, ffn),
            ("feed_forward.w3", ffn, dim),
        ):
            made[f"layers.{i}.{name}.weight"] = matrix(rows, columns)
        made[f"layers.{i}.attention_norm.weight"] = norm()
        made[f"layers.{i}.ffn_norm.weight"] = norm()
    head = dim // params["n_heads"]
    made["rope.freqs"] = params.get("rope_theta", 10000.0) ** -(torch.arange(0, head, 2) / head)
    return made


def forward(weights: Weights, params: Params, tokens: Tensor) -> Tensor:
    """Logits by the formulas of Meta's ``model.py``: neighbouring numbers of a head are one complex number."""
    batch, length = tokens.shape
    heads, eps = params["n_heads"], params["norm_eps"]
    groups, size = params.get("n_kv_heads", heads), params["dim"] // heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name]

    frequencies = torch.tensor([scaled(f, params) for f in frequencies_of(params)])
    turns = torch.polar(torch.ones(length, size // 2), torch.outer(torch.arange(length).float(), frequencies))

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    mask = torch.full((length, length), -math.inf).triu(1)
    h = weights["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}
        x = norm(h, f"layers.{i}.attention_norm.weight")
        q = rotate((x @ layer["attention.wq.weight"].T).view(batch, length, heads, size))
        k = rotate((x @ layer["attention.wk.weight"].T).view(batch, length, groups, size))
        v = (x @ layer["attention.wv.weight"].T).view(batch, length, groups, size)
        k, v = (t.repeat_interleave(heads // groups, 2).transpose(1, 2) for t in (k, v))
        attention = (q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(size) + mask).softmax(-1) @ v
        h = h + attention.transpose(1, 2).flatten(2) @ layer["attention.wo.weight"].T
        x = norm(h, f"layers.{i}.ffn_norm.weight")
        gate, up = x @ layer["feed_forward.w1.weight"].T, x @ layer["feed_forward.w3.weight"].T
        h = h + (silu(gate) * up) @ layer["feed_forward.w2.weight"].T
    return norm(h, "norm.weight") @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def frequencies_of(params: Params) -> list[float]:
    size = params["dim"] // params["n_heads"]
    return [params.get("rope_theta", 10000.0) ** (-i / size) for i in range(0, size, 2)]


def scaled(frequency: float, params: Params) -> float:
    """Llama 3.1's stretch of long waves: by 8, and by 32 in Llama 3.2, whose models are narrower than 4096."""
    if not params.get("use_scaled_rope"):
        return frequency
    factor, trained = 32 if params["dim"] < 4096 else 8, 8192
    wave = 2 * math.pi / frequency
    if wave > trained:
        return frequency / factor
    if wave < trained / 4:
        return frequency
    smooth = (trained / wave - 1) / 3
    return (1 - smooth) * frequency / factor + smooth * frequency


ROWS, COLUMNS = 0, 1


def cut(name: str, weight: Tensor, rank: int, count: int, *, embedding: int, heads: int = 0) -> Tensor:
    """What fairscale's parallel layers keep of a weight on one rank."""
    if weight.ndim == 1:
        return weight
    if name.endswith(("wk.weight", "wv.weight")) and heads and count > heads:
        return weight.chunk(heads)[rank * heads // count]
    axis = embedding if name.startswith("tok_") else COLUMNS if name.endswith(("wo.weight", "w2.weight")) else ROWS
    return weight.chunk(count, axis)[rank]


def release(folder: Path, params: Params, weights: Weights, count: int = 1, embedding: int = ROWS) -> Path:
    """Write a release: each shard's tensors are views of one storage, as in Meta's files."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    for rank in range(count):
        parts = {
            name: cut(name, w, rank, count, embedding=embedding, heads=params.get("n_kv_heads", 0))
            for name, w in weights.items()
        }
        plain = {name: part for name, part in parts.items() if name != "rope.freqs"}
        flat = torch.cat([part.flatten() for part in plain.values()])
        views = flat.split([part.numel() for part in plain.values()])
        shaped = {name: view.view(part.shape) for (name, part), view in zip(plain.items(), views, strict=True)}
        torch.save({**shaped, "rope.freqs": weights["rope.freqs"]}, folder / f"consolidated.{rank:02d}.pth")
    return folder


def to_hf(source: Path, out: Path, **options: Any) -> Weights:
    convert(Request(source, "hf", out, **options))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("params", "count", "embedding"),
    [
        (LLAMA1, 1, COLUMNS),
        (LLAMA1, 2, COLUMNS),
        ({**LLAMA1, "n_kv_heads": 2, "rope_theta": 1e6}, 2, COLUMNS),
        (LLAMA3, 1, ROWS),
        (LLAMA3, 4, ROWS),
        (LLAMA3, 8, ROWS),  # more ranks than key-value heads
        (LLAMA32, 2, ROWS),
        ({"model": LLAMA3}, 2, ROWS),
    ],
)
def test_function(tmp_path: Path, params: Params, count: int, embedding: int) -> None:
    plain = params.get("model", params)
    weights = model(plain)
    source = release(tmp_path / "meta", plain, weights, count, embedding)
    (source / "params.json").write_text(json.dumps(params))
    to_hf(source, tmp_path / "hf")
    with torch.no_grad():
        expected = forward(weights, plain, TOKENS)
    assert expected.std() > 0.1
    assert (hf.logits(tmp_path / "hf", TOKENS) - expected).abs().max() <= 1e-4
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"a tokenizer"


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def expected_hf(params: Params, weights: Weights) -> Weights:
    """What transformers' ``convert_llama_weights_to_hf`` makes: pairs of rows become two halves of a head."""
    made: Weights = {}
    for name, weight in weights.items():
        parts = name.removesuffix(".weight").split(".", 2)
        if name == "rope.freqs":
            continue
        if name.endswith(("wq.weight", "wk.weight")):
            size = params["dim"] // params["n_heads"]
            weight = weight.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
        short = HF_NAMES[parts[0] if parts[0] != "layers" else parts[2]]
        made[f"{short}.weight" if parts[0] != "layers" else f"model.layers.{parts[1]}.{short}.weight"] = weight
    return made


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.uint8)


def same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype, name
        assert torch.equal(bits(got[name]), bits(weight)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "embedding"), [(1, ROWS), (2, COLUMNS), (2, ROWS), (4, ROWS), (8, ROWS)])
def test_bits(tmp_path: Path, dtype: torch.dtype, count: int, embedding: int) -> None:
    weights = model(LLAMA3, dtype=dtype)
    source = release(tmp_path / "meta", LLAMA3, weights, count, embedding)
    same(to_hf(source, tmp_path / "hf"), expected_hf(LLAMA3, weights))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == str(dtype).removeprefix("torch.")


def test_beside_huggingface(tmp_path: Path) -> None:
    """Where both lie in one directory HuggingFace's is read, unless --from says otherwise."""
    weights = model(LLAMA3)
    source = release(tmp_path / "both", LLAMA3, weights, 2)
    convert(Request(source, "hf", tmp_path / "hf"))
    for name in ("model.safetensors", "config.json"):
        (source / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    (source / "consolidated.00.pth").unlink()
    same(to_hf(source, tmp_path / "detected"), expected_hf(LLAMA3, weights))
    with pytest.raises(Damaged, match="1 of 2 tensor-parallel shards"):
        to_hf(source, tmp_path / "said", source_format="meta")


def test_megatron_from_meta(tmp_path: Path) -> None:
    weights = model(LLAMA3)
    source = release(tmp_path / "meta", LLAMA3, weights, 2)
    convert(Request(source, "megatron", tmp_path / "megatron", parallel=Parallel(tp=4, pp=2, etp=4)))
    same(to_hf(tmp_path / "megatron", tmp_path / "hf"), expected_hf(LLAMA3, weights))


@pytest.mark.parametrize("stored", ["no output", "one storage", "a copy"])
@pytest.mark.parametrize("count", [1, 2])
def test_tied(tmp_path: Path, stored: str, count: int) -> None:
    weights = model(LLAMA32, tied=True)
    source = release(tmp_path / "meta", LLAMA32, weights, count)
    for path in source.glob("*.pth"):
        shard = torch.load(path)
        if stored == "no output":
            del shard["output.weight"]
        elif stored == "one storage":
            shard["output.weight"] = shard["tok_embeddings.weight"]
        torch.save(shard, path)
    got = to_hf(source, tmp_path / "hf")
    assert "lm_head.weight" not in got
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    with torch.no_grad():
        expected = forward(weights, LLAMA32, TOKENS)
    assert (hf.logits(tmp_path / "hf", TOKENS) - expected).abs().max() <= 1e-4


def test_narrow_but_not_tied(tmp_path: Path) -> None:
    weights = model(LLAMA32)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    weights["output.weight"][-1, -1] += 1
    got = to_hf(release(tmp_path / "meta", LLAMA32, weights), tmp_path / "hf")
    same(got, expected_hf(LLAMA32, weights))


def test_a_config_that_ties_what_differs(tmp_path: Path) -> None:
    source = release(tmp_path / "meta", LLAMA3, model(LLAMA3))
    to_hf(source, tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    write(tmp_path / "config" / "config.json", json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(Refused, match="differ"):
        to_hf(source, tmp_path / "hf", hf_config=tmp_path / "config")


def test_frequencies_of_llama_1_are_left_out(tmp_path: Path) -> None:
    weights = model(LLAMA1)
    source = release(tmp_path / "meta", LLAMA1, weights)
    shard = torch.load(source / "consolidated.00.pth")
    shard["layers.1.attention.inner_attention.rope.freqs"] = shard.pop("rope.freqs")
    torch.save(shard, source / "consolidated.00.pth")
    same(to_hf(source, tmp_path / "hf"), expected_hf(LLAMA1, weights))
    receipt = json.loads((tmp_path / "hf" / "dconv.json").read_text())
    assert receipt["left_out"] == {"layers.1.attention.inner_attention.rope.freqs": "recomputed from the config"}


def test_tokenizer_one_directory_up(tmp_path: Path) -> None:
    source = release(tmp_path / "7B", LLAMA1, model(LLAMA1))
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_checklist.chk").write_text("x")
    to_hf(source, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"a tokenizer"
    assert not (tmp_path / "hf" / "tokenizer_checklist.chk").exists()


def test_another_makers_params(tmp_path: Path) -> None:
    """Mistral's params.json has keys of its own: refused, until a config says what they mean."""
    weights = model(LLAMA3)
    source = release(tmp_path / "meta", {**LLAMA3, "sliding_window": 4096}, weights, 2)
    with pytest.raises(Refused, match="plain Llama"):
        to_hf(source, tmp_path / "hf")
    to_hf(release(tmp_path / "own", LLAMA3, weights), tmp_path / "config")
    same(to_hf(source, tmp_path / "a", hf_config=tmp_path / "config"), expected_hf(LLAMA3, weights))
    (source / "params.json").unlink()
    same(to_hf(source, tmp_path / "b", hf_config=tmp_path / "config"), expected_hf(LLAMA3, weights))
    with pytest.raises(Refused) as caught:
        to_hf(source, tmp_path / "hf")
    assert "--hf-config" in caught.value.do


def drop_shard(number: int) -> Callable[[Path], None]:
    return lambda source: (source / f"consolidated.{number:02d}.pth").unlink()


def edit_params(**changes: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        write(source / "params.json", json.dumps({**LLAMA3, **changes}))

    return edit


def write(path: Path, text: str) -> None:
    path.write_text(text)


def edit_shard(change: Callable[[Weights], Any]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        shard = torch.load(source / "consolidated.01.pth")
        change(shard)
        torch.save(shard, source / "consolidated.01.pth")

    return edit


def truncate(source: Path) -> None:
    with open(source / "consolidated.01.pth", "r+b") as file:
        file.truncate(5000)


Q = "layers.0.attention.wq.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], type[DconvError], str]] = {
    "first shard missing": (drop_shard(0), Damaged, "1 of 4 tensor-parallel shards"),
    "middle shard missing": (drop_shard(2), Damaged, "1 of 4 tensor-parallel shards"),
    "last shard missing": (drop_shard(3), Damaged, "1 of 4 tensor-parallel shards"),
    "truncated": (truncate, Damaged, "truncated"),
    "wrong shape": (edit_shard(lambda s: s.update({Q: s[Q][:-2]})), Damaged, "another shape"),
    "no query": (edit_shard(lambda s: s.pop(Q)), Damaged, "not whole"),
    "no embedding": (edit_shard(lambda s: s.pop("tok_embeddings.weight")), Damaged, "not whole"),
    "a tensor more": (edit_shard(lambda s: s.update({"vision.weight": s[Q]})), Refused, "in no row"),
    "codes": (edit_shard(lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})), Refused, "quantised"),
    "dtypes": (edit_shard(lambda s: s.update({Q: s[Q].bfloat16()})), Damaged, "disagree on the dtype"),
    "another width": (edit_params(dim=128), Damaged, "shape|shards are missing"),
    "another vocabulary": (edit_params(vocab_size=100), Damaged, "another shape"),
    "more layers": (edit_params(n_layers=3), Damaged, "not whole"),
    "fewer layers": (edit_params(n_layers=1), Refused, "in no row"),
    "other heads": (edit_params(n_heads=16), Damaged, "shape|shards are missing"),
    "no width": (edit_params(dim=None), Damaged, "dim"),
    "width of text": (edit_params(dim="64"), Damaged, "dim"),
    "not JSON": (lambda source: write(source / "params.json", "{"), Damaged, "not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path: Path, name: str) -> None:
    breakage, kind, message = BROKEN[name]
    source = release(tmp_path / "meta", LLAMA3, model(LLAMA3), 4)
    breakage(source)
    with pytest.raises(kind, match=message):
        to_hf(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]
