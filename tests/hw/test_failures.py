"""Each way in which a hand-off fails, for each compiler: an error and an exit code of its own, nothing that looks good.

The drivers are the real ones; their vendors' toolchains are played by `tests.hw.stand_ins`. What a compiler takes is
made once, by the command; then each failure has a copy of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from dconv.cli import main
from dconv.errors import DconvError, Preempted, StorageFault
from dconv.hw import finish, manifest, process
from dconv.hw.target import Adapter, Ask, Handing, Tool
from tests.hw import stand_ins
from tests.processes import call


@dataclass(frozen=True)
class Compiler:
    """A row of docs/hardware.md's table of failures.

    Attributes:
        before: failure -> exit code and words, of those that are seen before any work.
        after: the same of those of the compiler, as its stand-in is told to fail.
    """

    target: str
    chip: str
    settings: Mapping[str, object]
    before: Mapping[str, tuple[int, str]]
    after: Mapping[str, tuple[int, str]]

    def convert(self, model: Path, out: Path, *options: str, chip: str = "", **settings: object) -> int:
        said = json.dumps({**self.settings, **settings})
        told = ["--platform", chip or self.chip, "--quantization-config", said, "-o", str(out), "--quiet"]
        return main(["convert", str(model), self.target, *told, *options])


COMPILERS: Final = {
    "rkllm": Compiler(
        "rk", "RK3588", {"toolkit": "rkllm"},
        {"no toolchain": (7, "no package rkllm-toolkit"), "half of it": (7, "librkllm.so is empty"),
         "unknown chip": (2, "compiles for one chip"), "impossible pair": (3, "does not compute in w4a16")},
        {"crash": (7, "exit code 134"), "hang": (7, "longer than it may"), "build": (7, "build returned -1"),
         "empty": (7, "returned 0 and wrote nothing"), "nothing": (7, "returned 0 and wrote nothing"),
         "full": (5, "found no room on the disk")},
    ),
    "rknn": Compiler(
        "rk", "RK3588", {"toolkit": "rknn", "sequence": 8},
        {"no toolchain": (7, "rknn-toolkit2, librknnc.so"), "half of it": (7, "librknnc.so"),
         "unknown chip": (2, "compiles for one chip"), "impossible pair": (3, "does not compute in w4a16")},
        {"crash": (7, "exit code 134"), "hang": (7, "longer than it may"), "errors": (7, "Catch exception"),
         "empty": (7, "no .rknn: 0 bytes"), "absent": (7, "no .rknn: 0 bytes"), "cut": (7, "where its header says"),
         "cpu": (7, "nothing of the graph would run on the NPU"), "full": (5, "found no room on the disk")},
    ),
    "qnn": Compiler(
        "qnn", "SM8750", {"sequence": 8},
        {"no toolchain": (7, "onnxruntime-qnn, libQnnHtp.so"), "half of it": (7, "libHtpPrepare.so"),
         "unknown chip": (2, "compiles for one chip"), "impossible pair": (3, "no half precision")},
        {"crash": (7, "exit code 134"), "hang": (7, "longer than it may"), "errors": (7, "Failed to finalize"),
         "empty": (7, "is missing or empty"), "few": (7, "is missing or empty"), "absent": (7, "wrote no graph"),
         "other": (7, "was compiled for"), "cpu": (7, "left to the CPU: EPContext, Gather"),
         "full": (5, "found no room on the disk")},
    ),
    "ax": Compiler(
        "ax", "AX650", {},
        {"no toolchain": (7, "neither pulsar2 nor docker"), "half of it": (7, "docker has no image of pulsar2"),
         "unknown chip": (2, "compiles for one chip"), "impossible pair": (2, "weight_type cannot be this")},
        {"crash": (7, "exit code 134"), "hang": (7, "longer than it may"), "type": (7, "model_type error"),
         "empty": (6, "are empty"), "few": (6, "parts of the model are missing"),
         "full": (5, "found no room on the disk")},
    ),
}  # fmt: skip

#: Compiler, failure, exit code, words.
BEFORE: Final = [(name, fails, *said) for name, one in COMPILERS.items() for fails, said in one.before.items()]
AFTER: Final = [(name, fails, *said) for name, one in COMPILERS.items() for fails, said in one.after.items()]
#: A pair of chip and precision that the compiler does not have; Pulsar2 says of none that a chip lacks it.
PAIRS: Final = {"rkllm": ("RK3588", "w4a16"), "rknn": ("RK3588", "w4a16"), "qnn": ("SM7550", "fp16"),
                "ax": ("AX650", "w4a16")}  # fmt: skip


def toolchain(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-in, as a person would have the toolchain; what has to be said of where it is."""
    folder.mkdir(exist_ok=True)
    said = stand_ins.environment("pulsar2" if name == "ax" else name, folder)
    if python := said.pop("TOOLCHAIN_PYTHON", ""):
        return ["--toolchain-python", python]
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    return []


