#!/usr/bin/env bash
# Makes docs/results.md: the shipped profiles of SmolLM2-135M-Instruct beside other defences. About an hour and a half on two
# CPU cores, the sibling's training included; it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts
model=HuggingFaceTB/SmolLM2-135M-Instruct
[ -d artifacts/smollm2-aligned ] || python examples/align_smollm2.py --output artifacts/smollm2-aligned

# As in the InferAligner paper: mean differences, each layer's own gate at the midpoint, the sibling's vectors, all positions.
# The paper does not say which layers and how strongly; they are tuned as ours are, without a say for harmless answers.
steerfast extract --model "$model" --aligned-model artifacts/smollm2-aligned --gate mean --vectors ssv,forced \
    --harmful steerfast:harmful_fit --harmless steerfast:harmless_fit --output artifacts/paper-extracted.safetensors
steerfast calibrate artifacts/paper-extracted.safetensors --midpoint --sensor own \
    --harmful steerfast:harmful_calibrate --harmless steerfast:harmless_calibrate --output artifacts/paper-calibrated.safetensors
steerfast tune artifacts/paper-calibrated.safetensors --vectors ssv --bands 10-19 --strengths 2,3,4 --positions all \
    --harmful steerfast:harmful_tune --harmless steerfast:harmless_tune --max-new-tokens 48 --min-fluent 0.8 --min-unchanged 0 \
    --resume artifacts/paper-trials.jsonl --output artifacts/paper.safetensors

steerfast eval "$model" --limit 50 \
    --profile ours=steerfast/data/smollm2-135m-instruct.safetensors \
    --profile late=steerfast/data/smollm2-135m-instruct-late.safetensors \
    --profile paper=artifacts/paper.safetensors --other sibling=artifacts/smollm2-aligned \
    --resume artifacts/eval.jsonl --json benchmarks/results/eval-cpu.json --html artifacts/eval.html --markdown docs/results.md
