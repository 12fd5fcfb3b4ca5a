"""Real clusters on this machine, as fixtures."""

from tests.cluster.ray_cluster import ray_cluster as ray_cluster
from tests.cluster.slurm import slurm as slurm
