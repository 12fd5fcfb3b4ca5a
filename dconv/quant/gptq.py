"""GPTQ (Frantar et al., 2022): round a weight's columns one by one, each with what the earlier ones' errors call for.

The textbook inverts the Hessian and factors the inverse. The same numbers come from one factor of the Hessian itself
(Chee et al., 2023, QuIP, theorem 6): with H = R Rᵀ, R upper triangular, and Ů = R diag(R)⁻¹ less its diagonal, column j
is to be rounded from ``w_j + (W - Ŵ) Ů[:, j]``, the error over the columns before it. That is a third of the work, and
nothing ill-conditioned is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.net.untyped import linalg, listed
from dconv.quant.grid import Numbers

if TYPE_CHECKING:
    import torch

#: Columns that are rounded between two large products.
_BLOCK: Final = 128
#: Past this damping a Hessian is of no use.
_MOST_DAMP: Final = 1.0


@dataclass(frozen=True)
class Recipe:
    """How a weight is quantised.

    Attributes:
        group: columns that share a scale; -1 for all.
        desc_act: round the columns with the largest activations first.
        group_aware: the same for whole groups, and inside of each, so that groups stay those of neighbours.
        static_groups: scales from the weights as they are, before any error is carried over.
        search: the power of the search for scales (`Numbers.fit`), 0 for none.
        damp, damp_step: what is added to the Hessian's diagonal, as a part of its mean, and by how much more after
            each failure to factor it.
    """

    numbers: Numbers
    group: int = 128
    desc_act: bool = False
    group_aware: bool = False
    static_groups: bool = False
    search: float = 0.0
    damp: float = 0.05
    damp_step: float = 0.01

    @property
    def listed(self) -> bool:
        """Whether groups are not of neighbours, so that each column's group must be stored."""
        return self.desc_act and not self.static_groups and self.group > 0


