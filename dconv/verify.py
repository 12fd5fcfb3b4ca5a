"""Is an output what it must be? Re-read against its receipt, or compare what the model computes.

`reread` asks the bytes: every tensor, every byte between tensors, every closing file against the digests of
``dconv.json``, streaming. ``dconv check`` uses it, ``convert --verify`` also what `dconv.logits` finds.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dconv import logits
from dconv.checkpoint.files import parse_json, read_small
from dconv.errors import Damaged, DconvError, StorageFault, VerifyFailed, group_names
from dconv.pipeline import Job
from dconv.sharding.digest import ALGORITHMS, of_zeros, tree, update_zeros
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.parsed import is_list, is_mapping, mapping_or_empty
from dconv.sharding.plan import LEAF_BYTES
from dconv.sharding.receipt import OWN, RECEIPT, hash_stretch, is_unchanged
from dconv.sharding.region import Region

_READ: Final = 1 << 20


@dataclass(frozen=True)
class Reread:
    """What reading an output back found.

    Attributes:
        tensors, files, nbytes: how much was read and compared.
        damaged: tensors whose bytes are not those that were written, as ``name in file``.
        broken: files that are missing, or changed outside their tensors.
        strangers: files in the directory that the receipt does not name.
    """

    plan: str
    tensors: int
    files: int
    nbytes: int
    damaged: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Nothing damaged, nothing broken."""
        return not (self.damaged or self.broken)

    def fault(self, kind: type[DconvError], folder: Path) -> DconvError:
        """What is wrong, as an error of ``kind``."""
        parts = [
            f"{len(names)} {word}{'s' * (len(names) > 1)}"
            for word, names in (("tensor", self.damaged), ("file", self.broken))
            if names
        ]
        return kind(
            f"{' and '.join(parts)} changed since the receipt was written",
            where="\n".join(group_names(names) for names in (self.damaged, self.broken) if names) + f"\nin {folder}",
            expected=f"the digests in {RECEIPT} (plan {self.plan})",
            do="convert again, or copy it again from where it was whole",
        )


def find_receipt(path: Path) -> Path | None:
    """The directory whose receipt covers ``path``: itself, or above it for a file or a Megatron root's iteration."""
    for folder in (path, path.absolute().parent):
        if (folder / RECEIPT).is_file():
            receipt = _receipt(folder)
            inside = f"{path.absolute().name}/"
            covered = mapping_or_empty(receipt.get("frames"))
            if folder == path or path.name in covered or any(name.startswith(inside) for name in covered):
                return folder
    return None


def plan_of(folder: Path) -> str:
    """The plan id in a directory's receipt."""
    return str(_receipt(folder).get("plan"))


def _receipt(folder: Path) -> dict[str, object]:
    """A directory's receipt, held against its own digest before anything that it says is believed.

    Raises:
        Damaged: it is not as it was written.
    """
    path = folder / RECEIPT
    data = read_small(path, what="the receipt")
    receipt = parse_json(data, where=str(path), what="the receipt")
    if not is_unchanged(data, receipt, receipt.get("digest")):
        raise Damaged(
            "the receipt changed since it was written",
            where=str(path),
            expected=f"bytes of the digest in its {OWN}",
            do="copy it again from where it was whole: what it says of the tensors cannot be trusted",
        )
    return receipt


