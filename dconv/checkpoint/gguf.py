"""GGUF files as a source: one, or a set ``-00001-of-00003.gguf``, with config and tokenizer in the metadata.

Weights in blocks are decoded as they are read (`dconv.coded.gguf`); what lies where is `dconv.arch.gguf_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.gguf import ARCHS, arch_of, config_of
from dconv.arch.gguf_metadata import Metadata
from dconv.arch.gguf_names import Box, boxes_of
from dconv.arch.gguf_rope import FREQUENCIES, LONG, SHORT
from dconv.arch.layouts import Facts
from dconv.checkpoint import gguf_tokenizer
from dconv.checkpoint.files import listed, stamp
from dconv.checkpoint.gguf_header import Header, Tensor, read_header
from dconv.checkpoint.huggingface import small_values
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.signs import GGUF, is_gguf
from dconv.checkpoint.source import Located, Source, expected_specs, shape_error
from dconv.checkpoint.tied import differ, equal
from dconv.codec.gguf import PLAIN
from dconv.coded import gguf as coded
from dconv.coded.decoded import Decoded
from dconv.errors import Damaged, DconvError, group_names
from dconv.sharding.dtypes import ITEMSIZE, TO_TORCH
from dconv.sharding.reader import Reader
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Extent, FileStamp, Piece, Stored, TensorSpec

_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
#: Tables that the config says as well.
_TABLES: Final = (FREQUENCIES, LONG, SHORT)
_HEAD: Final = "output.weight"
#: A table of frequencies, at most.
_MOST: Final = 1 << 16
#: Missing files that an error's text is made of.
_NAMED: Final = 1000
#: Bytes of what reads one.
_SCRATCH: Final = 1 << 18
_MIXED: Final = "norms and biases of a GGUF are fp32 whatever its weights are, and stay so without --dtype"


def find(path: Path) -> Path | None:
    """The GGUF that a path is, or the only one (the first of the only set) that lies in it."""
    if not path.is_dir():
        return path if is_gguf(path) else None
    held = [entry for entry in listed(path, f"*{GGUF}") if entry.is_file() and not entry.name.startswith("mmproj")]
    sets = {match[1] if (match := _SPLIT.fullmatch(entry.name)) else entry.name: entry for entry in reversed(held)}
    return next(iter(sets.values())) if len(sets) == 1 else None


def open_source(path: Path, *, own_config: bool = True, rename: Renaming = AS_STORED) -> Source:
    """Describe a GGUF from its headers; of its tensors only a table of frequencies is read.

    Args:
        path: a file, any one of a set, or the directory that has them.
        own_config: translate the metadata; False leaves the config to ``--hf-config``.
        rename: gives the stored tensors other names before they are looked at.

    Raises:
        Damaged: a header or a set that is not whole, a value that none is.
        Refused: an architecture that is not known here, metadata that lack what its config needs.
        ToolMissing: no package gguf.
    """
    first = find(path)
    if first is None:
        names = sorted(entry.name for entry in listed(path, f"*{GGUF}")) if path.is_dir() else [path.name]
        raise Damaged(
            "no GGUF that can be told apart",
            where=str(path),
            expected="one file, or one set of -00001-of-0000N.gguf",
            found=", ".join(names)[:200] or "none",
            do="name the file itself",
        )
    folder, parts = first.parent, _parts(first)
    files = {part.name: stamp(part) for part in parts}  # before what they hold
    headers = {part.name: read_header(part) for part in parts}
    values = next(iter(headers.values())).values
    _check_set(first, headers)
    arch = arch_of(values, str(first))
    held = _held(folder, headers, rename)
    raw = {name: _stored(name, file, tensor) for name, (file, tensor) in held.items()}
    dtype = _dtype(tensor for _, tensor in held.values())
    config = None
    with closing(Reader(folder, files, _SCRATCH)) as reader:
        found = _decoded(Decoded(dict(raw), partial(small_values, reader)), held, arch, dtype)
        shapes = {name: stored.spec.shape for name, stored in found.tensors.items()}
        with suppress(*(() if own_config else (DconvError,))):
            numbers = partial(_numbers, reader, folder, raw)
            config = config_of(Metadata(arch, values, shapes, numbers, str(first)))
            config["torch_dtype"] = TO_TORCH[dtype]
    named = _named(arch, config, shapes)
    side, notes = gguf_tokenizer.side(first, values)
    if any(tensor.kind == "F32" for _, tensor in held.values()) and dtype != "f32":
        notes = (*notes, _MIXED)

    def locate(family: Family, facts: Facts) -> Located:
        boxes = list(boxes_of(arch, expected_specs(family, facts).values(), facts, shapes))
        for name in _mixed(boxes, found):
            coded.alike(found, name, dtype)
        return _locate(boxes, facts, found, (folder, files, raw))

    return Source(
        format="gguf",
        root=folder,
        config=config,
        args=None,
        side=side,
        files=files,
        parallel=None,
        locate=locate,
        stored_bytes=sum(tensor.nbytes for _, tensor in held.values()),
        shapes={hf: shape for hf, (_, shape) in named.items()} or shapes,
        notes=notes,
        derived=found.derived,
        coded={hf: found.coded[name] for hf, (name, _) in named.items() if name in found.coded} or found.coded,
        stored=lambda: raw.values(),
    )


def _parts(first: Path) -> list[Path]:
    """The files of a set, of which any one was named.

    Raises:
        Damaged: some are missing.
    """
    match = _SPLIT.fullmatch(first.name)
    if match is None:
        return [first]
    count = int(match[3])
    parts = [first.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    there = {entry.name for entry in first.parent.iterdir()}  # a name costs nothing, and promises any number
    if missing := [part.name for part in parts if part.name not in there]:
        raise Damaged(
            f"{len(missing)} of {count} files of a GGUF are missing, nothing was written",
            where=group_names(missing[:_NAMED]) + f"\nin {first.parent}",
            do="fetch them again",
        )
    if not parts:
        raise Damaged("a set of no files", where=str(first))
    return parts


def _check_set(first: Path, headers: Mapping[str, Header]) -> None:
    """That the files say of themselves what their names say.

    Raises:
        Damaged: they are of several sets, or a file is alone that should not be.
    """
    total = sum(len(header.tensors) for header in headers.values())
    for number, (name, header) in enumerate(headers.items()):
        said = [header.values.get(f"split.{key}") for key in ("no", "count", "tensors.count")]
        if len(headers) == 1 and said[1] in (None, 0, 1):
            continue
        if said != [number, len(headers), total]:
            raise Damaged(
                "a file of a GGUF set that does not belong to it, nothing was written",
                where=str(first.with_name(name)),
                expected=f"split.no {number}, split.count {len(headers)}, split.tensors.count {total}",
                found=", ".join(map(str, said)),
                do="the files keep the names that they were split under: fetch them again",
            )


def _held(folder: Path, headers: Mapping[str, Header], rename: Renaming) -> dict[str, tuple[str, Tensor]]:
    """Every tensor, with its file."""
    held: dict[str, tuple[str, Tensor]] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in held:
                raise Damaged("two files of a set hold one tensor", where=f"{name[:120]} in {folder / file}")
            held[name] = file, tensor
    return rename(held, folder)


def _stored(name: str, file: str, tensor: Tensor) -> Stored:
    """A tensor as its file has it: numbers, or the bytes of its rows."""
    dtype = PLAIN.get(tensor.kind, "u8")
    shape = tensor.shape if tensor.kind in PLAIN else (*tensor.shape[:-1], tensor.row_bytes)
    extent = Extent(Region.whole(shape), file, tensor.offset, row_major(shape, ITEMSIZE[dtype]))
    return Stored(TensorSpec(name, shape, dtype), (extent,))


def _dtype(tensors: Iterable[Tensor]) -> str:
    """What the weights are decoded to where nothing else is asked for: their own dtype where they have one."""
    kinds = Counter[str]()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            kinds[PLAIN.get(tensor.kind, "")] += tensor.nbytes
    return "bf16" if kinds[""] else max(kinds, key=lambda kind: kinds[kind], default="f32")


def _decoded(found: Decoded, held: Mapping[str, tuple[str, Tensor]], arch: str, dtype: str) -> Decoded:
    for name, (_, tensor) in held.items():
        if tensor.kind not in PLAIN:
            coded.decode(found, name, tensor.kind, tensor.shape, dtype)
        elif ARCHS[arch].raised and name.endswith("norm.weight"):
            coded.lower(found, name)
    return found


def _numbers(reader: Reader, folder: Path, raw: Mapping[str, Stored], name: str) -> list[float]:
    """A small table of fp32.

    Raises:
        Damaged: it is none.
    """
    stored = raw.get(name)
    if stored is None or stored.spec.dtype != "f32" or len(stored.spec.shape) != 1 or stored.spec.shape[0] > _MOST:
        found = f"{stored.spec.dtype}{list(stored.spec.shape)}" if stored else "nothing"
        raise Damaged("no table of frequencies", where=f"{name} in {folder}", expected="f32, one axis", found=found)
    return [float(number) for number in small_values(reader, stored)]


def _named(arch: str, config: dict[str, Any] | None, shapes: Mapping[str, Index]) -> dict[str, tuple[str, Index]]:
    """HuggingFace's names for what is there, each with the first tensor that it is in and its shape."""
    named: dict[str, tuple[str, Index]] = {}
    if config is not None:
        family = registry.detect(config, None)
        facts = family.facts(config)
        for spec, box in boxes_of(arch, expected_specs(family, facts).values(), facts, shapes):
            named.setdefault(spec.name, (box.tensor, spec.file_shape))
    return named


