#!/usr/bin/env bash
# Makes a safety profile of a model, from the model and the corpus that ships: the one recipe, for every model.
#   examples/make_profile.sh HuggingFaceTB/SmolLM2-135M-Instruct steerfast/data/smollm2-135m-instruct.safetensors
#   PER_SOURCE=48 examples/make_profile.sh Qwen/Qwen2.5-Coder-0.5B-Instruct qwen.safetensors
# PER_SOURCE is how many prompts of a source and label fit the gate. Started again, it reads no prompt twice.
set -euo pipefail
model=$1 output=$2 work=artifacts/$(basename "$2" .safetensors)
mkdir -p "$work"
steerfast extract --model "$model" --per-source "${PER_SOURCE:-120}" --vectors forced --cache "$work/rows" --output "$work/extracted.safetensors"
steerfast calibrate "$work/extracted.safetensors" --model "$model" --per-source 64 --max-false-positive-rate 0.02 --cache "$work/rows" \
    --output "$work/calibrated.safetensors"
steerfast learn "$work/calibrated.safetensors" --model "$model" --steps 60 --batch-size 8 --answer-tokens 48 \
    --output "$work/learned.safetensors"
steerfast tune "$work/learned.safetensors" --model "$model" --vectors learned --strengths 1 --positions response \
    --max-new-tokens 64 --min-fluent 0.9 --min-unchanged 0.9 --resume "$work/trials.jsonl" --output "$output"