@dataclass(frozen=True)
class Prepared:
    """A hand-off up to its compiler, as `dconv.hw.finish.compiled` takes it."""

    adapter: Adapter
    handing: Handing
    tool: Tool
    ask: Ask
    how: finish.Finish

    def compiled(self, folder: Path, fails: str = "") -> int:
        """The exit code, with OUT in a folder; errors are raised."""
        shutil.copytree(self.how.work, folder / "work")
        how = replace(self.how, out=folder / "out", work=folder / "work", timeout=1 if fails == "hang" else 300)
        tool = replace(self.tool, environment={**self.tool.environment, "STAND_IN_FAILS": fails})
        return 0 if finish.compiled(self.adapter, self.handing, tool, self.ask, how) else 1


@pytest.fixture(scope="module")
def prepared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    made: dict[str, Prepared] = {}

    def prepare(name: str) -> Prepared:
        if name not in made:
            at = tmp_path_factory.mktemp(name)

            def stopped(adapter: Adapter, handing: Handing, tool: Tool, ask: Ask, how: finish.Finish) -> Any:
                tool = replace(tool, environment={**tool.environment, "PATH": os.environ["PATH"]})
                made[name] = Prepared(adapter, handing, tool, ask, how)
                raise Preempted("stopped before the compiler")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finish, "compiled", stopped)
                assert COMPILERS[name].convert(llama, at / "out", *toolchain(name, at / "tools", patch)) == 75
        return made[name]

    return prepare


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tools"}


@pytest.mark.parametrize(("name", "fails", "code", "words"), BEFORE)
def test_before_any_work(
    name: str, fails: str, code: int, words: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    compiler, (chip, dtype), options = COMPILERS[name], PAIRS[name], list[str]()
    if fails == "no toolchain":
        options = [] if name == "ax" else ["--toolchain-python", sys.executable]
        monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    elif fails == "half of it" and name == "ax":
        (tmp_path / "tools").mkdir()
        (tmp_path / "tools" / "docker").write_text("#!/bin/sh\n")
        (tmp_path / "tools" / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    else:
        options = toolchain(name, tmp_path / "tools", monkeypatch)
    if fails == "half of it" and name != "ax":
        library = {"rkllm": "librkllm.so", "rknn": "librknnc.so", "qnn": "libHtpPrepare.so"}[name]
        (path,) = (tmp_path / "tools").rglob(library)
        path.write_bytes(b"")
    if fails == "impossible pair":
        options += ["--quant", dtype]
    chips = {"unknown chip": "XY1", "impossible pair": chip}
    assert compiler.convert(llama, tmp_path / "out", *options, chip=chips.get(fails, "")) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == set()


@pytest.mark.parametrize(("name", "fails", "code", "words"), AFTER)
def test_of_a_compiler(
    name: str, fails: str, code: int, words: str, prepared: Callable[[str], Prepared], tmp_path: Path
) -> None:
    with pytest.raises(DconvError) as raised:
        prepared(name).compiled(tmp_path, fails)
    assert raised.value.exit_code == code
    assert words in str(raised.value)
    assert left(tmp_path) == {"out.compile.log"}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_stand_in_that_is_told_nothing_compiles(
    name: str, prepared: Callable[[str], Prepared], tmp_path: Path
) -> None:
    """Or each failure above might be of another cause."""
    assert prepared(name).compiled(tmp_path) == 0
    assert manifest.checked(tmp_path / "out")["kind"] == "compiled"
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize("name", COMPILERS)
def test_no_room_for_what_is_compiled(
    name: str, prepared: Callable[[str], Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen before the compiler is started, which takes hours to find it out."""
    monkeypatch.setattr(finish.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageFault, match="no room for what is compiled"):
        prepared(name).compiled(tmp_path)
    assert left(tmp_path) == set()


def test_a_disk_that_is_full_at_the_very_end(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    told = toolchain("rkllm", tmp_path / "tools", monkeypatch)
    assert COMPILERS["rkllm"].convert(llama, tmp_path / "out", *told) == 5
    assert "No space left" in capsys.readouterr().err
    assert left(tmp_path) == {"out.compile.log"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_that_cannot_be_kept_ends_the_compiler(tmp_path: Path) -> None:
    """It would wait for ever for someone to read what it says."""
    command = [sys.executable, "-c", "while True: print('x' * 1000)"]
    with pytest.raises(StorageFault, match="cannot be kept"):
        process.run(command, Path("/dev/full"), cwd=tmp_path, environment=dict(os.environ), timeout=60,
                    told=lambda _: None, stopped=lambda: False, words="a compiler")  # fmt: skip


def test_a_rank_says_why_nothing_can_be_prepared_beside_the_output(llama: Path, tmp_path: Path) -> None:
    """As any storage fault, under any launcher, and not as a traceback."""
    (tmp_path / "file").touch()
    words = ["-m", "dconv.launch", llama, "rk", "--platform", "RK3588", "--bundle", "-o", tmp_path / "file" / "out"]
    code, _, err = call(sys.executable, *map(str, words))
    assert code == 5 and "storage (5)" in err and "Traceback" not in err
