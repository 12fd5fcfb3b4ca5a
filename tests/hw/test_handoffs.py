"""scripts/handoffs.py on a small model: it shows what is right, and can say no."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(model: Path, work: Path, *rows: str, fails: str = "") -> tuple[int, dict[str, str], str]:
    """Exit code, chip and settings of each row -> the row, last line of stderr."""
    only = [word for name in rows for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "handoffs.py", model, "--work", work, *only], capture_output=True,
        text=True, env={**os.environ, "STAND_IN_FAILS": fails}, timeout=600,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    return done.returncode, {line.split(" | ")[1]: line for line in lines}, done.stderr.strip().rpartition("\n")[2]


def test_bundles_that_stand_ins_take_and_one_that_lacks_a_layer(llama: Path, tmp_path: Path) -> None:
    code, rows, last = table(llama, tmp_path, "rk rkllm w8a8", "ax", fails="few")
    assert (code, last) == (1, "off: ax AX650 s8")
    assert "1 of 1 files; off by 0, 16 of 16 tokens" in rows["RK3588 rkllm w8a8"]
    assert "3 of 4 files" in rows["AX650 s8"]


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".venvs/qnn/toolchain-installed").exists(), reason="bash scripts/toolchains.sh qnn")
def test_a_real_compiler(llama: Path, tmp_path: Path) -> None:
    code, rows, last = table(llama, tmp_path, "qnn SM8650 fp16")
    assert (code, last) == (0, "")
    assert "names SM8650; operators EPContext" in rows["SM8650 fp16"] and "model_ctx_qnn.bin" in rows["SM8650 fp16"]
