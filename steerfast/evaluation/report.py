"""Write an evaluation's report from its JSON data: one page of HTML, its pictures as PNGs, and a page of Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from steerfast._files import write_atomically
from steerfast.errors import OutputError, SteerfastError
from steerfast.evaluation.plots import COLOURS, Picture, draw, known, primary
from steerfast.evaluation.systems import UNSTEERED

__all__ = [
    "Headline",
    "ReportCell",
    "ReportRow",
    "ReportTable",
    "check_html",
    "headlines",
    "markdown",
    "tables",
    "write_html",
]

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
    parts += ["\n".join(lines)] if lines else []
    for table in tables(result):
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


@dataclass(frozen=True)
class _Figure:
    """A figure of every system, by up to two names. share: of prompts, printed in %."""

    key: str
    group: str
    share: bool = True


_ASR = _Figure("asr", "attack success, % ↓")
_OVER_REFUSAL = _Figure("over_refusal", "over-refusal, % ↓")


@dataclass(frozen=True)
class _Design:
    """A table of systems. signed: differences from unsteered. titled: rows carry the systems' descriptions."""

    name: str
    title: str
    figures: Sequence[_Figure]
    note: str = ""
    signed: bool = False
    titled: bool = False


_DESIGNS = (
    _Design(
        "systems",
        "All systems",
        (
            _ASR,
            _OVER_REFUSAL,
            _Figure("fluent", "fluent, % ↑"),
            _Figure("unchanged", "unchanged, % ↑"),
            _Figure("latency.ratio", "× time ↓", share=False),
        ),
        "Attack success is the share of harmful prompts that were not refused, over-refusal the share of harmless ones "
        "that were; both by the first judge. Fluent counts answers to harmful prompts, unchanged answers to harmless "
        "ones that equal the unsteered model's token for token. Ranges are 95 % intervals.",
        titled=True,
    ),
    _Design(
        "differences",
        "Differences from unsteered",
        (_ASR, _OVER_REFUSAL),
        "Percentage points above or below the unsteered model on the same prompts, with the 95 % interval of a paired "
        "bootstrap; bold where zero lies outside.",
        signed=True,
    ),
    _Design(
        "tasks",
        "Tasks",
        [_Figure("tasks", "", share=False)],
        "By lm-evaluation-harness, in each metric's unit, with 95 % intervals from its standard errors. Systems that "
        "reword prompts run no tasks.",
    ),
    _Design("styles", "Attack success by style, %", [_Figure("asr_by_style", "")]),
    _Design("harmless-styles", "Over-refusal by style, %", [_Figure("over_refusal_by_style", "")]),
    _Design(
        "gates",
        "Gates",
        (
            _Figure("gate_auc", "gate AUC ↑", share=False),
            _Figure("fire_rate", "opened, %"),
            _Figure("abstain_rate", "undecided, %"),
        ),
        "AUC of each harmful set against all harmless prompts together, how often the gate opened, and how often it "
        "abstained, with an abstain band.",
    ),
    _Design("gate-styles", "Gate AUC by style", [_Figure("gate_auc_by_style", "", share=False)]),
    _Design(
        "answers",
        "Fluent and unchanged answers by set",
        (_Figure("fluent_by_set", "fluent, % ↑"), _Figure("unchanged_by_set", "unchanged, % ↑")),
    ),
    _Design(
        "judges",
        "Attack success by judge, %",
        (_Figure("asr_by_judge", ""), _Figure("no_verdict", "no verdict", share=False)),
        "No verdict: answers that the first judge could not decide; they are in no rate.",
    ),
    _Design("harmless-judges", "Over-refusal by judge, %", [_Figure("over_refusal_by_judge", "")]),
    _Design(
        "time",
        "Time per token",
        (
            _Figure("latency.ms_per_token", "ms per token", share=False),
            _Figure("latency.ratio", "× unsteered", share=False),
            _Figure("latency.pairs", "pairs", share=False),
        ),
        "One sequence, greedy; the ratio is the median of pairs of runs, steered and unsteered in turn.",
    ),
)