@dataclass(frozen=True)
class Factor:
    """A Hessian as the rounding uses it.

    Attributes:
        order: columns, in the order in which they are rounded.
        feedback: Ů [columns, columns], strictly upper triangular, in that order.
        diagonal: R's, squared: what an error of a column costs, in that order.
        importance: H's own diagonal, in the columns' own order.
        damp: what was added, as a part of the mean of the diagonal.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    diagonal: torch.Tensor
    importance: torch.Tensor
    damp: float

    def power(self, weight: torch.Tensor) -> float:
        """Σ of the squares of what a weight [rows, columns] answers, W H Wᵀ, damping included."""
        import torch

        turned = weight[:, self.order]
        answers = turned.addmm(turned, self.feedback).square_()
        return float((answers @ self.diagonal).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Chosen:
    """A quantised weight, or rows of it.

    Attributes:
        codes: u8 [rows, columns].
        scales, zeros: float32 [rows, groups], u8 [rows, groups].
        groups: i32 [columns], each column's group.
        error: of each row, (W - Ŵ) H (W - Ŵ)ᵀ, damping included; float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    error: torch.Tensor

    def decode(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 [rows, columns]."""
        at = self.groups.long()
        return (self.codes.float() - self.zeros.float()[:, at]) * self.scales[:, at]


def factor(hessian: torch.Tensor, recipe: Recipe) -> Factor | None:
    """Factor a Hessian [columns, columns], float32; it is overwritten, and one more of its size is needed.

    A column that no token reached is rounded to nearest: it gets the mean of the diagonal, and nothing is carried over.

    Returns:
        None where it cannot be factored: no token came, or it is not finite.
    """
    import torch

    importance = hessian.diagonal().clone()
    mean = float(importance.double().mean())
    if not mean > 0 or not bool(importance.isfinite().all()):
        return None
    columns = len(importance)
    order = torch.arange(columns, device=hessian.device)
    if recipe.desc_act:
        order = torch.sort(importance, descending=True, stable=True)[1]
    elif recipe.group_aware and 0 < recipe.group < columns:
        order = _by_group(importance, recipe.group)
    # R of H = R Rᵀ is the lower factor of H with rows and columns reversed, reversed.
    turned = torch.empty_like(hessian)
    back = order.flip(0)
    for start in range(0, columns, _BLOCK):
        turned[start : start + _BLOCK] = hessian[back[start : start + _BLOCK]][:, back]
    turned.diagonal()[importance[back] == 0] = mean
    plain = turned.diagonal().clone()
    damp = recipe.damp
    lower = hessian.mT  # a large one may not be there three times: its own place takes the factor
    while True:
        turned.diagonal().copy_(plain + damp * mean)
        fault = torch.empty((), dtype=torch.int32, device=hessian.device)
        linalg().cholesky_ex(turned, out=(lower, fault))
        if not int(fault):
            break
        damp += recipe.damp_step
        if not recipe.damp_step > 0 or damp >= _MOST_DAMP:
            return None
    feedback = turned.mT  # of LAPACK's own order
    for start in range(0, columns, _BLOCK):
        feedback[:, start : start + _BLOCK] = lower[:, max(0, columns - start - _BLOCK) : columns - start].flip(0, 1)
    diagonal = feedback.diagonal().clone()
    feedback.div_(diagonal[None, :]).triu_(1)
    return Factor(order, feedback, diagonal.square(), importance, damp)


def _by_group(importance: torch.Tensor, size: int) -> torch.Tensor:
    """Groups by their largest column, and the columns of each, the most important first.

    Source: GPTQModel's ``act_group_aware``.
    """
    import torch

    groups = [torch.arange(at, min(at + size, len(importance))) for at in range(0, len(importance), size)]
    most = torch.stack([importance[group].max() for group in groups])
    inside = [group[torch.sort(importance[group], descending=True, stable=True)[1].cpu()] for group in groups]
    ordered = listed(torch.sort(most, descending=True, stable=True)[1])
    return torch.cat([inside[at] for at in ordered]).to(importance.device)


def quantise(weight: torch.Tensor, made: Factor, recipe: Recipe) -> Chosen:
    """Round a weight, or some rows of one: each row by itself.

    Args:
        weight: float32 [rows, columns].
        made: of the Hessian of what comes to it.
        recipe: the one that ``made`` was made with.
    """
    import torch

    rows, columns = weight.shape
    size = columns if recipe.group < 0 else recipe.group
    order, numbers, feedback = made.order, recipe.numbers, made.feedback
    device = weight.device
    owners = torch.arange(columns, device=device) // size
    count = int(owners[-1]) + 1 if columns else 0
    scales = torch.empty(count, rows, device=device)
    zeros = torch.empty(count, rows, device=device)
    static = recipe.static_groups or recipe.group < 0
    if static:
        _fit_all(weight, made.importance, recipe, size, scales, zeros)
    places = owners if recipe.listed else owners[order]
    importance = made.importance[order]
    turned = weight.t()[order].contiguous()  # a column is then one stretch of memory
    del weight
    wrong = torch.zeros_like(turned)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    error = torch.zeros(rows, device=device)
    where = listed(places)
    block = _BLOCK if size >= columns or static else -(-_BLOCK // size) * size
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        now = turned[begin:end].clone()
        if begin:
            now.addmm_(feedback[:begin, begin:end].t(), wrong[:begin])
        inside = feedback[begin:end, begin:end]
        cost = listed(made.diagonal[begin:end])
        for at in range(end - begin):
            group = where[begin + at]
            if not static and (begin + at) % size == 0:
                stop = min(at + size, end - begin)
                free = _compensated(turned[begin + at : begin + stop], now[at:stop], inside[at:stop, at:stop])
                found = numbers.fit(free.t(), importance[begin + at : begin + stop], recipe.search)
                scales[group], zeros[group] = found
            scale, zero = scales[group], zeros[group]
            code = numbers.code(now[at], scale, zero)
            codes[begin + at] = code
            nearest = code.sub_(zero).mul_(scale)
            error.addcmul_(now[at] - nearest, now[at] - nearest, value=cost[at])
            lost = torch.sub(turned[begin + at], nearest, out=wrong[begin + at])
            now[at + 1 :].addr_(inside[at, at + 1 :], lost)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=device)
    return Chosen(
        codes[back].t().contiguous(),
        scales.t().contiguous(),
        zeros.t().to(torch.uint8).contiguous(),
        places[back].to(torch.int32),
        error,
    )


def nearest(weight: torch.Tensor, recipe: Recipe) -> Chosen:
    """Round a weight [rows, columns] to nearest, where no token reached it. ``error`` is of the plain squares."""
    import torch

    columns = weight.shape[1]
    eye = torch.ones(columns, device=weight.device)
    plain = Factor(
        torch.arange(columns, device=weight.device),
        torch.zeros(columns, columns, device=weight.device),
        eye,
        eye,
        0.0,
    )
    return quantise(weight, plain, recipe)


def _fit_all(
    weight: torch.Tensor,
    importance: torch.Tensor,
    recipe: Recipe,
    size: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> None:
    """Scales and zero points of neighbouring columns, as the weights are."""
    for group in range(len(scales)):
        some = slice(group * size, (group + 1) * size)
        scales[group], zeros[group] = recipe.numbers.fit(weight[:, some], importance[some], recipe.search)


def _compensated(weights: torch.Tensor, now: torch.Tensor, feedback: torch.Tensor) -> torch.Tensor:
    """The weights of a group ([columns, rows]) that make good the errors before it best, were they not rounded.

    ``now`` is what its columns are rounded from if those before them in the group had no error of their own; with
    E = W - W̃ this means E (I + Ů) = W - now, in the group.
    """
    import torch

    eye = torch.eye(len(feedback), device=feedback.device)
    left = linalg().solve_triangular((feedback + eye).t(), weights - now, upper=False, unitriangular=True)
    return weights - left
