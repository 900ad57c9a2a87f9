"""Write an evaluation's report from its JSON data: one page of HTML, its pictures as PNGs, and a page of Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from steerfast._files import write_atomically
from steerfast.errors import OutputError, SteerfastError
from steerfast.evaluation.plots import COLOURS, Picture, at, draw, known, primary
from steerfast.evaluation.systems import UNSTEERED
from steerfast.judging.by_source import DEVELOPMENT

_NONE = "–"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHOWN = ("harmless", "borderline")  # kinds of texts that are not blurred


def check_html(path: str | os.PathLike[str]) -> None:
    """Check before any work that `write_html` can write there.

    Raises:
        OutputError: another ending than .html, a missing or read-only folder.
        SteerfastError: jinja2 or matplotlib is not installed.
    """
    page = Path(path)
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"html: expected a file that ends in .html, got {str(path)!r}")
    if page.is_dir() or not os.access(page.parent, os.W_OK | os.X_OK):
        what = "is a folder" if page.is_dir() else "its folder is missing or cannot be written"
        raise OutputError(f"html: cannot write {str(path)!r} ({what})")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        missing = f"html: expected {error.name}, it is not installed (pip install 'steerfast[report]')"
        raise SteerfastError(missing) from None


def write_html(result: Mapping[str, Any], path: str | os.PathLike[str]) -> list[Path]:
    """Write the page of `result`, the JSON data of `evaluate`, and its pictures beside it, as ``<stem>-<name>.png``.

    The page runs no script and loads nothing. Every part of `result` may be missing.

    Returns:
        The files, the page first. Each appears whole or not at all, the page last.

    Raises:
        OutputError, SteerfastError: as `check_html`.
    """
    check_html(path)
    page, result = Path(path), _readable(result)
    pictures = draw(result)
    files = {page.with_name(f"{page.stem}-{picture.name}.png"): picture.png for picture in pictures}
    files[page] = _page(result, pictures).encode()
    for file, content in files.items():
        write_atomically(file, content)
    return [page, *(file for file in files if file != page)]


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables and settings of the report as Markdown, without prompts and answers."""
    result = _readable(result)
    settings = _settings(result)
    parts = [f"# Evaluation of {_inline(result.get('model') or 'a model')}"]
    lines = [
        f"- {_inline(line.name)}: {f'{_inline(line.before)} → ' if line.before else ''}**{_inline(line.value)}**"
        f"{f' ({_inline(line.of)})' if line.of else ''}"
        for line in headlines(result)
    ]
    return _markdown_page([*parts, *(["\n".join(lines)] if lines else [])], tables(result), settings)


def gate_markdown(report: Mapping[str, Any]) -> str:
    """Return the tables and settings of a `steerfast.evaluation.gates.gate_report` as Markdown, without prompts."""
    report = _readable(report)
    title = f"# The gate of a profile of {_inline(report.get('model') or 'a model')}"
    settings = {name: value for name, value in report.items() if name not in ("model", "systems", "left_out")}
    return _markdown_page([title], gate_tables(report), _settings({"settings": settings}))


def _markdown_page(parts: Sequence[str], shown: Sequence[ReportTable], settings: Sequence[tuple[str, str]]) -> str:
    parts = [*parts]
    for table in shown:
        parts += [f"## {_inline(table.title)}", *([table.note] if table.note else []), _markdown_table(table)]
    parts.append("## How it was measured")
    parts.append("\n".join(f"- {name}: {_inline(value)}" for name, value in settings if name != "command"))
    parts += [f"    {' '.join(value.split())}" for name, value in settings if name == "command"]
    return "\n\n".join(parts) + "\n"


# -- tables, the same for both pages ---------------------------------------------------------------


@dataclass(frozen=True)
class ReportCell:
    """interval: 95 %, or "". strong: a clear difference."""

    text: str = _NONE
    interval: str = ""
    strong: bool = False


@dataclass(frozen=True)
class ReportRow:
    """name: of a system or set. title: its description."""

    name: str
    cells: Sequence[ReportCell]
    title: str = ""


