"""Real clusters on this machine, as fixtures."""

from tests.cluster.slurm import slurm as slurm
