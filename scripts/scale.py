"""Time and cost of large conversions on 1 to 64 nodes, from measured rates and stated assumptions: docs/scale.md.

python scripts/scale.py                       print the tables
python scripts/scale.py --client 5 --price 9  the same for another cluster
python scripts/scale.py --write               put them between the markers of docs/scale.md (assumptions as they are)
python scripts/scale.py --measure             measure anew into docs/scale.json (ten minutes, 3 GB of memory)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where a test loads this file by its path

from scale_measure import LAYOUTS, NODES, RANKS_PER_NODE, measure
from scale_model import (
    CLUSTERS,
    GPTQ_CPU_SECONDS,
    MOVES,
    Assumed,
    counted,
    expected,
    gptq_seconds,
    operations,
    phases,
    running,
    straggling,
    syncs,
    total,
    waiting,
    work_of,
)

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PAGE: Final = DOCS / "scale.md"
RATES: Final = DOCS / "scale.json"

#: The phases of which one stands for the bytes.
MOVED: Final = frozenset({"processors", "nodes' clients", "file system"})

Table = list[str]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 1000 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.0f} h"


def dollars(value: float) -> str:
    return f"${value:.2f}" if value < 100 else f"${value:,.0f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------ what was measured


def rates_table(found: Mapping[str, Any], _: Assumed) -> Table:
    rates = found["rates"]
    weights = rates[MOVES]["read"]
    rows = []
    for kind, one in rates.items():
        if "read" not in one:
            continue
        work = work_of(rates, kind)
        rows.append((kind, f"`{one['words']}`", f"{one['seconds']:.2f} s", f"{work.rate / 1e9:.2f} GB/s",
                     f"{work.traffic:.2f}"))  # fmt: skip
    both = rates["two at once"]
    lines = table(("kind", "FORMAT and options", "a rank's processor", "bf16 weights a rank", "traffic"), rows)
    return [
        *lines,
        "",
        f"{weights / 1e9:.2f} GB of bf16 weights; {found['machine']}; {found['day']}. Two ranks at once took "
        f"{both['seconds']:.2f} s of processor each, one alone {rates[MOVES]['seconds']:.2f} s.",
    ]


def plans_table(found: Mapping[str, Any], _: Assumed) -> Table:
    rows = []
    for name, plan in found["plans"].items():
        layout = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in plan["layout"].items())
        size, peak = f"{plan['parameters'] / 1e9:,.0f} B", f"{plan['peak'] / 2**20:.0f} MiB"
        counts = (plan["source_files"], count(plan["tensors"]), count(plan["tasks"]), plan["target_files"])
        rows.append((name, size, f"`{layout}`", *counts, f"{plan['seconds']:.1f} s", peak))
    return table(
        ("model", "parameters", "layout", "files in", "tensors", "tasks", "files out", "planning", "peak"), rows
    )


def counts_table(found: Mapping[str, Any], _: Assumed) -> Table:
    names = ("source", "journal", "progress", "ends", "output, lock")
    rows = []
    for run in found["metadata"]:
        seen, looks = counted(run["counts"], run["ranks"])
        said = operations(run["ranks"], run["source_files"], run["target_files"], run["share"], looks)
        cells = [f"{count(seen[name])} / {count(said[name])}" for name in names]
        most = syncs(run["ranks"], run["tasks"])
        rows.append((run["ranks"], run["source_files"], looks.looks, *cells, f"{count(seen['fsync'])} / {count(most)}"))
    return table(("ranks", "files in", "looks", *names, "fsync"), rows)


# ------------------------------------------------------------------------------------------------ what follows


def assumed_table(_: Mapping[str, Any], given: Assumed) -> Table:
    clusters = {**CLUSTERS, "middle": given}
    words = {
        "client": ("a node's client, read and written together", lambda value: f"{value / 1e9:g} GB/s"),
        "aggregate": ("the whole file system, likewise", lambda value: f"{value / 1e9:g} GB/s"),
        "metadata": ("its metadata servers", lambda value: f"{value:,.0f} operations/s"),
        "latency": ("an operation for a process that waits for it", lambda value: f"{value * 1e3:g} ms"),
        "sync": ("an fsync", lambda value: f"{value * 1e3:g} ms"),
        "start": ("until all ranks run", lambda value: f"{value:g} s"),
        "price": ("a node for an hour", lambda value: f"${value:g}"),
        "slow": ("a straggler's speed", lambda value: f"{value:g} of the others'"),
        "cores": ("cores of a node (calibration only)", lambda value: f"{value}"),
    }
    rows = [(what, *(say(getattr(one, name)) for one in clusters.values())) for name, (what, say) in words.items()]
    return table(("assumed", *clusters), rows)


def times_table(found: Mapping[str, Any], given: Assumed) -> Table:
    work = work_of(found["rates"], MOVES)
    rows = []
    for name, plan in found["plans"].items():
        alone = total(phases(plan, 1, RANKS_PER_NODE, work, given))
        for nodes in NODES:
            spent = phases(plan, nodes, RANKS_PER_NODE, work, given)
            whole = total(spent)
            longest = max(spent, key=lambda phase: spent[phase])
            share = plan["worlds"][str(nodes)]
            ranks = nodes * RANKS_PER_NODE
            even = (
                f"{share['largest_rank'] * ranks / plan['written']:.2f}{' (own shards)' if share['own_shards'] else ''}"
            )
            cost = whole * nodes / 3600 * given.price
            rows.append((name, nodes, ranks, even, seconds(whole), f"{alone / whole / nodes:.0%}",
                         f"{longest}, {spent[longest] / whole:.0%}", dollars(cost)))  # fmt: skip
    return table(("model", "nodes", "ranks", "largest share", "time", "efficiency", "longest phase", "cost"), rows)


def phases_table(found: Mapping[str, Any], given: Assumed) -> Table:
    work = work_of(found["rates"], MOVES)
    names = ("start", "planning", "source's metadata", "opening", "bytes", "journals", "commit")
    rows = []
    for name, plan in found["plans"].items():
        for nodes in (1, 8, 64):
            spent = phases(plan, nodes, RANKS_PER_NODE, work, given)
            bytes_by = next(phase for phase in spent if phase not in names)
            spent["bytes"] = spent[bytes_by]
            rows.append((name, nodes, *(seconds(spent[phase]) for phase in names), bytes_by))
    return table(("model", "nodes", *names, "bytes are bound by"), rows)


def clusters_table(found: Mapping[str, Any], given: Assumed) -> Table:
    work = work_of(found["rates"], MOVES)
    clusters = {**CLUSTERS, "middle": given}
    rows = []
    for name, plan in found["plans"].items():
        for nodes in (1, 8, 64):
            spent = [total(phases(plan, nodes, RANKS_PER_NODE, work, one)) for one in clusters.values()]
            rows.append((name, nodes, *map(seconds, spent)))
    return table(("model", "nodes", *clusters), rows)


def kinds_table(found: Mapping[str, Any], given: Assumed) -> Table:
    rows = []
    for kind, one in found["rates"].items():
        if "read" not in one:
            continue
        work = work_of(found["rates"], kind)
        runs = [phases(plan, 8, RANKS_PER_NODE, work, given) for plan in found["plans"].values()]
        cells = [f"{seconds(total(spent))}, {dollars(total(spent) * 8 / 3600 * given.price)}" for spent in runs]
        rows.append((kind, *cells, ", ".join(sorted({phase for spent in runs for phase in spent} & MOVED))))
    return table(("kind", *found["plans"], "bytes are bound by"), rows)


def straggler_table(found: Mapping[str, Any], given: Assumed) -> Table:
    work = work_of(found["rates"], MOVES)
    rows = []
    for name, plan in found["plans"].items():
        for nodes in (2, 8, 64):
            rows.append((name, nodes, *map(seconds, straggling(plan, nodes, RANKS_PER_NODE, work, given))))
    return table(("model", "nodes", "none slow", "one slow, own share", "one slow, tasks taken one by one"), rows)


def metadata_table(found: Mapping[str, Any], given: Assumed) -> Table:
    rows, names = [], []
    for name, plan in found["plans"].items():
        for nodes in (1, 8, 64):
            ranks, share = nodes * RANKS_PER_NODE, plan["worlds"][str(nodes)]
            asked = operations(ranks, plan["source_files"], plan["target_files"], share, expected(ranks))
            names, whole = list(asked), sum(asked.values())
            rows.append((name, ranks, *map(count, asked.values()), count(syncs(ranks, plan["tasks"])), count(whole),
                         f"{seconds(whole / 10e3)} to {seconds(whole / 50e3)}"))  # fmt: skip
    head = ("model", "ranks", *names, "fsync, at most", "in all", "at 10k to 50k a second")
    rates = [
        (ranks, count(running(ranks)), f"{running(ranks) / given.metadata:.0%}", count(waiting(ranks, given)),
         f"{waiting(ranks, given) / given.metadata:.0%}")
        for ranks in (8, 64, 512)
    ]  # fmt: skip
    return [
        *table(head, rows),
        "",
        *table(("ranks", "a second while all work", "of what servers do", "while all wait for one", "of it"), rates),
    ]


def breaks_table(found: Mapping[str, Any], given: Assumed) -> Table:
    work = work_of(found["rates"], MOVES)
    rows = []
    for name, plan in found["plans"].items():
        runs = {nodes: phases(plan, nodes, RANKS_PER_NODE, work, given) for nodes in NODES}
        alone = total(runs[1])
        useful = max(nodes for nodes, spent in runs.items() if alone / total(spent) / nodes >= 0.5)
        fastest = min(runs, key=lambda nodes: total(runs[nodes]))
        after = runs[min(2 * fastest, NODES[-1])]
        others = sorted((phase for phase in after if phase not in MOVED), key=lambda phase: -after[phase])
        rows.append((name, useful, f"{fastest}, {seconds(total(runs[fastest]))}",
                     ", ".join(f"{phase} {seconds(after[phase])}" for phase in others[:2])))  # fmt: skip
    head = ("model", "nodes at half efficiency or more", "fastest", "what costs most with twice as many, bytes apart")
    return table(head, rows)


def gptq_table(_: Mapping[str, Any], given: Assumed) -> Table:
    tokens = 128 * 2048
    rows = []
    for name in ("70B", "405B"):
        spent = [gptq_seconds(LAYOUTS[name][0], tokens, nodes, RANKS_PER_NODE, given) for nodes in (1, 8, 64)]
        costs = [one * nodes / 3600 * given.price for one, nodes in zip(spent, (1, 8, 64), strict=True)]
        rows.append((name, *(f"{seconds(one)}, {dollars(cost)}" for one, cost in zip(spent, costs, strict=True))))
    lines = table(("model", "1 node", "8 nodes", "64 nodes"), rows)
    return [*lines, "", f"128 x 2,048 tokens; from {GPTQ_CPU_SECONDS:.0f} s of two cores for SmolLM2-135M."]


TABLES: Final = {
    "rates": rates_table, "plans": plans_table, "counts": counts_table, "assumed": assumed_table,
    "times": times_table, "phases": phases_table, "clusters": clusters_table, "kinds": kinds_table,
    "stragglers": straggler_table, "metadata": metadata_table, "gptq": gptq_table,
    "breaks": breaks_table,
}  # fmt: skip


def filled(page: str, found: Mapping[str, Any], given: Assumed) -> str:
    """A page with each table between its markers.

    Raises:
        SystemExit: a marker of no table, or a table without a marker.
    """
    seen = []

    def put(match: re.Match[str]) -> str:
        name = match[1]
        seen.append(name)
        return "\n".join([f"<!-- table {name} -->", *TABLES[name](found, given), "<!-- end -->"])

    names = "|".join(TABLES)
    text = re.sub(rf"<!-- table ({names}) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)
    if sorted(seen) != sorted(TABLES) or text.count("<!-- table ") != len(TABLES):
        raise SystemExit(f"the page has tables {seen}, not {list(TABLES)} once each")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure anew; others' work beside it slows it down")
    parser.add_argument("--repeat", type=int, default=5, help="of which the best counts")
    parser.add_argument("--fast", type=Path, default=Path("/dev/shm"), help="a folder in memory")  # noqa: S108
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    scales = {"client": 1e9, "aggregate": 1e9}
    for field in fields(Assumed):
        scale = scales.get(field.name, 1)
        default = getattr(Assumed(), field.name) / scale
        parser.add_argument(f"--{field.name}", type=float, metavar="X",
                            help=f"assumed; {default:g}{' GB/s' if scale > 1 else ''}")  # fmt: skip
    args = parser.parse_args()
    given = {
        field.name: getattr(args, field.name) * scales.get(field.name, 1)
        for field in fields(Assumed)
        if getattr(args, field.name) is not None
    }
    if given and args.write:
        parser.error("docs/scale.md has the assumptions of this script; print those of another cluster")
    if args.measure:
        with tempfile.TemporaryDirectory(dir=args.fast) as fast, tempfile.TemporaryDirectory() as disk:
            RATES.write_text(json.dumps(measure(Path(fast), Path(disk), args.repeat), indent=1) + "\n")
    found = json.loads(RATES.read_text())
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), found, Assumed()))
        return
    for name, make in TABLES.items():
        print(f"\n{name}\n", *make(found, replace(Assumed(), **given)), sep="\n")


if __name__ == "__main__":
    main()
