"""Make a corpus file from folders of labelled prompts, and report what went in.

    python benchmarks/make_corpus.py FOLDER... OUT --evaluation sets/alpaca.json --report report.json

The table (benchmarks/corpus/sources.json) names each source with its family, split, most rows, licence and origin.
A source's rows are in NAME.json beside the table, or else in a folder, as `steerfast.text.examples.read_examples` reads
them. Prompts of fit and calibrate that resemble those of validate or of an evaluation set are left out, and so are
prompts of fit that resemble those of calibrate. docs/corpus.md says more.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import click

from steerfast._files import write_atomically
from steerfast.errors import PromptError, SteerfastError
from steerfast.text.duplicates import near_duplicates
from steerfast.text.examples import LABELS, SPLITS, Example, Prompt, read_examples, text_of
from steerfast.text.prompts import read_prompts, read_records, shipped_records

TABLE = Path(__file__).parent / "corpus" / "sources.json"
CONTEXTS = (
    *("system", "turns", "document_before", "json", "wrapper", "document_after"),
    *("system", "refused", "document_before", "json", "wrapper", "tools"),
)
SHARE = 0.2  # rows in a context, over rows as they are
SHORT = 600  # characters of a request that is set into a context
MOST = 100  # rows of a source, if it names no other number
LONGEST = 2500  # characters of a prompt, if its source names no other limit
WHOLE = 24  # characters of a prompt that is found inside another one
SPARE = 1.4  # rows drawn over those kept: near-duplicates leave
REQUIRED = ("family", "split", "licence", "origin", "use")
KEPT = (*REQUIRED, "set", "styles", "label", "context")  # of a source, in the file

Table = Mapping[str, Mapping[str, Any]]


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sources", default=TABLE, type=click.Path(exists=True, path_type=Path), help="The table.")
@click.option("--evaluation", multiple=True, help="A set that scores a gate: nothing kept resembles it.")
@click.option("--report", type=click.Path(path_type=Path), help="Counts by source, as JSON.")
def main(folders: Sequence[Path], out: Path, sources: Path, evaluation: Sequence[str], report: Path | None) -> None:
    try:
        made = make(json.loads(sources.read_text()), [sources.parent, *folders], out, evaluation)
    except SteerfastError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(made["total"]))
    if report is not None:
        write_atomically(report, (json.dumps(made, indent=1) + "\n").encode())


def make(table: Table, folders: Sequence[Path], out: Path, evaluation: Sequence[str] = ()) -> dict[str, Any]:
    """Write a corpus file and return the report on it; equal inputs give equal bytes.

    Raises:
        PromptError: what `check` refuses, a source without a file, or rows that cannot be read.
    """
    check(table)
    drawn = {name: draw(name, source, folders) for name, source in table.items() if "set" not in source}
    kept = distinct(drawn, table, evaluation)
    most = {name: source.get("most", MOST) for name, source in table.items()}
    rng = random.Random(0)
    pool = make_pool(json.loads(find("pool", folders).read_text()), folders, rng)
    kinds = {label: cycle(CONTEXTS) for label in LABELS}
    rows: list[dict[str, Any]] = []
    report = {}
    for name, examples in kept.items():
        own = [as_row(example) for example in examples[: most[name]]]
        set_in = in_contexts(own, pool.get(table[name]["split"]), kinds, rng)
        rows += own + set_in
        repeats = len(drawn[name]) - len(examples)
        counts = {"drawn": len(drawn[name]), "near-duplicates": repeats, "kept": len(own), "in a context": len(set_in)}
        report[name] = {**counts, "labels": dict(Counter(row["label"] for row in own + set_in))}
    sources = {name: {k: v for k, v in source.items() if k in KEPT} for name, source in table.items()}
    lines = [json.dumps(line, ensure_ascii=False) for line in ({"sources": sources, "pool": pool}, *rows)]
    packed = lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME)
    write_atomically(out, packed)
    return {"total": {"rows": len(rows), "bytes": len(packed)}, "sources": report}


def check(table: Table) -> None:
    """Refuse a table with a source that lacks a field, an unknown split, or a family in two splits."""
    splits: dict[str, str] = {}
    for name, source in table.items():
        for key in REQUIRED:
            if not source.get(key):
                raise PromptError(f"sources: {name}: expected {', '.join(REQUIRED)}, got no {key}")
        if source["split"] not in SPLITS:
            raise PromptError(f"sources: {name}: split: expected {', '.join(SPLITS)}, got {source['split']!r}")
        first = splits.setdefault(source["family"], source["split"])
        if first != source["split"]:
            raise PromptError(
                f"sources: {name}: expected split {first!r}, where its family is, got {source['split']!r}"
            )


def find(name: str, folders: Sequence[Path]) -> Path:
    """Return the first NAME.json in folders."""
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    raise PromptError(f"sources: expected {name}.json in {', '.join(map(str, folders))}, found none")


def draw(name: str, source: Mapping[str, Any], folders: Sequence[Path]) -> list[Example]:
    """Return rows of a source in a random order of its own: `SPARE` times as many as are kept.

    ``labels`` renames labels, ``longest`` bounds a prompt's characters, ``without`` names categories that are left out,
    ``free_of`` a source whose texts no prompt may contain, and ``unclear`` fingerprints of rows whose label a reader
    doubted.
    """
    path = find(name, folders)
    records = read_records(path, conversations=("turns",))
    examples = read_examples(path, label=source.get("label"))
    refused = [text.rstrip(" ?").lower() for text in texts_of(source.get("free_of"), folders)]
    rows = []
    for record, example in zip(records, examples, strict=True):
        text = text_of(example.prompt)
        if len(text) > source.get("longest", LONGEST) or record.get("category") in source.get("without", ()):
            continue
        if any(other in text.lower() for other in refused):
            continue
        label = source.get("labels", {}).get(example.label, example.label)
        context = source.get("context", "bare")
        rows.append(Example(example.prompt, label, name, source["split"], example.lang or "en", context))
    random.Random(name).shuffle(rows)
    drawn = rows[: round(SPARE * source.get("most", MOST))]
    return [row for row in drawn if fingerprint(row) not in source.get("unclear", ())]


def fingerprint(example: Example) -> str:
    """Return eight hexadecimal digits that name a prompt's text."""
    return hashlib.sha256(text_of(example.prompt).encode()).hexdigest()[:8]


