#!/usr/bin/env bash
# Train on several nodes: the same command on every one of them, or once through srun.
#
#   NNODES=4 MASTER=node0 examples/recipes/launch/multi-node.sh RECIPE [--training.fsdp true ...]
#   srun --nodes 4 --ntasks-per-node 1 examples/recipes/launch/multi-node.sh RECIPE
#
# NNODES     nodes, 1 by default (Slurm's under srun). No range: a run resumes with as many processes as it began with.
# GPUS       processes per node, all of its GPUs by default
# MASTER     host of the rendezvous, one of the nodes (under srun the first one)
# PORT       its port, 29500 by default
# RUN_ID     name of the rendezvous, the same on every node and another for every run (Slurm's job by default)
# RESTARTS   how often all processes are started again after one has died, 3 by default
# PYTHON     interpreter, python by default
#
# --resume makes a restart go on from the last whole checkpoint of training.output_dir, which all nodes must see under
# the same path; where there is none, the run begins. The batch is documents x accumulated batches x processes: with 4
# nodes of 8 GPUs a recipe for 8 processes takes 4 times as many documents a step.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: NNODES=4 MASTER=node0 $0 RECIPE [--SECTION.FIELD VALUE ...]" >&2
  exit 2
fi
recipe=$1
shift

nodes=${NNODES:-${SLURM_NNODES:-1}}
master=${MASTER:-}
if [[ -z $master && -n ${SLURM_JOB_NODELIST:-} ]]; then
  master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
if [[ -z $master ]]; then
  if [[ $nodes -ne 1 ]]; then
    echo "MASTER must name one of the $nodes nodes" >&2
    exit 2
  fi
  master=localhost
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$nodes" \
  --nproc-per-node "${GPUS:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$master:${PORT:-29500}" \
  --rdzv-id "${RUN_ID:-${SLURM_JOB_ID:-beacon}}" \
  --max-restarts "${RESTARTS:-3}" \
  -m beacon.training "$recipe" --resume "$@"