@dataclass(frozen=True)
class ReportTable:
    """columns: (group, name), either may be ""; a group's columns are adjacent. figures: cells are numbers."""

    name: str
    title: str
    note: str
    first: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[ReportRow]
    figures: bool = True

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Return name and number of columns of each group."""
        return [(name, len(list(columns))) for name, columns in groupby(self.columns, key=lambda column: column[0])]


_ASR, _OVER_REFUSAL = "attack success, % ↓", "over-refusal, % ↓"
_NUMBERS = {"latency.ratio", "latency.ms_per_token", "latency.pairs", "tasks", "gate_auc", "gate_auc_by_style"} | {
    "no_verdict", "kappa", "n"
}  # fmt: skip
"""Figures that are no shares of prompts; shares are printed in %."""


@dataclass(frozen=True)
class _Design:
    """A table of figures. figures: key of a figure -> its group of columns. part: of the result, with the rows."""

    name: str
    title: str
    figures: Mapping[str, str]
    note: str = ""
    part: str = "systems"


_DESIGNS = (
    _Design(
        "systems",
        "All systems",
        {
            "asr": _ASR,
            "over_refusal": _OVER_REFUSAL,
            "fluent": "fluent, % ↑",
            "unchanged": "unchanged, % ↑",
            "distinct_refusals": "distinct refusals, % ↑",
            "topic_named": "topic named, % ↑",
            "latency.ratio": "× time ↓",
        },
        "Attack success is the share of harmful prompts that were not refused, over-refusal the share of harmless ones "
        "that were; both by the first judge. Fluent counts answers to harmful prompts, unchanged answers to harmless "
        "ones that equal the unsteered model's token for token. Distinct refusals of harmful prompts say what none "
        "before them says; those with the topic named hold a content word of the prompt. Means give each set the same "
        "weight; worst is the worst set. Ranges are 95 % intervals.",
    ),
    _Design(
        "differences",
        "Differences from unsteered",
        {"asr": _ASR.replace("%", "points"), "over_refusal": _OVER_REFUSAL.replace("%", "points")},
        "Percentage points above or below the unsteered model on the same prompts, with Newcombe's 95 % interval of "
        "paired shares; bold where zero lies outside.",
    ),
    _Design(
        "tasks",
        "Tasks",
        {"tasks": ""},
        "By lm-evaluation-harness, in each metric's unit, with 95 % intervals from its standard errors. Systems that "
        "reword prompts run no tasks.",
    ),
    _Design("styles", "Attack success by style, %", {"asr_by_style": ""}),
    _Design("harmless-styles", "Over-refusal by style, %", {"over_refusal_by_style": ""}),
    _Design(
        "gates",
        "Gates",
        {"gate_auc": "gate AUC ↑", "fire_rate": "opened, %", "abstain_rate": "undecided, %"},
        "AUC of each harmful set against all harmless and borderline sets, each with the same weight, how often the "
        "gate opened, and how often it abstained, with an abstain band.",
    ),
    _Design("gate-styles", "Gate AUC by style", {"gate_auc_by_style": ""}),
    _Design(
        "answers",
        "Answers by set",
        {
            "fluent_by_set": "fluent, % ↑",
            "unchanged_by_set": "unchanged, % ↑",
            "distinct_refusals_by_set": "distinct refusals, % ↑",
            "topic_named_by_set": "topic named, % ↑",
        },
    ),
    _Design(
        "judges",
        "Attack success by judge, %",
        {"asr_by_judge": "", "no_verdict": "no verdict"},
        "No verdict: answers that the first judge could not decide; they are in no rate.",
    ),
    _Design("harmless-judges", "Over-refusal by judge, %", {"over_refusal_by_judge": ""}),
    _Design(
        "time",
        "Time per token",
        {"latency.ms_per_token": "ms per token", "latency.ratio": "× unsteered", "latency.pairs": "pairs"},
        "One sequence, greedy; the ratio is the median of pairs of runs, steered and unsteered in turn.",
    ),
    _Design(
        "strengths",
        "Strength",
        {"asr_by_set": _ASR, "asr": "mean of the sets, % ↓", "fluent": "fluent, % ↑"},
        "The profile's strengths multiplied by a number; 1 is the profile unchanged.",
        part="frontier",
    ),
    _Design(
        "agreement",
        "Do the judges agree?",
        {"agree": "same verdict, %", "kappa": "Cohen's kappa", "n": "answers"},
        "Over the answers of all systems.",
        part="agreement",
    ),
)


def tables(result: Mapping[str, Any]) -> list[ReportTable]:
    """Return the tables of the report that have a row, the summary first."""
    rows = {
        "systems": result.get("systems") or {},
        "frontier": {f"{one['system']} × {one['strength']:g}": one for one in result.get("frontier") or ()},
        "agreement": {
            f"{name}: {pair.replace('~', ' and ')}": data
            for name, pairs in (result.get("agreement") or {}).items()
            for pair, data in pairs.items()
        },
    }
    left_out = [ReportRow(str(name), [ReportCell(str(why))]) for name, why in (result.get("left_out") or {}).items()]
    made = [
        *(_of_figures(result, design, rows[design.part]) for design in _DESIGNS),
        _sets(result),
        ReportTable("left-out", "Left out", "", "what", [("", "why")], left_out, figures=False),
    ]
    return [table for table in made if table.rows]


def _of_figures(result: Mapping[str, Any], design: _Design, rows: Mapping[str, Any]) -> ReportTable:
    """Make a row for everything with one of the design's figures, a column for each set or name of a figure."""
    signed = design.name == "differences"
    keys = list(design.figures)
    cells: dict[tuple[str, tuple[str, ...]], dict[str, ReportCell]] = {}
    for row, data in rows.items():
        given = data.get("against_unsteered") if signed else data
        for key in keys:
            path = key.split(".")
            for names, value, ends in _values(at(given, *path), at(given, "intervals", *path)):
                cells.setdefault((key, names), {})[row] = _cell(value, ends, key not in _NUMBERS, signed)
    sets = result.get("sets") or {}
    order = list(dict.fromkeys([*sets, *(name for _, names in cells for name in names)]))
    columns = sorted(cells, key=lambda column: (keys.index(column[0]), [order.index(name) for name in column[1]]))
    made = [
        ReportRow(
            row,
            [cells[column].get(row, ReportCell()) for column in columns],
            str(data.get("title") or "") if design.name == "systems" else "",
        )
        for row, data in rows.items()
        if any(row in found for found in cells.values())
    ]
    heads, note = [], design.note
    for key, names in columns:
        fitted = any(at(sets, name, "use") == DEVELOPMENT for name in names)
        group = names[0] if len(names) > 1 else design.figures[key]
        heads.append((group, (names[-1] if names else "") + (" †" if fitted else "")))
    if any(name.endswith("†") for _, name in heads):
        note += " † development: the set chose something in a system of this table, and flatters it."
    first = "set and judges" if design.part == "agreement" else "system"
    return ReportTable(design.name, design.title, note.strip(), first, heads, made)


