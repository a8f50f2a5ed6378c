#!/bin/sh
# Train the demo model: 8x8 handwritten digits, 2.4 million parameters, about 13 minutes on two cores.
# Usage: recipes/digits.sh [OUT], then: python recipes/recognise.py OUT/digits_model_2_128_4_3_0.15.safetensors
#
# 1,498 images are few, and the model would soon know them by heart. Noise of 0.15 instead of 0.1 did the most against
# that: 99 % instead of 97.7 % of samples are recognised. A jitter of a quarter pixel did nothing for either number.
# The steps end where the held-out likelihood no longer improves.
exec tarflow train --data digits --out "${1:-runs/digits}" \
  --patch-size 2 --width 128 --blocks 4 --layers 3 --noise-std 0.15 \
  --steps 2400 --batch-size 64 --lr 1e-3 --warmup 200 --weight-decay 0.1 \
  --drop-label 0.1 --ema 0.998 --grad-clip 1.0 --seed 0 --threads 2 --sample-every 400 --guidance 1.0
