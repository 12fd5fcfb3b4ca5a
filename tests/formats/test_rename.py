"""``--rename``: house spellings are laid over the stored names, and nothing about them is guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

from dconv.arch.llama import LLAMA
from dconv.checking import check
from dconv.checkpoint.rename import Renaming, Rule, read_renaming
from dconv.cli import main
from dconv.errors import Damaged, DconvError, Refused, UsageError
from dconv.examine import inspect
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, write_random
from tests.oracles import hf

HOUSE = {"backbone.*": "model.*", "output_head.weight": "lm_head.weight"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA))


def written(path: Path, rules: dict[str, str]) -> Path:
    path.write_text(json.dumps(rules))
    return path


def house_name(name: str) -> str:
    return name.replace("model.", "backbone.", 1).replace("lm_head", "output_head")


def house_safetensors(model: Path, name: Callable[[str], str] = house_name) -> Path:
    weights = load_file(model / "model.safetensors")
    save_file({name(stored): weight for stored, weight in weights.items()}, model / "model.safetensors")
    return model


def in_safetensors(work: Path, model: Path) -> tuple[Path, dict[str, str]]:
    return house_safetensors(model), HOUSE


def in_pt(work: Path, model: Path) -> tuple[Path, dict[str, str]]:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({house_name(name): weight for name, weight in weights.items()}, model / "model.pt")
    return model, HOUSE


def in_ranks(work: Path, model: Path) -> tuple[Path, dict[str, str]]:
    convert(Request(model, "pt", work / "pt", parallel=Parallel(tp=2, etp=2)))
    for path in (work / "pt").glob("*.bin"):
        torch.save({house_name(name): weight for name, weight in torch.load(path).items()}, path)
    return work / "pt", HOUSE


def in_legacy(work: Path, model: Path) -> tuple[Path, dict[str, str]]:
    """Names are a rank's own: layer numbers are local to a stage."""
    convert(Request(model, "megatron", work / "legacy", parallel=Parallel(tp=2, pp=2, etp=2), megatron_format="legacy"))
    for path in (work / "legacy").rglob("model_optim_rng.pt"):
        states = torch.load(path, weights_only=False)
        states["model"] = {f"student.{name}": weight for name, weight in states["model"].items()}
        torch.save(states, path)
    return work / "legacy", {"student.*": "*"}


def in_torch_dist(work: Path, model: Path) -> tuple[Path, dict[str, str]]:
    """Written by torch's own distributed checkpoint, layers stacked under one key."""
    convert(Request(model, "megatron", work / "dist", parallel=Parallel(tp=2, etp=2)))
    folder = work / "dist" / "release"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    held: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "properties")
    }
    load(held, checkpoint_id=str(folder), no_dist=True)
    common, side = (folder / "common.pt").read_bytes(), (folder / "metadata.json").read_bytes()
    out = work / "house" / "release"
    out.mkdir(parents=True)
    save({f"student.{n}": t for n, t in held.items()}, storage_writer=FileSystemWriter(out), no_dist=True)
    (out / "common.pt").write_bytes(common)
    (out / "metadata.json").write_bytes(side)
    return out, {"student.*": "*"}


KINDS = {
    "safetensors": in_safetensors,
    "pt": in_pt,
    "ranks": in_ranks,
    "legacy": in_legacy,
    "torch_dist": in_torch_dist,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container(tmp_path: Path, kind: str) -> None:
    work = tmp_path / "work"
    model = write_random(work / "model", LLAMA, config_of(LLAMA, vocab_size=64))
    expected = tensors(model)
    made, rules = KINDS[kind](work, model)
    with pytest.raises(DconvError):
        convert(Request(made, "hf", tmp_path / "without"))
    convert(Request(made, "hf", tmp_path / "hf", rename=written(tmp_path / "names.json", rules)))
    assert tensors(tmp_path / "hf") == expected


def test_a_config_file_and_yaml(tmp_path: Path, model: Path) -> None:
    """From the command line, the rules as YAML; `inspect` sees the new names."""
    expected = tensors(model)
    house_safetensors(model)
    rules = tmp_path / "names.yaml"
    rules.write_text("'backbone.*': 'model.*'\noutput_head.weight: lm_head.weight\n")
    assert main(["convert", str(model), "hf", "-o", str(tmp_path / "hf"), "--rename", str(rules), "--quiet"]) == 0
    assert tensors(tmp_path / "hf") == expected
    found = inspect(model, rename=rules)
    assert not found.refused and "model.norm.weight" in found.names
    assert "backbone.norm.weight" in inspect(model).names


def test_check_runs_house_spellings(tmp_path: Path) -> None:
    _, tiny = hf.tiny("llama")
    model = hf.save(tiny, tmp_path / "model")
    expected = check(model).run
    house_safetensors(model)
    found = check(model, rename=written(tmp_path / "names.json", HOUSE)).run
    assert found is not None and expected is not None
    assert found["largest_logit"] == pytest.approx(expected["largest_logit"], rel=1e-6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"backbone.*": "model.*"}, "in no row of llama"),  # output_head.weight keeps its name
        ({**HOUSE, "spine.*": "model.*"}, "1 of 3 patterns of --rename match no tensor"),
        ({"*": "model.*", **HOUSE}, "2 of 3 patterns of --rename match no tensor"),  # the first takes every name
        ({"backbone.layers.*.mlp.up*": "model.layers.*.mlp.gate*", **HOUSE}, "one name"),
        ({"backbone.layers.*.mlp.up*": "backbone.layers.*.mlp.gate*"}, "one name"),  # the other keeps its own
    ],
)
def test_rules_that_do_not_fit(tmp_path: Path, model: Path, rules: dict[str, str], message: str) -> None:
    house_safetensors(model)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Refused, match=message):
        convert(Request(model, "hf", tmp_path / "out", rename=written(tmp_path / "names.json", rules)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "names.json"])