def _mixed(boxes: Iterable[tuple[TensorSpec, Box]], found: Decoded) -> set[str]:
    """Plain tensors that make a weight together with others of another dtype."""
    dtypes: dict[str, set[str]] = {}
    for spec, box in boxes:
        dtypes.setdefault(spec.name, set()).add(found.tensors[box.tensor].spec.dtype)
    return {box.tensor for spec, box in boxes if len(dtypes[spec.name]) > 1 and box.tensor not in found.coded}


def _locate(
    boxes: Iterable[tuple[TensorSpec, Box]],
    facts: Facts,
    found: Decoded,
    behind: tuple[Path, Mapping[str, FileStamp], Mapping[str, Stored]],
) -> Located:
    """The logical tensors of a family, each where the file has it.

    Args:
        boxes: the logical tensors, and what of which stored one each is.
        facts: what config and tensors tell of the model.
        found: the stored tensors, those in blocks decoded.
        behind: directory, files and the tensors as they are stored.
    """
    located, used = Located({}, {}, {}), set[str]()
    for spec, box in boxes:
        stored = found.tensors[box.tensor]
        if stored.spec.shape != box.whole:
            raise shape_error(box.tensor, str(behind[0]), box.whole, stored.spec.shape)
        used.add(box.tensor)
        located.pieces.setdefault(spec.name, []).append(_piece(spec, box, stored))
    for name in found.tensors.keys() - used:
        if name in _TABLES:
            located.left_out[name] = "computed from the config"
        elif name == _HEAD and facts["tied"]:
            located.left_out[name] = _tied(*behind)
        else:
            located.unknown[name] = str(behind[0])
    return located


def _tied(folder: Path, files: Mapping[str, FileStamp], raw: Mapping[str, Stored]) -> str:
    embedding = "token_embd.weight"
    if embedding not in raw or not equal(folder, files, raw[embedding], raw[_HEAD]):
        raise differ(_HEAD, embedding, folder)
    return "tied to the input embedding by the config"


def _piece(spec: TensorSpec, box: Box, stored: Stored) -> Piece:
    extent = stored.extents[0]
    offset = extent.offset + sum(at * step for at, step in zip(box.start, extent.strides, strict=True))
    strides = [extent.strides[axis] for axis in box.axes]
    strides[0] *= box.step
    return Piece(spec.name, box.region, extent.file, offset, tuple(strides), stored.spec.dtype)
