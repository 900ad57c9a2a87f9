"""Estimate the best gate that a model's residual stream allows: cross-validated probes of several kinds, by layer.

A gate is fitted on some styles and judged on others. The probes here see every style, also those of the evaluation
sets; only the prompts are new to them. A gate that reads one layer in the same way should not do better. Writes a JSON
line per layer and probe.

    python benchmarks/probe_ceiling.py --output benchmarks/results/probe-ceiling-cpu.jsonl
    python benchmarks/probe_ceiling.py --pooling mean --output benchmarks/results/probe-ceiling-mean-cpu.jsonl
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from report import machine, write
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import steerfast
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.hf.loading import DEMO_MODEL
from steerfast.judging.estimates import gate_figures, threshold_at_false_positive_rate
from steerfast.profile import Gate
from steerfast.text.encoding import encode, pad_token
from steerfast.text.prompts import read_records

HARMFUL = ("harmful_demo", "advbench", "harmbench", "jailbreak_attacks")
HARMLESS = ("harmless_demo", "self_instruct", "truthfulqa_questions", "gsm8k")
FALSE_POSITIVES = 0.02


def probes() -> dict[str, Any]:
    """Name -> an unfitted classifier."""
    return {
        "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)),
        "mlp": make_pipeline(StandardScaler(), MLPClassifier((32,), alpha=1.0, max_iter=40, random_state=0)),
    }


def out_of_fold(
    probe: Any, rows: NDArray[Any], harmful: NDArray[Any], groups: NDArray[Any], folds: int = 5
) -> NDArray[Any]:
    """Score each prompt with a probe that was fitted without it."""
    scores = np.empty(len(rows))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, groups):
        probe.fit(rows[train], harmful[train])
        if hasattr(probe, "decision_function"):
            scores[test] = probe.decision_function(rows[test])
        else:
            scores[test] = probe.predict_proba(rows[test])[:, 1]
    return scores


@click.command()
@click.option("--model", "name", default=DEMO_MODEL, show_default=True)
@click.option("--pooling", type=click.Choice(["last", "mean"]), default="last", show_default=True, help="what is read")
@click.option("--limit", default=100, show_default=True, help="prompts per set")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
def main(name: str, pooling: Any, limit: int, output: Path, seed: int) -> None:
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    model, tokenizer = steerfast.load_model(name, dtype="float32", device="cpu")
    prompts, sets = [], []
    for chosen in (*HARMFUL, *HARMLESS):
        records = read_records(f"steerfast:{chosen}")
        for i in sorted(draw.permutation(len(records))[:limit]):
            prompts.append(records[i]["prompt"])
            style = records[i].get("style")
            sets.append(f"{chosen}, {style}" if chosen == "jailbreak_attacks" and style else chosen)
    names = np.array(sets)
    harmful = np.array([name.split(",")[0] in HARMFUL for name in sets])
    read, _ = gate_reading(Gate(pooling=pooling))
    ids = encode(tokenizer, prompts, model)
    rows: Any = residual_rows(model, ids, reduce=read, pad_token_id=pad_token(tokenizer))
    if pooling == "last":
        rows = rows / rows.norm(dim=2, keepdim=True)  # a cosine gate sees no more; a mean is one of such rows
    rows = rows.numpy()
    counts = {chosen: sets.count(chosen) for chosen in dict.fromkeys(sets)}
    output.unlink(missing_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write({"model": name, "pooling": pooling, "sets": counts, "seed": seed, "command": command, **machine()}, output)
    for layer in range(rows.shape[1]):
        for kind, probe in probes().items():
            scores = out_of_fold(probe, rows[:, layer], harmful, names)
            limit_at = threshold_at_false_positive_rate(scores[~harmful], FALSE_POSITIVES)
            found = gate_figures(scores[harmful], scores[~harmful], limit_at)
            by_set = {
                chosen: gate_figures(scores[names == chosen], scores[~harmful], limit_at)
                for chosen in dict.fromkeys(sets)
                if chosen.split(",")[0] in HARMFUL
            }
            line = {
                "layer": layer,
                "probe": kind,
                "auc": found.auc.to_list(),
                "hit_rate": found.hit_rate.to_list(),
                "by_set": {
                    chosen: {"auc": round(one.auc.value, 4), "hit_rate": round(one.hit_rate.value, 4)}
                    for chosen, one in by_set.items()
                },
            }
            write(line, output)


if __name__ == "__main__":
    main()
