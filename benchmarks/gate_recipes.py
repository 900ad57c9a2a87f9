"""Recipes for a prompt gate, judged on styles of prompt that they were not fitted on.

Each recipe makes a direction per layer from the shipped fit sets. It is tried on each of their styles, left out of the
fit in turn, on the calibrate sets, whose styles it has seen, and on the held-out sets; some are also tried on the
evaluation sets. A JSON line per recipe. Those of "all tokens" read the mean of a prompt, as the shipped profile does at
layer 15 (of its last 256 tokens); the others read its last token.

    python benchmarks/gate_recipes.py --output benchmarks/results/gate-recipes-cpu.jsonl

Scores are brought to one scale before they are combined: from each its threshold at 3 % of the harmless calibrate
prompts is taken, and the rest divided by the standard deviation of theirs.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from numpy.typing import NDArray
from report import machine, write
from torch import Tensor

import steerfast
from steerfast.cli.common import read_set
from steerfast.fitting.activations import gate_reading, residual_rows
from steerfast.fitting.directions import fit_direction, project
from steerfast.fitting.left_out import style_splits
from steerfast.hf.generation import PromptBatch
from steerfast.hf.loading import DEMO_MODEL
from steerfast.judging.estimates import auc, gate_figures, rate, threshold_at_false_positive_rate
from steerfast.profile import Gate
from steerfast.text.encoding import encode, pad_token
from steerfast.text.prompts import read_prompts, read_records
from steerfast.text.styles import PLAIN, Prompts

FIT = ("fit", "framed", "styles", "languages")
CALIBRATE = ("calibrate", "styles_calibrate", "languages_calibrate")
HELDOUT = ("heldout",)
SIDES = ("harmful", "harmless")
HARMFUL = ("harmful_demo", "advbench", "harmbench", "jailbreak_attacks")
HARMLESS = ("harmless_demo", "self_instruct", "truthfulqa_questions", "gsm8k")
EVALUATION = (*HARMFUL, *HARMLESS, "borderline")
SHRINKAGE = 0.3

Pooling = Literal["last", "mean"]
READS = {pooling: gate_reading(Gate(pooling=pooling)) for pooling in ("last", "mean")}
"""What is kept of a prompt, and its score: of the last token, and of the mean over all tokens."""

Pair = tuple[Any, Any]
"""What belongs to the harmful prompts, and the same of the harmless ones."""


def means_of_plain(rows: Pair, styles: Pair, shrinkage: float | None = SHRINKAGE) -> Tensor:
    plain = torch.tensor(styles[0] == PLAIN), torch.tensor(styles[1] == PLAIN)
    return fit_direction(*rows, shrinkage=shrinkage, means_of=plain)


def means_of_all_styles(rows: Pair, styles: Pair) -> Tensor:
    return fit_direction(*rows, shrinkage=SHRINKAGE)


def scatter_within_styles(rows: Pair, styles: Pair) -> Tensor:
    deviations = [x.clone() for x in rows]
    for x, names in zip(deviations, styles, strict=True):
        for style in np.unique(names):
            x[names == style] -= x[names == style].mean(dim=0)
    return scattered(rows, styles, deviations)


def styles_weighted_equally(rows: Pair, styles: Pair) -> Tensor:
    deviations = []
    for x, names in zip(rows, styles, strict=True):
        _, where, counts = np.unique(names, return_inverse=True, return_counts=True)
        weight = torch.from_numpy(len(names) / len(counts) / counts[where])[:, None]
        deviations.append(weight.sqrt() * (x - (weight * x).mean(dim=0)))
    return scattered(rows, styles, deviations)


def fewer_prompts(rows: Pair, styles: Pair, share: float) -> Tensor:
    """The usual recipe on so many of the prompts, each drawn by itself."""
    draws = np.random.default_rng(0)
    keep = [draws.random(len(names)) < share for names in styles]
    return means_of_plain(
        tuple(x[torch.from_numpy(mask)] for x, mask in zip(rows, keep, strict=True)),
        tuple(names[mask] for names, mask in zip(styles, keep, strict=True)),
    )


def scattered(rows: Pair, styles: Pair, deviations: list[Tensor]) -> Tensor:
    """The usual recipe with another scatter."""
    means = [x[names == PLAIN].mean(dim=0) for x, names in zip(rows, styles, strict=True)]
    # Mirrored, so that the mean is that one, whatever the deviations sum to.
    return fit_direction(
        *(torch.cat([mean + x, mean - x]) for mean, x in zip(means, deviations, strict=True)), shrinkage=SHRINKAGE
    )


@dataclass(frozen=True)
class Recipe:
    fit: Callable[[Pair, Pair], Tensor] = means_of_plain
    layers: tuple[int, ...] = (22,)
    poolings: tuple[Pooling, ...] = ("last",)  # of each layer, or of all
    combine: Callable[..., NDArray[Any]] = np.mean
    on_all: bool = False  # also tried on the evaluation sets

    @property
    def reads(self) -> list[tuple[int, Pooling]]:
        repeats = len(self.layers) // len(self.poolings)
        return list(zip(self.layers, self.poolings * repeats, strict=True))


RECIPES = {
    "layer 22": Recipe(on_all=True),  # the next ones are this with one thing changed
    **{f"shrinkage {value}": Recipe(partial(means_of_plain, shrinkage=value)) for value in (0.05, 0.1, 0.5)},
    "shrinkage of Ledoit and Wolf": Recipe(partial(means_of_plain, shrinkage=None)),
    "means of all styles": Recipe(means_of_all_styles),
    "scatter within styles": Recipe(scatter_within_styles),
    "styles weighted equally": Recipe(styles_weighted_equally),
    **{f"layer {layer}": Recipe(layers=(layer,), on_all=layer == 15) for layer in (15, 18, 20, 23, 24, 26)},
    **{
        f"{share:.0%} of the prompts": Recipe(partial(fewer_prompts, share=share), on_all=True) for share in (0.25, 0.5)
    },
    **{f"all tokens, layer {n}": Recipe(layers=(n,), poolings=("mean",), on_all=True) for n in (9, 12, 15, 18, 22, 26)},
    **{
        f"all tokens, layer 15, {share:.0%} of the prompts": Recipe(
            partial(fewer_prompts, share=share), layers=(15,), poolings=("mean",), on_all=True
        )
        for share in (0.25, 0.5)
    },
    "layer 15, last token and all tokens": Recipe(layers=(15, 15), poolings=("last", "mean"), on_all=True),
    "mean of 2 layers": Recipe(layers=(15, 22), on_all=True),
    "max of 2 layers": Recipe(layers=(15, 22), combine=np.max, on_all=True),
    "mean of 3 layers": Recipe(layers=(15, 22, 24), on_all=True),
    "mean of 5 layers": Recipe(layers=(12, 15, 22, 24, 27), on_all=True),
}


@dataclass(frozen=True)
class Side:
    """The harmful prompts of some sets, or the harmless ones."""

    prompts: Prompts
    rows: Tensor  # [prompts, layers, poolings, H]


def directions(recipe: Recipe, sides: Pair, masks: Pair = (slice(None), slice(None))) -> list[Tensor]:
    """One per score of the recipe, from the prompts in the masks."""
    styles = tuple(np.array(side.prompts.styles)[mask] for side, mask in zip(sides, masks, strict=True))
    found = []
    for layer, pooling in recipe.reads:
        at = list(READS).index(pooling)
        rows = [side.rows[mask, layer, at].double() for side, mask in zip(sides, masks, strict=True)]
        if pooling == "last":  # for a cosine gate; the mean is of unit rows
            rows = [x / x.norm(dim=1, keepdim=True) for x in rows]
        found.append(recipe.fit(tuple(rows), styles))
    return found


def measure(
    recipe: Recipe, fit: Pair, calibrate: Pair, heldout: Pair, evaluation: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Figures of one recipe; `evaluation`: the rows of each set that it shall also be tried on."""
    final = directions(recipe, fit)

    def by_layer(rows: Tensor, fitted: list[Tensor]) -> NDArray[Any]:
        read = [
            project(rows[:, layer, list(READS).index(pooling)], direction, READS[pooling][1])
            for (layer, pooling), direction in zip(recipe.reads, fitted, strict=True)
        ]
        return torch.stack(read, dim=1).numpy()

    reference = by_layer(calibrate[1].rows, final)
    zero = np.array([threshold_at_false_positive_rate(layer, 0.03) for layer in reference.T])

    def scores(rows: Tensor, fitted: list[Tensor] = final) -> NDArray[Any]:
        return recipe.combine((by_layer(rows, fitted) - zero) / reference.std(axis=0), axis=1)

    left_out, seen = {}, {}
    for style, (out, kept) in style_splits(fit[0].prompts, fit[1].prompts).items():
        fitted = directions(recipe, fit, kept)
        left_out[style] = [scores(side.rows[mask], fitted) for side, mask in zip(fit, out, strict=True)]
        masks = [torch.tensor(side.prompts.in_style(style)) for side in calibrate]
        if masks[0].any():
            seen[style] = [scores(side.rows[mask]) for side, mask in zip(calibrate, masks, strict=True)]
    bad, good = (scores(side.rows) for side in calibrate)
    low, limit, high = (threshold_at_false_positive_rate(good, share) for share in (0.10, 0.03, 0.02))
    found = {name: scores(rows) for name, rows in evaluation.items()}
    sets: dict[str, Any] = {}
    for name, x in found.items():
        inside = int(((x > low) & (x <= high)).sum())
        sets[name] = {"n": len(x), "opened": rate(int((x > limit).sum()), len(x)).to_list(), "in_band": inside / len(x)}
        if name.startswith(HARMFUL):
            sets[name]["auc"] = auc(x, np.concatenate([found[harmless] for harmless in HARMLESS])).to_list()
    return {
        "left_out": on_styles(left_out),
        "seen": on_styles(seen),
        "calibrate": gate_figures(bad, good, limit).to_dict(),
        "heldout": gate_figures(*(scores(side.rows) for side in heldout), limit).to_dict(),
        "sets": sets,
    }


