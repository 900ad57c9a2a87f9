#!/usr/bin/env bash
# Makes the profiles that ship with the package, from the model alone. Hours on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts
both() { # the options for these sets of harmful and harmless prompts
    for label in harmful harmless; do for set in "$@"; do echo "--$label steerfast:${label}_$set"; done; done
}
python examples/train_smollm2.py aligned --output artifacts/smollm2-aligned
# shellcheck disable=SC2046
steerfast extract --model HuggingFaceTB/SmolLM2-135M-Instruct --aligned-model artifacts/smollm2-aligned \
    $(both fit framed styles languages) --vectors alignment,forced --shrinkage 0.3 --output artifacts/extracted.safetensors

make() { # NAME SENSOR FALSE_POSITIVES: a profile whose gate decides at a layer
    # shellcheck disable=SC2046
    steerfast calibrate artifacts/extracted.safetensors $(both calibrate styles_calibrate languages_calibrate) \
        --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout \
        --sensor "$2" --max-false-positive-rate "$3" --output "artifacts/calibrated-$2.safetensors"
    steerfast tune "artifacts/calibrated-$2.safetensors" \
        --harmful steerfast:harmful_tune --harmless steerfast:harmless_tune --restyle 1 --min-unchanged 0.9 \
        --vectors forced --bands 15 --strengths 0.75,0.8,0.85 --positions all --max-new-tokens 48 --min-fluent 0.93 \
        --resume "artifacts/trials-$2.jsonl" --output "steerfast/data/$1.safetensors"
}
make smollm2-135m-instruct 15 0.05
make smollm2-135m-instruct-late 22 0.03 # decides better, and reads prompts that fire a second time
