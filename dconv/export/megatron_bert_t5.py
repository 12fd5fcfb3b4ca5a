"""Encoders (BertModel) and encoder-decoders (T5Model) of megatron-core from Megatron arguments, and their logits.

T5's relative positions are added to attention scores, which megatron-core leaves to Transformer Engine. Here the
local attention of megatron-core computes with them, through `_with_bias`, in the one place where such a bias belongs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dconv.errors import Refused
from dconv.export.megatron_config import as_dict, position_embedding, transformer_config
from dconv.export.megatron_cpu import cpu_patches
from dconv.export.megatron_gpt import require_tokens
from dconv.export.megatron_weights import Args, forget_weights

if TYPE_CHECKING:
    import torch
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.T5 import T5Model


def build_bert(args: Args, *, dtype: torch.dtype | None = None) -> list[BertModel]:
    """This rank's stage of a BERT in the running `parallel_world`, in evaluation mode, weights all NaN.

    Arguments as for `dconv.export.megatron_gpt.build_gpt`; two token types; the pooler and the head of two classes are
    there unless ``bert_binary_head`` is false. megatron-core's BERT normalises before each block and once at the end,
    as HuggingFace's ``megatron-bert`` does and its ``bert`` does not, and its language model head computes erf GELU
    whatever the layers do.

    Returns:
        One `BertModel`; megatron-core has no virtual stages for it.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    given = as_dict(args)
    config = transformer_config(given, dtype or torch.float32)
    state: Any = parallel_state  # whose functions have no types
    positions = position_embedding(given)
    if positions not in ("learned_absolute", "rope"):
        raise Refused("megatron-core's BERT has learned or rotary positions", found=f"{positions}")
    if config.virtual_pipeline_model_parallel_size:
        raise Refused("megatron-core has no virtual stages for BERT", found="vpp > 1", do="run it with vpp 1")
    model = BertModel(
        config,
        num_tokentypes=2 if given.get("bert_binary_head", True) else 0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given.get("max_position_embeddings") or 0,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not given.get("untie_embeddings_and_output_weights", False),
        position_embedding_type=positions,
        rotary_percent=given.get("rotary_percent", 1.0),
        add_binary_head=given.get("bert_binary_head", True),
    )
    forget_weights(model)
    return [model.eval()]


def bert_logits(
    models: list[BertModel],
    tokens: torch.Tensor,
    mask: torch.Tensor | None = None,
    token_types: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """One forward pass of the whole pipeline; every rank of the world calls it with the same inputs.

    Args:
        models: from `build_bert`.
        tokens: int64 [batch, sequence].
        mask: [batch, sequence], 1 for tokens and 0 for padding, which gets no meaningful logits; all tokens if None.
        token_types: int64 [batch, sequence]; all 0 if None.

    Returns:
        On the last stage float32 [batch, sequence, padded vocabulary] and, with a binary head, [batch, 2]; else None.

    Raises:
        Refused: tokens are not a matrix of numbers below the vocabulary size.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    (model,) = models
    require_tokens(model.vocab_size, tokens)
    mask = torch.ones_like(tokens) if mask is None else mask
    token_types = torch.zeros_like(tokens) if token_types is None else token_types
    state: Any = parallel_state  # whose functions have no types
    group = state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    stage: int = state.get_pipeline_model_parallel_rank()
    with torch.no_grad():
        if not model.pre_process:
            shape = (tokens.shape[1], tokens.shape[0], model.config.hidden_size)
            hidden = torch.empty(shape, dtype=model.config.params_dtype)
            dist.recv(hidden, stages[stage - 1], group=group)
            model.set_input_tensor(hidden)
        output = model(tokens, mask, token_types if model.add_binary_head else None)
        if not model.post_process:
            dist.send(output.contiguous(), stages[stage + 1], group=group)
            return None
    words, classes = output
    return words.float(), None if classes is None else classes.float()


def build_t5(args: Args, *, dtype: torch.dtype | None = None) -> list[T5Model]:
    """This rank's part of a T5 in the running `parallel_world` (pipeline size 1), in evaluation mode, weights all NaN.

    Arguments as for `dconv.export.megatron_gpt.build_gpt`, and encoder_num_layers and decoder_num_layers where they
    differ from num_layers, ``position_embedding_type`` relative, relative_attention_num_buckets (32) and
    relative_attention_max_distance (128).

    Returns:
        One `T5Model`.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.T5 import T5Model
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise Refused("megatron-core 0.16.1 runs T5 in one pipeline stage", found="pp > 1")
    given = as_dict(args)
    counts = [given.get(f"{part}_num_layers") or given["num_layers"] for part in ("encoder", "decoder")]
    configs = [transformer_config({**given, "num_layers": count}, dtype or torch.float32) for count in counts]
    positions: Any = given.get("position_embedding_type", "learned_absolute")
    if positions != "relative":
        positions = position_embedding(given)
    specs: list[Any] = [encoder_model_with_local_spec(), decoder_model_with_local_spec()]
    if positions == "relative":
        for spec in specs:
            spec.submodules.self_attention.submodules.core_attention = _with_bias()
    norm: Any = WrappedTorchNorm
    blocks: list[Any] = [
        TransformerBlockSubmodules([spec] * count, norm) for spec, count in zip(specs, counts, strict=True)
    ]
    model = T5Model(
        configs[1],
        encoder_config=configs[0],
        transformer_encoder_layer_spec=blocks[0],
        transformer_decoder_layer_spec=blocks[1],
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given.get("max_position_embeddings") or 0,
        parallel_output=False,
        share_embeddings_and_output_weights=not given.get("untie_embeddings_and_output_weights", False),
        position_embedding_type=positions,
        rotary_percent=given.get("rotary_percent", 1.0),
        relative_attention_num_buckets=given.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=given.get("relative_attention_max_distance", 128),
    )
    forget_weights(model)
    return [model.eval()]


def _with_bias() -> type:
    """megatron-core's DotProductAttention that adds a bias to the scaled scores, as Transformer Engine's does."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class WithBias(DotProductAttention):
        def forward(self, *args: Any, attention_bias: Any = None, **kwargs: Any) -> Any:
            softmax = self.scale_mask_softmax
            if attention_bias is None:
                return super().forward(*args, **kwargs)
            # a hook on the softmax, whose first input are the scores [batch, heads, queries, keys]
            add = softmax.register_forward_pre_hook(lambda _, given: (given[0] + attention_bias, *given[1:]))
            try:
                return super().forward(*args, **kwargs)
            finally:
                add.remove()

    return WithBias


def t5_logits(models: list[T5Model], tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """One forward pass; every rank of the world calls it with the same inputs, of tokens only (no padding).

    Args:
        models: from `build_t5`.
        tokens: int64 [batch, sequence], of the encoder.
        answers: int64 [batch, sequence], of the decoder.

    Returns:
        float32 [batch, sequence of answers, padded vocabulary], gathered over tensor parallel.

    Raises:
        Refused: tokens or answers are not a matrix of numbers below the vocabulary size.
    """
    import torch

    (model,) = models
    require_tokens(model.vocab_size, tokens)
    require_tokens(model.vocab_size, answers)
    batch, length = tokens.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)  # true where nothing is to be seen
    past = torch.ones(answers.shape[1], answers.shape[1], dtype=torch.bool).triu(1).expand(batch, 1, -1, -1)
    both = torch.zeros(batch, 1, answers.shape[1], length, dtype=torch.bool)
    with torch.no_grad():
        return model(tokens, answers, seen, past, both).float()
