#!/usr/bin/env bash
# Install what the tests of tests/cluster start on this machine: SLURM and munge, as Debian packages.
#
#   bash scripts/cluster.sh
#
# Needs root and apt-get; without them it says so and ends well, and those tests are skipped with the reason. The tests
# start daemons of their own. A second call with everything there returns at once.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/apt.sh"

export PATH=$PATH:/usr/sbin:/sbin

complete() {
    local name
    for name in munged slurmctld slurmd sbatch srun squeue scontrol scancel sinfo; do
        command -v "$name" >/dev/null || return 1
    done
}

apt_install SLURM slurmctld slurmd slurm-client munge
