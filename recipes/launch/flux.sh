#!/usr/bin/env bash
# One image from FLUX.1 on all GPUs of a node, with its real weights. Not run on GPUs yet: see docs/gpu.md.
#
#   recipes/launch/flux.sh --prompt "a red fox in the snow, at dawn" --out fox.png
#
# WEIGHTS: a FLUX.1 on the Hugging Face hub, or a folder. ULYSSES divides GPUS; the rest is the ring.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node "${GPUS:-4}" examples/flux.py \
    --weights "${WEIGHTS:-black-forest-labs/FLUX.1-dev}" \
    --ulysses "${ULYSSES:-2}" --steps "${STEPS:-28}" \
    --height "${HEIGHT:-1008}" --width "${WIDTH:-1008}" "$@"
