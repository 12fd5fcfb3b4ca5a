"""AWS Neuron's names and shapes: which tensor of NxD Inference is made of which of HuggingFace's.

The names are those of the modules, which is what the vendor's loader has after its own conversion and renaming:

- ``model.`` is dropped (``get_state_dict``, ``models/application_base.py``), q, k and v lie under ``qkv_proj`` and not
  in one matrix (``fused_qkv`` is off unless asked for), and the output projection is ``o_proj.o_proj``
  (``preshard_hook``, ``modules/attention/gqa.py``, which leaves these names alone where they are there already);
- experts are one tensor a layer, each transposed, gate before up (``convert_hf_to_neuron_state_dict`` of
  ``models/mixtral``, ``models/qwen3_moe`` and the MiniMax-M2 contribution); Mixtral's move from ``block_sparse_moe`` to
  ``mlp``, MiniMax-M2's stay; the router is ``linear_router``; Qwen3-MoE's norms of queries and keys are
  ``q_layernorm`` and ``k_layernorm``, MiniMax-M2's keep their names;
- the loader adds by itself what depends on the parallel size: ``rank_util.rank``, spmd ranks, copies of key heads,
  padded query heads and expert widths, an output layer tied to the embedding. Rotary tables are computed.

The router keeps its dtype: the module is fp32 for Qwen3-MoE and MiniMax-M2, but by default (``cast_type="config"``) the
loader casts everything that is neither FP8 nor named ``…scale`` to the model's dtype, the router and its bias included.

In FP8 a matrix has one scale a row, experts one a block of each axis (`ROWS`, `BLOCKS`); MiniMax-M2's output projection
is bf16: its scale is dropped by that loader as redundant.

Llama's class and MiniMax-M2's read a directory of these names. Mixtral's and Qwen3-MoE's own classes convert
HuggingFace's names without looking whether that was done, so that theirs has to be told to leave the tensors be.

Source: aws-neuron/neuronx-distributed-inference 4bcdc54, aws-neuron/neuronx-distributed fbac349, and MiniMax-M2's
contribution, whn09/neuronx-distributed-inference 1638fba (branch contrib/MiniMax-M2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dconv.arch.family import Family, spelled_out
from dconv.arch.layouts import Facts
from dconv.errors import Refused, group_names
from dconv.sharding.layout import Fused, Part, Run
from dconv.sharding.region import Index
from dconv.sharding.tensor import Slot, TensorSpec

#: How the codes of an FP8 source are held: not at all, with one scale a row, or with one a block.
DENSE: Final = ""
ROWS: Final = "rows"
BLOCKS: Final = "blocks"


@dataclass(frozen=True, slots=True)
class NeuronRow:
    """One line: Neuron's name, HuggingFace's as in the family's own table, and how FP8 is held.

    ``*`` is the layer, ``#`` the expert; ``{q,k,v}`` in both spells as many tensors. A name with ``#`` on
    HuggingFace's side alone is a stack of experts.
    """

    neuron: str
    hf: str
    fp8: str = DENSE


_MLP, _SPARSE = "layers.*.mlp", "layers.*.block_sparse_moe"
_ATTENTION: Final = "layers.*.self_attn"
_FUSED: Final = "expert_mlps.mlp_op"


def _attention(output: str) -> tuple[NeuronRow, ...]:
    """What every decoder has; ``output`` is how the output projection is held."""
    return (
        NeuronRow("embed_tokens.weight", "model.embed_tokens.weight"),
        NeuronRow("norm.weight", "model.norm.weight"),
        NeuronRow("lm_head.weight", "lm_head.weight"),
        NeuronRow("layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
        NeuronRow("layers.*.post_attention_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
        NeuronRow(f"{_ATTENTION}.qkv_proj.{{q,k,v}}_proj.weight", f"model.{_ATTENTION}.{{q,k,v}}_proj.weight", ROWS),
        NeuronRow(f"{_ATTENTION}.o_proj.o_proj.weight", f"model.{_ATTENTION}.o_proj.weight", output),
    )


def _experts(here: str, theirs: str, gate_up: str, down: str) -> tuple[NeuronRow, ...]:
    return (
        NeuronRow(f"{here}.router.linear_router.weight", f"{theirs}.gate.weight"),
        NeuronRow(f"{here}.{_FUSED}.gate_up_proj.weight", f"{theirs}.experts.#.{gate_up}.weight", BLOCKS),
        NeuronRow(f"{here}.{_FUSED}.down_proj.weight", f"{theirs}.experts.#.{down}.weight", BLOCKS),
    )


# fmt: off
TABLES: Final[Mapping[str, tuple[NeuronRow, ...]]] = {
    "llama": (
        *_attention(ROWS),
        NeuronRow(f"{_ATTENTION}.qkv_proj.{{q,k,v}}_proj.bias", f"model.{_ATTENTION}.{{q,k,v}}_proj.bias"),
        NeuronRow(f"{_ATTENTION}.o_proj.o_proj.bias",           f"model.{_ATTENTION}.o_proj.bias"),
        NeuronRow(f"{_MLP}.{{gate,up}}_proj.weight",            f"model.{_MLP}.{{gate,up}}_proj.weight", ROWS),
        NeuronRow(f"{_MLP}.{{gate,up}}_proj.bias",              f"model.{_MLP}.{{gate,up}}_proj.bias"),
        NeuronRow(f"{_MLP}.down_proj.weight",                   f"model.{_MLP}.down_proj.weight", ROWS),
        NeuronRow(f"{_MLP}.down_proj.bias",                     f"model.{_MLP}.down_proj.bias"),
    ),
    "mixtral": (
        *_attention(ROWS),
        *_experts(_MLP, f"model.{_SPARSE}", "w{1,3}", "w2"),
    ),
    "qwen3_moe": (
        *_attention(ROWS),
        NeuronRow(f"{_ATTENTION}.q_layernorm.weight",           f"model.{_ATTENTION}.q_norm.weight"),
        NeuronRow(f"{_ATTENTION}.k_layernorm.weight",           f"model.{_ATTENTION}.k_norm.weight"),
        *_experts(_MLP, f"model.{_MLP}", "{gate,up}_proj", "down_proj"),
    ),
    "minimax_m2": (
        *_attention(DENSE),
        NeuronRow(f"{_ATTENTION}.q_norm.weight",                f"model.{_ATTENTION}.q_norm.weight"),
        NeuronRow(f"{_ATTENTION}.k_norm.weight",                f"model.{_ATTENTION}.k_norm.weight"),
        NeuronRow(f"{_SPARSE}.router.e_score_correction_bias",  f"model.{_SPARSE}.e_score_correction_bias"),
        *_experts(_SPARSE, f"model.{_SPARSE}", "w{1,3}", "w2"),
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of Neuron's.

    Attributes:
        name: Neuron's name, layer filled in.
        sources: HuggingFace's tensors in it: of each expert its halves, of anything else the one.
        stacked: whether it is experts: [expert, in, out of every half].
        fp8: how an FP8 source's codes are held.
    """

    name: str
    sources: tuple[tuple[TensorSpec, ...], ...]
    stacked: bool
    fp8: str

    @property
    def _fused(self) -> tuple[Fused, ...]:
        order = (1, 0) if self.stacked else tuple(range(len(self.sources[0][0].shape)))
        return tuple(
            Fused(
                self.name,
                axis=len(order) - 1 if self.stacked else 0,
                parallel=False,
                parts=tuple(Part((Run(spec.name, 0, spec.shape[0]),)) for spec in specs),
                specs=specs,
                order=order,
            )
            for specs in self.sources
        )

    @property
    def shape(self) -> Index:
        """The tensor's own, as Neuron has it; of experts the first axis numbers them."""
        one = self._fused[0].shape()
        return (len(self.sources), *one) if self.stacked else one

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where each of ``sources`` lies in it."""
        lead = enumerate(self._fused)
        return tuple(slot for i, one in lead for slot in one.slots(one.whole(), (i,) if self.stacked else ()))

    def scales(self, block: tuple[int, int], name: Callable[[str], str]) -> Held:
        """The scales of an FP8 tensor held in blocks, laid out as it is.

        Args:
            block: rows and columns of HuggingFace's matrix that share a scale, as the config says.
            name: HuggingFace's name of the scales of a weight.

        Raises:
            Refused: a width is no multiple of the block. Neuron's blocks have no edge (``_setup_for_scale`` in
                neuronx_distributed's ``quantization/quantization_layers.py`` divides, and drops the rest), and two
                halves side by side would not begin at one.
        """
        whole = [spec for specs in self.sources for spec in specs]
        if uneven := [spec for spec in whole if any(n % step for n, step in zip(spec.shape, block, strict=True))]:
            raise Refused(
                f"{len(uneven)} experts' matrices are no whole number of blocks, as Neuron's have to be, "
                "nothing was written",
                where=group_names(spec.name for spec in uneven),
                expected=f"a multiple of {block[0]} x {block[1]} (weight_block_size)",
                found=" x ".join(str(n) for n in uneven[0].shape),
                do="convert it to a dense Neuron checkpoint",
            )
        rows, columns = block
        specs = tuple(
            tuple(TensorSpec(name(s.name), (s.shape[0] // rows, s.shape[1] // columns), "f32") for s in halves)
            for halves in self.sources
        )
        return replace(self, name=scale_of(self.name), sources=specs)


def loaded_from(stored: str) -> str:
    """The table's name for a stored tensor: the vendor's scripts leave the attention's outer names to the loader."""
    layer, attention, rest = stored.partition(".self_attn.")
    if attention and rest.startswith(("q_proj.", "k_proj.", "v_proj.")):
        rest = f"qkv_proj.{rest}"
    elif attention and rest.startswith("o_proj.") and not rest.startswith("o_proj.o_proj."):
        rest = f"o_proj.{rest}"
    return layer + attention + rest


