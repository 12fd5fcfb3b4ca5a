"""What words in a sentence mean for a conversion: one table, from words to FORMATs and options.

A rule is a regular expression on the sentence in lower case. Earlier rules count first, and take their words away from
later ones, so that ``llama.cpp`` is no ``llama``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

#: How surely words mean a FORMAT: its name, a program that reads it, a machine that such a program runs on.
Weight = Literal[3, 2, 1]


@dataclass(frozen=True, slots=True)
class Means:
    """Words that mean a FORMAT.

    Attributes:
        words: a regular expression.
        format: as it is typed.
        why: for a person.
        weight: see `Weight`.
        options: what else they mean.
    """

    words: str
    format: str
    why: str
    weight: Weight = 3
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reader:
    """A program that reads several FORMATs, so that the numbers asked for choose one.

    Attributes:
        words: a regular expression.
        name: as a person writes it.
        formats: FORMATs that it reads.
    """

    words: str
    name: str
    formats: tuple[str, ...]


def _chip(words: str, target: str, chip: str, title: str) -> Means:
    return Means(words, target, f"{title}: {target} compiles for it", 2, ("--platform", chip))


#: Stands for a chip that nobody named.
CHIP: Final = "CHIP"

#: Families of chips by the names that their makers sell them under. A chip's own name is looked up in its adapter.
CHIPS: Final = (
    _chip(r"dimensity\s*9400", "mtk", "MT6991", "Dimensity 9400"),
    _chip(r"dimensity\s*9300", "mtk", "MT6989", "Dimensity 9300"),
    _chip(r"dimensity\s*8300", "mtk", "MT6897", "Dimensity 8300"),
    _chip(r"(snapdragon\s*)?8 elite gen 5", "qnn", "SM8850", "Snapdragon 8 Elite Gen 5"),
    _chip(r"(snapdragon\s*)?8 elite", "qnn", "SM8750", "Snapdragon 8 Elite"),
    _chip(r"(snapdragon\s*)?8\s*gen\s*3", "qnn", "SM8650", "Snapdragon 8 Gen 3"),
    _chip(r"(snapdragon\s*)?8\s*gen\s*2", "qnn", "SM8550", "Snapdragon 8 Gen 2"),
    _chip(r"(snapdragon\s*)?8\s*gen\s*1", "qnn", "SM8450", "Snapdragon 8 Gen 1"),
    _chip(r"(snapdragon\s*)?x elite", "qnn", "SC8380XP", "Snapdragon X Elite"),
    _chip(r"trainium\s*2", "neuron", "trn2", "Trainium2"),
    _chip(r"trainium", "neuron", "trn1", "Trainium"),
    _chip(r"inferentia\s*2?", "neuron", "inf2", "Inferentia2"),
)

#: In the order in which they are looked for.
FORMATS: Final = (
    Means(r"llama[. -]?cpp|koboldcpp|llamafile", "gguf", "llama.cpp reads GGUF", 2),
    Means(r"ollama", "gguf", "Ollama reads GGUF", 2),
    Means(r"lm[ -]?studio|gpt4all|jan\.ai", "gguf", "it runs llama.cpp, which reads GGUF", 2),
    Means(r"ggufs?", "gguf", "a FORMAT"),
    *CHIPS,
    Means(r"mediatek|dimensity|neuropilot", "mtk", "MediaTek's compiler", 2, ("--platform", CHIP)),
    Means(r"snapdragon|qualcomm|hexagon|qnn|qairt", "qnn", "Qualcomm's compiler", 2, ("--platform", CHIP)),
    Means(r"rockchip|rkllm|rknn", "rk", "Rockchip's compiler", 2, ("--platform", CHIP)),
    Means(r"axera|pulsar2", "ax", "Axera's compiler", 2, ("--platform", CHIP)),
    Means(r"(aws )?neuron|nxd", "neuron", "a FORMAT, and AWS's compiler where a chip is named"),
    Means(r"mlx(-lm)?", "mlx", "a FORMAT"),
    Means(r"apple( silicon)?|macs?|macbook|mac studio|m[1-5] (max|pro|ultra)", "mlx", "Apple's chips run MLX", 1),
    Means(r"onnx ?runtime|onnx", "onnx", "a FORMAT"),
    Means(r"browsers?|webgpu|transformers\.js", "onnx", "browsers run ONNX", 1),
    Means(r"c#|\.net|dotnet|windows|directml", "onnx", "onnxruntime runs there", 1),
    Means(r"executorch|torch[._ ]export|pt2|exported program", "torch_export", "torch.export's archive"),
    Means(r"torch ?script|libtorch", "torchscript", "a FORMAT"),
    Means(r"(megatron|mcore)([ -](lm|core))?|nemo", "megatron", "a FORMAT"),
    Means(r"pre-?train(ing)?|fine-?tun(e|ing)|continue training", "megatron", "Megatron trains", 1),
    Means(r"bmtrain|model ?center", "bmtrain", "a FORMAT"),
    Means(r"hugging ?face|hf|safetensors|transformers", "hf", "HuggingFace's files"),
    Means(r"state dict", "pt", "a file of torch"),
    Means(r"compressed[- ]tensors|llm-?compressor|pack-quantized", "", "how codes are named"),
    Means(r"gptq", "gptq", "a FORMAT"),
    Means(r"awq", "awq", "a FORMAT"),
    Means(r"android|phones?", "mtk", "phones: MediaTek's compiler, where no other chip is named", 1,
          ("--platform", CHIP)),
)  # fmt: skip

_SERVED: Final = ("hf", "gptq", "awq", "fp8", "mx")
READERS: Final = (
    Reader(r"vllm", "vLLM", _SERVED),
    Reader(r"sglang", "SGLang", _SERVED),
    Reader(r"tgi|text[- ]generation[- ]inference", "TGI", ("hf", "gptq", "awq", "fp8")),
)

#: Codes by what they are called: a regular expression, and the key of `NUMBERS` and `USUAL` that it means.
CODES: Final = (
    (r"mxfp4", "mxfp4"), (r"mxfp6", "mxfp6_e2m3"), (r"mxfp8", "mxfp8"), (r"nvfp4", "nvfp4"),
    (r"fp8|float8|e4m3|w8a8-?fp8", "fp8"),
    (r"w4a16|int-?4|(4|four)[- ]?bits?", "4"), (r"w8a16|w8a8|int-?8|(8|eight)[- ]?bits?", "8"),
    (r"(2|two)[- ]?bits?|int-?2", "2"), (r"(3|three)[- ]?bits?|int-?3", "3"), (r"(5|five)[- ]?bits?", "5"),
    (r"(6|six)[- ]?bits?", "6"),
    (r"bf16|bfloat16", "bf16"), (r"fp16|f16|float16|half precision", "f16"), (r"fp32|f32|float32", "f32"),
    (r"q4", "4"), (r"q8", "8"), (r"q5", "5"), (r"q6", "6"), (r"q3", "3"), (r"q2", "2"),
)  # fmt: skip

#: FORMAT -> codes -> options; a FORMAT that is missing has none, and codes that are missing it does not have.
NUMBERS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "gguf": {
        "2": ("--quant", "q2_k"), "3": ("--quant", "q3_k_m"), "4": ("--quant", "q4_k_m"), "5": ("--quant", "q5_k_m"),
        "6": ("--quant", "q6_k"), "8": ("--quant", "q8_0"), "mxfp4": ("--quant", "mxfp4"),
        "bf16": ("--quant", "bf16"), "f16": ("--quant", "f16"), "f32": ("--quant", "f32"),
    },
    "mlx": {
        **{bits: ("--quant", f"{bits}bit") for bits in ("2", "3", "4", "5", "6", "8")},
        "bf16": ("--dtype", "bf16"), "f16": ("--dtype", "f16"), "f32": ("--dtype", "f32"),
    },
    "onnx": {"4": ("--quant", "int4"), "8": ("--quant", "int8"), "f16": ("--dtype", "f16"), "f32": ("--dtype", "f32")},
    "gptq": {
        "4": (), "8": ("--quantization-config", '{"bits": 8}'), "3": ("--quantization-config", '{"bits": 3}'),
        "2": ("--quantization-config", '{"bits": 2}'),
    },
    "awq": {"4": ()},
    "fp8": {"fp8": (), "8": ()},
    "mx": {name: ("--quant", name) for name in ("mxfp4", "mxfp6_e2m3", "mxfp8", "nvfp4")},
    "rk": {"4": ("--quant", "w4a16"), "8": ("--quant", "w8a8"), "f16": ("--quant", "fp16")},
    "ax": {"4": ("--quant", "s4"), "8": ("--quant", "s8"), "bf16": ("--quant", "bf16"), "f16": ("--quant", "fp16")},
    "qnn": {"8": ("--quant", "w8a16"), "f16": ("--quant", "fp16")},
    "neuron": {"fp8": ("--quant", "fp8"), "8": ("--quant", "fp8"), "bf16": ()},
    **{format: {name: ("--dtype", name) for name in ("bf16", "f16", "f32")}
       for format in ("hf", "megatron", "pt", "bmtrain", "torch_export", "torchscript")},
}  # fmt: skip

#: Where no FORMAT is named, or HuggingFace's for somebody who serves it: the one that these codes mean.
USUAL: Final = {
    "4": "gptq", "3": "gptq", "2": "gptq", "8": "fp8", "fp8": "fp8", "mxfp4": "mx", "mxfp6_e2m3": "mx", "mxfp8": "mx",
    "nvfp4": "mx", "bf16": "hf", "f16": "hf", "f32": "hf", "5": "gguf", "6": "gguf",
}  # fmt: skip

#: Words -> an option, with why.
OPTIONS: Final = (
    (r"same (logits|answers|function)|logits", ("--verify", "logits"), "logits of source and output are compared"),
    (r"make sure|double[- ]check|check(ed)?|verif(y|ied)|proven?|bit[- ]exact", ("--verify", "digest"),
     "the output is read again and compared"),
    (r"mp_rank|legacy", ("--megatron-format", "legacy"), "one file a rank"),
    (r"slurm|sbatch", ("--launcher", "slurm"), "SLURM starts the ranks"),
    (r"ray(?! ?trac)", ("--launcher", "ray"), "Ray starts the ranks"),
    (r"torchrun", ("--launcher", "torchrun"), "torchrun starts the ranks"),
    (r"resume|continue|go on", ("--resume",), "goes on where a run was stopped"),
    (r"overwrite|replace", ("--overwrite",), "an output of before is replaced"),
    (r"without (compiling|the compiler|toolchain)|bundle", ("--bundle",), "what is compiled, for elsewhere"),
)  # fmt: skip

#: Parallel sizes by their names.
SIZES: Final = (
    ("vpp", r"vpp|virtual pipeline( parallel(ism)?)?"), ("etp", r"etp|expert tensor( parallel(ism)?)?"),
    ("tp", r"tp|tensor[- ]parallel(ism)?"), ("pp", r"pp|pipeline([- ]parallel(ism)?| stages)?"),
    ("ep", r"ep|expert[- ]parallel(ism)?"),
)  # fmt: skip

_WORDS: Final = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
#: Numbers as people write them.
NUMBER_WORDS: Final = {word: number for number, word in enumerate(_WORDS.split(), 1)} | {"a": 1, "single": 1}

#: Words that say nothing of a conversion.
PLAIN: Final = frozenset(re.findall(r"\S+", """
    a an and the my our your i we me it its this that is are be please can could would want need like how do
    does to into for from of on in at by with under as back so then convert converted make made turn run
    running get give put use using model models checkpoint checkpoints weights big small file files format
    formats new old will bit bits each all one quantise quantize quantised quantized quantisation quantization
    export serve serving inference deploy deployment gpu gpus node nodes machine board chip device computer
    laptop phone laptop or local locally server sure have has some there here training train card cards
    cluster parallel parallelism way ranks processes it's i'd again after afterwards nothing changed still
    also only moe dense llm language out write read compile per
"""))  # fmt: skip

#: Before a word that names what is wanted, and what there is.
WANTED: Final = re.compile(
    r"\b(to|into|for|as|in|with|on|onto|using|under|towards?|->|→|=>)( (a|an|the|my|our|use in))*\s*$"
)
THERE: Final = re.compile(r"\b(from|of|out of)( (a|an|the|my|our))*\s*$")
KEPT: Final = re.compile(r"^[ -]*(checkpoints?|runs?|weights|model|shards|directory|files?|state)\b")
