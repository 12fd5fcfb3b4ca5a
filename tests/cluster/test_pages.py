"""The commands of the pages that need a cluster, on real ones: docs/start/slurm.md and docs/start/ray.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.ray_cluster import LOOPBACK, RayCluster
from tests.cluster.slurm import Slurm
from tests.docs import runs
from tests.docs.commands import pages

pytest.importorskip("transformers", reason="the models of the pages are transformers' own")
PAGES = {page.cluster: page for page in pages() if page.cluster}


def test_every_page_of_a_cluster_is_run() -> None:
    assert {cluster: page.name for cluster, page in PAGES.items()} == {
        "slurm": "docs/start/slurm.md",
        "ray": "docs/start/ray.md",
    }


@pytest.mark.long
def test_commands_of_slurm(slurm: Slurm, tmp_path: Path) -> None:
    runs.require_as_printed(runs.run_page(PAGES["slurm"], tmp_path, slurm.variables))


@pytest.mark.long
def test_commands_of_ray(ray_cluster: RayCluster, tmp_path: Path) -> None:
    ray_cluster.hold()
    variables = {**LOOPBACK, "RAY_ADDRESS": ray_cluster.address}
    runs.require_as_printed(runs.run_page(PAGES["ray"], tmp_path, variables))
