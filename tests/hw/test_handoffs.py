"""scripts/handoffs.py on a small model: its cheapest real compiler, its stand-ins, and that it can say no."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_table_of_what_was_written_and_what_is_off(llama: Path, tmp_path: Path) -> None:
    """Axera's stand-in is told to leave a layer out: that row is off, and the exit code says so."""
    rows = [word for name in ("rk rkllm w8a8", "ax", "qnn SM8650 fp16") for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "handoffs.py", llama, "--work", tmp_path, *rows], capture_output=True,
        text=True, env={**os.environ, "STAND_IN_FAILS": "few"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == "off: ax AX650 s8", done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    found = {tuple(line.replace("`", "").split(" | ")[:2]): line for line in lines}
    rkllm, qnn = found["| rk", "RK3588 rkllm w8a8"], found["| qnn", "SM8650 fp16"]
    assert "1 parts, all there; off by 0, 16 of 16 tokens" in rkllm
    assert "2 parts, not all there" in found["| ax", "AX650 s8"]
    if (ROOT / ".venvs" / "qnn" / "toolchain-installed").exists():
        assert "names SM8650; operators EPContext" in qnn and "model_ctx_qnn.bin" in qnn
    else:
        assert "toolchains.sh qnn" in qnn and "not run: qnn SM8650 fp16" in done.stdout
