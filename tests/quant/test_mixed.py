"""Mixed precision by pattern: on the real names of every family, against the plain reading of the rule."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
from compressed_tensors.config import CompressionFormat
from hypothesis import given
from hypothesis import strategies as st

from dconv.arch.registry import by_name, families
from dconv.errors import DconvError, Refused, UsageError
from dconv.quant.kinds import KINDS
from dconv.quant.listing import lines_of
from dconv.quant.mixed import Choice, resolve
from dconv.quant.names import folded
from dconv.quant.parse import presets, quantization_of
from dconv.quant.readers import readers, torn
from tests.models import KEYS, config_of, facts_of

Shapes = dict[str, tuple[int, ...]]
#: Preset -> the families that it is for.
PRESETS = {"olmoe": "olmoe", "qwen2_moe": "qwen2_moe", "mixtral": "mixtral", "deepseek_moe": "deepseek"}
#: Sizes at which groups of 128 are whole, as they are in the published models.
WHOLE = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}


def shapes_of(name: str, **sizes: Any) -> Shapes:
    family = by_name(name)
    own = {key: value for key, value in EXPERTS.items() if key in KEYS.get(name, {})}
    config = config_of(family, **{**WHOLE, **own, **sizes})
    return {spec.name: spec.shape for entry in family.entries(facts_of(family, config)) for spec in entry.fused.specs}


OLMOE = shapes_of("olmoe")


def choices(said: Any, shapes: Shapes = OLMOE, **options: Any) -> dict[str, str]:
    """Words by module."""
    found = resolve(quantization_of(said), shapes, **options).choices
    return {name.removesuffix(".weight"): choice.words for name, choice in found.items()}


def test_the_issues_own_example() -> None:
    said = {
        "default": {"wq": "int4", "aq": "bf16", "group_size": 128},
        "overrides": [
            {"pattern": "*.mlp.experts.*", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.mlp.gate", "skip": True, "comment": "the router"},
        ],
    }
    resolved = resolve(quantization_of(said), OLMOE, strict=True)
    found = choices(said, strict=True)
    assert resolved.notices == ()
    assert found["model.layers.1.self_attn.q_proj"] == "int4 g128"
    assert found["model.layers.2.mlp.experts.3.down_proj"] == "mxfp4 g32"
    assert found["model.layers.0.mlp.gate"] == "as it is (router)"
    assert found["lm_head"] == "as it is (output layer)"
    assert "model.embed_tokens" not in found
    (reader,) = readers(resolved.choices).found
    assert (reader.name, reader.format) == ("compressed-tensors", "mixed-precision")


def test_alphaquants_file_of_mxfp6() -> None:
    """``configs/olmoe_mxfp6.json`` of AlphaQuant with weights alone: its groups are not MX's."""
    said: dict[str, Any] = {
        "default": {},
        "overrides": [
            {"pattern": "*lm_head*", "skip": True},
            {"pattern": "*.mlp.gate*", "skip": True},
            {"pattern": "*.self_attn.*", "wq": "mxfp8", "aq": "mxfp8", "group_size": 128},
            {"pattern": "*.experts.*.gate_proj", "wq": "mxfp6", "group_size": 64, "extra": {"format": "e3m2"}},
            {"pattern": "*.experts.*.up_proj", "wq": "mxfp6", "group_size": 64, "extra": {"format": "e3m2"}},
            {"pattern": "*.experts.*.down_proj", "wq": "mxfp6", "group_size": 64, "extra": {"format": "e3m2"}},
        ],
    }
    resolved = resolve(quantization_of(said), OLMOE)
    found = choices(said)
    assert found["model.layers.0.mlp.experts.1.up_proj"] == "mxfp6_e3m2 g32"
    assert found["model.layers.0.self_attn.o_proj"] == "mxfp8 g32, activations mxfp8"
    assert len(resolved.notices) == 2
    assert "mxfp6 has groups of 32, 64 was asked for: model.layers.{0..2}.mlp.experts.{0..3}.{gate,up,down}_proj" in (
        resolved.notices
    )
    missing = readers(resolved.choices).missing
    assert "no public loader" in missing
    assert "mxfp6_e3m2 g32: quark" in missing
    assert "mxfp8 g32, activations mxfp8: compressed-tensors" in missing
    said["overrides"][3]["aq"] = "mxfp6"  # as the file has it
    with pytest.raises(Refused, match="activations are not quantised in this type"):
        quantization_of(said)


