"""What every readable container turns into, before an architecture table is laid over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import xxhash

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint.files import Made, read_small
from dconv.errors import Damaged, DconvError, Refused, group_names
from dconv.sharding.coords import Parallel
from dconv.sharding.derived import Derived, real_files
from dconv.sharding.plan import check_pieces
from dconv.sharding.reader import BoxReader
from dconv.sharding.region import Index
from dconv.sharding.tensor import FileStamp, Logical, Piece, Stored, TensorSpec

#: Small files that travel beside the weights, through Megatron and back. Python files never do.
SIDE_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.tiktoken", "*.jinja", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "USE_POLICY*", "README.md",
)  # fmt: skip


#: Side files by name.
Side = Mapping[str, Path | Made]


@dataclass(frozen=True)
class Source:
    """A checkpoint as found.

    Attributes:
        format: container in words: ``huggingface``, ``megatron legacy`` …
        root: directory that file names are relative to.
        config: HuggingFace config, when one came along.
        args: Megatron's args, when the container has them.
        side: side files by name (tokenizer, chat template …).
        files: every weight file.
        parallel: how the source is cut, for reports.
        left_out: what is not weights (optimizer state, RNG), with the reason.
        shapes: of the stored tensors by name; of those that ranks divide, some rank's.
        tensors: the stored tensors by name, where these are HuggingFace's names and no rank divides them.
        locate: pieces of the logical tensors that a table expects; calls back for names that it does not know.
        lacks: what is missing to tell the architecture, where there is neither config nor args.
        in_memory: it lies in the memory of a running job; ``root`` and ``files`` name no files.
        notes: what a person should know of how it was understood, one line each.
        reader, made, derived, stored: see `dconv.sharding.tensor.Logical`.
        coded: names of the tensors that are decoded from codes, with the scheme in words.
        fault: why the codes of a quantised source cannot be decoded; it can be looked at, not converted.
    """

    format: str
    root: Path
    config: dict[str, object] | None
    args: dict[str, object] | None
    side: Side
    files: dict[str, FileStamp]
    parallel: Parallel | None
    locate: Callable[[Family, Facts], Located]
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    stored_bytes: int = 0
    shapes: dict[str, Index] = field(default_factory=dict[str, Index])
    tensors: dict[str, Stored] = field(default_factory=dict[str, Stored])
    lacks: str = ""
    in_memory: bool = False
    notes: tuple[str, ...] = ()
    reader: Callable[[int], BoxReader] | None = None
    made: str = ""
    derived: Mapping[str, Derived] = field(default_factory=dict[str, Derived])
    coded: Mapping[str, str] = field(default_factory=dict[str, str])
    fault: DconvError | None = None
    stored: Callable[[], Iterable[Stored]] = tuple


@dataclass(frozen=True)
class Located:
    """Pieces found for each logical tensor, and the stored names that no row has."""

    pieces: dict[str, list[Piece]]
    unknown: dict[str, str]
    left_out: dict[str, str]


def describe(source: Source, family: Family, facts: Facts, drop: Iterable[str] = ()) -> Logical:
    """Lay a family's table over a source.

    Raises:
        Refused: stored tensors that are in no row and in no ``drop`` pattern.
        Damaged: tensors that are missing, torn, or of another shape than the config says.
    """
    located = source.locate(family, facts)
    patterns = list(drop)
    left_out = {**source.left_out, **located.left_out}
    unknown: dict[str, str] = {}
    for name, file in located.unknown.items():
        pattern = next((p for p in patterns if fnmatchcase(name, p)), None)
        if pattern is not None:
            left_out[name] = f"--drop {pattern}"
        elif reason := family.reason_to_leave_out(name, facts):
            left_out[name] = reason
        else:
            unknown[name] = file
    if unknown:
        first = next(iter(unknown))
        inspect = "" if source.in_memory else f"dconv inspect {source.root}  shows what they are;  "
        raise Refused(
            f"{len(unknown)} of {len(source.shapes)} source tensors are in no row of {family.name}, "
            "nothing was written",
            where=f"{group_names(unknown)}\nfirst in {unknown[first]}",
            expected="every tensor mapped, or named in --drop",
            do=f"{inspect}--drop '{group_names([first])}'  leaves it out",
        )
    specs = expected_specs(family, facts, located.pieces)
    pieces, replicas = check_pieces(specs, located.pieces)
    used = {piece.file for found in (*pieces.values(), *replicas.values()) for piece in found}
    behind = real_files(used, source.derived)
    files = {name: stamp for name, stamp in source.files.items() if name in behind}
    return Logical(
        source.root,
        specs,
        pieces,
        files,
        left_out,
        replicas,
        source.reader,
        source.made,
        dict(source.derived),
        source.stored,
    )


def expected_specs(
    family: Family, facts: Facts, pieces: Mapping[str, list[Piece]] | None = None
) -> dict[str, TensorSpec]:
    """The logical tensors that a model with these facts has, with the dtypes of the pieces where known.

    Raises:
        Damaged: shards of one tensor disagree on the dtype.
    """
    specs: dict[str, TensorSpec] = {}
    for entry in family.entries(facts):
        for spec in entry.fused.specs:
            if spec.name in specs:  # one expert's part of a tensor that holds them all
                continue
            dtypes = {piece.dtype for piece in pieces.get(spec.name, ())} if pieces else set[str]()
            if len(dtypes) > 1:
                raise Damaged(
                    "shards of one tensor disagree on the dtype",
                    where=spec.name,
                    found=", ".join(sorted(dtypes)),
                )
            specs[spec.name] = replace(spec, dtype=dtypes.pop() if dtypes else spec.dtype)
    return specs


def side_files(folder: Path) -> dict[str, Path]:
    """The side files of a directory, by name; also links to nothing, which whoever reads them tells of."""
    if not folder.is_dir():
        return {}
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if (path.is_file() or (path.is_symlink() and not path.exists()))
        and any(fnmatchcase(path.name, pattern) for pattern in SIDE_FILES)
        and not path.name.endswith((".index.json", ".py"))
    }


@contextmanager
def beside(side: Side) -> Generator[Path, None, None]:
    """A directory, for a while, with the side files in it, config.json excepted."""
    with TemporaryDirectory(prefix="dconv-run-") as scratch:
        folder = Path(scratch)
        for name, path in side.items():
            if isinstance(path, Made):
                (folder / name).write_bytes(path.make())
            elif name != "config.json" and path.exists():
                (folder / name).symlink_to(path.absolute())
        yield folder


def side_bytes(config: Mapping[str, object] | None, side: Side) -> Iterable[tuple[str, bytes]]:
    """config.json and the side files, as (name, bytes).

    Raises:
        Damaged: a side file of a size that none has.
        StorageFault: one cannot be read.
    """
    if config is not None:
        yield "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    for name, path in side.items():
        if name != "config.json" or config is None:
            made = isinstance(path, Made)
            yield name, path.make() if made else read_small(path, what="a file that travels along")


def seal(config: Mapping[str, object] | None, side: Side, also: str = "") -> str:
    """A digest of what `side_bytes` gives, and of ``also``; see `dconv.sharding.plan.Target`."""
    digest = xxhash.xxh3_128(also.encode("utf-8", "surrogatepass"))
    for name, data in side_bytes(config, side):
        digest.update(f"\n{name} {len(data)}\n".encode("utf-8", "surrogatepass"))
        digest.update(data)
    return digest.hexdigest()


def shape_error(name: str, where: str, expected: tuple[int, ...], found: tuple[int, ...]) -> Damaged:
    """The error of a tensor whose shape is not the one that the config gives it."""
    return Damaged(
        "a tensor has another shape than its config says",
        where=f"{name} in {where}",
        expected=str(expected),
        found=str(found),
        do="the config belongs to another model, or --hf-config names the wrong directory",
    )