#: Ends of matrices whose modules are no parallel linear layers, so that no reader makes FP8 layers of them.
_NEVER_FP8: Final = ("embed_tokens.weight", "norm.weight", "linear_router.weight")
#: The output layer has a module of its own where it is tied to the embedding, too.
_HEAD: Final = "lm_head"


def left_plain(shapes: Mapping[str, Index], quantised: Collection[str]) -> tuple[str, ...]:
    """``modules_to_not_convert``: the linear modules that are stored without FP8, and no others.

    NxD makes FP8 layers of all parallel linear modules but those whose dotted name has an entry *somewhere in it*
    (``_convert_initialized_float_to_initialized_quantized`` of neuronx_distributed's ``quantization/quantize.py``).
    So an entry is the last part of such modules' name where that is in no quantised module's name, else a whole name.

    Args:
        shapes: of all tensors, under Neuron's names.
        quantised: those in FP8; the list is empty where there are none.
    """
    if not quantised:
        return ()
    linear = [name for name, shape in shapes.items() if len(shape) > 1 and name.endswith(".weight")]
    modules = [name.removesuffix(".weight") for name in linear if not name.endswith(_NEVER_FP8)]
    coded = [name.removesuffix(".weight") for name in quantised]
    found: dict[str, None] = {}
    for module in dict.fromkeys([_HEAD, *modules]):
        if f"{module}.weight" not in quantised:
            last = module.rpartition(".")[2]
            found[module if any(last in other for other in coded) else last] = None
    return tuple(found)


