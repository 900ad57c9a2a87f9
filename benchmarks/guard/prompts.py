"""Write the prompts of a guard: those that train it are of the corpus' split fit, those that test it of validate.

    python benchmarks/guard/prompts.py FOLDER --train 300 --test 100

Each number is one of harmful and of harmless prompts; half of the harmless ones are borderline. All are English, bare
and at most 600 characters long, of all sources in turn. The files are named fit-harmful.jsonl, fit-harmless.jsonl,
validate-harmful.jsonl and validate-harmless.jsonl.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import chain, islice, zip_longest
from pathlib import Path

import click

from steerfast.text.corpus import corpus
from steerfast.text.examples import Example

KINDS = {"harmful": {"harmful": 1.0}, "harmless": {"harmless": 0.5, "borderline": 0.5}}
LONGEST = 600  # characters


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--train", default=300, show_default=True, type=click.IntRange(min=2))
@click.option("--test", default=100, show_default=True, type=click.IntRange(min=2))
def main(folder: Path, train: int, test: int) -> None:
    for split, count in (("fit", train), ("validate", test)):
        for kind, shares in KINDS.items():
            rows = [row for label, share in shares.items() for row in spread(split, label, round(share * count))]
            lines = [json.dumps({"prompt": row.prompt, "label": kind, "source": row.source}) for row in rows]
            (folder / f"{split}-{kind}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def spread(split: str, label: str, count: int) -> list[Example]:
    """Return `count` prompts of a label, the first ones of each source in turn."""
    by_source: dict[str, list[Example]] = defaultdict(list)
    for one in corpus(split, labels=[label]):
        if one.lang == "en" and one.context == "bare" and isinstance(one.prompt, str) and len(one.prompt) <= LONGEST:
            by_source[one.source].append(one)
    turns = chain.from_iterable(zip_longest(*by_source.values()))
    return list(islice((one for one in turns if one is not None), count))


if __name__ == "__main__":
    main()
