# Sourced by the batch scripts of this folder: `run_ranks` runs one conversion on the job's nodes, requeues the job when
# it was stopped before the end, and ends the script with the conversion's own exit code.
# shellcheck shell=bash
#
# From the environment of sbatch; all of it may be left out:
#
# NPROC            ranks on each node (default: the GPUs that the job has there, else its cores, at most 8)
# TORCHRUN         the torchrun to use (default: the one of .venv beside this folder, else of PATH)
# HEAD_ADDR        where the nodes meet: an address of the first one (default: its name)
# RDZV_PORT        and the port (default: from the job's number)
# LOCAL_ADDR       what torchrun calls a node's own address, where its full name does not resolve
# GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    the interface over which ranks that calibrate talk
# DCONV_STATE      a folder that all nodes share, for the job's notes on itself (default: the one it runs in)
# IDLE_REQUEUES    requeues in a row that finished nothing before the job gives up (default: 3)
set -euo pipefail

told='' heard='' step=''
# shellcheck disable=SC2154 # here: the script that sources this found it
root=$(cd -- "$here/.." && pwd)
job=$SLURM_JOB_ID # of an array the last task has the array's number: it must be said which task is meant
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() {
    printf 'dconv: %s\n' "$*" >&2
}

tell() { # a signal came: pass it on to the step; to srun itself it would mean to kill the ranks
    told=1 heard=1
    while is_alive && [[ ! $(squeue --noheader --steps "$job.0" --format %i 2>/dev/null) ]]; do
        sleep 0.5 # srun has not made its step yet, and scancel would not say so
    done
    while is_alive; do
        scancel --signal=TERM "$job.0" || true
        for _ in {1..15}; do # a node whose task had not begun has not heard it
            ! is_alive || sleep 1
        done
    done
}

is_alive() {
    [[ $step ]] && kill -0 "$step" 2>/dev/null
}
trap tell USR1 TERM

run_ranks() { # run_ranks MODEL FORMAT [-o OUT] [options]
    local cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} code=0 python words=("$@")
    export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-$((cores < 8 ? cores : 8))}}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a rank moves bytes; it computes next to nothing
    export TORCHRUN=${TORCHRUN:-$root/.venv/bin/torchrun}
    [[ -x $TORCHRUN ]] || TORCHRUN=$(command -v torchrun) || {
        say "no torchrun: TORCHRUN=/path/to/torchrun sbatch … names one that every node has"
        exit 7
    }
    python=$(dirname -- "$TORCHRUN")/python
    [[ -x $python ]] || python=python3
    [[ ${HEAD_ADDR:-} ]] || read -r HEAD_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || HEAD_ADDR=$HOSTNAME
    # Below the ports that systems give away by themselves (32768 and up), and above those of Ray (10001 to 19999).
    export HEAD_ADDR RDZV_PORT="${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 9000))}"
    local state=${DCONV_STATE:-$PWD}/.dconv-job-$SLURM_JOB_ID
    export DCONV_EXIT_CODES=$state/codes
    rm -rf -- "$DCONV_EXIT_CODES"
    mkdir -p -- "$DCONV_EXIT_CODES" || {
        say "the job cannot keep its notes: DCONV_STATE=/a/shared/folder sbatch … names a place"
        exit 5
    }
    ((${SLURM_RESTART_COUNT:-0} == 0)) || words+=(--resume) # what the run before has committed is done

    if [[ ! $told ]]; then
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
            --cpus-per-task="$cores" --kill-on-bad-exit=0 --export=ALL \
            bash "$here/node.sh" "${words[@]}" &
        step=$!
        [[ ! $told ]] || tell # it came in between
        while true; do
            heard=''
            wait "$step" && code=0 || code=$?
            [[ $heard ]] || break # else it was the signal that ended the wait
        done
    fi
    conclude "$code"
}

conclude() { # what came of it, by the codes that the ranks left: torchrun ends with 1 whatever they say
    local code=$1 said failed='' stopped='' ranks=0 file
    ((code == 0)) && [[ ! $told ]] && leave 0
    for file in "$DCONV_EXIT_CODES"/*; do
        [[ -s $file ]] || continue
        read -r said <"$file"
        ranks=$((ranks + 1))
        case $said in
        0) ;;
        75) stopped=1 ;;
        *) failed=${failed:-$said} ;;
        esac
    done
    [[ ! $failed ]] || leave "$failed"
    if ((ranks == SLURM_JOB_NUM_NODES * NPROC)); then # every rank came to an end of its own
        [[ $stopped ]] || leave 0
        told=1
    fi
    [[ ! $told ]] || requeue
    say "a rank ended without a word: killed for its memory, or lost with its node"
    leave "$((code ? code : 1))"
}

requeue() { # never returns
    local before=0 idle=0 finished
    # Else SLURM itself ends the job (cancelled, out of time), or starts it again.
    scontrol show job -o "$job" | grep 'JobState=RUNNING ' >/dev/null || leave 75
    [[ ! -s $state/requeued ]] || read -r before idle <"$state/requeued"
    finished=$("$python" -m dconv.launch.left "${words[@]}") || finished=$before
    idle=$((finished > before ? 0 : idle + 1))
    printf '%s %s\n' "$finished" "$idle" >"$state/requeued"
    if ((idle > ${IDLE_REQUEUES:-3})); then
        say "stopped $idle times with nothing finished in between: not requeued; a longer --time?"
        leave 75
    fi
    trap '' USR1 TERM
    say "stopped with $finished tasks finished: requeued"
    scontrol requeue "$job" || leave 75
    exit 75
}

leave() { # the job is over for good
    rm -rf -- "$state"
    exit "$1"
}
