"""Hostile checkpoints, each made from a good one; ``python -m attacks.make DIR`` writes them. README.md lists them."""
