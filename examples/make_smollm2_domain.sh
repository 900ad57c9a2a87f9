#!/usr/bin/env bash
# The InferAligner paper's comparison (arXiv 2401.11206) on SmolLM2: an aligned model whose refusals wear off when it is
# tuned on mathematics, and what brings them back. Makes docs/results-domain.md. Hours on two CPU cores; started again,
# it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts/eval
aligned=artifacts/smollm2-aligned maths=artifacts/smollm2-maths maths_safety=artifacts/smollm2-maths-safety
refusal="I'm sorry, but I can't help with that. It could cause serious harm to people." # of forced vectors

train() { # FOLDER OPTION...
    [[ -e $1/tokenizer_config.json ]] || python examples/train_smollm2.py "${@:2}" --output "$1"
}
profile() { # NAME COMMAND...: makes artifacts/maths-NAME.safetensors
    [[ -e artifacts/maths-$1.safetensors ]] || steerfast "${@:2}" --output "artifacts/maths-$1.safetensors"
}
both() { # the options for these sets of harmful and harmless prompts
    for label in harmful harmless; do for set in "$@"; do echo "--$label steerfast:${label}_$set"; done; done
}
tune() { # NAME FROM OPTION...; the maths model repeats itself, refusals included: few of its answers are fluent
    profile "$1" tune "artifacts/maths-$2.safetensors" --positions all --min-fluent 0.25 --min-unchanged 0 \
        --resume artifacts/trials-domain.jsonl "${@:3}"
}

train "$aligned" aligned
train "$maths" maths
train "$maths_safety" maths --safety 120 --steps 40

# InferAligner as in the paper: mean differences, midpoints, a gate at every steered layer
profile paper-extracted extract --model "$maths" --aligned-model "$aligned" --gate mean --score dot --vectors ssv --unit-norm
profile paper-calibrated calibrate artifacts/maths-paper-extracted.safetensors --sensor own --midpoint
tune paper paper-calibrated --bands 10-19 --strengths 30,60,120
# as CAST (arXiv 2409.05907): principal components at one condition layer, vectors of the model's own
profile cast-extracted extract --model "$maths" --gate pca --vectors forced
profile cast-calibrated calibrate artifacts/maths-cast-extracted.safetensors --max-false-positive-rate 0.05
tune cast cast-calibrated --bands 15 --strengths 0.6,0.75
# LDA gates that read the last token, for what alignment added to the sibling and for vectors of the model's own
# shellcheck disable=SC2046
profile lda-extracted extract --model "$maths" --aligned-model "$aligned" $(both fit framed styles languages) \
    --vectors alignment,forced --refusal "$refusal" --shrinkage 0.3
# shellcheck disable=SC2046
profile lda-calibrated calibrate artifacts/maths-lda-extracted.safetensors \
    $(both calibrate styles_calibrate languages_calibrate) --max-false-positive-rate 0.05 \
    --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout
tune alignment lda-calibrated --vectors alignment --bands 5-24 --strengths 5,7
tune self lda-calibrated --vectors forced --bands 10-19,15 --strengths 0.6,0.75
# the gate of the shipped profile's recipe, which reads the mean, and a vector learned from the sibling
# shellcheck disable=SC2046
profile mean-extracted extract --model "$maths" $(both fit framed styles suffixes languages) --pooling mean --window 256 \
    --vectors srv --shrinkage 0.3
# shellcheck disable=SC2046
profile mean-calibrated calibrate artifacts/maths-mean-extracted.safetensors \
    $(both calibrate styles_calibrate languages_calibrate) --sensor 15 --max-false-positive-rate 0.07 \
    --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout
profile learned learn artifacts/maths-mean-calibrated.safetensors --harmful steerfast:harmful_fit \
    --harmful steerfast:harmful_styles --aligned-model "$aligned" --max-norm 0.5

steerfast eval "$maths" --profile learned=artifacts/maths-learned.safetensors \
    --profile alignment=artifacts/maths-alignment.safetensors --profile self=artifacts/maths-self.safetensors \
    --profile paper=artifacts/maths-paper.safetensors --profile cast=artifacts/maths-cast.safetensors \
    --other safety-sft="$maths_safety" --other aligned="$aligned" --limit 30 --max-new-tokens 48 --strengths 0.5,1.5 \
    --resume artifacts/eval/domain.jsonl --html artifacts/eval/domain.html --markdown docs/results-domain.md \
    --json benchmarks/results/eval-domain-cpu.json
