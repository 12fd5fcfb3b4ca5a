"""GPTQ as its paper and IST-DASLab/gptq have it, slow and obvious, in float64: the inverse, its factor, the columns."""

from __future__ import annotations

import torch

from dconv.quant.gptq import Recipe


def textbook(weight: torch.Tensor, hessian: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded weights float64 [rows, columns], in their own order, and codes."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    size = columns if recipe.group < 0 else recipe.group
    mean = h.diagonal().mean()
    dead = h.diagonal() == 0
    importance = h.diagonal().clone()
    h.diagonal()[dead] = mean
    order = torch.arange(columns)
    if recipe.desc_act:
        order = torch.sort(importance.float(), descending=True, stable=True)[1]
    elif recipe.group_aware and recipe.group > 0:
        rank = sorted(range(columns), key=lambda j: (-float(importance[j // size * size :][:size].max()), j // size,
                                                     -float(importance[j]), j))  # fmt: skip
        order = torch.tensor(rank)
    fits = {}
    if recipe.static_groups or recipe.group < 0:
        for group in range(-(-columns // size)):
            some = slice(group * size, (group + 1) * size)
            fits[group] = recipe.numbers.fit(weight[:, some], importance[some].float(), recipe.search)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(recipe.damp * mean)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    made, codes = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(columns):
        static = bool(fits) and (recipe.static_groups or recipe.group < 0)
        if static:
            scale, zero = fits[int(order[j]) // size]
        else:
            if j % size == 0:
                some = slice(j, j + size)
                now = recipe.numbers.fit(w[:, some].float(), importance[order][some].float(), recipe.search)
            scale, zero = now
        codes[:, j] = ((w[:, j] / scale).round() + zero).clamp(0, recipe.numbers.top)
        made[:, j] = (codes[:, j] - zero) * scale
        lost = (w[:, j] - made[:, j]) / upper[j, j]
        w[:, j:] -= lost[:, None] * upper[j, j:]
    back = torch.argsort(order)
    return made[:, back], codes[:, back]