def on_styles(scores: Mapping[str, Sequence[NDArray[Any]]]) -> dict[str, Any]:
    """Figures by style, at thresholds that open for 2 % of the other styles' harmless prompts, or of its own.

    Few styles have 50 harmless prompts: at its own threshold each lets one through at least.
    """
    styles = {}
    for style, (bad, good) in scores.items():
        others = np.concatenate([harmless for name, (_, harmless) in scores.items() if name != style])
        found = gate_figures(bad, good, threshold_at_false_positive_rate(others, 0.02))
        own = threshold_at_false_positive_rate(good, max(0.02, 1 / len(good)))
        figures = {name: getattr(found, name).value for name in ("auc", "hit_rate", "false_positive_rate")}
        styles[style] = {**figures, "hit_rate_own_threshold": float((bad > own).mean())}
    means = {name: float(np.mean([figures[name] for figures in styles.values()])) for name in styles[style]}
    worst = sorted(figures["auc"] for figures in styles.values())[: math.ceil(len(styles) / 4)]
    pooled = auc(*(np.concatenate(side) for side in zip(*scores.values(), strict=True))).value
    return {**means, "auc_worst_quarter": float(np.mean(worst)), "auc_pooled": pooled, "styles": styles}


def residuals(name: str, file: Path | None) -> dict[str, Tensor]:
    """What gates read of each set, [prompts, layers, poolings, H]."""
    if file is not None and file.exists():
        return torch.load(file, weights_only=True)
    model, tokenizer = steerfast.load_model(name, dtype="float32", device="cpu")
    rows = {}
    for chosen in (*(f"{side}_{part}" for side in SIDES for part in (*FIT, *CALIBRATE, *HELDOUT)), *EVALUATION):
        sequences = encode(tokenizer, read_prompts(f"steerfast:{chosen}"), model)
        rows[chosen] = residual_rows(
            model, sequences, reduce=read_both, pad_token_id=pad_token(tokenizer), description=chosen
        )
    if file is not None:
        torch.save(rows, file)
    return rows


