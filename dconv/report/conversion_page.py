"""The report of a conversion as one page for a browser, in the frame of all pages: see `dconv.report.conversion`.

What grows with the model is grouped: files and ranks past some dozens, cells of the map past some thousands.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dconv import __version__, verify
from dconv.report import parts as shared
from dconv.report.conversion import Conversion, Side, facts, receipt_facts
from dconv.report.drawing import COLOURS, MOST, Line, chart, flow, strips
from dconv.report.layer_map import layer_map
from dconv.report.parts import framed, listed, named, printable, said
from dconv.report.plan import count, size
from dconv.sharding.parsed import is_mapping

_OPTION: Final = "--report"
_COMMAND: Final = "dconv convert"
#: Cells of each of the two maps, rows of the table of ranks, and rows of ranks over time.
_CELLS: Final = 8000
_RANKS: Final = 64


def page(conversion: Conversion) -> str:
    """The page."""
    request = conversion.job.request
    title = f"{printable(named(request.source.name or str(request.source)))} to {request.format}"
    filling = {
        "title": said(title),
        "version": said(__version__),
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "ended": _ended(conversion),
        "cards": "".join(
            f"<li><b>{said(value)}</b><span>{said(label)}</span></li>" for value, label in _cards(conversion)
        ),
        "facts": listed(facts(conversion)),
        "helped": "Ranks that were done may have helped others." if len(conversion.shares) > 1 else "",
        "flow": flow(conversion.flows),
        "shares": _shares(conversion),
        "rates": _rates(conversion),
        "before": _map(conversion.before),
        "after": _map(conversion.after),
        "losses": _losses(conversion),
        "verified": _verified(conversion),
        "receipt": listed(receipt_facts(conversion)),
    }
    return framed("conversion.html", filling, title=title, command=_COMMAND, report=conversion.to_dict())


def check_place(path: Path) -> None:
    """That a report can be written at ``path``; see `dconv.report.parts.check_place`."""
    shared.check_place(path, option=_OPTION, command=_COMMAND)


def write(path: Path, text: str) -> None:
    """Write a report; only another report is replaced. See `dconv.report.parts.write`."""
    shared.write(path, text, option=_OPTION, command=_COMMAND)


def _ended(conversion: Conversion) -> str:
    run = conversion.run
    if run.failure is not None:
        words = f"exit code {run.failure.exit_code}: the output is there, and is not to be used"
        return f'<div class="wrong"><strong>Verification failed, {words}</strong><pre>{said(run.failure)}</pre></div>'
    done = "It was there already, made by an earlier run" if run.already else "Done, exit code 0"
    verified = "verified" if run.verified else "not verified: --verify digest reads it back"
    return f'<div class="right">{said(done)}; {said(verified)}.</div>'


def _cards(conversion: Conversion) -> Iterable[tuple[str, str]]:
    run, plan = conversion.run, conversion.job.plan
    yield count(conversion.job.parameters), "parameters"
    yield size(plan.bytes_read), "to read"
    yield size(plan.bytes_written), "to write"
    if conversion.kept:
        yield size(conversion.kept), "kept of earlier runs"
    if not run.already:
        fresh = max(plan.bytes_written - conversion.kept, 0)
        yield _seconds(run.seconds), "from command to commit"
        if conversion.did:
            yield f"{size(fresh / max(run.seconds, 1e-9))}/s", "written, over all of it"
    yield f"{run.world:,}", f"rank{'s' * (run.world != 1)}"
    yield str(run.failure.exit_code if run.failure else 0), "exit code"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds < 600
        else f"{seconds / 60:.3g} min"
        if seconds < 36_000
        else f"{seconds / 3600:.3g} h"
    )


def _shares(conversion: Conversion) -> str:
    did = {rank.rank: rank for rank in conversion.did}
    rows: list[str] = []
    for rank, (read, written, tasks) in enumerate(conversion.shares[:_RANKS]):
        mine = did.get(rank)
        noted = [size(mine.read), size(mine.written), size(mine.kept), _seconds(mine.seconds)] if mine else ["–"] * 4
        rate = f"{size(mine.written / mine.seconds)}/s" if mine and mine.seconds > 0 else "–"
        cells = [size(read), size(written), f"{tasks:,}", *noted, rate]
        host = said(named(mine.host)) if mine else "–"
        rows.append(f"<tr><td>rank {rank}</td>{_numbers(cells)}<td>{host}</td></tr>")
    if rest := conversion.shares[_RANKS:]:
        sums = [sum(share[i] for share in rest) for i in range(3)]
        cells = [size(sums[0]), size(sums[1]), f"{sums[2]:,}", *["–"] * 5]
        rows.append(f"<tr><td>… and {len(rest):,} more ranks</td>{_numbers(cells)}<td>–</td></tr>")
    whole = [sum(share[i] for share in conversion.shares) for i in range(3)]
    noted = [sum(getattr(rank, key) for rank in conversion.did) for key in ("read", "written", "kept")]
    cells = [size(whole[0]), size(whole[1]), f"{whole[2]:,}", *(map(size, noted) if did else ["–"] * 3), "", ""]
    rows.append(f"<tr><td>together</td>{_numbers(cells)}<td></td></tr>")
    heads = ("share, read", "share, written", "tasks", "has read", "has written", "kept", "at work for", "rate")
    named_columns = "".join(f'<th class="number">{head}</th>' for head in heads)
    return (
        '<div class="scroll"><table class="classes"><thead><tr><th>rank</th>'
        f"{named_columns}<th>machine</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="faint">A share is what the plan gives a rank; kept is what of it an earlier run had done, and was '
        "found whole. What two ranks did at one time counts for both; holes of sparse files count as bytes.</p>"
    )


def _numbers(cells: Sequence[str]) -> str:
    return "".join(f'<td class="number">{cell}</td>' for cell in cells)


def _rates(conversion: Conversion) -> str:
    if not conversion.rates:
        why = "the output was there already" if conversion.run.already else "no rank has noted what it did"
        return f"<p>Nothing was measured: {why}.</p>{_earlier(conversion)}"
    ends, unit = list(conversion.ends), _unit(conversion)
    rates = {
        rank: [(read / unit[1], written / unit[1]) for read, written in each] for rank, each in conversion.rates.items()
    }
    both = [[sum(rate[i][side] for rate in rates.values()) for i in range(len(ends))] for side in (0, 1)]
    lines = [Line("read, all ranks", _steps(ends, both[0])), Line("written, all ranks", _steps(ends, both[1]))]
    together = chart(lines, x="time since the first rank began [s]", y=f"rate [{unit[0]}/s]")
    written = [Line(f"rank {rank}", _steps(ends, [rate[1] for rate in each])) for rank, each in list(rates.items())]
    if len(rates) == 1:
        by_rank = ""
    elif len(rates) <= COLOURS:
        drawn = chart(written, x="time since the first rank began [s]", y=f"written [{unit[0]}/s]")
        by_rank = f"<h3>Written, by rank</h3>{drawn}"
    else:
        shown = [
            Line(f"rank {rank}", list(zip(ends, (rate[1] for rate in each), strict=True)))
            for rank, each in list(rates.items())[:_RANKS]
        ]
        drawn = strips(shown, x="time since the first rank began [s]", y=f"{unit[0]}/s written by a rank")
        more = f"<p>… and {len(rates) - _RANKS:,} more ranks.</p>" if len(rates) > _RANKS else ""
        by_rank = f"<h3>Written, by rank</h3>{drawn}{more}"
    note = "Ranks note what they have done at most every 0.5 s; between two notes it is taken as even."
    return f'<p class="faint">{note}</p>{together}{by_rank}{_earlier(conversion)}'


def _unit(conversion: Conversion) -> tuple[str, float]:
    """The unit of the rates, and bytes in it: GB wherever there is a tenth of it in a second."""
    top = max(sum(rate[i][side] for rate in conversion.rates.values()) for side in (0, 1)
              for i in range(len(conversion.ends)))  # fmt: skip
    return next(((name, factor) for name, factor in (("GB", 1e9), ("MB", 1e6)) if top >= factor / 10), ("kB", 1e3))


def _steps(ends: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """A level for each stretch of time."""
    starts = [0.0, *ends]
    return [(x, value) for i, value in enumerate(values) for x in (starts[i], starts[i + 1])]


def _earlier(conversion: Conversion) -> str:
    if not conversion.earlier:
        return ""
    rows = "".join(
        f"<tr><td>rank {track.rank} of {track.world}</td>"
        + _numbers([size(track.last.read), size(track.last.written), _seconds(track.last.at - track.began)])
        + f"<td>{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(track.began))}</td></tr>"
        for track in conversion.earlier[:_RANKS]
    )
    more = len(conversion.earlier) - _RANKS
    rest = f"<p>… and {more:,} more.</p>" if more > 0 else ""
    return (
        "<h3>Earlier runs of this plan</h3><p>What they had done and was found whole is kept.</p>"
        '<div class="scroll"><table class="classes"><thead><tr><th>rank</th><th class="number">had read</th>'
        '<th class="number">had written</th><th class="number">at work for</th><th>began</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{rest}"
    )


def _map(side: Side) -> str:
    return layer_map(side.precision, _CELLS) if side.precision else f"<p>Not known: {said(side.why_not)}.</p>"


def _losses(conversion: Conversion) -> str:
    found = conversion.losses
    if found is None:
        return "<p>No weight was put into codes.</p>"
    if found.why_not:
        return f"<p>Not measured: {said(found.why_not)}.</p>"
    lines = [
        Line(kind, [(layer, 100 * value) for layer, value in sorted(each.items()) if layer >= 0])
        for kind, each in found.layers.items()
    ]
    shown = [line for line in lines if line.points][:MOST]
    drawn = ""
    if shown:
        first = min(point[0] for line in shown for point in line.points)
        drawn = chart(shown, x="layer", y=f"{found.measure} [%]", whole=True, from_x=first)
    rows = "".join(
        f'<tr><td class="name">{said(named(kind))}</td>'
        + _numbers([f"{looked:,}", f"{100 * mean:.3g} %", f"{100 * worst:.3g} %"])
        + f'<td class="name">{said(named(where))}</td></tr>'
        for kind, looked, mean, worst, where in found.lines
    )
    return (
        f'<p class="faint">{said(found.words)}</p>{drawn}<div class="scroll"><table class="classes"><thead><tr>'
        f'<th>class</th><th class="number">weights</th><th class="number">{found.measure}</th>'
        '<th class="number">largest</th><th>where</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _verified(conversion: Conversion) -> str:
    run = conversion.run
    if run.failure is not None:
        return f'<div class="wrong"><strong>Failed</strong><pre>{said(run.failure)}</pre></div>'
    if run.verified is None:
        return (
            "<p>Nothing was asked for. <code>--verify digest</code> reads the output back; <code>--verify "
            "logits</code> also compares what source and output compute.</p>"
        )
    return f"<p>{said(verify.sentence(run.verified))}.</p><dl>{listed(_results(run.verified))}</dl>"


def _results(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "read back", f"{found['tensors']:,} tensors in {found['files']:,} files, {found['bytes']:,} bytes"
    yield "digests", "all as they were written"
    logits = found.get("logits")
    if not is_mapping(logits):
        return
    held = logits.get("weights")
    if is_mapping(held):
        yield "weights", f"{held['weights']:,} weights of {held['coded']:,} tensors in codes, decoded from the files"
        off = f"{held['error']:.2g} of the largest weight that shares their scale, bound {held['bound']:.2g}"
        yield "off by", f"at most {off}"
        yield "calibrated", f"{held['calibrated']:,} tensors, all finite" if held["calibrated"] else ""
    yield "logits", f"differ by {logits['difference']:.2g} of the largest logit at most" + _bound(logits)
    yield "mean", f"{logits['mean']:.2g} of the largest logit" if "mean" in logits else ""
    yield "divergence", f"{logits['divergence']:.2g} nats a token" if "divergence" in logits else ""


def _bound(logits: Mapping[str, Any]) -> str:
    if "bound" not in logits:
        return " (told, not judged: rounding is what was asked for)"
    return f", bound {logits['bound']:.2g}: {logits['why']}"
