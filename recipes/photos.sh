#!/bin/sh
# Train the model that decoding is timed with: 32x32 crops of two photographs, width 384, 28 million parameters, about
# a quarter of an hour on two cores that have AMX. Random weights would say nothing: parallel decoding lives from structure.
# Usage: recipes/photos.sh [OUT]
set -e
out="${1:-runs/photos}"
python "$(dirname "$0")/photos.py" "$out/photos"
exec tarflow train --data "$out/photos" --image-size 32 --hold-out 16 --out "$out" \
  --patch-size 2 --width 384 --blocks 4 --layers 4 --noise-std 0.1 \
  --amp on --steps 1200 --batch-size 8 --lr 5e-4 --warmup 60 --ema 0.99 --seed 0 --threads 2 --sample-every 0 --save-every 100
