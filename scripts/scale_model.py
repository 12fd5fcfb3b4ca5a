"""How long a conversion takes on many nodes, from what docs/scale.json holds and from what is assumed of a cluster.

Nothing is measured here, and nothing is random: the same figures give the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any, Final

#: The kind of work whose bytes are moved as they are.
MOVES: Final = "relayout (moves)"
#: Notes of progress that a rank writes in a second at most (`dconv.launch.progress`).
NOTES: Final = 5
#: Looks in a second, at most, at whether other ranks take tasks (`dconv.sharding.stealing`).
LOOKS: Final = 2
#: Ranks that look at all journals for each that is not done, and seconds that a rank adds to the time between two looks
#: (`_HELPERS`, `_EACH` there).
HELPERS: Final = 8
EACH: Final = 0.02


@dataclass(frozen=True)
class Assumed:
    """A cluster. None of it was measured.

    Attributes:
        client: bytes a second between one node and the file system, read and written together.
        aggregate: the same of the whole file system.
        metadata: operations a second that its metadata servers do for all nodes together.
        latency: seconds of one such operation for a process that waits for it.
        sync: seconds of an fsync.
        start: seconds until all ranks run: scheduler, torchrun, Python from a shared disk.
        price: dollars of a node for an hour.
        slow: the speed of a straggling node, of what the others have.
        cores: of a node, for calibration.
    """

    client: float = 3e9
    aggregate: float = 100e9
    metadata: float = 20e3
    latency: float = 0.5e-3
    sync: float = 10e-3
    start: float = 10.0
    price: float = 4.0
    slow: float = 0.2
    cores: int = 64


#: The ends of what is said of such machines, and the middle that the tables stand for.
CLUSTERS: Final = {
    "slow": replace(Assumed(), client=1e9, aggregate=50e9, metadata=10e3),
    "middle": Assumed(),
    "fast": replace(Assumed(), client=5e9, aggregate=500e9, metadata=50e3),
}


@dataclass(frozen=True)
class Work:
    """What is done with a weight of two bytes.

    Attributes:
        rate: bytes of bf16 weights a second and rank.
        traffic: bytes between a node and the file system for each byte of bf16 weights.
    """

    rate: float
    traffic: float


def work_of(rates: Mapping[str, Any], kind: str) -> Work:
    """A kind's figures. Encoders read twice or more, the second time from the page cache: once counts."""
    weights, one = rates[MOVES]["read"], rates[kind]
    return Work(weights / one["seconds"], (min(one["read"], weights) + one["written"]) / weights)


# ---------------------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True)
class Seen:
    """How often all ranks together did what depends on who meets whom.

    Attributes:
        looks: at the journals of all ranks, one before the commit; what else ranks list them for opens none.
        notes: of progress, written, and read before the commit.
        listings: of the ranks that are done.
    """

    looks: int
    notes: int
    listings: int


def expected(ranks: int) -> Seen:
    """Of a run whose ranks end together. How often they note and list depends on time, see `running` and `waiting`."""
    return Seen(1 + min(HELPERS, ranks), 3 * ranks, 3 * ranks)


def operations(ranks: int, sources: int, targets: int, share: Mapping[str, int], seen: Seen) -> dict[str, int]:
    """Metadata operations of all ranks, by what they are about; at most, since not all ranks are there at each look.

    Args:
        sources, targets: files of the source and of the output.
        share: how often those are opened for bytes, summed over ranks.
    """
    opened, made = share["sources_opened"], share["outputs_opened"]
    return {
        "source": ranks * (7 * sources + 57) + sources + opened,  # each rank plans; the one that commits looks again
        "journal": seen.looks * (ranks + 1) + 6 * ranks + 14,
        "progress": seen.notes + 3 * ranks + 8,
        "ends": seen.listings + 5 * ranks + 10,
        "output, lock": 34 * ranks + seen.looks * ranks + 2 * made + targets + 68,
    }


def counted(counts: Mapping[str, int], ranks: int) -> tuple[dict[str, int], Seen]:
    """What was counted, by the same names, with fsyncs and what `running` is about apart."""
    found = {"source": 0, "journal": 0, "progress": 0, "ends": 0, "output, lock": 0, "fsync": 0, "stealing": 0}
    for words, count in counts.items():
        name, _, about = words.partition(" ")
        if name == "fsync":
            found["fsync"] += count
        else:
            found[about if about in found else "output, lock"] += count
    return found, Seen(counts["listdir journal"] - ranks, counts["open progress"], counts.get("listdir ends", 0))


def running(ranks: int) -> float:
    """Operations a second while all work: notes of progress, and whether anyone takes tasks."""
    return ranks * (NOTES + LOOKS)


def waiting(ranks: int, assumed: Assumed) -> float:
    """Operations a second while all wait for one rank: each lists who is done, and few look at all journals."""
    look = 2 * ranks * assumed.latency
    helping = min(HELPERS, ranks) * 2 * ranks / (max(1 / LOOKS, EACH * ranks, 10 * look) + look)
    return ranks / max(1 / LOOKS, EACH * ranks / 4) + helping


def syncs(ranks: int, tasks: int) -> int:
    """At most so many fsyncs: each task's file and its journal line, and what each rank and the commit make durable."""
    return 2 * tasks + 4 * ranks + 40


# ---------------------------------------------------------------------------------------------------- one run


