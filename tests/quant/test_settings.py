"""``--quantization-config``: everything that is said is understood or refused, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dconv.checkpoint.small_config import read_mapping
from dconv.errors import Damaged, DconvError, UsageError
from dconv.quant.parse import presets, quantization_of
from dconv.quant.settings import Awq, Calibration, Gptq, Quantization
from dconv.quant.table import Fields

ISSUE = {
    "bits": 4, "group_size": 64, "sym": True, "desc_act": True, "damp_percent": 0.05, "static_groups": True,
    "nsamples": 64, "seqlen": 512, "seed": 0, "routing_weighted": True,
}  # fmt: skip


def test_nothing_said_is_all_defaults() -> None:
    made = quantization_of(None)
    assert made == Quantization()
    assert made.settings == Gptq()
    assert (made.settings.bits, made.settings.group_size, made.settings.damp_percent) == (4, 128, 0.05)
    assert made.table.default == Fields("int4", group=128)
    assert quantization_of(None, "awq").settings == Awq()


def test_text_a_file_and_keys_say_the_same(tmp_path: Path) -> None:
    made = quantization_of(ISSUE)
    assert made.settings == Gptq(4, 64, True, True, static_groups=True, routing_weighted=True)
    assert made.calibration == Calibration(None, 64, 512, 0)
    (tmp_path / "q.json").write_text(json.dumps(ISSUE))
    (tmp_path / "q.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in ISSUE.items()))
    for said in (json.dumps(ISSUE), tmp_path / "q.json", str(tmp_path / "q.yaml")):
        assert quantization_of(said) == made


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, Awq(group_size=64)),  # AutoAWQ
        ({"apply_clip": False, "quant_method": "awq"}, Awq(clip=False)),
        ({"wbits": 3, "groupsize": 32, "symmetric": False, "actorder": True}, Gptq(3, 32, False, True)),
        ({"bits": 8, "damp": 0.1, "quant_method": "gptq"}, Gptq(8, damp_percent=0.1)),
        ({"dampening_frac": 0.01}, Gptq(damp_percent=0.01)),
        ({"mse": True}, Gptq(mse=2.4)),
        ({"mse": 3}, Gptq(mse=3.0)),
        ({"mse": False}, Gptq()),
    ],
)
def test_other_tools_words(theirs: dict[str, Any], ours: Gptq | Awq) -> None:
    assert quantization_of(theirs, "awq" if isinstance(ours, Awq) else "gptq").settings == ours


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"grup_size": 64}, "did you mean group_size?"),
        ({"desc-act": True}, "did you mean desc_act?"),
        ({"rotation": "hadamard"}, "there is no key 'rotation'"),
        ({"n_grid": 20}, "there is no key 'n_grid'"),  # AWQ's
        ({"zero_point": True}, "sym says this"),
        ({"checkpoint_format": "gptq_v2"}, "--quant says the format"),
        ({"wq": "int4"}, "it belongs into default"),
        ({"bits": 5}, "2, 3, 4, 8"),
        ({"bits": True}, "2, 3, 4, 8"),
        ({"bits": 4.0}, "2, 3, 4, 8"),
        ({"bits": None}, "2, 3, 4, 8"),
        ({"group_size": 48}, "-1, 32, 64, 128"),
        ({"group_size": 0}, "-1, 32, 64, 128"),
        ({"sym": 1}, "true or false"),
        ({"actorder": "weight"}, "true or false"),  # llm-compressor's, which is another thing
        ({"damp_percent": 5}, "between 0 and 1"),
        ({"damp_percent": float("nan")}, "between 0 and 1"),
        ({"damp_auto_increment": 0}, "above 0"),
        ({"mse": -1}, "exponent"),
        ({"nsamples": 0}, "from 1"),
        ({"seed": -1}, "from 0"),
        ({"data": 3}, "file or folder"),
        ({"bits": 4, "w_bit": 4}, "said twice"),
        ({"bits": 4, "default": {"wq": "int3"}}, "said twice"),
        ({"group_size": 64, "default": {"wq": "int3", "group_size": 32}}, "said twice"),
        ({"method": "awq"}, "another method"),
        ({"preset": "olmo"}, "did you mean olmoe?"),
        ({"preset": 3}, "no such ready config"),
        ({"overrides": {}}, "overrides is no list"),
    ],
)
def test_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantization_of(said)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"bits": 8}, "expected   4"),
        ({"version": "gemv"}, "gemm"),
        ({"sym": True}, "zero_point says this"),
        ({"desc_act": True}, "there is no key"),
        ({"overrides": [{"pattern": "*", "wq": "int8"}]}, "4 bits, nothing else"),
        ({"default": {"wq": "mxfp4"}}, "4 bits, nothing else"),
        ({"overrides": [{"pattern": "*", "group_size": 64}]}, "one group size"),
    ],
)
def test_refused_of_awq(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantization_of(said, "awq")
    assert words in str(caught.value)


def test_two_names_for_the_samples() -> None:
    assert quantization_of({"dataset": "a.txt"}, data="a.txt").calibration.data == "a.txt"
    assert quantization_of({}, data="a.txt").calibration.data == "a.txt"
    with pytest.raises(UsageError, match="named twice"):
        quantization_of({"data": "b.txt"}, data="a.txt")


@pytest.mark.parametrize(
    "said", ["{", "{]", '{"bits": 4, "bits": 3}', "nothing.json", "olmo", "", "x" * 9999, "{\ud800}"]
)
def test_text_that_is_neither(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        quantization_of(said)
    if said == "olmo":
        assert "did you mean olmoe?" in str(caught.value)


def test_a_default_sets_what_its_settings_say() -> None:
    made = quantization_of({"default": {"wq": "int3", "group_size": 32}})
    assert (made.settings.bits, made.settings.group_size) == (3, 32)
    assert quantization_of({"default": {"wq": "int8"}, "group_size": 64}).table.default.group == 64
    assert quantization_of({"default": {}}).table.default == Fields()  # AlphaQuant: no type unless a pattern says one
    assert quantization_of({"bits": 3, "overrides": []}).table.default == Fields("int3", group=128)


def test_a_preset_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantization_of("olmoe")
    assert plain.preset == "olmoe"
    more = quantization_of(
        {"preset": "olmoe", "nsamples": 3, "overrides": [{"pattern": "model.layers.0.*", "skip": True}]}
    )
    assert (more.preset, more.calibration.nsamples) == ("olmoe", 3)
    assert [o.pattern for o in more.table.overrides] == [
        *(o.pattern for o in plain.table.overrides),
        "model.layers.0.*",
    ]
    assert more.settings == plain.settings
    monkeypatch.chdir(tmp_path)
    (tmp_path / "olmoe").write_text("bits: 3")  # a file of this name is what was meant
    assert quantization_of("olmoe") == quantization_of({"bits": 3})


def test_every_preset_is_read() -> None:
    assert {"int4", "olmoe", "qwen2_moe", "mixtral", "deepseek_moe"} <= set(presets())
    for name in presets():
        assert quantization_of(name).preset == name


def test_clipped_to_the_model() -> None:
    asked = Calibration(seqlen=2048)
    assert asked.clipped(None) == asked.clipped(4096) == asked.clipped(2048) == (asked, "")
    clipped, note = asked.clipped(1024)
    assert clipped == Calibration(seqlen=1024)
    assert "1,024" in note
    assert "2,048" in note


_SAID = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 32, 64, 128]),
        "sym": st.booleans(),
        "desc_act": st.booleans(),
        "damp_percent": st.floats(1e-6, 0.99),
        "mse": st.floats(0, 16),
        "routing_weighted": st.booleans(),
        "nsamples": st.integers(1, 1000),
        "seed": st.integers(0, 2**63 - 1),
    },
)


@given(_SAID)
def test_what_is_described_says_what_was_meant(said: dict[str, Any]) -> None:
    """The description is plain JSON, holds every value that was said, and two that differ mean different things."""
    made = quantization_of(said)
    described = json.loads(json.dumps(made.describe()))
    calibration = described["calibration"]
    assert all((calibration | described)[key] == value for key, value in said.items())
    default = quantization_of(None)
    assert (described == json.loads(json.dumps(default.describe()))) == (made == default)
    assert "data" not in calibration


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*ISSUE, "default", "overrides", "wq", "pattern", "x"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_nothing_but_our_errors(said: Any) -> None:
    if isinstance(said, dict):
        for method in ("gptq", "awq"):
            try:
                assert isinstance(quantization_of(said, method), Quantization)
            except DconvError as error:
                assert error.exit_code in (2, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "twice"), ("x:\n  b: 1\n  b: 2", "twice"), ("a: &x [1]\nb: *x", "aliases"),
        ("[1]", "no mapping"),
        ("a: " + "9" * 9999, "no YAML"),
        ("", "no mapping"), ("# " + "x" * (1 << 20), "large"),
    ],
    ids=["twice", "deep twice", "alias", "list", "long number", "empty", "large"],
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_mapping(path, "--option")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: !!python/object/apply:os.system [true]", "a tag"), ("{" * 5000, "implausibly deep")],
    ids=["tag", "deep"],
)
def test_yaml_that_is_hostile(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(Damaged, match=words):
        read_mapping(path, "--option")


def test_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("1: yes\nx: 0x10\nn: null")
    assert read_mapping(path, "--option", texts=True) == {"1": "yes", "x": "0x10", "n": "null"}
    assert read_mapping(path, "--option") == {1: True, "x": 16, "n": None}
