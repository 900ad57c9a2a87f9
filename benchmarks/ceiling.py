"""The AUC that a gate of this kind could reach on a set, had it been fitted on the set itself.

    python benchmarks/ceiling.py PROFILE --prompts validation.jsonl --json ceiling.jsonl

A direction is fitted at the sensor, as `steerfast extract` fits it, on four fifths of the prompts and scores the rest.
Harmful prompts of a source stand against the harmless sources, each alike, and against the borderline prompts of the
same source. The profile's own AUC stands beside it. A gate that falls short of a ceiling lacks prompts; a low ceiling
means that the model's rows do not tell these prompts apart, or that a few hundred prompts are too few to fit them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import steerfast
from steerfast._files import write_atomically
from steerfast.fitting.directions import fit_direction
from steerfast.fitting.extract import ExtractOptions
from steerfast.fitting.labelled import Labelled
from steerfast.fitting.score import gate_rows, row_scores
from steerfast.hf.loading import load_model
from steerfast.judging.estimates import grouped_auc
from steerfast.text.corpus import corpus
from steerfast.text.examples import read_examples

FOLDS = 5
SHRINKAGE = ExtractOptions.shrinkage


@click.command(help=__doc__)
@click.argument("profile_file", metavar="PROFILE")
@click.option("--prompts", help="Labelled prompts.  [default: the corpus' split validate]")
@click.option("--dtype", default="auto", show_default=True, help="Of the model.")
@click.option("--cache", help="A folder for the rows of prompts.")
@click.option("--json", "json_file", help="Where to write the rows, a line each.")
def main(profile_file: str, prompts: str | None, dtype: Any, cache: str | None, json_file: str | None) -> None:
    profile = steerfast.SteeringProfile.load(profile_file)
    model, tokenizer = load_model(profile.model.name, dtype=dtype)
    given = corpus("validate") if prompts is None else read_examples(prompts)
    harmful, others = ([one for one in given if (one.label == "harmful") == bad] for bad in (True, False))
    examples = Labelled.of(harmful, others)
    rows = gate_rows(profile, model, tokenizer, examples.prompts, description="rows", cache=cache)
    sensor = profile.gate_layers[0]
    scores = row_scores(profile, rows)[:, sensor]
    found = ceilings(examples, rows[:, sensor].flatten(1).double(), scores)
    lines = [{"profile": profile.checksum, "model": profile.model.name, "layer": sensor, **row} for row in found]
    if json_file is not None:
        write_atomically(Path(json_file), "".join(json.dumps(line) + "\n" for line in lines).encode())
    click.echo("| harmful prompts of | against | prompts | AUC of the gate | ceiling |\n|---|---|--:|--:|--:|")
    for row in found:
        cells = [f"{row[key][0]:.3f} ({row[key][1]:.3f}–{row[key][2]:.3f})" for key in ("auc", "ceiling")]
        click.echo(f"| {row['source']} | {row['against']} | {' + '.join(map(str, row['n']))} | {' | '.join(cells)} |")


def ceilings(examples: Labelled, rows: Tensor, scores: Tensor) -> list[dict[str, Any]]:
    """Return the AUC and its ceiling, with 95 % intervals, of each harmful source against each kind of others.

    Args:
        rows: float64 [n, F], what the gate reads. scores: [n], the gate's.
    """
    groups = examples.groups()
    harmless = [places for (_, label), places in groups.items() if label == "harmless"]
    found = []
    for (source, label), places in groups.items():
        if label != "harmful":
            continue
        against = {"harmless sources": harmless, "its borderline prompts": [groups.get((source, "borderline"), [])]}
        for kind, sides in against.items():
            if not sides or not sides[0]:
                continue
            row = {"source": source, "against": kind, "n": [len(places), sum(map(len, sides))]}
            for name, one in (("auc", scores), ("ceiling", crossed(rows, places, sides))):
                area = grouped_auc([one[places].numpy()], [one[side].numpy() for side in sides])
                row[name] = [round(value, 4) for value in area.to_list()]
            found.append(row)
    return found


def crossed(rows: Tensor, harmful: Sequence[int], others: Sequence[Sequence[int]]) -> Tensor:
    """Return each prompt's score by a direction that was fitted without its fifth: float64 [n], else 0."""
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for fold in range(FOLDS):
        kept, out = _parted(harmful, fold)
        sides = [_parted(side, fold) for side in others]
        weights = torch.cat([torch.full((len(side),), 1 / len(side)) for side, _ in sides])
        good = [place for side, _ in sides for place in side]
        even = torch.full((len(kept),), float(weights.sum()) / len(kept))
        direction = fit_direction(rows[kept], rows[good], shrinkage=SHRINKAGE, weights=(even, weights))
        out += [place for _, side in sides for place in side]
        middle = (rows[kept] @ direction).mean() / 2 + (rows[good] @ direction).mean() / 2
        scores[out] = rows[out] @ direction - middle
    return scores


def _parted(places: Sequence[int], fold: int) -> tuple[list[int], list[int]]:
    """Return the places that stay, and every fifth, which is out."""
    return [place for i, place in enumerate(places) if i % FOLDS != fold], list(places[fold::FOLDS])


if __name__ == "__main__":
    main()
