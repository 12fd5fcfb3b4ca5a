#!/usr/bin/env bash
# Start a conversion with torchrun, on this machine or as one of several nodes that share a file system:
#
#   NPROC=8 launch/torchrun.sh MODEL megatron -o OUT --tp 8
#   NPROC=8 NNODES=4 RDZV_ENDPOINT=node0:29500 launch/torchrun.sh --config run.yaml --tp 8 --pp 4
#   NPROC=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config run.yaml --tp 8 --pp 4
#
# NPROC           ranks on this machine (default: the number of cores, at most 8)
# NNODES          machines in the run (1); start this script once on each, with the same MODEL, OUT and options
# MAX_RESTARTS    new starts of the ranks when one of them is lost (3; between machines only with RDZV_ENDPOINT).
#                 What is finished is kept. A refusal is said once, and a signal is no reason to start again.
#                 A machine that is lost is not made good: run the same again, on as many as there are
# RDZV_ENDPOINT   where the machines meet: HOST:PORT of one of them. They agree on their numbers themselves
# RDZV_ID         names this run to them, where several have one endpoint (dconv)
# LOCAL_ADDR      the address by which the other machines reach this one (default: what its name stands for)
# NODE_RANK       this machine's number, from 0; with RDZV_ENDPOINT only to say that number 0 holds it
# MASTER_ADDR, MASTER_PORT    where the ranks meet without RDZV_ENDPOINT (port 29500)
# TORCHRUN        the torchrun to use (default: the one of .venv, else of PATH)
#
# Any number of ranks gives the same bytes. With tp x pp ranks each works on its own shard.
# torchrun ends with 1 whatever the conversion ended with; `dconv convert --launcher torchrun` ends with its exit code.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cores=$(nproc)
nproc=${NPROC:-$((cores < 8 ? cores : 8))}
nnodes=${NNODES:-1}
restarts=${MAX_RESTARTS:-3}
torchrun=${TORCHRUN:-$root/.venv/bin/torchrun}
[[ -x $torchrun ]] || torchrun=torchrun

where=(--standalone)
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    where=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-dconv}")
    if [[ -n ${NODE_RANK:-} ]]; then
        where+=(--rdzv-conf "is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)")
    fi
    [[ -z ${LOCAL_ADDR:-} ]] || where+=(--local-addr "$LOCAL_ADDR")
elif [[ $nnodes != 1 ]]; then
    restarts=${MAX_RESTARTS:-0}
    where=(
        --nnodes "$nnodes"
        --node-rank "${NODE_RANK:?which of the $nnodes machines is this one}"
        --master-addr "${MASTER_ADDR:?the address of machine 0}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a rank moves bytes; it computes next to nothing
exec "$torchrun" "${where[@]}" --nproc-per-node "$nproc" --max-restarts "$restarts" -m dconv.launch "$@"
