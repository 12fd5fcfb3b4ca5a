"""Turn torchrun, Ray, SLURM, a local count or one process into (rank, size) and call the same run. No conversion."""
