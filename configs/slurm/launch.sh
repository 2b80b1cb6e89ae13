#!/usr/bin/env bash
# A stage on all nodes of a Slurm allocation, one launcher a node: bash configs/slurm/launch.sh rl --policy ...
# In params.yaml: launch: bash configs/slurm/launch.sh
set -euo pipefail

if [ -e "${OUT_OF_TIME:-}" ]; then # see loop.sbatch
    echo "launch.sh: the job's time is up" >&2
    exit 143
fi
read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${SLURM_GPUS_ON_NODE:-8}

# What is in quotes runs on each node: srun gives every task the number of its node.
# shellcheck disable=SC2016
exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=900 bash -c '
    head_node=$1 gpus=$2
    shift 2
    exec accelerate launch --config_file configs/accelerate/nodes-fsdp2.yaml \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes $((SLURM_JOB_NUM_NODES * gpus)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$head_node" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
        -m rloop_cli "$@"
' on-node "$head_node" "$gpus" "$@"
