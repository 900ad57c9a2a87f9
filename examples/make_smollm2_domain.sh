#!/usr/bin/env bash
# The paper's comparison (arXiv 2401.11206) on SmolLM2: makes what docs/results.md and docs/results-domain.md compare, on
# the model itself and on a relative tuned on mathematics, and measures it. Hours on two CPU cores; started again, it
# goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p artifacts/eval
base=HuggingFaceTB/SmolLM2-135M-Instruct
aligned=artifacts/smollm2-aligned maths=artifacts/smollm2-maths maths_safety=artifacts/smollm2-maths-safety
refusal="I'm sorry, but I can't help with that. It could cause serious harm to people." # of forced vectors

train() { # FOLDER OPTION...
    [[ -e $1/tokenizer_config.json ]] || python examples/train_smollm2.py "${@:2}" --output "$1"
}
profile() { # NAME COMMAND...: makes artifacts/NAME.safetensors
    [[ -e artifacts/$1.safetensors ]] || steerfast "${@:2}" --output "artifacts/$1.safetensors"
}
both() { # the options for these sets of harmful and harmless prompts
    for label in harmful harmless; do for set in "$@"; do echo "--$label steerfast:${label}_$set"; done; done
}
fit() { # STAGE MODEL OPTION...: gates and vectors of the methods, calibrated
    # InferAligner as in the paper: mean differences, midpoints, a gate at every steered layer
    profile "$1-paper-extracted" extract --model "$2" --aligned-model "$aligned" --gate mean --score dot \
        --vectors ssv --unit-norm
    profile "$1-paper-calibrated" calibrate "artifacts/$1-paper-extracted.safetensors" --sensor own --midpoint
    # as CAST (arXiv 2409.05907): principal components at one condition layer, vectors of the model's own
    profile "$1-cast-extracted" extract --model "$2" --gate pca --vectors forced
    profile "$1-cast-calibrated" calibrate "artifacts/$1-cast-extracted.safetensors" --max-false-positive-rate 0.05
    # the gate of the shipped profile, for vectors of the sibling and of the model's own
    # shellcheck disable=SC2046
    profile "$1-lda-extracted" extract --model "$2" --aligned-model "$aligned" $(both fit framed styles languages) \
        --vectors alignment,forced --refusal "$refusal" --shrinkage 0.3
    # shellcheck disable=SC2046
    profile "$1-lda-calibrated" calibrate "artifacts/$1-lda-extracted.safetensors" \
        $(both calibrate styles_calibrate languages_calibrate) --max-false-positive-rate 0.05 \
        --heldout-harmful steerfast:harmful_heldout --heldout-harmless steerfast:harmless_heldout \
        "${@:3}"
}
tune() { # NAME FROM OPTION...; what a gate costs is for eval to say
    profile "$1" tune "artifacts/$2.safetensors" --resume artifacts/trials-domain.jsonl --min-unchanged 0 "${@:3}"
}
measure() { # MODEL NAME DATA OPTION...: docs/NAME.md, benchmarks/results/DATA.json and a report
    steerfast eval "$1" --limit 50 --resume "artifacts/eval/$3.jsonl" --html "artifacts/eval/$3.html" \
        --markdown "docs/$2.md" --json "benchmarks/results/$3.json" "${@:4}"
}

train "$aligned" aligned
fit p1 "$base" --sensor 15
tune p1-paper p1-paper-calibrated --bands 10-19 --strengths 30,60,120 --positions all --min-fluent 0.8
tune p1-cast p1-cast-calibrated --bands 15 --strengths 0.8,1.2 --positions all --min-fluent 0.8
tune p1-self p1-lda-calibrated --vectors forced --bands 15 --strengths 0.75,1 --positions all --min-fluent 0.8

train "$maths" maths
train "$maths_safety" maths --safety 120 --steps 40
fit p2 "$maths"
# The maths model repeats itself, refusals included: few of its answers are fluent.
tune p2-ours p2-lda-calibrated --vectors alignment --bands 5-24 --strengths 5,7 --positions all --min-fluent 0.25
tune p2-self p2-lda-calibrated --vectors forced --bands 10-19,15 --strengths 0.6,0.75 --positions all --min-fluent 0.25
tune p2-paper p2-paper-calibrated --bands 10-19 --strengths 30,60,120 --positions all --min-fluent 0.25
tune p2-cast p2-cast-calibrated --bands 15 --strengths 0.6,0.75 --positions all --min-fluent 0.25

shipped=steerfast/data/smollm2-135m-instruct
measure "$base" results eval-cpu --profile ours=$shipped.safetensors --profile late=$shipped-late.safetensors \
    --profile paper=artifacts/p1-paper.safetensors --profile self=artifacts/p1-self.safetensors \
    --profile cast=artifacts/p1-cast.safetensors --other safety-sft="$aligned" --strengths 0.5,0.75,1,1.25
measure "$maths" results-domain eval-domain-cpu --profile ours=artifacts/p2-ours.safetensors \
    --profile paper=artifacts/p2-paper.safetensors --profile self=artifacts/p2-self.safetensors \
    --profile cast=artifacts/p2-cast.safetensors --other safety-sft="$maths_safety" --other aligned="$aligned" \
    --strengths 0.5,0.75,1,1.25
