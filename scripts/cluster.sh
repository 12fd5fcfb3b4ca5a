#!/usr/bin/env bash
# Install what the tests of tests/cluster start on this machine: SLURM and munge, as Debian packages.
#
#   bash scripts/cluster.sh
#
# Needs root and apt-get; without them it says so and ends well, and those tests are skipped with the reason. The tests
# start daemons of their own. A second call with everything there returns at once.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge)
export PATH=$PATH:/usr/sbin:/sbin

skip() {
    printf 'cluster: no SLURM for the tests: %s\n' "$1"
    exit 0
}

complete() {
    local name
    for name in munged slurmctld slurmd sbatch srun squeue scontrol scancel sinfo; do
        command -v "$name" >/dev/null || return 1
    done
}

complete && exit
command -v apt-get >/dev/null || skip "no apt-get here; install ${packages[*]}"
((EUID == 0)) || skip "not root; apt-get install ${packages[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install -y --no-install-recommends "${packages[@]}" </dev/null >"$log" 2>&1
}
install || { apt-get update >"$log" 2>&1 && install; } || {
    tail -n 20 "$log"
    skip "apt-get failed, see above"
}
complete || skip "the packages came without all of their commands"
