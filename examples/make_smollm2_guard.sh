#!/usr/bin/env bash
# Trains the guard of SmolLM2-135M-Instruct from its own answers and measures it. Both commands continue where they stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts/guard
profile=steerfast/data/smollm2-135m-instruct.safetensors
search=(--block 16 --depth 48 --temperature 0.6 --top-p 0.9)
methods=plain,plain-or-refuse,gate-or-refuse,steered,best-of-n-augmented,beam-lagrangian,args-lagrangian
methods+=,inference-guard,inference-guard-critic,speculative,guided
steerfast guard train --model HuggingFaceTB/SmolLM2-135M-Instruct --profile "$profile" --count 100 --rollouts 2 \
    "${search[@]}" --width 256 --epochs 30 --learning-rate 3e-4 --critic-batch 32 --margin 1 \
    --output artifacts/guard --json artifacts/guard/train.json
python benchmarks/guard/bench.py artifacts/guard --profile "$profile" --count 50 "${search[@]}" --methods "$methods" \
    --curve 16 --resume artifacts/guard/answers.jsonl --json artifacts/guard/bench.json
python benchmarks/guard/guard_bars.py artifacts/guard/bench.json