def scale_of(weight: str) -> str:
    """Neuron's name of the scales of ``weight``."""
    return weight.removesuffix(".weight") + ".scale"


@dataclass(frozen=True, slots=True)
class Scales:
    """How many of a source's scales (tensors, one a weight in FP8) went which way: every one is in one of the three."""

    kept: int
    requantised: int
    dropped: int

    @property
    def read(self) -> int:
        """All of them that the source has."""
        return self.kept + self.requantised + self.dropped


def count_scales(held: Iterable[Held]) -> Scales:
    """Of the weights that are in FP8 in the source: held in blocks, by row, and decoded."""
    ways = [one.fp8 for one in held for specs in one.sources for spec in specs if spec.dtype == "f8_e4m3"]
    return Scales(ways.count(BLOCKS), ways.count(ROWS), ways.count(DENSE))


def lay_out(family: Family, facts: Facts, dtypes: Mapping[str, str] | None = None) -> tuple[Held, ...]:
    """Every tensor that Neuron has of a model, in the model's own order.

    Args:
        family: one of `TABLES`.
        facts: of the model.
        dtypes: of HuggingFace's tensors, by name, where known (bf16 otherwise).

    Raises:
        Refused: a family without a table here, or a tensor that its class in NxD Inference does not have.
    """
    table = TABLES.get(family.name)
    if table is None:
        raise Refused(
            f"Neuron's names of {family.name} are not known, nothing was written",
            expected="one of " + ", ".join(TABLES),
        )
    rows = {row.hf: row for row in table}
    held: list[Held] = []
    strange: list[str] = []
    experts: dict[str, list[tuple[TensorSpec, ...]]] = {}
    for entry in family.entries(facts):
        specs = tuple(replace(s, dtype=dtypes.get(s.name, s.dtype)) if dtypes else s for s in entry.fused.specs)
        row = rows.get(entry.row.hf)
        if row is None:
            strange += [spec.name for spec in specs]
            continue
        names = [name.replace("*", str(entry.layer)) for name in spelled_out(row.neuron)]
        if not entry.row.per_expert:
            held += [Held(name, ((spec,),), False, row.fp8) for name, spec in zip(names, specs, strict=True)]
            continue
        stack = experts.setdefault(names[0], [])
        stack.append(specs)
        if len(stack) == facts["experts"]:
            held.append(Held(names[0], tuple(stack), True, row.fp8))
    if strange:
        raise Refused(
            f"{len(strange)} tensors have no place in Neuron's {family.name}, nothing was written",
            where=group_names(strange),
            expected="what its class in NxD Inference has: " + ", ".join(dict.fromkeys(row.hf for row in table)),
        )
    return tuple(held)
