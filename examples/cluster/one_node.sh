#!/bin/bash
# Trains on all GPUs of this machine; the same call goes on with what an earlier one left.
#
#   examples/cluster/one_node.sh examples/turbosparse_mistral7b.toml --set output=/scratch/runs/mistral
#
# With accelerate: accelerate launch --multi_gpu --num_processes 8 -m turbosparse sparsify RECIPE
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds to write a checkpoint in after SIGTERM; torchrun's default is 30
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" -m turbosparse sparsify "$@"
