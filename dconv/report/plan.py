"""What ``dconv plan`` says to a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

#: Rows of the table of ranks that a person reads; ``--json`` has all.
_ROWS: Final = 8
#: What one rank reads or writes a second on a plain NVMe disk; the plan's floor is priced with it.
_RATE: Final = 2e9


def text(priced: dict[str, Any]) -> str:
    """What `dconv.examine.price` found, for a person."""
    source, target, ranks = priced["source"], priced["target"], priced["ranks"]
    total, rounded, written = priced["tensors"], priced["rounded"], priced["bytes_written"]
    exact = f"exact: all {total} tensors" if not rounded else f"exact: {total - rounded} of {total} tensors"
    shards = f"{target['shards']} shard{'s' * (target['shards'] != 1)} of {size(written / target['shards'])}"
    layout = f", {target['layout']}" if target["layout"] else ""
    codes = f", {target['codes']}" if target["codes"] else ""
    plural = f", {source['files']} file{'s' * (source['files'] != 1)}"
    files = "" if source["format"].startswith("config alone") else plural
    lines = [
        f"{priced['family']}  {priced['layers']} layers  {count(priced['parameters'])} parameters  "
        f"{'+'.join(priced['dtypes'])}",
        f"{container(source['format'])}{files}  ->  {container(target['format'])}{layout}{codes}",
        f"read {size(priced['bytes_read'])}   write {size(written)}   {shards}   "
        f"largest buffer {priced['largest_buffer'] >> 20} MiB   {exact}",
        "rank   shard             read       write   tensors",
    ]
    for share in ranks[:_ROWS]:
        lines.append(
            f"{share['rank']:4}   {share['shard']:<10} {size(share['read']):>11} {size(share['written']):>11} "
            f"{share['tensors']:>9}"
        )
    if len(ranks) > _ROWS:
        lines.append(f"   …   {len(ranks) - _ROWS} more ranks, --json shows all")
    alone = max(priced["bytes_read"], written) / _RATE
    slowest = max(max(share["read"], share["written"]) for share in ranks) / _RATE
    many = f"{slowest:.1f} s with {len(ranks)} ranks, " if len(ranks) > 1 else ""
    lines.append(f"floor at 2 GB/s a rank: {many}{alone:.1f} s with 1        plan {priced['plan']}")
    lines += [f"numeric: {words}\n  {names}" for words, names in precision_text(priced["precision"])]
    lines += priced["notes"]
    lines += [f"left out: {name} ({reason})" for name, reason in list(priced["left_out"].items())[:_ROWS]]
    lines += [f"megatron-core lacks: {what}" for what in priced["needs"]]
    return "\n".join(lines)


def precision_text(precision: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each thing that is done to values, with the tensors that it is done to."""
    return [
        (f"{kind['op']}, {kind['count']} tensor{'s' * (kind['count'] != 1)}", "\n  ".join(kind["tensors"]))
        for kind in precision
    ]


def size(nbytes: float) -> str:
    """Bytes for a person, in powers of ten: ``141.1 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count(n: float) -> str:
    """A count for a person: ``70.6 B``, ``135 M``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{n:.0f}"


def container(name: str) -> str:
    """A container's name as it is written in prose."""
    return name.replace("huggingface", "HuggingFace").replace("megatron", "Megatron")