def texts_of(name: str | None, folders: Sequence[Path]) -> list[str]:
    return read_prompts(find(name, folders)) if name else []


def distinct(drawn: Mapping[str, list[Example]], table: Table, evaluation: Sequence[str]) -> dict[str, list[Example]]:
    """Return the rows without those of fit or calibrate that resemble a prompt which judges them."""
    validate = [text_of(e.prompt) for name in drawn if table[name]["split"] == "validate" for e in drawn[name]]
    for source in table.values():
        validate += [record["prompt"] for record in shipped_records(source["set"])] if "set" in source else []
    for path in evaluation:
        validate += read_prompts(path)
    against = list(validate)
    kept = dict(drawn)
    for split in ("calibrate", "fit"):
        names = [name for name in drawn if table[name]["split"] == split]
        texts = [text_of(example.prompt) for name in names for example in drawn[name]]
        near = near_duplicates(texts, against)
        mask = iter(alike or holds(text, validate) for alike, text in zip(near, texts, strict=True))
        for name in names:
            kept[name] = [example for example in drawn[name] if not next(mask)]
        against = validate + [text_of(e.prompt) for name in names for e in kept[name]]
    return kept


def holds(text: str, others: Sequence[str]) -> bool:
    """Return whether a text has another one of at least `WHOLE` characters inside it, as a wrapper does."""
    return any(other in text for other in others if len(other) >= WHOLE)


def as_row(example: Example) -> dict[str, Any]:
    """Return an example as a line of the file; what is usual is left out."""
    row: dict[str, Any] = {"request": example.prompt, "label": example.label, "source": example.source}
    if example.lang != "en":
        row["lang"] = example.lang
    if example.context != "bare":
        row["context"] = example.context
    return row


def in_contexts(
    rows: Sequence[dict[str, Any]],
    pieces: Mapping[str, Sequence[Any]] | None,
    kinds: Mapping[str, Iterator[str]],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Return some of the short requests once more, each in a context; every label meets all contexts alike."""
    short = [row for row in rows if isinstance(row["request"], str) and len(row["request"]) <= SHORT]
    short = [row for row in short if "context" not in row]
    if not pieces or not short:
        return []
    found = []
    for row in rng.sample(short, min(len(short), max(1, round(SHARE * len(rows))))):
        kind = next(kinds[row["label"]])
        found.append({**row, "context": kind, "piece": rng.randrange(len(pieces[pool_key(kind)]))})
    return found


def pool_key(context: str) -> str:
    return context.partition("_")[0]


def make_pool(recipe: Mapping[str, Any], folders: Sequence[Path], rng: random.Random) -> dict[str, Any]:
    """Return the pieces of each split and context: lists as they stand, or texts taken from a source.

    A piece taken from a source is a system message (of conversations), or ``words`` words of a prompt.
    """
    return {
        split: {
            context: pieces
            if isinstance(pieces, list)
            else [p for take in pieces["take"] for p in taken(take, folders, rng)]
            for context, pieces in contexts.items()
        }
        for split, contexts in recipe.items()
    }


def taken(take: Mapping[str, Any], folders: Sequence[Path], rng: random.Random) -> list[str]:
    """Return pieces of a source's rows ``first`` to ``last``."""
    examples = read_examples(find(take["source"], folders), label="harmless")[take["first"] : take["last"]]
    texts = [leading_text(example.prompt) for example in examples]
    texts = [
        text for text in texts if len(text.split()) >= take["words"][0] and len(text) <= take.get("longest", 10**6)
    ]
    found = []
    for text in rng.sample(texts, take["count"]):
        words = text.split(" ")
        length = rng.randint(*take["words"])
        start = rng.randrange(max(1, len(words) - length)) if take.get("anywhere") else 0
        found.append(" ".join(words[start : start + length]).strip() if "longest" not in take else text)
    return found


def leading_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def table_of(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table in Markdown of what `steerfast.text.corpus.corpus_sources` returns."""
    lines = [f"| split | source | {' | '.join(LABELS)} | licence |", "|---|---|--:|--:|--:|---|"]
    for name, source in sources.items():
        counts = " | ".join(str(source["counts"].get(label, "")) for label in LABELS)
        lines.append(f"| {source['split']} | {name} | {counts} | {source['licence']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
