#!/usr/bin/env bash
# Start a conversion with torchrun, on this machine or as one of several nodes that share a file system:
#
#   NPROC=8 launch/torchrun.sh MODEL megatron -o OUT --tp 8
#   NPROC=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config run.yaml --tp 8 --pp 4
#
# NPROC         ranks on this machine (default: the number of cores, at most 8)
# NNODES        machines in the run (1); start this script once on each, with the same MODEL, OUT and options
# NODE_RANK     this machine's number, from 0
# MASTER_ADDR, MASTER_PORT    where the ranks meet (port 29500)
# TORCHRUN      the torchrun to use (default: the one of .venv, else of PATH)
#
# Any number of ranks gives the same bytes. With tp x pp ranks each works on its own shard.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cores=$(nproc)
nproc=${NPROC:-$((cores < 8 ? cores : 8))}
torchrun=${TORCHRUN:-$root/.venv/bin/torchrun}
[[ -x $torchrun ]] || torchrun=torchrun

where=(--standalone)
if ((${NNODES:-1} > 1)); then
    where=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:?which of the $NNODES machines is this one}"
        --master-addr "${MASTER_ADDR:?the address of machine 0}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a rank moves bytes; it computes next to nothing
exec "$torchrun" "${where[@]}" --nproc-per-node "$nproc" -m dconv.launch "$@"