def reread(folder: Path) -> Reread:
    """Read every byte that the receipt of ``folder`` speaks of, and compare.

    Raises:
        Damaged: there is no receipt, or it is broken itself.
        StorageFault: a file cannot be read.
    """
    receipt = _receipt(folder)
    algorithm = str(receipt.get("digest"))
    if algorithm not in ALGORITHMS:
        raise _broken_receipt(folder, "digest", ", ".join(ALGORITHMS), algorithm)
    closing, frames = (_digests(folder, receipt, part) for part in ("closing", "frames"))
    tensors: dict[str, list[_Tensor]] = {name: [] for name in frames}
    for tensor in _tensors(folder, receipt):
        if tensor.file not in tensors:
            raise _broken_receipt(folder, tensor.key, "a file named in frames", tensor.file)
        tensors[tensor.file].append(tensor)
    damaged: list[str] = []
    broken: list[str] = []
    nbytes = 0
    for name, said in {**closing, **frames}.items():
        try:
            fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold it up
        except (FileNotFoundError, NotADirectoryError):
            broken.append(f"{name} (missing)")
            continue
        except OSError as fault:
            raise StorageFault(f"cannot read: {fault.strerror}", where=str(folder / name)) from fault
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                broken.append(f"{name} (not a regular file)")
                continue
            held = sorted(tensors.get(name, ()), key=lambda t: t.offset)
            if _between(fd, held, algorithm) != said:
                broken.append(f"the header of {name}" if held else name)
            damaged += [f"{t.key} in {name}" for t in held if _digest(fd, t, algorithm) != t.digest]
            nbytes += os.fstat(fd).st_size
        except OSError as fault:
            raise StorageFault(f"cannot read: {fault.strerror}", where=str(folder / name)) from fault
        finally:
            os.close(fd)
    known = {*closing, *frames, RECEIPT}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    strangers = tuple(name for name in found if name not in known)
    count = sum(map(len, tensors.values()))
    return Reread(str(receipt.get("plan")), count, len(known) - 1, nbytes, tuple(damaged), tuple(broken), strangers)


def digest(out: Path) -> Reread:
    """`reread` right after a conversion.

    Raises:
        VerifyFailed: something is not as it was written.
    """
    found = reread(out)
    if not found.whole:
        raise found.fault(VerifyFailed, out)
    return found


@dataclass(frozen=True, slots=True)
class _Tensor:
    key: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return Region.whole(self.shape).volume * ITEMSIZE[self.dtype]


def _broken_receipt(folder: Path, part: str, expected: str, found: object) -> Damaged:
    return Damaged(
        "the receipt is broken",
        where=f"{part[:200]} in {folder / RECEIPT}",
        expected=expected,
        found=repr(found)[:120],
        do="convert again: without a valid receipt this is not a result",
    )