@pytest.mark.parametrize("aq", ["int8", "fp4", "mxfp4", "nothing", 8, ["fp8"]])
def test_activations_without_a_dynamic_scheme(aq: Any) -> None:
    with pytest.raises(Refused, match="activations"):
        quantization_of({"default": {"wq": "int8", "aq": aq}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"pattern": "*", "wq": "int9"}, "did you mean int"),
        ({"pattern": "*", "wq": "MXFP4"}, "did you mean mxfp4?"),
        ({"pattern": "*", "wq": None}, "wq has no value"),
        ({"pattern": "*", "wq": ["int4"]}, "no such type"),
        ({"pattern": "*", "bits": 4}, "there is no key 'bits'"),
        ({"pattern": "*", "group_sise": 4}, "did you mean group_size?"),
        ({"pattern": "*", "group_size": "64"}, "group_size makes no sense"),
        ({"pattern": "*", "group_size": 0}, "group_size makes no sense"),
        ({"pattern": "*", "skip": "yes"}, "skip is true or false"),
        ({"pattern": "*", "wq": "mxfp6", "extra": {"format": "e4m3"}}, "extra says the format"),
        ({"pattern": "*", "wq": "int4", "extra": {"format": "e2m3"}}, "int4 has one format"),
        ({"pattern": "*", "wq": "mxfp6", "extra": {"fmt": "e2m3"}}, "extra says the format"),
        ({"wq": "int4"}, "no pattern"),
        ({"pattern": ""}, "no pattern"),
        ({"pattern": 3}, "no pattern"),
        ("*", "no pattern"),
    ],
)  # fmt: skip
def test_overrides_that_make_no_sense(override: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantization_of({"overrides": [override]})
    assert words in str(caught.value)
    assert "overrides[0]" in str(caught.value)


def test_patterns_with_and_without_weight() -> None:
    for pattern in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"):
        found = choices({"overrides": [{"pattern": pattern, "wq": "int8"}]}, strict=True)
        assert [name for name, words in found.items() if words == "int8 g128"] == ["model.layers.0.self_attn.q_proj"]


def test_later_overrides_win_and_fields_merge() -> None:
    found = choices({
        "overrides": [
            {"pattern": "*.layers.0.*", "skip": True},
            {"pattern": "*.experts.*", "wq": "mxfp6", "extra": {"format": "e3m2"}},
            {"pattern": "*.experts.1.*", "wq": "int8", "group_size": 32},
            {"pattern": "*.experts.1.up_proj", "group_size": 64},
            {"pattern": "model.layers.0.self_attn.k_proj", "skip": False},
        ]
    })  # fmt: skip
    assert found["model.layers.0.mlp.experts.1.up_proj"] == "as it is (skipped)"  # a type does not take a skip back
    assert found["model.layers.0.self_attn.k_proj"] == "int4 g128"
    assert found["model.layers.1.mlp.experts.0.up_proj"] == "mxfp6_e3m2 g32"  # a group that it inherits is not its own
    assert found["model.layers.1.mlp.experts.1.gate_proj"] == "int8 g32"
    assert found["model.layers.1.mlp.experts.1.up_proj"] == "int8 g64"


def test_idle_patterns() -> None:
    said = {"overrides": [{"pattern": "*.mpl.*", "skip": True}, {"pattern": "*norm*", "wq": "fp4"}]}
    (notice,) = resolve(quantization_of(said), OLMOE).notices
    assert notice == "patterns that match no linear layer: *.mpl.*, *norm*"
    (notice,) = resolve(quantization_of({**said, "preset": "int4"}), OLMOE).notices
    assert notice.startswith("patterns of the ready config that match")
    with pytest.raises(Refused) as caught:
        resolve(quantization_of(said), OLMOE, strict=True)
    assert "*.mpl.*" in str(caught.value)


def test_the_output_layer() -> None:
    assert choices({"lm_head": True})["lm_head"] == "int4 g128"
    assert choices({"overrides": [{"pattern": "lm_head", "wq": "int8"}]})["lm_head"] == "int8 g128"
    assert choices({"overrides": [{"pattern": "*", "group_size": 64}]})["lm_head"] == "as it is (output layer)"
    with pytest.raises(UsageError, match="to be skipped"):
        choices({"lm_head": True, "overrides": [{"pattern": "lm_head", "skip": True}]})


def test_routers_and_gates_are_never_coded() -> None:
    found = choices({"overrides": [{"pattern": "*", "wq": "int8"}]}, shapes_of("qwen2_moe"))
    gates = [name for name in found if name.endswith(("mlp.gate", "shared_expert_gate"))]
    assert gates
    assert {found[name] for name in gates} == {"as it is (router)"}


@pytest.mark.parametrize(
    ("default", "words"),
    [
        ({"wq": "fp8", "group_size": 64}, "fp8 has groups of 128, 64 was asked for"),
        ({"wq": "fp4", "group_size": 32}, "fp4 has groups of 16, 32 was asked for"),
        ({"wq": "mxfp8", "group_size": -1}, "mxfp8 has groups of 32, -1 was asked for"),
    ],
)
def test_group_sizes_of_a_type(default: dict[str, Any], words: str) -> None:
    (notice,) = resolve(quantization_of({"default": default}), OLMOE).notices
    assert notice.startswith(words)


def test_group_sizes_that_are_refused() -> None:
    with pytest.raises(UsageError, match="a group size that no loader takes"):
        choices({"default": {"wq": "int4", "group_size": 48}})
    narrow = OLMOE | {"model.layers.0.self_attn.q_proj.weight": (128, 96)}
    with pytest.raises(Refused) as caught:
        choices({}, narrow)
    assert "group_size 32 divides them" in str(caught.value)
    found = choices("int4", narrow)
    assert found["model.layers.0.self_attn.q_proj"] == "int4 g32"
    assert found["model.layers.0.self_attn.k_proj"] == "int4 g128"


def test_experts_of_a_layer_stay_alike() -> None:
    """One of them is narrow: all of its layer's have its group, and no other layer's."""
    narrow = OLMOE | {"model.layers.1.mlp.experts.2.down_proj.weight": (128, 96)}
    found = choices("olmoe", narrow)
    of = {
        layer: {words for name, words in found.items() if f"layers.{layer}.mlp.experts" in name} for layer in range(3)
    }
    assert of == {0: {"int4 g128"}, 1: {"int4 g32"}, 2: {"int4 g128"}}
    assert torn(resolve(quantization_of("olmoe"), narrow).choices) == []


def test_what_vllm_loads_as_one_is_told_where_it_is_torn() -> None:
    """DeepSeek's ranks before queries and keys are one matrix there, too."""
    overrides = [{"pattern": "*.q_a_proj", "wq": "int8"}, {"pattern": "*.up_proj", "wq": "int8"}]
    said = quantization_of({"default": {"wq": "int4", "group_size": 32}, "overrides": overrides})
    lines = torn(resolve(said, shapes_of("deepseek_v3", kv_lora_rank=32, q_lora_rank=32)).choices)
    whole = ("gate_proj+up_proj", "q_a_proj+kv_a_proj_with_mqa", "experts")
    assert [what for what in whole if any(f"loads {what} as one" in line for line in lines)] == [*whole]


def test_nothing_left() -> None:
    for said in ({"default": {}}, {"overrides": [{"pattern": "*", "skip": True}]}):
        with pytest.raises(Refused, match="nothing is left to quantise"):
            choices(said)
    with pytest.raises(Refused, match="nothing is left"):
        choices({}, {"model.norm.weight": (8,)})


def test_experts_in_one_tensor() -> None:
    with pytest.raises(Refused, match="one tensor for all"):
        choices({}, shapes_of("gpt_oss"))


@pytest.mark.parametrize("name", sorted(set(families()) - {"gpt_oss"}))
def test_linear_layers_are_those_of_the_table(name: str) -> None:
    """Names alone tell the same matrices as the family's own table does, and others outside of a decoder."""
    family = by_name(name)
    entries = list(family.entries(facts_of(family, config_of(family))))
    shapes = {spec.name: spec.shape for entry in entries for spec in entry.fused.specs}
    linear = {
        spec.name for entry in entries for spec in entry.fused.specs if entry.row.is_linear and len(spec.shape) == 2
    }
    config = quantization_of({"default": {"wq": "int8", "group_size": -1}})
    if not linear:
        with pytest.raises(Refused, match="nothing is left"):
            resolve(config, shapes, linear)
        return
    assert set(resolve(config, shapes, linear).coded) == linear
    others = resolve(config, shapes).coded.keys() - linear
    assert not others or name in ("llava", "minicpmv", "t5")
    outside = ("encoder.", "vision_tower.", "multi_modal_projector.", "vpm.", "resampler.")
    assert all(other.startswith(outside) for other in others)


OWN = [
    (name, family) for name in presets() for key, family in PRESETS.items() if name.partition("-")[0] in (key, "int4")
]


@pytest.mark.parametrize(("preset", "family"), OWN)
def test_presets_on_their_families(preset: str, family: str) -> None:
    """No pattern is idle, all of it has a reader, and vLLM holds nothing of it apart."""
    shapes = shapes_of(family)
    resolved = resolve(quantization_of(preset), shapes)
    assert resolved.notices == ()
    assert readers(resolved.choices).found
    assert torn(resolved.choices) == []
    routers = [n for n in resolved.choices if n.endswith((".gate.weight", "_gate.weight"))]
    assert routers
    assert all(resolved.choices[n].plain for n in routers)
    (experts,) = {choice.words for n, choice in resolved.choices.items() if ".experts." in n}
    assert experts.startswith({"mxfp4": "mxfp4", "mxfp6": "mxfp6"}.get(preset.rpartition("-")[2], "int4"))
    tiny = {n: tuple(max(1, size // 4) for size in shape) for n, shape in shapes.items()}
    assert resolve(quantization_of(preset), tiny).choices  # smaller groups, or as they are


def test_a_readers_formats_exist() -> None:
    known = {form.value for form in CompressionFormat}
    for kind in KINDS.values():
        for element in kind.elements or ("",):
            for group in kind.groups:
                for reader in readers({"x": Choice(kind.name, group, element)}).found:
                    assert reader.name != "compressed-tensors" or reader.format in known


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ([Choice("int4", 128)], ["gptq", "awq", "compressed-tensors"]),
        ([Choice("int3", 128)], ["gptq", "compressed-tensors"]),
        ([Choice("int5", 128)], ["compressed-tensors"]),
        ([Choice("int4", 128), Choice("int8", 128)], ["gptq", "compressed-tensors"]),
        ([Choice("int4", 128), Choice("mxfp4", 32, "e2m1")], ["compressed-tensors"]),
        ([Choice("mxfp4", 32, "e2m1")], ["compressed-tensors", "quark"]),
        ([Choice("mxfp6", 32, "e3m2")], ["quark"]),
        ([Choice("mxfp6", 32, "e3m2"), Choice("mxfp4", 32, "e2m1")], ["quark"]),
        ([Choice("mxfp6", 32, "e3m2"), Choice("int4", 128)], []),
        ([Choice("fp6", 128, "e2m3")], []),
        ([Choice("fp8", 128, "e4m3", "fp8")], ["fp8", "compressed-tensors"]),
        ([Choice("fp8", -1, "e4m3", "fp8")], ["compressed-tensors"]),
        ([Choice("int8", 128, aq="fp8")], []),
    ],
)
def test_readers(kinds: list[Choice], names: list[str]) -> None:
    found = readers({str(number): kind for number, kind in enumerate(kinds)} | {"plain": Choice("bf16")})
    assert [reader.name for reader in found.found] == names
    assert bool(found.missing) == (not names)


def test_what_vllm_holds_in_one_is_named() -> None:
    said = {"overrides": [{"pattern": "*.q_proj", "wq": "int8"}, {"pattern": "*.experts.1.*", "wq": "int8"}]}
    found = torn(resolve(quantization_of(said), OLMOE).choices)
    assert any("q_proj+k_proj+v_proj" in line and "model.layers.{0..2}.self_attn" in line for line in found)
    assert any("experts" in line and "model.layers.{0..2}.mlp.experts" in line for line in found)


# ------------------------------------------------------------------------------------------------- by the plain rule

_PATTERNS = st.sampled_from(
    ["*", "*.mlp.*", "*experts*", "*.experts.[01].*", "model.layers.0.*", "*_proj", "*q_proj.weight",
     "model.layers.?.mlp.*", "*gate*", "lm_head*", "*.norm.*"]
)  # fmt: skip
_OVERRIDE = st.fixed_dictionaries(
    {"pattern": _PATTERNS},
    optional={
        "wq": st.sampled_from(sorted(KINDS)),
        "group_size": st.sampled_from([-1, 32, 64]),
        "skip": st.booleans(),
        "aq": st.sampled_from(["bf16", "fp8"]),
    },
)


@given(st.lists(_OVERRIDE, max_size=4))
def test_against_the_rule_said_plainly(overrides: list[dict[str, Any]]) -> None:
    """One dictionary, updated by every override that fnmatch finds to fit, as AlphaQuant resolves a scheme."""
    config = quantization_of({"default": {"wq": "int4", "group_size": 128}, "overrides": overrides})
    try:
        found = resolve(config, OLMOE).choices
    except DconvError as error:
        assert "nothing is left" in error.what
        return
    for name in OLMOE:
        if name.endswith("_proj.weight"):
            scheme: dict[str, Any] = {"wq": "int4", "group_size": 128}
            for override in overrides:
                if any(fnmatch.fnmatchcase(form, override["pattern"]) for form in (name, name.removesuffix(".weight"))):
                    scheme.update(override)
            wq = "bf16" if scheme.get("skip") else scheme["wq"]
            assert found[name].wq == wq
            if wq != "bf16":
                kind = KINDS[wq]
                group = scheme["group_size"] if scheme["group_size"] in kind.groups else kind.group
                assert (found[name].group, found[name].aq) == (group, scheme.get("aq", "bf16"))


def spelled_out(text: str) -> set[str]:
    """Every name that a folded one stands for."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return {text}
    parts: list[str] = []
    for part in found[1].split(","):
        low, dots, high = part.partition("..")
        parts += map(str, range(int(low), int(high) + 1)) if dots else [part]
    return {name for part in parts for name in spelled_out(text.replace(found[0], part, 1))}


@given(st.sets(st.sampled_from(sorted(name for name in OLMOE if name.endswith("_proj.weight"))), min_size=1))
def test_folded_names_are_exactly_the_names(names: set[str]) -> None:
    each = [spelled_out(text) for text in folded(names)]
    assert sum(map(len, each)) == len(names)
    assert set().union(*each) == {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize("preset", ["qwen2_moe", "mixtral-mxfp4"])
def test_a_table_for_a_terminal(preset: str) -> None:
    shapes = shapes_of(PRESETS[preset.partition("-")[0]])
    resolved = resolve(quantization_of(preset), shapes)
    lines = lines_of(resolved.choices)
    assert max(map(len, lines)) <= 80
    counted = sum(int(line.split()[-2].replace(",", "")) for line in lines if not line.startswith(" "))
    assert counted == len(resolved.choices)
    assert len(lines) < 20


def test_long_names_are_wrapped_not_cut() -> None:
    names = {f"model.{'very_' * 12}long.layers.{layer}.mlp.{part}_proj.weight": Choice("int4", 128)
             for layer in range(2) for part in ("gate", "up")}  # fmt: skip
    lines = lines_of(names)
    assert max(map(len, lines)) <= 80
    assert spelled_out("".join(line.strip() for line in lines[1:])) == {name.removesuffix(".weight") for name in names}
