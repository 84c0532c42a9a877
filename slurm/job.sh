# shellcheck shell=bash
# Functions of the batch scripts, which source it from the submit folder: sbatch runs a copy of a script elsewhere.

# EDIT: the commands that make `python -m trainer` work on your nodes, if it does not in the shell that calls sbatch.
activate() {
    # shellcheck source=/dev/null
    [[ ! -e .venv/bin/activate ]] || source .venv/bin/activate
}

refuse() {
    printf '%s\n' "$@" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || refuse "$0 is a script for SLURM, and this is not a job." "  sbatch $0 $*"

# The allocation: a heterogeneous job has several groups of nodes, any other job one.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
groups=${SLURM_HET_SIZE:-1}
nodes=$SLURM_JOB_NUM_NODES
for ((group = 1; group < groups; group++)); do
    name=SLURM_JOB_NUM_NODES_HET_GROUP_$group
    nodes=$((nodes + ${!name}))
done
tasks=${SLURM_NTASKS:-$nodes}
cores=$SLURM_CPUS_ON_NODE
gpus=${SLURM_GPUS_ON_NODE:-0}
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
meet=$first_node:$((20000 + SLURM_JOB_ID % 12768))

# The token that proves to the processes of this job that they speak to each other: srun hands it to all of them.
SILOTRAIN_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export SILOTRAIN_TOKEN

# SLURM sends SIGUSR1 to this shell before the time limit (--signal=B:USR1@...). The shell forwards it to the step, which
# saves and stops. SIGTERM comes when the job is cancelled or preempted, and SLURM sends that to the step itself.
stopping=
step=
trap 'stopping=yes; [[ -z $step ]] || kill -s USR1 "$step"' USR1
trap : TERM

# Run a step, and exit with its code; requeue the job if the step was preempted.
run() {
    local code=75
    if [[ -z $stopping ]]; then
        "$@" &
        step=$!
        while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal interrupts the wait, not the step
        code=0
        wait "$step" || code=$?
    fi
    # 75: saved; 138: killed by SIGUSR1 before it had a handler. A job that is being cancelled is not RUNNING any more.
    if [[ $code == 75 || $code == 138 ]] && [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING* ]]; then
        echo "job $job is requeued, and will resume from its last checkpoint"
        scontrol requeue "$job"
    fi
    exit "$code"
}

# Train on all nodes of the job with these overrides.
train() {
    local launch=${LAUNCH:-torchrun}
    [[ $launch == torchrun || $launch == srun ]] ||
        refuse "LAUNCH=$launch" "  valid: torchrun, one launcher a node; srun, one task a GPU"
    ((cores > 1)) || echo "one core on a node; sbatch --exclusive, or --cpus-per-task=8, gives more" >&2
    activate
    # Bad input is reported once, and not on each node.
    ((${SLURM_RESTART_COUNT:-0})) || python -m trainer --cfg job "$@" >/dev/null || exit
    "train_by_$launch" "$@"
}

# One launcher per node starts a worker for each of its GPUs, as torchrun does, and restarts them after a failure.
train_by_torchrun() {
    local options=(--ntasks="$nodes" --ntasks-per-node=1)
    ((groups == 1)) || options=(--het-group="0-$((groups - 1))")
    run srun "${options[@]}" --cpu-bind=none python -m trainer launch.nodes="$nodes" launch.rdzv_endpoint="$meet" "$@"
}

# The tasks of the job are the workers; with one task per node, one task is started for each GPU.
train_by_srun() {
    local options=(--ntasks="$tasks") threads=${SLURM_CPUS_PER_TASK:-1}
    if ((tasks == nodes && gpus > 1)); then
        threads=$((cores / gpus))
        options=(--ntasks=$((gpus * nodes)) --ntasks-per-node="$gpus")
    fi
    options+=(--cpus-per-task="$threads")
    ((groups == 1)) || options=(--het-group="0-$((groups - 1))")
    run srun "${options[@]}" --distribution=block --wait=60 python -m trainer launch.threads_per_worker="$threads" "$@"
}
