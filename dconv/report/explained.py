"""An explanation for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from dconv.codec.minifloat import FORMATS
from dconv.report.cost import MICRO, Cost
from dconv.report.example import Example, Made
from dconv.report.explain import Explanation
from dconv.report.schemes import Scheme
from dconv.report.usage import Usage
from dconv.report.whole import Field, Whole

WIDTH: Final = 80
#: Classes of modules that a person reads; ``--json`` has all.
_CLASSES: Final = 20
_NAME: Final = 32
_INDENT: Final = " " * 10
#: Tensors that are named as an encoding's worst, and the longest of their names.
_WORST: Final = 3
_LONG: Final = 67


def text(name: str, said: Explanation) -> str:
    """The explanation of the model of this name."""
    blocks = [_head(name, said)]
    told: set[str] = set()
    blocks += [list(_scheme(scheme, told)) for scheme in said.schemes]
    if isinstance(said.example, Example):
        blocks.append(list(_example(said.example)))
    elif isinstance(said.example, Whole):
        blocks.append(list(_whole(said.example)))
    elif said.example:
        blocks.append(list(_made(said.example)))
    if said.usage:
        blocks += [list(_bounds(said.usage)), list(_codes(said.usage))]
    blocks.append(list(_costs(said)))
    blocks += [list(_worst(cost)) for cost in said.costs if cost.encoding.name in said.focus and cost.tensors]
    blocks.append(_sample(said))
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _wrapped(words: str, indent: str = "") -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _head(name: str, said: Explanation) -> list[str]:
    if said.coded:
        return _wrapped(f"{name}  {said.asked}: {said.tensors:,} tensors of {said.weights:,} weights in codes")
    return _wrapped(f"{name}  {said.tensors:,} tensors of {said.weights:,} weights, none of them in codes yet")


def _scheme(scheme: Scheme, told: set[str]) -> Iterable[str]:
    yield from _wrapped(f"What is stored: {scheme.words} ({scheme.tensors:,} tensor{'s' * (scheme.tensors != 1)})")
    for part in scheme.parts:
        yield from _wrapped(part.name, "  ")
        shape = " x ".join(map(str, part.shape))
        yield from _wrapped(f"{part.dtype} {shape}{': ' * bool(part.words)}{part.words}", "    ")
    for sentence in scheme.sentences:
        yield from _wrapped(sentence, "  ") if sentence not in told else ()
        told.add(sentence)


def _example(one: Example) -> Iterable[str]:
    fmt = next(fmt for fmt in FORMATS if fmt.name == one.format)
    part, power = np.frexp(abs(one.value))
    yield "One of its weights"
    yield from _wrapped(f"{one.tensor}{list(one.index)}", "  ")
    yield f"  code    0x{one.code:02x}, in {one.format} {one.value:g} = {2 * part:g} x 2^{power - 1}" + (
        ", below 0" if one.value < 0 else ""
    )
    yield f"  scale   {one.scale:.6g}, at {list(one.block)} of {list(one.blocks)} in"
    yield from _wrapped(one.scale_tensor, "          ")
    sign = "/" if one.divides else "x"
    yield f"  weight  {one.value:g} {sign} {one.scale:.6g} = {one.weight:.6g}"
    moved = _percent(abs(one.step / 2 / one.weight))
    yield f"  step    {one.step:.3g} to the next number there is: half of that, {moved} of the"
    yield "          weight, is how far encoding may have moved it"
    yield f"  holds   at most {fmt.largest:g} {sign} {one.scale:.6g} = {one.holds:.6g} with this scale"


def _whole(one: Whole) -> Iterable[str]:
    yield "One of its weights"
    yield from _wrapped(f"{one.tensor}{list(one.index)}", "  ")
    yield from _field("code", one.bits, one.code)
    if one.listed:
        yield f"  group   {one.group} of zeros and scales, for input {one.index[-1]} in"
        yield from _wrapped(one.listed, _INDENT)
    if one.zero:
        yield from _field("zero", one.bits, one.zero)
    yield f"  scale   {one.scale:.6g}, at {list(one.scale_at)} in"
    yield from _wrapped(one.scale_tensor, _INDENT)
    less = one.zero.value if one.zero else 0

    def product(code: int) -> str:
        return f"({code} - {less}) x {one.scale:.6g}" if one.zero else f"{code} x {one.scale:.6g}"

    yield f"  weight  {product(one.code.value)} = {one.weight:.6g}"
    yield f"  step    {one.scale:.3g} from a code to the next"
    first = round(one.lowest / one.scale) + less
    lowest, highest = product(first), product(first + (1 << one.bits) - 1)
    yield f"  holds   from {lowest} = {one.lowest:.6g}"
    yield f"          to {highest} = {one.highest:.6g} with this scale{' and zero' if one.zero else ''}"


def _field(label: str, bits: int, one: Field) -> Iterable[str]:
    whole = bits == 8 and one.word < 256 and not one.low
    word = f"0x{one.word:02x}" if whole else f"bits {one.low} to {one.low + bits - 1} of 0x{one.word:08x}"
    yield f"  {label}    {word}, at {list(one.at)} in"
    yield from _wrapped(one.tensor, _INDENT)
    if one.value == one.stored:
        yield f"{_INDENT}{'it is' if whole else 'they are'} {one.value}"
    elif one.value > one.stored:
        yield f"{_INDENT}they are {one.stored}, stored less one: {one.value}"
    else:
        yield f"{_INDENT}they are {one.stored}, stored raised by {one.stored - one.value}: {one.value}"


def _made(one: Made) -> Iterable[str]:
    yield "One of its weights, and what fp8_block makes of it"
    yield from _wrapped(f"{one.tensor}{list(one.index)} = {one.weight:.6g}", "  ")
    yield f"  scale   {one.largest:.6g} / 448 = {one.scale:.6g}: the largest of block {list(one.block)} becomes 448"
    yield f"  code    0x{one.code:02x}: {one.weight:.6g} / {one.scale:.6g} = {one.weight / one.scale:.5g} is nearest to"
    yield f"          {one.value:g}; its neighbour is {one.step / one.scale:g} away"
    error = abs(one.decoded - one.weight)
    yield f"  weight  {one.value:g} x {one.scale:.6g} = {one.decoded:.6g}, {_percent(error / abs(one.weight))} off"


def _bounds(usage: Sequence[Usage]) -> Iterable[str]:
    yield "What it cost at most, and as rounding errors are spread"
    yield f"  {'':<{_NAME}} {'of a':>8} {'of its':>8} {'together':>9} {'expected':>9}"
    yield f"  {'class':<{_NAME}} {'weight':>8} {'largest':>8} {'':>9} {'':>9}"
    for each in _shown(usage):
        figures = f"{each.of_weight:>8.2%} {each.of_largest:>8.2%} {each.bound:>9.2%} {each.expected:>9.2%}"
        yield f"  {_cut(each.kind)} {figures}"
    yield from _more(usage)
    yield from _wrapped(
        "Half a step: of a weight, by itself, for normal numbers (subnormals lose more of themselves); of its largest, "
        "by the largest weight that shares the scale; together, the norm of all half steps by that of the weights; "
        "expected, that / sqrt(3). What a scheme cut to its largest code may have lost more.",
        "  ",
    )


def _codes(usage: Sequence[Usage]) -> Iterable[str]:
    fmt = usage[0].fmt
    same = all(each.fmt is fmt for each in usage)
    most = f"{fmt.largest:g}" if same else "largest"
    yield "Codes in use"
    yield f"  {'class':<{_NAME}} {'zero':>8} {'subnormal':>10} {most:>8} {'no number':>10}"
    for each in _shown(usage):
        share = each.shares()
        yield (
            f"  {_cut(each.kind)} {_share(share['zero']):>8} {_share(share['subnormal']):>10} "
            f"{_share(share['largest']):>8} {_share(share['no number']):>10}"
        )
    yield from _more(usage)
    if same:
        whole = Usage("", fmt)
        for each in usage:
            whole.add(each)
        by = ", ".join(f"2^{power} {_share(share)}" for power, share in whole.exponents().items())
        yield from _wrapped(f"by exponent: {by}", "  ")


def _costs(said: Explanation) -> Iterable[str]:
    if said.coded:
        yield "What it would lose again, encoded anew from what it decodes to"
    else:
        yield "What it would lose in"
    yield f"  {'':<20}{'error':>9}{'largest':>11}{'made 0':>9}"
    if said.kept:
        yield f"  {said.kept:<20}{'0':>9}{'0':>11}{'0':>9}  kept: codes are copied"
    for cost in said.costs:
        loss = cost.total
        if not loss.weights:
            if cost.left_out:
                yield f"  {cost.encoding.name:<20} not measured: columns are no multiple of {cost.encoding.group}"
            continue
        figures = f"{_percent(loss.relative):>9}{loss.largest:>11.3g}{_share(loss.zeroed / loss.weights):>9}"
        yield f"  {cost.encoding.name:<20}{figures}  {cost.encoding.words}"
        if loss.broken:
            yield f"  {'':<20}{loss.broken:,} of {loss.weights:,} became infinite or no number"
        if cost.left_out:
            yield f"  {'':<20}less {len(cost.left_out):,} tensors whose columns are no multiple of it"
    yield from _wrapped(
        "Error: norm of the error by the norm of the weights. Largest: how far a weight moved. "
        f"{_rules(said.rule)}{_guessed(said)}",
        "  ",
    )
    if any(cost.encoding.name.startswith("int4") and cost.total.weights for cost in said.costs):
        yield from _wrapped(
            "int4 is rounded to nearest, scales in fp16: calibration (GPTQ, AWQ) does better. It chooses codes by what "
            "a layer computes, and loses less of that.",
            "  ",
        )


def _rules(asked: str) -> str:
    if asked:
        return f"MX scales by the {asked} rule."
    default = Counter(rule for _, rule in MICRO.values()).most_common(1)[0][0]
    others = [f"{name} by {rule}" for name, (_, rule) in MICRO.items() if rule != default]
    return f"MX scales by the {default} rule, {', '.join(others)}, as dconv convert has it; --scale-rule has others."


def _guessed(said: Explanation) -> str:
    if said.sample["whole"] or not any(cost.encoding.by_tensor and cost.total.weights for cost in said.costs):
        return ""
    of = "the sample and the block with the largest scale" if said.usage else "the sample, so that they may lose more"
    return f" A tensor's largest weight, which fp8_tensor and nvfp4 need, is taken from {of}."


def _worst(cost: Cost) -> Iterable[str]:
    yield f"Worst in {cost.encoding.name}"
    for name, loss in cost.worst()[:_WORST]:
        yield f"  {name if len(name) <= _LONG else name[: _LONG - 1] + '…':<{_LONG}} {100 * loss.relative:>8.2f} %"


def _sample(said: Explanation) -> list[str]:
    sample = said.sample
    read = f"{sample['bytes_read'] / 1e6:,.1f} MB in {sample['reads']:,} reads"
    of = f"{sample['weights']:,} weights in {sample['boxes']:,} boxes of {sample['tensors']:,} tensors"
    if sample["whole"]:
        return _wrapped(f"Measured on all weights: {of}; {read}.")
    return _wrapped(f"Measured on a sample, drawn by seed {sample['seed']} from each class in turn: {of}; {read}.")


def _shown(usage: Sequence[Usage]) -> Sequence[Usage]:
    return [each for each in usage if each.count][:_CLASSES]


def _more(usage: Sequence[Usage]) -> Iterable[str]:
    if left := len(usage) - len(_shown(usage)):
        yield f"  … and {left:,} more classes, --json has those that were looked at"


def _cut(name: str) -> str:
    return f"{name if len(name) <= _NAME else name[: _NAME - 1] + '…':<{_NAME}}"


def _percent(part: float) -> str:
    if part == 0:
        return "0"
    return f"{100 * part:.2g} %" if part < 0.01 else f"{100 * part:.1f} %"


def _share(part: float) -> str:
    """A share, so that what occurs at all is not taken for nothing."""
    if part == 0:
        return "0"
    return "< 0.01 %" if part < 1e-4 else f"{100 * part:.2f} %"
