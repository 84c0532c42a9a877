# shellcheck shell=bash
# What the batch scripts have in common. They source it: sbatch runs a copy of a script, that lies elsewhere.

# EDIT: whatever makes `python -m trainer` work on your nodes.
activate() {
    # shellcheck source=/dev/null
    source .venv/bin/activate
}

refuse() {
    printf '%s\n' "$@" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || refuse "$0 is a script for SLURM, and this is no job." "  sbatch $0 $*"

# What SLURM has given: a heterogeneous job comes in groups of nodes, any other is one.
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

# SLURM warns this shell before the time is over (--signal=B:USR1@...), and the shell tells the step, which saves and
# leaves. SIGTERM comes when the job is cancelled or preempted; then SLURM has told the step itself.
told=
step=
trap 'told=yes; [[ -z $step ]] || kill -s USR1 "$step"' USR1
trap : TERM

# Runs a step to its end, and ends the job with its exit code: or queues the job again, if the step was told to leave.
run() {
    local code=75
    if [[ -z $told ]]; then
        "$@" &
        step=$!
        while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends a wait, not the step
        code=0
        wait "$step" || code=$?
    fi
    # 75: has saved; 138: SIGUSR1 came before it could be heeded. A job that is being cancelled does not run any more.
    if [[ $code == 75 || $code == 138 ]] && [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING* ]]; then
        echo "job $job is queued again, and goes on from what it has saved"
        scontrol requeue "$job"
    fi
    exit "$code"
}

# Trains on all nodes of the job with these overrides.
train() {
    local launch=${LAUNCH:-torchrun}
    [[ $launch == torchrun || $launch == srun ]] ||
        refuse "LAUNCH=$launch" "  valid: torchrun, one launcher a node; srun, one task a GPU"
    activate
    ((${SLURM_RESTART_COUNT:-0})) || python -m trainer --cfg job "$@" >/dev/null || exit # before many find the same
    "train_by_$launch" "$@"
}

# One launcher a node starts a worker for each of its GPUs, as torchrun does, and starts them again after a failure.
train_by_torchrun() {
    local options=(--ntasks="$nodes" --ntasks-per-node=1)
    ((groups == 1)) || options=(--het-group="0-$((groups - 1))")
    run srun "${options[@]}" --cpu-bind=none python -m trainer launch.nodes="$nodes" launch.rdzv_endpoint="$meet" "$@"
}

# The tasks of the job are the workers; if there is only one a node, one a GPU.
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