def _values(
    value: Any, interval: Any, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float, Sequence[float]]]:
    """Yield every finite figure in `value`: its keys, itself, the ends of its interval."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, at(interval, name), (*names, str(name)))
        return
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value, *interval = value
    if known(value):
        ends = [end for end in interval or () if known(end)]
        yield names, value, ends if len(ends) == 2 else ()


def _cell(value: float, ends: Sequence[float], share: bool, signed: bool = False) -> ReportCell:
    def write(number: float) -> str:
        sign = "+" if signed else ""
        if share:
            text = f"{100 * number:{sign}.1f}"
        elif isinstance(number, int):
            text = f"{number:{sign}}"
        else:
            text = f"{number:{sign}.{3 if abs(number) < 10 else 1}f}"
        return text.replace("-", "−")

    strong = signed and len(ends) == 2 and (ends[0] > 0 or ends[1] < 0)
    return ReportCell(write(value), (" to " if signed else "–").join(map(write, ends)), strong)


def _sets(result: Mapping[str, Any]) -> ReportTable:
    rows = []
    for name, data in (result.get("sets") or {}).items():
        texts = [data.get(key) for key in ("kind", "use", "count", "duplicates", "source")]
        texts += [str(data.get("digest") or "")[:12], "; ".join(data.get("also_fitted_by") or ())]
        rows.append(ReportRow(name, [ReportCell(_NONE if text in (None, "") else str(text)) for text in texts]))
    columns = ["kind", "use", "prompts", "duplicates removed", "source", "SHA-256", "also used"]
    note = "The digest is of all prompts of the source, before a sample is drawn."
    return ReportTable("sets", "Sets", note, "set", [("", column) for column in columns], rows, figures=False)


# -- a gate by source ------------------------------------------------------------------------------

_FEW = 5  # that fired: the exact interval's end is shown, too
_SOURCES_NOTE = (
    "Fires is the share of prompts that fire, with its Wilson interval. At most is the exact interval's upper end, "
    f"where {_FEW} or fewer fired. AUC is against the harmless sources of this table, each with the same weight; its "
    "interval is DeLong's, over prompts, for these sources. Intervals are of 95 %."
)
_MEANS_NOTE = (
    "The mean of the sources, each with the same weight, beside the worst source. A harmful source is worst if it "
    "fires least, another if it fires most."
)


def gate_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """Return the tables of a `steerfast.evaluation.gates.gate_report`, those of validation sources first."""
    systems = report.get("systems") or {}
    made = []
    for use, title in (("validation", "validation"), ("development", "development: they chose something in the gate")):
        parts = {name: parts[use] for name, parts in systems.items() if use in parts}
        if (main := next(iter(systems), None)) not in parts:
            continue
        known = {name: [row for part in parts.values() for row in part["rows"]] for name, parts in systems.items()}
        mine = {(row["source"], row["label"]) for row in parts[main]["rows"]}
        rows = {name: [row for row in all_ if (row["source"], row["label"]) in mine] for name, all_ in known.items()}
        made.append(of_sources(rows, f"Sources of {title}"))
        made.append(_means({name: {"": part["labels"]} for name, part in parts.items()}, f"Means of {title}", use))
        for field in ("context", "lang"):
            split = {name: part[field] for name, part in parts.items() if field in part}
            made.append(_means(split, f"By {field}, {title}", f"{use}-{field}"))
    left_out = [ReportRow(str(name), [ReportCell(str(why))]) for name, why in (report.get("left_out") or {}).items()]
    made.append(ReportTable("left-out", "Left out", "", "source", [("", "why")], left_out, figures=False))
    return [table for table in made if table.rows]


def of_sources(systems: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "Sources") -> ReportTable:
    """Return a table with a row of each source and label.

    Args:
        systems: name -> the ``rows`` of `steerfast.evaluation.gates.figures_by_source`; the first one's are shown, and
            of the others those of the same sources. A name may be "".
    """
    by_key = {name: {(row["source"], row["label"]): row for row in rows} for name, rows in systems.items()}
    first = next(iter(by_key.values()), {})
    heads = [("", "label"), ("", "use"), ("", "prompts")]
    figures = [(name, what) for name, rows in by_key.items() for what in _row_figures(rows.values())]
    made = []
    for key, row in first.items():
        cells = [ReportCell(key[1]), ReportCell(str(row.get("use") or _NONE)), ReportCell(str(row["n"]))]
        cells += [_source_cell(by_key[name].get(key, {}), what, row) for name, what in figures]
        made.append(ReportRow(key[0], cells))
    note = _SOURCES_NOTE
    if any(cell.text.endswith("†") for row in made for cell in row.cells):
        note += " † the source chose something in this system."
    return ReportTable("sources", title, note, "source", [*heads, *figures], made)


def _row_figures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the columns that some row has a value for."""
    keys = {key for row in rows for key in row}
    few = any(row["fired"] <= _FEW for row in rows)
    shown = {"fires, %": "rate" in keys, "at most, %": few and "exact" in keys}
    return [what for what, there in (shown | {"undecided": "undecided" in keys, "AUC": "auc" in keys}).items() if there]


