"""Shared by the tests that megatron-core judges in this process."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def core() -> Any:
    megatron_cpu = pytest.importorskip("dconv.export.megatron_cpu")
    megatron_cpu.cpu_patches()
    import megatron.core

    return megatron.core