def read_both(hidden: Tensor, batch: PromptBatch) -> Tensor:
    return torch.stack([read(hidden, batch).float() for read, _ in READS.values()], dim=1)


def side_of(rows: Mapping[str, Tensor], sets: list[str]) -> Side:
    prompts = read_set("sets", [f"steerfast:{chosen}" for chosen in sets]).prompts
    return Side(prompts, torch.cat([rows[chosen] for chosen in sets]))


@click.command()
@click.option("--model", "name", default=DEMO_MODEL, show_default=True)
@click.option("--rows", "file", type=click.Path(path_type=Path), help="keep the residual rows here for the next run")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(name: str, file: Path | None, output: Path) -> None:
    rows = residuals(name, file)
    pairs = [
        tuple(side_of(rows, [f"{side}_{part}" for part in parts]) for side in SIDES)
        for parts in (FIT, CALIBRATE, HELDOUT)
    ]
    evaluation = {chosen: rows[chosen] for chosen in EVALUATION}
    attacks = np.array([record["style"] for record in read_records("steerfast:jailbreak_attacks")])
    for style in dict.fromkeys(attacks):
        evaluation[f"jailbreak_attacks, {style}"] = rows["jailbreak_attacks"][attacks == style]
    output.unlink(missing_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write({"model": name, "command": command, **machine()}, output)
    for title, recipe in RECIPES.items():
        figures = measure(recipe, *pairs, evaluation if recipe.on_all else {})
        write({"recipe": title, "layers": recipe.layers, "poolings": recipe.poolings, **figures}, output)


if __name__ == "__main__":
    main()
