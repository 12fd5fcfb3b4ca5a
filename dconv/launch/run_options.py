"""The options that change no output byte: how a rank runs, and who starts the ranks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from dconv.errors import UsageError
from dconv.launch.values import byte_count, number, positive, threads, whole
from dconv.request import spelled
from dconv.sharding.digest import ALGORITHMS
from dconv.sharding.tuning import AUTO

LAUNCHERS: Final = ("local", "torchrun", "ray", "slurm")
#: Options of ``dconv convert`` that only some launchers have.
_ONLY: Final = {
    "max_restarts": ("torchrun", "ray"),
    "address": ("ray",), "cpus_per_rank": ("ray",), "gpus_per_rank": ("ray",),
    "nodes": ("slurm",), "partition": ("slurm",), "account": ("slurm",), "time": ("slurm",), "sbatch": ("slurm",),
    "wait": ("slurm",),
}  # fmt: skip


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How to run it; none of these changes an output byte."""
    group = parser.add_argument_group("run")
    group.add_argument("--max-memory", type=byte_count, default=byte_count("256MiB"), metavar="SIZE",
                       help="bytes that one rank's buffers may take (256MiB)")  # fmt: skip
    group.add_argument("--threads", type=threads, default=AUTO, metavar="N",
                       help="threads a rank (auto: found by the first tasks, more while that is faster)")  # fmt: skip
    group.add_argument("--stage-dir", type=Path, metavar="DIR",
                       help="on a disk of each machine: what is read from a slow file system is fetched there first, "
                            "once and in large pieces")  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on after a kill; done already counts as success")
    group.add_argument("--overwrite", action="store_true", help="replace an OUT of dconv once the new one is whole")
    group.add_argument("--digest", choices=sorted(ALGORITHMS), default="xxh3", help="digest kept in the receipt")
    group.add_argument("--verify", choices=("none", "digest", "logits"), default="none",
                       help="read the output back, or compare logits with the source (of codes, weights by their "
                            "bound, and logits are told)")  # fmt: skip
    group.add_argument("--report", nargs="?", type=Path, const=True, metavar="FILE",
                       help="write a page: plan, rates by rank, precision, errors of codes, verification, receipt "
                            "(OUT.report.html, beside the output)")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Who runs it: ``dconv convert``'s own; a rank under another launcher has no say in them."""
    group = parser.add_argument_group("launch")
    group.add_argument("--nproc", type=positive, default=1, metavar="N",
                       help="ranks to start: on this machine, in all (ray), on each node (slurm) (1)")  # fmt: skip
    group.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0],
                       help="who starts them; from within torchrun or srun: python -m dconv.launch")  # fmt: skip
    group.add_argument("--max-restarts", type=whole, metavar="N",
                       help="new starts of ranks that were lost (torchrun, ray; 3)")  # fmt: skip
    add_save_option(group)
    group.add_argument("--debug", action="store_true", help="show where an internal error happened")
    group = parser.add_argument_group("Ray (--launcher ray)")
    group.add_argument("--address", metavar="ADDRESS", help="of the cluster (RAY_ADDRESS, else one on this machine)")
    group.add_argument("--cpus-per-rank", type=number, metavar="N", help="cores that a rank asks for (1)")
    group.add_argument("--gpus-per-rank", type=number, metavar="N", help="GPUs that a rank asks for (0)")
    group = parser.add_argument_group("SLURM (--launcher slurm)")
    group.add_argument("--nodes", type=positive, metavar="N", help="nodes of the job (1)")
    group.add_argument("--partition", metavar="NAME", help="where it runs (the cluster's default)")
    group.add_argument("--account", metavar="NAME", help="who pays")
    group.add_argument("--time", metavar="TIME", help="its limit, as sbatch has it: 30, 4:00:00, 1-12 (the cluster's)")
    group.add_argument("--sbatch", action="append", default=[], metavar="ARGUMENT",
                       help="another argument of sbatch, such as --sbatch=--gres=gpu:8")  # fmt: skip
    group.add_argument("--wait", action="store_true", help="stay until the job has ended, and show its progress")


def add_save_option(parser: Any) -> None:
    """``--save-config``, of the commands that a person starts; into a parser or a group of one."""
    parser.add_argument("--save-config", type=Path, metavar="FILE",
                        help="also write these options to FILE, for --config")  # fmt: skip


def check_launch(args: argparse.Namespace) -> None:
    """Refuse options of another launcher.

    Raises:
        UsageError: see above.
    """
    said = {name: getattr(args, name) for name, launchers in _ONLY.items() if args.launcher not in launchers}
    given = [name for name, value in said.items() if value not in (None, []) and value is not False]
    if given:
        of = sorted({launcher for name in given for launcher in _ONLY[name]})
        raise UsageError(
            f"--launcher {args.launcher} has no use for this, nothing was written",
            where=", ".join(map(spelled, given)),
            expected=f"--launcher {' or '.join(of)} beside it",
        )
