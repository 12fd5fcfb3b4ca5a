"""The real megatron-core as a judge: build a model from Megatron arguments, load a checkpoint, compute logits.

``dconv check`` and ``--verify logits`` ask it whether a checkpoint computes what its source computes. Therefore it
shares no code with the converter: names, layouts, padding and file contents are megatron-core's own, and where this
version of megatron-core (0.16.1, local layer spec, CPU) would compute something else than the arguments say, it
refuses. Weights that no loader touched are NaN, so that a hole cannot pass for a model.

Typical use, in each process of a world of tp x pp::

    with parallel_world(tp, pp, rank=rank, world=world, init_method=init_method):
        models = build_gpt(args)
        load_torch_dist(models, "checkpoint/iter_0000001")
        result = logits(models, tokens)  # on the last stage
"""

from __future__ import annotations

from dconv.export.megatron_bert_t5 import bert_logits, build_bert, build_t5, t5_logits
from dconv.export.megatron_cpu import cpu_patches, parallel_world, require_megatron, spawn
from dconv.export.megatron_gpt import build_gpt, logits
from dconv.export.megatron_hybrid import build_hybrid, stand_in
from dconv.export.megatron_llava import build_llava, llava_logits
from dconv.export.megatron_weights import load_legacy, load_torch_dist, save_legacy, save_torch_dist, seed_weights

__all__ = [
    "bert_logits", "build_bert", "build_gpt", "build_hybrid", "build_llava", "build_t5", "cpu_patches", "llava_logits",
    "load_legacy", "load_torch_dist", "logits", "parallel_world", "require_megatron", "save_legacy", "save_torch_dist",
    "seed_weights", "spawn", "stand_in", "t5_logits",
]  # fmt: skip