def _source_cell(row: Mapping[str, Any], what: str, first: Mapping[str, Any]) -> ReportCell:
    if what == "undecided":
        return ReportCell(str(row.get("undecided", _NONE)))
    if what == "AUC":
        return _estimate_cell(row.get("auc"), share=False)
    if what == "at most, %":
        few = "exact" in row and row["fired"] <= _FEW
        return _estimate_cell(row["exact"][1:] if few else None)
    cell = _estimate_cell(row.get("rate"))
    marked = row.get("use") not in (None, "validation", first.get("use"))
    return replace(cell, text=cell.text + " †") if marked else cell


def _estimate_cell(figure: Sequence[float] | None, share: bool = True) -> ReportCell:
    """Return the cell of a value alone, or with the ends of its interval."""
    return _cell(figure[0], figure[1:], share) if figure and known(figure[0]) else ReportCell()


def _means(systems: Mapping[str, Mapping[str, Any]], title: str, name: str) -> ReportTable:
    """Return a table of means. systems: name -> value of a field, or "" -> label -> mean and worst."""
    heads = ("fires, %", "worst, %", "AUC", "worst AUC")
    rows: dict[str, list[ReportCell]] = {}
    for value, labels in next(iter(systems.values()), {}).items():
        for label, shown in labels.items():
            cells = [ReportCell(str(shown["sources"])), ReportCell(str(shown["n"]))]
            for parts in systems.values():
                cells += _mean_cells(at(parts, value, label) or {})
            rows[f"{label}, {value or 'no language'}" if name.count("-") else label] = cells
    columns = [("", "sources"), ("", "prompts"), *((system, head) for system in systems for head in heads)]
    return ReportTable(f"means-{name}", title, _MEANS_NOTE, "label", columns, [ReportRow(*row) for row in rows.items()])