def tables(result: Mapping[str, Any]) -> list[ReportTable]:
    """Return the tables of the report that have a row, the summary first."""
    left_out = [ReportRow(str(name), [ReportCell(str(why))]) for name, why in (result.get("left_out") or {}).items()]
    made = [
        *(_of_systems(result, design) for design in _DESIGNS),
        _frontier(result),
        _agreement(result),
        _sets(result),
        ReportTable("left-out", "Left out", "", "what", [("", "why")], left_out, figures=False),
    ]
    return [table for table in made if table.rows]


def _of_systems(result: Mapping[str, Any], design: _Design) -> ReportTable:
    """Make a row for each system with one of the design's figures, a column for each set or name of a figure."""
    systems, figures = _systems(result), design.figures
    cells: dict[tuple[_Figure, tuple[str, ...]], dict[str, ReportCell]] = {}
    for system, data in systems.items():
        given = data.get("against_unsteered") if design.signed else data
        for figure in figures:
            for names, value, ends in _values(_at(given, figure.key), _at(given, f"intervals.{figure.key}")):
                cell = _figure_cell(value, ends, figure.share, design.signed)
                cells.setdefault((figure, names), {})[system] = cell
    order = list(dict.fromkeys([*(result.get("sets") or {}), *(name for _, names in cells for name in names)]))
    columns = sorted(cells, key=lambda column: (figures.index(column[0]), [order.index(name) for name in column[1]]))
    rows = [
        ReportRow(
            system,
            [cells[column].get(system, ReportCell()) for column in columns],
            str(data.get("title") or "") if design.titled else "",
        )
        for system, data in systems.items()
        if any(system in found for found in cells.values())
    ]
    named = [(names[0] if len(names) > 1 else figure.group, _column(result, names)) for figure, names in columns]
    if design.signed:
        named = [(group.replace("%", "points"), name) for group, name in named]
    note = design.note
    if any(name.endswith("†") for _, name in named):
        note += " † also fitted, calibrated or tuned a profile of this table: its figures flatter."
    return ReportTable(design.name, design.title, note.strip(), "system", named, rows)


def _at(data: Any, path: str) -> Any:
    """Return the value under names joined by dots, None if one is missing."""
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _values(
    value: Any, interval: Any, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float, Sequence[float]]]:
    """Yield every finite figure in `value`: its keys, itself, the ends of its interval."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            ends = interval.get(name) if isinstance(interval, Mapping) else None
            yield from _values(inner, ends, (*names, str(name)))
        return
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value, *interval = value
    if known(value):
        ends = [end for end in interval or () if known(end)]
        yield names, value, ends if len(ends) == 2 else ()


def _figure_cell(value: float, ends: Sequence[float], share: bool, signed: bool = False) -> ReportCell:
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
    return ReportCell(write(value), " to ".join(map(write, ends)) if signed else "–".join(map(write, ends)), strong)


def _column(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the last name, with a mark if the set made a profile."""
    fitted = any(((result.get("sets") or {}).get(name) or {}).get("also_fitted_by") for name in names)
    return (names[-1] if names else "") + (" †" if fitted else "")


def _frontier(result: Mapping[str, Any]) -> ReportTable:
    points = result.get("frontier") or ()
    sets = list(dict.fromkeys(name for point in points for name in point.get("asr_by_set") or ()))
    rows = [
        ReportRow(
            str(point["system"]),
            [
                _cell_of(point.get("strength"), False),
                *(_cell_of((point.get("asr_by_set") or {}).get(name), True) for name in sets),
                *(_cell_of(point.get(key), True) for key in ("asr", "fluent")),
            ],
        )
        for point in points
    ]
    success = _ASR.group
    columns = [("", "× strength"), *((success, name) for name in sets), (success, "all sets"), ("", "fluent, % ↑")]
    note = "The profile's strengths multiplied by a number; 1 is the profile unchanged."
    return ReportTable("strengths", "Strength", note, "system", columns, rows)