def test_no_collision_between_files(tmp_path: Path) -> None:
    """Two files of one model may not come to hold one name, though each by itself would."""
    model = write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=20_000)
    rules = {"model.layers.*.input_layernorm*": "model.layers.*.post_attention_layernorm*"}
    with pytest.raises(Refused, match="one name"):
        convert(Request(model, "hf", tmp_path / "out", rename=written(tmp_path / "names.json", rules)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "x", "a: 1\na: 2", "{}", "a: [b]", "a: {b: c}", "'': b", "a: ''", "a: 'b*'", "'a**b': 'c**d'",
     "'a*': b", "? [a]\n: b", "a: &x b\n'c*': *x", "\x00", "<<: {a: b}"],
)  # fmt: skip
def test_files_that_are_no_rules(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_renaming(path)


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['true']", "? !!python/name:os.system\n: b", "a: " + "[" * 5000]
)
def test_yaml_that_asks_for_more_than_values(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(Damaged):
        read_renaming(path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "b", "a": "c"}', '{"a": null}', "a: b", '{"a*": "b"}'])
def test_json_that_is_no_rules(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(DconvError) as caught:
        read_renaming(path)
    assert caught.value.exit_code in (2, 4)


def test_no_such_file(tmp_path: Path, model: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(UsageError, match="--rename names no file"):
            convert(Request(model, "hf", tmp_path / "out", rename=path))


@pytest.mark.parametrize(
    ("pattern", "result", "name", "expected"),
    [
        ("a.*", "b.*", "a.x.y", "b.x.y"),
        ("a.*", "b.*", "a.", "b."),
        ("a.*", "b.*", "ab.x", None),
        ("a", "b", "a", "b"),
        ("a", "b", "aa", None),
        ("*.w", "*.weight", "x.w.w", "x.w.weight"),
        ("l.*.q.*", "h.*.s.*", "l.0.q.q.w", "h.0.s.q.w"),
        ("a*a", "b*b", "a", None),
        ("a*a", "b*b", "aa", "bb"),
        ("a.b", "c", "axb", None),  # a dot is a dot
        ("[x]*", "y*", "[x]1", "y1"),
        ("(a+)+$*", "y*", "aaaa", None),
        ("*-*-*", "*+*+*", "1-2-3-4", "1+2+3-4"),
    ],
)
def test_one_pattern(pattern: str, result: str, name: str, expected: str | None) -> None:
    assert Rule(pattern, result).apply(name) == expected


@given(st.lists(st.text("ab.", max_size=3), min_size=2, max_size=5), st.text("ab.", max_size=12))
def test_a_match_is_what_the_pattern_says(parts: list[str], name: str) -> None:
    """With itself on the right a pattern gives the name back, and it matches where a regular expression does."""
    import re

    parts = [parts[0], *(part or "a" for part in parts[1:-1]), parts[-1]]
    pattern = "*".join(parts)
    matches = re.fullmatch(".*?".join(map(re.escape, parts)), name) is not None
    assert Rule(pattern, pattern).apply(name) == (name if matches else None)


def test_the_first_match_counts_once() -> None:
    rules = Renaming((Rule("a.b", "head"), Rule("a.*", "b.*"), Rule("b.*", "c.*")))
    assert rules({"a.b": 1, "a.x": 2, "b.y": 3, "z": 4}, "here") == {"head": 1, "b.x": 2, "c.y": 3, "z": 4}
    rules.check_used("here")


def test_hostile_patterns_take_no_time() -> None:
    """A pattern that a backtracking matcher would never finish on."""
    rule = Rule("a*" * 400 + "b", "c*" * 400 + "d")
    assert rule.apply("a" * 100_000) is None
