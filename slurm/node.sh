#!/usr/bin/env bash
# The ranks of one node: what srun starts once on each, with the words of `python -m dconv.launch`. The variables are
# those of common.sh.
set -euo pipefail

where=(--standalone)
if ((SLURM_STEP_NUM_NODES > 1)); then
    where=(
        --nnodes "$SLURM_STEP_NUM_NODES"
        --rdzv-backend c10d
        --rdzv-endpoint "$HEAD_ADDR:$RDZV_PORT"
        --rdzv-id "dconv-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        # said, since torchrun would compare names with addresses, and a node may have several of both
        --rdzv-conf "is_host=$( ((SLURM_NODEID == 0)) && echo true || echo false)"
    )
fi
[[ -z ${LOCAL_ADDR:-} ]] || where+=(--local-addr "$LOCAL_ADDR")

# A rank that was told to leave is not started again: the job is requeued instead.
exec "$TORCHRUN" "${where[@]}" --max-restarts 0 --nproc-per-node "$NPROC" -m dconv.launch "$@"
