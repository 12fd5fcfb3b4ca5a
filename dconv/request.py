"""What a person asked for, before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dconv.sharding.coords import Parallel

if TYPE_CHECKING:
    from dconv.codec.mx import Rule

#: Every spelling of FORMAT -> its engine.
FORMATS: Final = {
    "huggingface": "huggingface", "hf": "huggingface", "safetensors": "huggingface", "megatron2hf": "huggingface",
    "megatron": "megatron", "hf2megatron": "megatron",
    "fp8": "huggingface", "mx": "huggingface", "gptq": "huggingface", "awq": "huggingface", "neuron": "neuron",
    "hf2neuron": "neuron",
    "gguf": "gguf", "mlx": "mlx", "pt": "pt", "bmtrain": "bmtrain", "modelcenter": "bmtrain",
    "onnx": "onnx", "torch_export": "torch_export", "pt2": "torch_export", "torchscript": "torchscript",
}  # fmt: skip

#: Those whose weights are stored in codes.
QUANTISED: Final = ("fp8", "mx", "gptq", "awq")
#: Those whose codes are chosen by calibration, where the source has none.
CALIBRATED: Final = ("gptq", "awq")
#: What options of codes may say: ``--quant-config``, ``--neuron-rescale``, ``--neuron-scale``; the default first.
CODE_READERS: Final = ("transformers", "quark", "compressed-tensors")
NEURON_RESCALES: Final = ("2", "448/240")
NEURON_SCALES: Final = ("multiplier", "reciprocal")
#: Options of codes, with what stands for them where they are not given.
_OF_CODES: Final = {
    "quant": None, "block_size": None, "scale_format": "float", "scale_rule": None, "quant_config": None,
    "quantization_config": None, "calibration": None, "strict": False, "neuron_rescale": None, "neuron_scale": None,
}  # fmt: skip
#: What to do about tensors that several shards of a source hold (`Request.replicas`).
REPLICAS: Final = ("equal", "first")


@dataclass(frozen=True)
class Request:
    """What a person asked for. Field names are the command line's.

    Attributes:
        model: path of the source.
        format: a key of `FORMATS`.
        out: output path; None is ``./<model>-<format>``.
        source_format: the source's container; None detects it.
        model_type: its family; None detects it.
        hf_config: a directory whose config.json and tokenizer are used instead of the source's own.
        parallel: the target's layout (Megatron; of ``pt`` the tensor parallel size alone).
        dtype: dconv's short name, or None to keep every tensor's own.
        shard_size: bytes of one file of weights, at most; None as the FORMAT has it (`file_size`, `split_size`).
        megatron_format: the container of a Megatron target: ``torch_dist``, ``legacy`` or ``model_pt``.
        transformer_impl: whose layer names its legacy files have, ``transformer_engine`` or ``local``.
        divisor: the vocabulary is padded to a multiple of this times tp (Megatron).
        drop: patterns of tensors to leave out; one may stand without a tuple around it.
        rename: a file of patterns for the source's tensor names.
        replicas: a tensor that several shards hold must be ``equal`` in all of them, or the ``first`` is taken.
        submodel: which model of a distillation checkpoint is meant, ``student`` or ``teacher``.
        teacher: a second checkpoint, to go into the same output (Megatron) as the model's teacher.
        teacher_only: leave the model itself out of that output.
        with_eagle: keep the tensors of an EAGLE head.
        mup2llama: fold muP scalars into the weights.
        fake_weight: take the model's config alone, and make its weights up.
        quant: the variant of FORMAT (`dconv.quantise.VARIANTS`); None is its first.
        block_size: rows and columns that share a scale.
        scale_format: ``float`` or ``ue8m0``, powers of two.
        neuron_rescale: what Neuron's FP8 codes are divided by and their scales multiplied by: ``2`` or ``448/240``.
        neuron_scale: whether Neuron's scales are written as what multiplies, or as its reciprocal.
        scale_rule: how an MX block's largest magnitude becomes its power of two (`dconv.codec.mx.Rule`); None as the
            reader's own tools have it: floor, and even for compressed-tensors.
        quant_config: for whom names and ``quantization_config`` are written (`dconv.quantise.Variant.readers`).
        quantization_config: settings of a calibrated quantisation: JSON, a file's name, or a preset's.
        calibration: a file or folder of samples; None for the text that ships.
        strict: a pattern of that config that matches nothing is an error.
        device: where calibration computes, and what a graph is written for: torch's name, or ``auto``
            (`dconv.net.device`).
        gguf_pretokenizer: llama.cpp's name for how a tokenizer splits text; None finds it out.
        opset: of ONNX; None is the exporter's own.
        lengths: tokens of a text, and of what came before it, that an ONNX graph is for; None is for any.
        for_codes: such a graph's compiler will give its activations codes (`dconv.hw.static_graph` says so).
        ports: whose inputs and outputs an ONNX graph of given lengths has: ``genie``'s (`dconv.export.genie`); None is
            onnxruntime-genai's. No option says it.
        fake_weight_config: a file of sizes and values for that (`dconv.checkpoint.fake_config`).
    """

    model: Path
    format: str
    out: Path | None = None
    source_format: str | None = None
    model_type: str | None = None
    hf_config: Path | None = None
    parallel: Parallel = Parallel()
    megatron_format: str = "torch_dist"
    transformer_impl: str = "transformer_engine"
    divisor: int = 128
    dtype: str | None = None
    shard_size: int | None = None
    drop: str | Sequence[str] = ()
    replicas: str = "equal"
    rename: Path | None = None
    submodel: str | None = None
    teacher: Path | None = None
    teacher_only: bool = False
    with_eagle: bool = False
    mup2llama: bool = False
    quant: str | None = None
    block_size: tuple[int, int] | None = None
    scale_format: str = "float"
    neuron_rescale: str | None = None
    neuron_scale: str | None = None
    scale_rule: Rule | None = None
    quant_config: str | None = None
    quantization_config: str | None = None
    calibration: str | None = None
    strict: bool = False
    device: str = "auto"
    gguf_pretokenizer: str | None = None
    opset: int | None = None
    lengths: tuple[int, int] | None = None
    for_codes: bool = False
    ports: str | None = None
    fake_weight: bool = False
    fake_weight_config: Path | None = None

    @property
    def file_size(self) -> int:
        """Bytes of one HuggingFace file."""
        return self.shard_size or 5_000_000_000

    @property
    def split_size(self) -> int | None:
        """Bytes of one file of a GGUF; None writes one file."""
        return self.shard_size

    @property
    def source(self) -> Path:
        """The checkpoint whose weights are written: the model, or its teacher where that alone is."""
        return self.teacher if self.teacher_only and self.teacher is not None else self.model

    @property
    def output(self) -> Path:
        """Where the result goes."""
        if self.out is not None:
            return self.out
        model = self.model.resolve()
        if self.fake_weight and model.name == "config.json":
            model = model.parent
        name = self.format if self.quant is None else self.quant
        return Path(
            f"{model.name.removesuffix('.gguf')}-{name if self.format in QUANTISED else FORMATS.get(self.format, name)}"
        )


def spelled(option: str) -> str:
    """A field as the command line has it."""
    return "--from" if option == "source_format" else f"--{option.replace('_', '-')}"


def is_in_codes(request: Request) -> bool:
    """Whether FORMAT has codes, or an option speaks of some; else nothing is encoded, and nothing is to be refused."""
    if request.format in QUANTISED or FORMATS.get(request.format) == "neuron":
        return True
    return any(getattr(request, name) != otherwise for name, otherwise in _OF_CODES.items())
