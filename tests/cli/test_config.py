"""Options in files: what a command line said is what its file says, and a change leaves the rest of a file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.commands.table import parser_of
from dconv.errors import StorageFault, UsageError
from dconv.launch import run_file
from dconv.launch.options import every_option, parse
from tests.cli.conftest import Dconv

LINES = (
    ["m", "megatron", "--tp", "2", "--pp-layout", "Ett|ttL", "--megatron-format", "legacy"],
    ["m", "hf", "-o", "out", "--shard-size", "1.5GB", "--drop", "a*", "--drop", "b", "--dtype", "f16", "--from", "pt"],
    ["m", "megatron", "--first-stage-layers", "3", "--count-loss", "--max-memory", "64MiB", "--threads", "2"],
    ["m", "fp8", "--block-size", "64x32", "--quant", "fp8_block", "--overwrite", "--digest", "sha256"],
    ["m", "onnx", "--lengths", "128+64", "--opset", "18", "--nproc", "3", "--toolchain-timeout", "90"],
    ["007", "gguf", "--quant", "q4_k_m", "--gguf-pretokenizer", "0x10", "--partition", "1", "--launcher", "slurm"],
)


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_file_says_what_its_command_line_said(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    run_file.save(path, parser_of("convert"), words)
    line, file = parse(every_option(), words), parse(every_option(), ["--config", str(path)])
    assert {**vars(line), "config": None} == {**vars(file), "config": None}
    run_file.save(path, parser_of("convert"), words)  # the same once more is no other file
    again = tmp_path / "again.yaml"
    run_file.save(again, parser_of("convert"), ["--config", str(path), "--nproc", "5"])
    assert {**run_file.read(path), "nproc": 5} == run_file.read(again)


def test_patterns_of_the_line_are_saved_beside_those_of_the_file(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("model: m\nformat: hf\ndrop: a*\n")
    words = ["--config", str(first), "--drop", "b*"]
    run_file.save(second, parser_of("plan"), words)
    assert parse(every_option(), ["--config", str(second)]).drop == parse(every_option(), words).drop == ["a*", "b*"]


def test_saved_where_the_command_makes_sense(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert dconv("convert", hf, "megatron", "--tp", 2, "--vpp", 3, "-o", tmp_path / "o", "--save-config", path).code
    assert not path.exists()
    ran = dconv("convert", hf, "megatron", "--tp", 2, "-o", tmp_path / "o", "--save-config", path)
    assert ran.code == 0, ran.err
    assert run_file.read(path) == {"model": str(hf), "format": "megatron", "out": str(tmp_path / "o"), "tp": 2}
    assert dconv("convert", "--config", path, "--resume", "--json").json["already_done"]
    assert dconv("plan", hf, "megatron", "--world", 3, "--tp", 1, "--save-config", path).code == 2
    assert run_file.read(path)["tp"] == 2, "another file is not replaced"


FILE = """\
# of the post-training team
model: llama-8b   # the newest
format:  megatron

drop:            # what the probe left
  - 'probe.*'
  - "x.*"
tp: 4
pp-layout: Ett|ttL
"""


def test_a_change_leaves_the_rest_alone(dconv: Dconv, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    assert dconv("config", "set", path, "tp", "8").code == 0
    assert path.read_text() == FILE.replace("tp: 4", "tp: 8")
    assert dconv("config", "set", path, "pp_layout", "3|3").code == 0
    assert path.read_text().endswith("tp: 8\npp-layout: 3|3\n")
    assert dconv("config", "set", path, "drop", "a*", "it's").code == 0
    assert yaml.safe_load(path.read_text())["drop"] == ["a*", "it's"]
    assert "# of the post-training team" in path.read_text() and "# the newest" in path.read_text()
    assert dconv("config", "set", path, "vpp", "2").code == 0
    assert dconv("config", "get", path, "vpp").out == "2\n"
    assert dconv("config", "set", path, "vpp", "null").code == 0
    assert dconv("config", "get", path, "vpp", "--json").json == {"option": "vpp", "value": None, "given": False}
    assert dconv("config", "get", path, "replicas").out == "equal\n"
    assert dconv("config", "show", path, "--json").json["model"] == "llama-8b"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["tp", "out", "drop", "quiet", "dtype", "max-memory"]), min_size=1, max_size=6),
       st.booleans(), st.data())  # fmt: skip
def test_any_changes_read_back(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], as_json: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(json.dumps({"tp": 2, "drop": ["z"]}) if as_json else "tp: 2\ndrop:\n- z\n")
    values = {
        "tp": st.sampled_from(["1", "16"]), "quiet": st.sampled_from(["true", "false"]),
        "out": st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1).map("o{}".format),
        "drop": st.sampled_from(["a: b", "# no", "*", "'", "- x"]), "dtype": st.sampled_from(["bf16", "f32"]),
        "max-memory": st.sampled_from(["1GB", "123456"]),
    }  # fmt: skip
    last = {}
    for key in keys:
        last[key.replace("-", "_")] = run_file.change(path, key, [data.draw(values[key])])
    found = run_file.read(path)
    assert {key: found[key] for key in last} == last


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["set", "run.yaml", "tpp", "2"], "did you mean tp?"),
        (["set", "run.yaml", "tp", "two"], "run.yaml"),
        (["set", "run.yaml", "dtype", "int3"], "not one of"),
        (["set", "run.yaml", "tp"], "dconv config set FILE OPTION VALUE"),
        (["set", "run.yaml", "tp", "1", "2"], "one value"),
        (["get", "run.yaml", "frobnicate"], "no option"),
        (["show", "nowhere.yaml"], "nowhere.yaml"),
        (["show"], "dconv config show FILE"),
        (["list-presets", "x"], "dconv config list-presets"),
    ],
)
def test_refused(dconv: Dconv, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(FILE)
    ran = dconv("config", *words)
    assert ran.code == 2
    assert said in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert Path("run.yaml").read_text() == FILE


def test_a_file_that_is_wrong_is_not_made_worse(dconv: Dconv, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("tpp: 3\n")
    ran = dconv("config", "set", path, "tp", "2")
    assert ran.code == 2 and "did you mean tp?" in ran.err
    assert path.read_text() == "tpp: 3\n"
    with pytest.raises(StorageFault):
        run_file.change(tmp_path / "no" / "such" / "run.yaml", "tp", ["2"])
    with pytest.raises(UsageError, match="one value"):
        run_file.change(path, "tp", [])


def test_presets_are_listed_and_taken(dconv: Dconv) -> None:
    names = dconv("config", "list-presets", "--json").json
    shown = dconv("config", "list-presets").out
    assert "int4" in names and all(name in shown and one["comment"] in shown for name, one in names.items())
