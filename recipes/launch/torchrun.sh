#!/usr/bin/env bash
# Two nodes of 8 GPUs: run this on each of them, with the same MASTER_ADDR (a name of the first) and its own NODE_RANK.
#
#   MASTER_ADDR=node0 NODE_RANK=0 recipes/launch/torchrun.sh recipes/llama3-8b-208k.toml
#
# With RESTARTS=3 and --folder F --resume auto --checkpoint_every N, a run whose rank dies goes on by itself. Tried on
# one machine (NNODES=1); on several, all of them must start again together.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or ranks that start again find the addresses of those that died
exec torchrun --max-restarts "${RESTARTS:-0}" \
    --nnodes "${NNODES:-2}" --node-rank "${NODE_RANK:?0 on the first node, 1 on the second}" \
    --nproc-per-node "${GPUS:-8}" \
    --master-addr "${MASTER_ADDR:?a name of the first node}" --master-port "${MASTER_PORT:-29500}" \
    "$(command -v seqmesh)" train "$@"