def phases(plan: Mapping[str, Any], nodes: int, per_node: int, work: Work, assumed: Assumed) -> dict[str, float]:
    """Seconds of each phase. Of what runs at once (processors, nodes' clients, the file system) the slowest counts."""
    share = plan["worlds"][str(nodes)]
    ranks, sources = nodes * per_node, plan["source_files"]
    asked = operations(ranks, sources, plan["target_files"], share, expected(ranks))
    moved = {
        "processors": share["largest_rank"] / work.rate,
        "nodes' clients": work.traffic * share["largest_node"] / assumed.client,
        "file system": work.traffic * plan["written"] / assumed.aggregate,
    }
    slowest = max(moved, key=lambda name: moved[name])
    return {
        "start": assumed.start,
        "planning": plan["seconds"],
        "source's metadata": max((7 * sources + 57) * assumed.latency, asked["source"] / assumed.metadata),
        "opening": 2 * assumed.sync + ranks * 12 * assumed.latency,  # one rank after another, under a lock
        slowest: moved[slowest],
        "journals": max(
            4 * ranks * assumed.latency, (asked["journal"] + asked["progress"] + asked["ends"]) / assumed.metadata
        ),  # by the rank that commits, whose looks nobody shares
        "commit": (4 * ranks + sources + 60) * assumed.latency + 12 * assumed.sync,
    }


def total(found: Mapping[str, float]) -> float:
    return sum(found.values())


# ---------------------------------------------------------------------------------------------------- stragglers


def speeds(nodes: int, per_node: int, work: Work, assumed: Assumed) -> tuple[float, float]:
    """Bytes of weights a second of the slow node and of each other one."""
    alone = min(per_node * work.rate, assumed.client / work.traffic)
    whole = assumed.aggregate / work.traffic
    slow = min(assumed.slow * alone, whole / nodes)
    return slow, min(alone, (whole - slow) / (nodes - 1)) if nodes > 1 else slow


def stolen(tasks: int, nbytes: int, ranks: Sequence[float]) -> float:
    """Seconds of ``tasks`` of one size that ranks of these speeds take one by one from a common list.

    A rank has done ⌊t · speed / size⌋ of them by t; the last one ends at the first t where these are all.
    """
    size = nbytes / tasks
    kinds: dict[float, int] = {}
    for speed in ranks:
        kinds[speed] = kinds.get(speed, 0) + 1
    low, high = 0.0, 2 * size * (tasks + len(ranks)) / sum(ranks) + size / min(ranks)
    for _ in range(60):
        middle = (low + high) / 2
        done = sum(count * floor(middle * speed / size) for speed, count in kinds.items())
        low, high = (low, middle) if done >= tasks else (middle, high)
    return high


def straggling(
    plan: Mapping[str, Any], nodes: int, per_node: int, work: Work, assumed: Assumed
) -> tuple[float, float, float]:
    """Seconds of the bytes: no node slow; the one with the most slow; the same where tasks are taken one by one."""
    share = plan["worlds"][str(nodes)]
    even = replace(assumed, slow=1.0)
    slow, other = speeds(nodes, per_node, work, assumed)
    ranks = [slow / per_node] * per_node + [other / per_node] * per_node * (nodes - 1)
    return (
        share["largest_node"] / speeds(nodes, per_node, work, even)[0],
        share["largest_node"] / slow,
        stolen(plan["tasks"], plan["written"], ranks),
    )


# ---------------------------------------------------------------------------------------------------- GPTQ

#: docs/benchmarks-gptq.md: SmolLM2-135M, 64 x 512 tokens, the settings of the row "dconv, the same settings".
GPTQ_CPU_SECONDS: Final = 181.0
SMOLLM2: Final = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "head_dim": 64,
}  # fmt: skip


def gptq_work(config: Mapping[str, int], tokens: int) -> tuple[float, float]:
    """Floating-point operations of calibrating a dense Llama: what is divided over ranks, and what each one repeats.

    Divided are two forwards (2 a weight and token), the lower triangle of Σ xxᵀ of each input (n² a token) and the
    rounding of rows (n² each). A Hessian's factor (n³/3) is computed by every rank that rounds rows of its weights.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    groups = config["num_key_value_heads"] * config["head_dim"]
    weights = [(heads, hidden), (groups, hidden), (groups, hidden), (hidden, heads)]
    weights += [(inner, hidden), (inner, hidden), (hidden, inner)]
    inputs = [hidden, heads, hidden, inner]
    size = sum(rows * columns for rows, columns in weights)
    divided = 4.0 * size * tokens + sum(n * n for n in inputs) * tokens + sum(rows * n * n for rows, n in weights)
    return divided * config["num_hidden_layers"], sum(n**3 / 3 for n in inputs) * config["num_hidden_layers"]


def gptq_seconds(config: Mapping[str, int], tokens: int, nodes: int, per_node: int, assumed: Assumed) -> float:
    """Of a dense Llama on processors that are as fast as the core that docs/benchmarks-gptq.md was measured on."""
    speed = sum(gptq_work(SMOLLM2, 64 * 512)) / GPTQ_CPU_SECONDS  # operations a second and core
    divided, repeated = gptq_work(config, tokens)
    return divided / (speed * nodes * assumed.cores) + repeated / (speed * assumed.cores / per_node)