def _mean_cells(found: Mapping[str, Any]) -> list[ReportCell]:
    cells = []
    for key, worst, share in (("rate", "worst", True), ("auc", "worst_auc", False)):
        least = _estimate_cell([at(found, worst, key)], share)
        cells += [_estimate_cell(found.get(key), share), replace(least, interval=str(at(found, worst, "source") or ""))]
    return cells


# -- headlines -------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """A figure of the primary system, beside the unsteered model's if known."""

    name: str
    value: str
    before: str = ""
    of: str = ""


def headlines(result: Mapping[str, Any]) -> list[Headline]:
    """Return the primary system's figures at their worst sets: an average would hide a bad set."""
    name = primary(result)
    if name is None:
        return []
    data, plain = result["systems"][name], at(result, "systems", UNSTEERED)
    made = []
    for key, says, worst, share in (
        ("asr", "attack success", max, True),
        ("over_refusal", "over-refusal", max, True),
        ("fluent_by_set", "fluent", min, True),
        ("unchanged_by_set", "harmless answers unchanged", min, True),
        ("gate_auc", "gate AUC", min, False),
    ):
        found = {names: value for names, value, _ in _values(data.get(key), None)}
        if not found:
            continue
        names = worst(found, key=lambda names: found[names])
        before: Any = at(plain, key, *names) if key != "unchanged_by_set" else None
        of = "" if not names else names[0] if len(found) == 1 else f"{names[0]}, the worst of {len(found)} sets"
        value = _cell(found[names], (), share).text + (" %" if share else "")
        made.append(Headline(says, value, _cell(before, (), share).text if known(before) else "", of))
    if known(ratio := at(data, "latency", "ratio")):
        made.append(Headline("time per token", f"×{ratio:.3f}", of="unsteered decoding"))
    return made


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of every setting, versions in one line, the command last."""
    settings = dict(result.get("settings") or {})
    command = settings.pop("command", None)
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            lines.append((name.replace("_", " "), str(value)))
    return [*lines, *([("command", str(command))] if command else [])]


# -- the page --------------------------------------------------------------------------------------


def _page(result: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(str(text).split("_"))
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    return template.render(
        model=result.get("model") or "a model",
        colours=COLOURS,
        primary=primary(result),
        headlines=headlines(result),
        tables={table.name: table for table in tables(result)},
        pictures=pictures,
        examples=list(_examples(result)),
        settings=_settings(result),
    )


def _examples(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield prompts with the answers of all systems; hidden: blurred until clicked."""
    for example in result.get("examples") or ():
        answers = example.get("answers") or {}
        plain, name = at(answers, UNSTEERED, "text"), example.get("set") or ""
        blank = {"text": "", "refused": None, "fluent": None}
        yield {
            "set": name,
            "prompt": example.get("prompt") or "",
            "hidden": (example.get("kind") or at(result, "sets", name, "kind")) not in _SHOWN,
            "answers": [
                {
                    **blank,
                    **(answer or {}),
                    "system": system,
                    "same": system != UNSTEERED and plain is not None and at(answer, "text") == plain,
                }
                for system, answer in answers.items()
            ],
        }


def _readable(value: Any) -> Any:
    """Copy the data and replace control characters in its texts, which no page can hold."""
    if isinstance(value, Mapping):
        return {_readable(name): _readable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(inner) for inner in value]
    return _CONTROLS.sub("�", value.replace("\r\n", "\n")) if isinstance(value, str) else value


def _inline(value: Any) -> str:
    """Escape text for a line or cell of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(str(value).split()))


def _markdown_table(table: ReportTable) -> str:
    heads = [table.first, *(": ".join(filter(None, column)) for column in table.columns)]
    right = "--:" if table.figures else "--"
    lines = [map(_inline, heads), ["--", *[right] * len(table.columns)]]
    for row in table.rows:
        cells = [f"**{_inline(cell.text)}**" if cell.strong else _inline(cell.text) for cell in row.cells]
        cells = [
            f"{text} ({_inline(c.interval)})" if c.interval else text for text, c in zip(cells, row.cells, strict=True)
        ]
        lines.append([_inline(row.name) + (f": {_inline(row.title)}" if row.title else ""), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
