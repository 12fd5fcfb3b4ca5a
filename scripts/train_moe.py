"""Train a small mixture of experts on prose, for a few minutes on a core, so that a perplexity of it means something.

    python scripts/train_moe.py olmoe OUT              also qwen2_moe, mixtral, deepseek_v2
    python scripts/train_moe.py mixtral OUT --seed 1 --steps 2400

The classes are transformers' own, four layers of 128, with a byte-level BPE tokenizer of 2048 words learnt from the
same text (``prose.training``: everything but the speech that `perplexity.py` measures on). Random weights would show
nothing: quantisation hurts a function that was learnt, and routing matters where experts differ. The loss that balances
the load is therefore a weak one: experts end up specialised, and are used unevenly.

The same seed, steps and version of torch give the same model: one thread, so that sums do not depend on how many there
are. DeepSeek-MoE 16B's own class is not in transformers; DeepSeek-V2's is its mixture (fine-grained experts, shared
ones, gates that are not normalised, a dense first layer) with another attention. Prints one JSON object as its last
line, with the share of the held-out tokens that each expert of each layer gets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import perplexity
import prose

WORDS: Final = 2048
END: Final = "<|endoftext|>"
#: Tokens of a window, and windows of a step.
LENGTH: Final = 256
BATCH: Final = 8
#: By default: 1.6 million tokens, about five minutes on a core.
STEPS: Final = 800
_PEAK_RATE: Final = 2e-3
_WARM_UP: Final = 30
#: Of the load's balance in the loss: enough that no expert starves, too little to make them alike.
_BALANCE: Final = 0.002

_SHARED: Final[dict[str, Any]] = {
    "vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
#: Of transformers: the names of a config and of a model, and what sets the family apart.
FAMILIES: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 16, "intermediate_size": 128}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_experts": 16, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
         "intermediate_size": 256},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 8, "intermediate_size": 256, "num_key_value_heads": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {"n_routed_experts": 16, "n_shared_experts": 1, "moe_intermediate_size": 128, "intermediate_size": 256,
         "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
         "qk_rope_head_dim": 16, "v_head_dim": 32},
    ),
}  # fmt: skip


def tokenizer_of(text: str) -> Any:
    """A byte-level BPE of `WORDS` words, learnt from ``text``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer: Any = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    learnt.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learnt, bos_token=END, eos_token=END)


@dataclass
class Routing:
    """What the routers of a model chose in its last forward pass, one entry a router.

    Attributes:
        balance: Switch Transformer's auxiliary loss (arXiv:2101.03961, eq. 4): experts × Σ share × mean probability,
            1 where the load is even.
        shares: of the (token, choice) pairs, for each expert.
    """

    balance: list[Any]
    shares: list[Any]


def watch(model: Any) -> Routing:
    """Keep what the routers choose."""
    import torch

    kept = Routing([], [])

    def chosen(router: Any, given: tuple[Any, ...], made: tuple[Any, ...]) -> None:
        tokens = given[0].reshape(-1, router.weight.shape[1])
        probabilities = torch.nn.functional.linear(tokens, router.weight).softmax(-1)
        experts = router.weight.shape[0]
        share = torch.bincount(made[-1].flatten(), minlength=experts) / made[-1].numel()
        kept.balance.append(experts * (share * probabilities.mean(0)).sum())
        kept.shares.append(share)

    def forget(*_: Any) -> None:
        kept.balance.clear()
        kept.shares.clear()

    model.register_forward_pre_hook(forget)
    for _, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(chosen)
    return kept


def rate(step: int, steps: int) -> float:
    """Of learning: linear up, then a half cosine down to a tenth."""
    if step < _WARM_UP:
        return _PEAK_RATE * (step + 1) / _WARM_UP
    return _PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * (step - _WARM_UP) / max(1, steps - _WARM_UP)))


def train(family: str, ids: Any, seed: int, steps: int) -> tuple[Any, Routing]:
    """A model of ``family`` that has seen ``steps`` batches of the tokens ``ids`` (one int64 tensor)."""
    import torch
    import transformers

    config_name, model_name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**_SHARED | own)
    config._experts_implementation = "eager"  # the others are for GPUs
    model = getattr(transformers, model_name)(config).float().train()
    routing = watch(model)
    matrices = [value for value in model.parameters() if value.dim() > 1]
    vectors = [value for value in model.parameters() if value.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    draw = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        places = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=draw)
        batch = torch.stack([ids[place : place + LENGTH + 1] for place in places.tolist()])
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = torch.stack(routing.balance).mean()
        (loss + _BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(f"step {step + 1:5}  loss {loss.item():.3f}  balance {balance.item():.2f}  {seconds:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    return model.eval(), routing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} x {LENGTH} tokens")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    torch.set_num_threads(1)
    texts = prose.speeches(perplexity.PROSE)
    text = prose.training(texts)
    tokenizer = tokenizer_of(text)
    began = time.perf_counter()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    model, routing = train(args.family, ids, args.seed, args.steps)
    seconds = time.perf_counter() - began
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(args.out)
    held_out = tokenizer(texts[prose.HELD_OUT], add_special_tokens=False)["input_ids"][:10_240]
    found = perplexity.score(model.float(), held_out, LENGTH, LENGTH)  # of the weights in bf16, as they are saved
    with torch.inference_mode():
        model(torch.tensor(held_out[:8192]).view(-1, LENGTH), use_cache=False)
    shares = [[round(share, 4) for share in layer.tolist()] for layer in routing.shares]
    told = {
        "family": args.family, "seed": args.seed, "steps": args.steps, "seconds": round(seconds, 1),
        "parameters": sum(value.numel() for value in model.parameters()), "tokens": len(ids),
        "perplexity": round(found.perplexity, 4), "shares": shares,
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