def _plain_path(folder: Path, part: str, name: object) -> str:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    plain = not path.is_absolute() and ".." not in path.parts and bool(path.parts) and "\0" not in str(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair: no file has such a name
        plain = False
    if not plain:
        raise _broken_receipt(folder, part, "paths inside the directory", name)
    return str(path)


def _digests(folder: Path, receipt: Mapping[str, object], part: str) -> dict[str, str]:
    listed = receipt.get(part, {})
    if not is_mapping(listed):
        raise _broken_receipt(folder, part, "files with digests", listed)
    return {_plain_path(folder, part, name): str(said) for name, said in listed.items()}


def _tensors(folder: Path, receipt: Mapping[str, object]) -> Iterator[_Tensor]:
    listed = receipt.get("tensors")
    if not is_mapping(listed):
        raise _broken_receipt(folder, "tensors", "tensors with digests", listed)
    for key, entry in listed.items():
        fields: Any = mapping_or_empty(entry)
        dtype, shape, offset = fields.get("dtype"), fields.get("shape"), fields.get("offset")
        numbers = [*shape, offset] if is_list(shape) else [None]
        if str(dtype) not in ITEMSIZE or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _broken_receipt(folder, key, "dtype, shape and offset", entry)
        file = _plain_path(folder, key, fields.get("file"))
        yield _Tensor(key, file, offset, dtype, tuple(shape), str(fields.get("digest")))


def _digest(fd: int, tensor: _Tensor, algorithm: str) -> str:
    """The tensor's digest from the file, cut into the leaves of `dconv.sharding.plan.Plan.tasks`."""
    itemsize = ITEMSIZE[tensor.dtype]
    leaves: list[str] = []
    offset, end = tensor.offset, os.fstat(fd).st_size
    if tensor.nbytes > end - offset:
        return ""
    for band in Region.whole(tensor.shape).bands(LEAF_BYTES // itemsize):
        nbytes = band.volume * itemsize
        leaves.append(_leaf(fd, offset, nbytes, algorithm))
        offset += nbytes
    return tree(algorithm, leaves)


def _leaf(fd: int, offset: int, nbytes: int, algorithm: str) -> str:
    """The digest of a stretch; holes of a sparse file are hashed as the zeros they are, without reading them."""
    end = offset + nbytes
    if (data := _next_data(fd, offset, end)) == offset and os.lseek(fd, offset, os.SEEK_HOLE) >= end:
        return hash_stretch(fd, offset, nbytes, algorithm)
    if data == end:
        return of_zeros(algorithm, nbytes)
    hasher = ALGORITHMS[algorithm]()
    while offset < end:
        update_zeros(hasher, data - offset)
        stop = min(os.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        while data < stop:
            read = os.pread(fd, min(_READ, stop - data), data)
            if not read:
                return ""
            hasher.update(read)
            data += len(read)
        offset = data
        data = _next_data(fd, offset, end)
    return hasher.hexdigest()


def _next_data(fd: int, offset: int, end: int) -> int:
    """Where the next byte lies that is in no hole, at most ``end``."""
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), end)
    except OSError as fault:
        if fault.errno == errno.ENXIO:  # no data up to the end of the file
            return end
        raise


def _between(fd: int, tensors: Iterable[_Tensor], algorithm: str) -> str:
    """The digest of every byte of the file that is no tensor's, in order: headers, zip records, all of small files."""
    hasher = ALGORITHMS[algorithm]()
    size, at = os.fstat(fd).st_size, 0
    for start, stop in [*((t.offset, t.offset + t.nbytes) for t in tensors), (size, size)]:
        while at < min(start, size):
            data = os.pread(fd, min(_READ, start - at), at)
            if not data:
                break
            hasher.update(data)
            at += len(data)
        at = max(at, stop)
    return hasher.hexdigest()


def told(mode: str, job: Job, out: Path) -> dict[str, object]:
    """Run ``--verify`` after a commit: what was verified, for the summary and ``--json``.

    Raises:
        VerifyFailed, ToolMissing: see `digest` and `dconv.logits.compare`; the output stays where it is.
    """
    found = digest(out)
    shown: dict[str, object] = {"tensors": found.tensors, "files": found.files, "bytes": found.nbytes}
    return {**shown, "logits": logits.compare(job, out)} if mode == "logits" else shown


def sentence(shown: Mapping[str, Any]) -> str:
    """One line about what `told` returned."""
    text = f"verified: {shown['tensors']} tensors and {shown['files']} files read back, digests as written"
    if "logits" not in shown:
        return text
    found = shown["logits"]
    if "weights" in found:
        return text + _coded(found)
    return text + f"\n          logits differ by {found['difference']:.1e} (bound {found['bound']:.1e}, {found['why']})"


def _coded(found: Mapping[str, Any]) -> str:
    """Of an output in codes: what was held to a bound, and what was measured."""
    held = found["weights"]
    near = f"at most {held['error']:.2g} of the largest that shares their scale (bound {held['bound']:.2g})"
    decoded = (
        f"{held['weights']:,} weights of {held['coded']} tensors decoded from the files are off by "
        f"{near if held['bound'] else 'nothing'}"
    )
    if held["calibrated"]:
        chosen = f"{held['calibrated']} calibrated tensors decoded from the files are finite"
        decoded = f"{chosen}, {decoded}" if held["coded"] else f"{chosen}, all others as they were"
    return (
        f"\n          {decoded}"
        f"\n          logits of the codes differ from the source's by {found['difference']:.1e} at most, "
        f"{found['mean']:.1e} in the mean; next tokens diverge by {found['divergence']:.1e} nats (told, not judged)"
    )
