#!/usr/bin/env bash
# Makes the profile that ships with the package, from the model alone. About an hour on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts
python examples/align_smollm2.py --output artifacts/smollm2-aligned
steerfast extract --model HuggingFaceTB/SmolLM2-135M-Instruct --aligned-model artifacts/smollm2-aligned \
    --harmful steerfast:harmful_fit --harmful steerfast:harmful_framed \
    --harmless steerfast:harmless_fit --harmless steerfast:harmless_framed \
    --shrinkage 0.3 --output artifacts/extracted.safetensors
steerfast calibrate artifacts/extracted.safetensors \
    --harmful steerfast:harmful_calibrate --harmless steerfast:harmless_calibrate \
    --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout \
    --max-false-positive-rate 0.04 --latest-sensor 15 --output artifacts/calibrated.safetensors
steerfast tune artifacts/calibrated.safetensors \
    --harmful steerfast:harmful_tune --harmless steerfast:harmless_tune \
    --vectors forced --bands 15,15-16,15-17 --strengths 0.65,0.7,0.75,0.8,0.85 --positions all --max-new-tokens 48 --min-fluent 0.93 \
    --resume artifacts/trials.jsonl \
    --output steerfast/data/smollm2-135m-instruct.safetensors
