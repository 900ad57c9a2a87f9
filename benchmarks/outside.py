"""Draw prompts of sources that the corpus does not hold, for `steerfast validate`.

    python benchmarks/outside.py FOLDER outside.jsonl
    python benchmarks/outside.py FOLDER outside50.jsonl --most 50

FOLDER holds NAME.json of each source below, as `steerfast.text.examples.read_examples` reads it: prompts with label and
language. Prompts that resemble one of the splits fit and calibrate are left out. The last line is a SHA-256 of the
sorted texts, one a line. docs/results-gate.md has the figures and where the sources come from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import click

from steerfast._files import write_atomically
from steerfast.fitting.labelled import evenly
from steerfast.text.corpus import corpus
from steerfast.text.duplicates import near_duplicates
from steerfast.text.examples import Example, grouped, read_examples, text_of

MOST = 100  # prompts of a source and label
OF_LANGUAGE = {  # source -> the most prompts of a label and language
    "cyberseceval_frr_de_es_fr_hi": 40,
    "xquad_multilingual": 33,
    "xsafety_harmful": 30,
    "xsafety_sensitive": 30,
}
SOURCES = (
    *("agieval", "belle_eval_zh", "cyberseceval_frr", "cyberseceval_instruct", "cyberseceval_interpreter"),
    *("cyberseceval_mitre", "dolly_part", "harmbench_contextual", "nq_open", "spider", *OF_LANGUAGE),
)
LARGE = "xsafety"  # in ten languages: `--most` leaves twice as many


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--most", type=click.IntRange(min=1), help="Of a source and label, twice as many of XSafety; evenly.")
def main(folder: Path, out: Path, most: int | None) -> None:
    found = distinct([one for name in SOURCES for one in drawn(name, folder / f"{name}.json")])
    if most is not None:
        parts = grouped(found)
        found = [
            found[place]
            for (name, _), places in parts.items()
            for place in evenly(places, 2 * most if name.startswith(LARGE) else most)
        ]
    lines = [
        {"prompt": one.prompt, "label": one.label, "source": one.source, **({"lang": one.lang} if one.lang else {})}
        for one in found
    ]
    write_atomically(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    texts = "\n".join(sorted(text_of(one.prompt) for one in found))
    click.echo(f"{len(found)} prompts, {hashlib.sha256(texts.encode()).hexdigest()}")


def drawn(name: str, path: Path) -> list[Example]:
    """Return the prompts of a source, evenly spaced."""
    groups: dict[tuple[str, str], list[Example]] = {}
    for one in read_examples(path):
        key = one.label, one.lang if name in OF_LANGUAGE else ""
        groups.setdefault(key, []).append(Example(one.prompt, one.label, name, lang=one.lang))
    return [one for group in groups.values() for one in evenly(group, OF_LANGUAGE.get(name, MOST))]


def distinct(given: list[Example]) -> list[Example]:
    """Return the prompts that resemble none of the splits fit and calibrate."""
    used = [text_of(one.prompt) for one in corpus(("fit", "calibrate"))]
    repeats = near_duplicates([text_of(one.prompt) for one in given], used)
    return [one for one, repeat in zip(given, repeats, strict=True) if not repeat]


if __name__ == "__main__":
    main()
