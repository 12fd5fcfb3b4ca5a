"""An encoder-decoder as two graphs: one reads a text once, the other one answers, token by token."""

from __future__ import annotations

from typing import Any, Final

from dconv.export.graph import BATCH, REPLIES, SEQUENCE, Graph, Port, module_of

ENCODER: Final = "encoder_model.onnx"
DECODER: Final = "decoder_model.onnx"


def halves_of(model: Any) -> dict[str, Graph]:
    """The two graphs by their files' names, which are optimum's, as are the tensors'.

    The decoder has no cache: it computes all of the reply each time.
    """
    vocabulary, hidden = model.config.vocab_size, model.config.d_model
    mask = (BATCH, SEQUENCE)
    states = (BATCH, SEQUENCE, hidden)
    encoder = Graph(
        module_of(model, _read),
        (Port("input_ids", (BATCH, SEQUENCE), True), Port("attention_mask", mask, True)),
        (Port("last_hidden_state", states),),
    )
    decoder = Graph(
        module_of(model, _answer),
        (
            Port("encoder_attention_mask", mask, True),
            Port("input_ids", (BATCH, REPLIES), True),
            Port("encoder_hidden_states", states),
        ),
        (Port("logits", (BATCH, REPLIES, vocabulary)),),
    )
    return {ENCODER: encoder, DECODER: decoder}


def _read(model: Any, tokens: Any, mask: Any) -> tuple[Any, ...]:
    return (model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state,)


def _answer(model: Any, mask: Any, replies: Any, states: Any) -> tuple[Any, ...]:
    from transformers.modeling_outputs import BaseModelOutput

    said = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=replies,
        use_cache=False,
    )
    return (said.logits,)
