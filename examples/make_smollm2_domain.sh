#!/usr/bin/env bash
# The InferAligner paper's comparison (arXiv 2401.11206) on SmolLM2: an aligned model whose refusals wear off when it is
# tuned on mathematics, and what brings them back: two gates times two vectors, each beside the other, fitted on the
# same prompts and calibrated at the same rate. Makes docs/results-domain.md. Hours on two CPU cores, about one with
# DTYPE=bfloat16 where the CPU has instructions for it; started again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
dtype=${DTYPE:-auto} # of the models, except in training
mkdir -p artifacts/eval
aligned=artifacts/smollm2-aligned maths=artifacts/smollm2-maths maths_safety=artifacts/smollm2-maths-safety
rows=artifacts/domain-rows

train() { # FOLDER OPTION...
    [[ -e $1/tokenizer_config.json ]] || python examples/train_smollm2.py "${@:2}" --output "$1"
}
profile() { # NAME COMMAND...: makes artifacts/domain-NAME.safetensors
    [[ -e artifacts/domain-$1.safetensors ]] ||
        steerfast "${@:2}" --dtype "$dtype" --output "artifacts/domain-$1.safetensors"
}
gate() { # NAME OPTION...: a gate, with the sibling's mean difference as a vector
    profile "$1-extracted" extract --model "$maths" --aligned-model "$aligned" --per-source 48 --vectors ssv --unit-norm \
        --cache "$rows" "${@:2}"
    profile "$1-gate" calibrate "artifacts/domain-$1-extracted.safetensors" --per-source 64 --cache "$rows"
}
tune() { # NAME GATE; the maths model repeats itself, refusals included: few of its answers are fluent
    profile "$1" tune "artifacts/domain-$2-gate.safetensors" --vectors ssv --bands 10-19,15-24 --strengths 30,60,120 \
        --positions response --min-fluent 0.25 --min-unchanged 0 --resume artifacts/trials-domain.jsonl
}
learn() { # NAME GATE: from the sibling's answers, at one layer for all gates
    profile "$1" learn "artifacts/domain-$2-gate.safetensors" --aligned-model "$aligned" --layer 15 --steps 60 \
        --batch-size 8 --answer-tokens 48
}

train "$aligned" aligned
train "$maths" maths
train "$maths_safety" maths --safety 120 --steps 40

gate paper --gate mean --pooling last --score dot # mean differences of last rows, as in the paper
gate ours
gate cast --gate pca --pooling mean # a principal component of mean rows, as CAST (arXiv 2409.05907)
tune paper paper
tune ours ours
tune cast cast
learn paper-learned paper
learn learned ours

named() { for name in "$@"; do echo "--profile $name=artifacts/domain-$name.safetensors"; done; }
# The first profile is also measured with its gate always open.
# shellcheck disable=SC2046
steerfast eval "$maths" --dtype "$dtype" $(named learned ours paper-learned paper cast) --other safety-sft="$maths_safety" \
    --other aligned="$aligned" --limit 100 --max-new-tokens 48 --resume artifacts/eval/domain.jsonl \
    --html artifacts/eval/domain.html --markdown docs/results-domain.md --json benchmarks/results/eval-domain-cpu.json
