#!/usr/bin/env bash
# Makes the profile that ships with the package, from the model alone.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts
both() { # the options for these sets of harmful and harmless prompts
    for label in harmful harmless; do for set in "$@"; do echo "--$label steerfast:${label}_$set"; done; done
}
python examples/train_smollm2.py aligned --output artifacts/smollm2-aligned
# shellcheck disable=SC2046
steerfast extract --model HuggingFaceTB/SmolLM2-135M-Instruct --aligned-model artifacts/smollm2-aligned \
    $(both fit framed styles suffixes languages) --pooling mean --window 256 --vectors forced --shrinkage 0.3 \
    --output artifacts/extracted.safetensors
# shellcheck disable=SC2046
steerfast calibrate artifacts/extracted.safetensors $(both calibrate styles_calibrate languages_calibrate) \
    --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout \
    --sensor 15 --max-false-positive-rate 0.07 --output artifacts/calibrated.safetensors
steerfast learn artifacts/calibrated.safetensors --harmful steerfast:harmful_fit --restyle 15 \
    --aligned-model artifacts/smollm2-aligned --output artifacts/learned.safetensors
steerfast tune artifacts/learned.safetensors \
    --harmful steerfast:harmful_tune --harmless steerfast:harmless_tune --restyle 6 --min-fluent 0.94 --min-unchanged 0.9 \
    --vectors learned --strengths 1 --positions response --max-new-tokens 64 \
    --resume artifacts/trials.jsonl --output steerfast/data/smollm2-135m-instruct.safetensors
