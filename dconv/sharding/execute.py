"""Do tasks: read boxes, apply the op, hash, write at the final offset. No communication, bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.sharding.allocation import keep_freed_memory
from dconv.sharding.derived import open_reader
from dconv.sharding.digest import ALGORITHMS, Hasher, of_zeros, update_zeros
from dconv.sharding.dtypes import ITEMSIZE, carrier
from dconv.sharding.ops import MOVE, Derive, Kernel
from dconv.sharding.outputs import Outputs
from dconv.sharding.overflow import check_range
from dconv.sharding.plan import Copy, Plan, TargetTensor, Task
from dconv.sharding.reader import BoxReader, ReadLog
from dconv.sharding.region import Region
from dconv.sharding.replicas import disagreement, equal
from dconv.sharding.staging import Stage
from dconv.sharding.tuning import Tuner

if TYPE_CHECKING:
    from concurrent.futures import Future


#: Buffers past this size no longer speed anything up (they leave the processor's caches).
TILE_BYTES: Final = 1 << 20
#: The usual block of a file system: a hole is made of whole ones.
_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True)
class Done:
    """A finished task: its leaf digest and how many bytes were really written (holes are not).

    The digest is empty where other processes have yet to write their parts of the leaf.
    """

    task: Task
    digest: str
    written: int


class Worker:
    """Does one task at a time with its own buffers.

    Args:
        kernel: applies numeric ops.
        budget: bytes that its buffers may take together.
        reader: opens a reader with a scratch buffer of so many bytes; None reads the source's files.
        stage: has copies of these on this machine.
    """

    def __init__(
        self,
        plan: Plan,
        outputs: Outputs,
        kernel: Kernel,
        budget: int,
        algorithm: str,
        log: ReadLog | None = None,
        reader: Callable[[int], BoxReader] | None = None,
        stage: Stage | None = None,
    ) -> None:
        # tile + scratch + (for casts) a tile in the source dtype with its fp32 and rounding temporaries
        self._tile_bytes = max(4096, min(TILE_BYTES, budget // 24))
        self._plan = plan
        self._outputs = outputs
        self._kernel = kernel
        self._tile = np.empty(self._tile_bytes, np.uint8)
        self._algorithm = algorithm
        self.reader: BoxReader = (
            reader(self._tile_bytes) if reader else open_reader(plan.source, self._tile_bytes, kernel, log, stage=stage)
        )

    def do(self, task: Task) -> Done:
        """Do one task: its bytes are at their place in the output when this returns, though not yet flushed to disk.

        Returns:
            The task, its digest ("" where other processes write a part of it, too) and the bytes written.

        Raises:
            DconvError: the source cannot be read, is damaged, or the output cannot be written.
        """
        if task.tensor < 0:
            return self._frame(task)
        tensor = self._plan.target.tensors[task.tensor]
        copies = [c for copy in self._plan.copies[task.tensor] if (c := copy.clip(task.region)) is not None]
        mine = [copy for copy in copies if self.reader.has(copy.file)]
        if len(mine) < len(copies):
            return self._part(task, tensor, mine)
        if all(map(self._is_hole, copies)):
            self._outputs.blank(task.file, task.offset, task.nbytes)
            return Done(task, of_zeros(self._algorithm, task.nbytes), 0)
        hasher = ALGORITHMS[self._algorithm]()
        offset, written = task.offset, 0
        itemsize = ITEMSIZE[tensor.spec.dtype]
        for tile, clipped in _tiles(task.region, copies, max(1, self._tile_bytes // itemsize)):
            nbytes = tile.volume * itemsize
            if all(map(self._is_hole, clipped)):
                self._outputs.blank(task.file, offset, nbytes)
                update_zeros(hasher, nbytes)
            else:
                data = self._fill(tile, clipped, tensor)
                hasher.update(data)
                written += self._write(task.file, data, offset, clipped)
            offset += nbytes
        return Done(task, hasher.hexdigest(), written)

    def _part(self, task: Task, tensor: TargetTensor, copies: Sequence[Copy]) -> Done:
        """Write what ``copies`` fill of a leaf and not a byte between: the rest is other processes' to write."""
        itemsize = ITEMSIZE[tensor.spec.dtype]
        offset, written = task.offset, 0
        for tile, clipped in _tiles(task.region, copies, max(1, self._tile_bytes // itemsize)):
            data = self._fill(tile, clipped, tensor) if clipped else memoryview(b"")
            for start, stop in _runs(tile, clipped):
                self._outputs.write(task.file, data[start * itemsize : stop * itemsize], offset + start * itemsize)
                written += (stop - start) * itemsize
            offset += tile.volume * itemsize
        return Done(task, "", written)

    def _is_hole(self, copy: Copy) -> bool:
        return self.reader.is_hole(copy) and all(map(self.reader.is_hole, copy.twins))

    def _write(self, file: int, data: memoryview, offset: int, copies: Sequence[Copy]) -> int:
        """Write a tile; of one from sparse files only the blocks with data. Returns the bytes written."""
        if not any(self.reader.is_sparse(copy.file) for copy in copies):
            self._outputs.write(file, data, offset)
            return len(data)
        written = 0
        for start, stop, zero in _blocks(data, offset):
            if zero:
                self._outputs.blank(file, offset + start, stop - start)
            else:
                self._outputs.write(file, data[start:stop], offset + start)
                written += stop - start
        return written

    def _fill(self, tile: Region, copies: Sequence[Copy], tensor: TargetTensor) -> memoryview:
        dtype = tensor.spec.dtype
        flat = self._tile[: tile.volume * ITEMSIZE[dtype]]
        out = flat.view(carrier(dtype)).reshape(tile.shape)
        if sum(copy.region.volume for copy in copies) < tile.volume:
            out[...] = 0  # vocabulary padding
        for copy in copies:
            box = out[_within(tile, copy.region)]
            raw = (
                box
                if copy.op is MOVE or isinstance(copy.op, Derive)
                else np.empty(copy.region.shape, carrier(copy.dtype))
            )
            self.reader.read_box(copy, raw)
            for twin in copy.twins:
                if not equal(self.reader, raw, twin):
                    name = next(s.tensor for s in tensor.slots if s.stored.intersect(copy.region) is not None)
                    raise disagreement(name, copy, twin)
            if raw is not box:
                box[...] = self._kernel(copy.op, raw)
            check_range(box, raw, copy, tensor, self._kernel)
        return flat.data

    def _frame(self, task: Task) -> Done:
        hasher: Hasher = ALGORITHMS[self._algorithm]()
        written = 0
        self._outputs.fd(task.file)
        for offset, data in self._plan.target.files[task.file].literals:
            self._outputs.write(task.file, memoryview(data), offset)
            hasher.update(data)
            written += len(data)
        return Done(task, hasher.hexdigest(), written)


def _within(tile: Region, region: Region) -> tuple[Any, ...]:
    """The numpy index of a region in an array of the tile; "..." gives a view also of a 0-d one."""
    place = zip(tile.start, region.start, region.shape, strict=True)
    return (..., *(slice(b - a, b - a + n) for a, b, n in place))


def _runs(tile: Region, copies: Sequence[Copy]) -> list[tuple[int, int]]:
    """The unbroken runs (start, stop; elements in row-major order) of a tile that copies fill together."""
    if not copies:
        return []
    filled = np.zeros(tile.shape, np.bool_)
    for copy in copies:
        filled[_within(tile, copy.region)] = True
    edges = np.flatnonzero(np.diff(filled.reshape(-1), prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _blocks(data: memoryview, offset: int) -> Iterator[tuple[int, int, bool]]:
    """Cut at the blocks of the file into runs (start, stop, all of it zero)."""
    array = np.frombuffer(data, np.uint8)
    first = min(-offset % _BLOCK, len(array))
    last = first + (len(array) - first) // _BLOCK * _BLOCK
    empty = [
        not array[:first].any(),
        *(array[first:last].reshape(-1, _BLOCK).max(axis=1, initial=0) == 0).tolist(),
        not array[last:].any(),
    ]
    edges = [0, *range(first, last + 1, _BLOCK), len(array)]
    start = 0
    for i, stop in enumerate(edges[1:]):
        if i + 1 == len(empty) or empty[i + 1] != empty[i]:
            if stop > start:
                yield start, stop, bool(empty[i])
            start = stop


def _tiles(region: Region, copies: Sequence[Copy], limit: int) -> Iterator[tuple[Region, list[Copy]]]:
    """Contiguous tiles of a leaf in order, each with the copies that fill it. ``copies`` are sorted by start."""
    waiting = 0
    active: list[Copy] = []
    for tile in region.bands(limit):
        if not tile.shape:
            yield tile, list(copies)
            return
        low, high = tile.start[0], tile.start[0] + tile.shape[0]
        while waiting < len(copies) and copies[waiting].region.start[0] < high:
            active.append(copies[waiting])
            waiting += 1
        active = [c for c in active if c.region.start[0] + c.region.shape[0] > low]
        yield tile, [c for copy in active if (c := copy.clip(tile)) is not None]


def run_tasks(
    plan: Plan,
    tasks: Sequence[Task],
    outputs: Outputs,
    on_done: Callable[[Done], None],
    *,
    kernel: Kernel,
    max_memory: int,
    tuner: Tuner,
    algorithm: str,
    stop: threading.Event | None = None,
    log: ReadLog | None = None,
    reader: Callable[[int], BoxReader] | None = None,
    skip: Callable[[Task], bool] = lambda _: False,
    stage: Stage | None = None,
) -> bool:
    """Do ``tasks`` with as many threads as ``tuner`` says inside ``max_memory`` bytes of buffers.

    ``on_done`` is called from this thread, once a task; ``skip`` just before a task begins, which it may leave out.
    Returns False when ``stop`` was set before all were done.

    Raises:
        DconvError: the first failure; tasks that were under way are finished or dropped.
    """
    if any(copy.op is not MOVE for copies in plan.copies for copy in copies[:1]):
        keep_freed_memory()
    crew = _Crew(
        lambda: Worker(plan, outputs, kernel, max_memory // tuner.most, algorithm, log, reader, stage),
        (task for task in tasks if not skip(task)), on_done, stop or threading.Event(), tuner,
    )  # fmt: skip
    try:
        while not crew.stop.is_set() and not crew.is_done:
            if tuner.threads == 1:
                crew.alone()
            else:
                crew.together()
        return crew.is_done
    finally:
        for worker in crew.workers:
            worker.reader.close()


class _Crew:
    """The workers of one `run_tasks`, of which as many work as the tuner says."""

    def __init__(
        self, make: Callable[[], Worker], tasks: Iterator[Task], on_done: Callable[[Done], None],
        stop: threading.Event, tuner: Tuner,
    ) -> None:  # fmt: skip
        self._make, self._tasks, self._on_done, self.stop, self._tuner = make, tasks, on_done, stop, tuner
        self.workers: list[Worker] = []
        self._free: list[Worker] = []
        self.is_done = False

    def alone(self) -> None:
        """One task after the other in this thread, as long as it is to be one."""
        worker = self._worker()
        while self._tuner.threads == 1 and not self.stop.is_set() and (task := self._next()) is not None:
            self._finished(worker.do(task))
        self._free.append(worker)

    def together(self) -> None:
        """In threads, as long as they are to be several."""
        from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait  # one thread does not pay for it

        with ThreadPoolExecutor(self._tuner.most, thread_name_prefix="dconv") as pool:
            busy: dict[Future[Done], Worker] = {}
            while True:
                while (
                    1 < self._tuner.threads > len(busy)
                    and not self.stop.is_set()
                    and (task := self._next()) is not None
                ):
                    worker = self._worker()
                    busy[pool.submit(worker.do, task)] = worker
                if not busy:
                    return
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    self._free.append(busy.pop(future))
                    self._finished(future.result())

    def _worker(self) -> Worker:
        if not self._free:
            self.workers.append(self._make())
            self._free.append(self.workers[-1])
        return self._free.pop()

    def _next(self) -> Task | None:
        task = next(self._tasks, None)
        self.is_done = task is None
        return task

    def _finished(self, done: Done) -> None:
        self._tuner.done(done.task.nbytes)
        self._on_done(done)
