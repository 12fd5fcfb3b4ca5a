"""A source whose storage fails at each call that reads it, from the first look to the commit."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dconv.errors import DconvError, StorageFault
from dconv.pipeline import Request, prepare, run
from dconv.sharding.rank import Settings
from tests.crash.cases import CASES, each, in_step, job_of, settings_of
from tests.crash.storage import READING, SHORT, Storage
from tests.models import tree_digest

FAULTS = {"EIO": errno.EIO, "EACCES": errno.EACCES, "ESTALE": errno.ESTALE, "EINTR": errno.EINTR, "short": 0}
#: The model, and outputs of these cases, read again.
KINDS = ("the model", "legacy", "torch_dist", "pt", "bmtrain", "mlx", "gguf", "fp8", "neuron")


@pytest.fixture(scope="module")
def sources(small: Path, results: dict[str, dict[str, str]], root_of_sources: Path) -> dict[str, Path]:
    """In memory, where that is to be had."""
    found = {"the model": shutil.copytree(small, root_of_sources / "model")}
    for case in KINDS[1:]:
        found[case] = root_of_sources / case
        run(job_of(small, case, found[case]), settings_of(case))
    return found


@pytest.mark.parametrize("once", [True, False], ids=["once", "for good"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_read_meets_a_fault(
    sources: dict[str, Path], root: Path, kind: str, fault: str, once: bool,
    request: pytest.FixtureRequest, counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """It ends well or with error 5, writes nothing wrong, and a later run ends well."""
    source, out = sources[kind], root / "out"
    asked = Request(source, out=out, **CASES["hf" if kind != "the model" else "torch_dist"])
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch)
        storage = Storage(patch, source, lambda *_: None, READING)
        run(prepare(asked), Settings())
    expected = tree_digest(out)
    shutil.rmtree(out)
    tried = failed = 0
    for k in each(request, len(storage.calls), KINDS.index(kind) + 5 * list(FAULTS).index(fault)):

        def hook(call: int, _: str, k: int = k) -> object:
            if call == k or (call > k and not once):
                if not FAULTS[fault]:
                    return SHORT
                raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))
            return None

        tried += 1
        with pytest.MonkeyPatch.context() as patch:
            in_step(patch)
            Storage(patch, source, hook, READING)
            try:
                run(prepare(asked), Settings())
            except (DconvError, OSError) as error:
                assert isinstance(error, StorageFault), (k, storage.calls[k - 1], error)
                failed += 1
                assert not out.exists()
            else:
                assert tree_digest(out) == expected, (k, storage.calls[k - 1])
        run(prepare(replace(asked)), Settings(resume=True))
        assert tree_digest(out) == expected
        assert [path.name for path in root.iterdir()] == ["out"]
        shutil.rmtree(out)
    if not FAULTS[fault]:
        assert not failed
    elif not once:
        assert failed
    counted("faults at a read", tried)