def _agreement(result: Mapping[str, Any]) -> ReportTable:
    found = {(name, pair): data for name, by in (result.get("agreement") or {}).items() for pair, data in by.items()}
    rows = [
        ReportRow(
            name,
            [
                ReportCell(pair.replace("~", " and ")),
                *(_cell_of(data.get(key), share) for key, share in (("agree", True), ("kappa", False), ("n", False))),
            ],
        )
        for (name, pair), data in found.items()
    ]
    columns = [("", "judges"), ("", "same verdict, %"), ("", "Cohen's kappa"), ("", "answers")]
    return ReportTable("agreement", "Do the judges agree?", "Over the answers of all systems.", "set", columns, rows)


def _cell_of(value: Any, share: bool) -> ReportCell:
    return _figure_cell(value, (), share) if known(value) else ReportCell()


def _sets(result: Mapping[str, Any]) -> ReportTable:
    rows = []
    for name, data in (result.get("sets") or {}).items():
        texts = [data.get("kind"), data.get("count"), data.get("duplicates"), data.get("source")]
        texts += [str(data.get("digest") or "")[:12], "; ".join(data.get("also_fitted_by") or ())]
        rows.append(ReportRow(name, [ReportCell(_NONE if text in (None, "") else str(text)) for text in texts]))
    columns = ["kind", "prompts", "duplicates removed", "source", "SHA-256", "also used"]
    note = "The digest is of all prompts of the source, before a sample is drawn."
    return ReportTable("sets", "Sets", note, "set", [("", column) for column in columns], rows, figures=False)


def _systems(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result.get("systems") or {}


def _kind(result: Mapping[str, Any], name: str) -> str:
    return ((result.get("sets") or {}).get(name) or {}).get("kind") or ""


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
    data, plain = _systems(result)[name], _systems(result).get(UNSTEERED) or {}
    made = []
    for key, says, worst, share in (
        ("asr", "attack success", max, True),
        ("over_refusal", "over-refusal", max, True),
        ("fluent", "fluent", min, True),
        ("unchanged", "harmless answers unchanged", min, True),
        ("gate_auc", "gate AUC", min, False),
    ):
        found = {names: value for names, value, _ in _values(data.get(key), None)}
        if not found:
            continue
        names = worst(found, key=lambda names: found[names])
        before = {names: value for names, value, _ in _values(plain.get(key), None)} if key != "unchanged" else {}
        unit = " %" if share else ""
        of = "" if not names else names[0] if len(found) == 1 else f"{names[0]}, the worst of {len(found)} sets"
        made.append(
            Headline(
                says,
                _figure_cell(found[names], (), share).text + unit,
                _figure_cell(before[names], (), share).text if names in before else "",
                of,
            )
        )
    if known(ratio := _at(data, "latency.ratio")):
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
        pictures=[{"picture": picture, "svg": Markup(picture.svg)} for picture in pictures],
        examples=list(_examples(result)),
        settings=_settings(result),
    )


def _examples(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield prompts with the answers of all systems, in the systems' order; hidden: blurred until clicked."""
    order = list(_systems(result))
    for example in result.get("examples") or ():
        answers = example.get("answers") or {}
        plain = (answers.get(UNSTEERED) or {}).get("text")
        yield {
            "set": example.get("set") or "",
            "prompt": example.get("prompt") or "",
            "hidden": (example.get("kind") or _kind(result, example.get("set") or "")) not in _SHOWN,
            "answers": [
                {
                    "system": name,
                    "text": (answers[name] or {}).get("text") or "",
                    "refused": (answers[name] or {}).get("refused"),
                    "fluent": (answers[name] or {}).get("fluent"),
                    "same": name != UNSTEERED and plain is not None and (answers[name] or {}).get("text") == plain,
                }
                for name in sorted(answers, key=lambda name: order.index(name) if name in order else len(order))
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
