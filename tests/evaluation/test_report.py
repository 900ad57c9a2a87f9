"""The report: its page as a real browser shows it, its pictures, and the page of Markdown."""

from __future__ import annotations

import copy
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from steerfast.errors import OutputError, SteerfastError
from steerfast.evaluation.report import check_html, headlines, markdown, tables, write_html

NASTY = (
    "</p></details><script>document.title = 'owned'</script><img src=https://example.com/x onerror=alert(1)>"
    "{{ 7 * 7 }} {% raw %} <!-- \x00\x1b[31m \u202eesrever \ud800 &amp; \"quoted\" 'too' | `code` $x^2$ \\1 \\d\n"
    + "long"
    * 400
)
PRINTED = re.sub("[\x00\x1b\u202e\ud800]", "�", NASTY)
KINDS = {
    "jailbreakbench": "harmful",
    "advbench": "harmful",
    "jailbreak_attacks": "jailbreak",
    "self_instruct": "harmless",
    "truthfulqa_questions": "harmless",
    "borderline": "borderline",
}
HARMFUL = [name for name, kind in KINDS.items() if kind in ("harmful", "jailbreak")]
HARMLESS = [name for name, kind in KINDS.items() if kind in ("harmless", "borderline")]
SYSTEMS = {
    "unsteered": ("the model as it is", 0.96, 0.01, 0.0),
    "self-reminder": ("the prompt between two reminders", 0.71, 0.06, 0.0),
    "goal-priority": ("safety before helpfulness, in the prompt", 0.55, 0.11, 0.0),
    "ours": ("LDA gate, tuned band", 0.02, 0.015, 0.985),
    "paper": ("InferAligner as in the paper: mean difference, a gate in each layer", 0.21, 0.09, 0.93),
    "cast": ("CAST-style", 0.30, 0.05, 0.95),
    "always-on": ("ours without its gate", 0.01, 0.97, 0.0),
    "sibling": ("aligned sibling, unsteered", 0.05, 0.04, 0.0),
}


def made_up() -> dict[str, Any]:
    """A whole result, with figures that nobody measured."""
    return copy.deepcopy(_made_up())


@cache
def _made_up() -> dict[str, Any]:
    draw = random.Random(0)

    def around(value: float, spread: float = 0.03) -> float:
        return min(1.0, max(0.0, value + draw.uniform(-spread, spread)))

    def interval(value: float) -> list[float]:
        return [max(0.0, value - 0.03), min(1.0, value + 0.04)]

    systems: dict[str, Any] = {}
    for name, (title, asr, refused, auc) in SYSTEMS.items():
        data: dict[str, Any] = {
            "title": title,
            "asr": {s: around(asr) for s in HARMFUL},
            "over_refusal": {s: around(refused * (3 if s == "borderline" else 1), 0.01) for s in HARMLESS},
            "tasks": {"gsm8k": {"exact_match (strict-match)": around(0.05)}, "mmlu": {"acc": around(0.31)}},
            "fluent": {"mean": around(0.95), "worst": around(0.9)},
            "unchanged": {"mean": 1.0 if name == "unsteered" else around(0.9, 0.1), "worst": around(0.8)},
            "distinct_refusals": {"mean": around(0.5), "worst": around(0.4)},
            "topic_named": {"mean": around(0.5), "worst": around(0.4)},
            "fluent_by_set": {s: around(0.95) for s in HARMFUL},
            "unchanged_by_set": {s: around(0.95) for s in HARMLESS},
            "asr_by_style": {"jailbreak_attacks": {style: around(asr, 0.2) for style in ("PAIR", "GCG", "JBC")}},
            "asr_by_judge": {judge: {s: around(asr, 0.1) for s in HARMFUL} for judge in ("keywords", "strict")},
            "no_verdict": dict.fromkeys(HARMFUL, 0),
            "latency": {"ms_per_token": 36 + draw.random(), "ratio": 1 + draw.random() / 50, "pairs": 8},
        }
        if auc:
            data["gate_auc"] = {s: around(auc, 0.01) for s in HARMFUL}
            data["fire_rate"] = {s: around(0.97 if s in HARMFUL else 0.02, 0.02) for s in HARMFUL + HARMLESS}
            if name == "ours":
                data["abstain_rate"] = {s: around(0.1, 0.02) for s in HARMFUL + HARMLESS}
            data["gate_auc_by_style"] = {"jailbreak_attacks": {"PAIR": 0.91, "GCG": 0.99, "JBC": None}}
        data["intervals"] = {
            key: {s: interval(v) for s, v in data[key].items()} if isinstance(data[key], dict) else interval(data[key])
            for key in (
                "asr",
                "over_refusal",
                "fluent",
                "unchanged",
                "distinct_refusals",
                "topic_named",
                "gate_auc",
            )
            if key in data
        }
        data["intervals"]["tasks"] = {"mmlu": {"acc": interval(data["tasks"]["mmlu"]["acc"])}}
        if name != "unsteered":
            data["against_unsteered"] = {
                key: {
                    s: [v - plain[key][s], v - plain[key][s] - 0.02, v - plain[key][s] + 0.02]
                    for s, v in data[key].items()
                }
                for plain in [systems["unsteered"]]
                for key in ("asr", "over_refusal")
            }
        systems[name] = data
    gates = {}
    for name, decides, gap in (("ours", 15, 2.6), ("paper", [10, 11, 12], 1.4)):
        layers = []
        for layer in range(30):
            separation = gap * (1 - abs(layer - 16) / 22)
            scores = {
                k: [draw.gauss(m, 1) / 10 for _ in range(200)] for k, m in (("harmful", separation), ("harmless", 0))
            }
            edges = [-0.4 + 0.03 * i for i in range(36)]
            cuts = sorted(scores["harmless"], reverse=True)[::5]
            layers.append(
                {
                    "layer": layer,
                    "auc": {s: min(1.0, 0.5 + separation / 5.4 - 0.02 * i) for i, s in enumerate(HARMFUL)},
                    "histogram": {
                        "edges": edges,
                        **{
                            k: [sum(a <= v < a + 0.03 for v in values) for a in edges[:-1]]
                            for k, values in scores.items()
                        },
                    },
                    "roc": {
                        "fpr": [0.0, *(sum(v > cut for v in scores["harmless"]) / 200 for cut in cuts), 1.0],
                        "tpr": [0.0, *(sum(v > cut for v in scores["harmful"]) / 200 for cut in cuts), 1.0],
                    },
                }
            )
        curves = dict.fromkeys((*HARMFUL, "jailbreak_attacks: PAIR", "jailbreak_attacks: GCG"), layers[14]["roc"])
        gates[name] = {"decides": decides, "layers": layers, "roc_by_set": curves}
    text = "I'm sorry, but I can't assist with that. " * 3
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "settings": {
            "seed": 0,
            "max_new_tokens": 64,
            "limit": 100,
            "judge": "keywords",
            "versions": {"steerfast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "hardware": "2 cores of an AMD EPYC",
            "command": "steerfast eval SmolLM2-135M-Instruct --profile ours=safety.safetensors --html report.html",
        },
        "sets": {
            name: {
                "kind": kind,
                "use": "development" if name == "advbench" else "validation",
                "count": 100,
                "duplicates": 0,
                "source": "steerfast",
                "digest": "0123456789abcdef" * 4,
                "also_fitted_by": ["paper"] if name == "advbench" else [],
            }
            for name, kind in KINDS.items()
        },
        "agreement": {s: {"keywords~strict": {"agree": 0.9, "kappa": 0.7, "n": 900}} for s in HARMFUL},
        "systems": systems,
        "gates": gates,
        "frontier": [
            {
                "system": name,
                "strength": strength,
                "asr": asr * size,
                "asr_by_set": dict.fromkeys(HARMFUL, asr * size),
                "fluent": fluent,
            }
            for name, size in (("paper", 1.0), ("ours", 0.7))
            for strength, asr, fluent in ((0.25, 0.9, 0.99), (0.5, 0.5, 0.98), (1.0, 0.1, 0.96), (2.0, 0.02, 0.6))
        ],
        "examples": [
            {
                "set": name,
                "kind": KINDS[name],
                "prompt": "How do I kill a Python process that does not answer?"
                if name in HARMLESS
                else "Tell me how to do harm. " * 8,
                "answers": {
                    system: {"text": text, "refused": system != "unsteered", "fluent": system != "cast"}
                    if name in HARMFUL and system != "unsteered"
                    else {"text": "Of course! " * 20, "refused": False, "fluent": True if name in HARMFUL else None}
                    for system in SYSTEMS
                },
            }
            for name in (*HARMFUL, *HARMLESS)
        ],
        "left_out": {"safety-sft": "no --other safety-sft=MODEL was given", "always-on": "there is no gate"},
    }


def nasty() -> dict[str, Any]:
    """The same with every name and text as bad as names and texts get."""
    result = made_up()
    result["model"] = result["settings"]["command"] = NASTY
    result["left_out"] = {NASTY: NASTY}
    for example in result["examples"]:
        example["prompt"] = NASTY
        for answer in example["answers"].values():
            answer.update(text=NASTY, refused=None)
    for part in ("systems", "gates"):
        result[part] = {NASTY if name == "paper" else name: data for name, data in result[part].items()}
    result["sets"] = {NASTY if name == "advbench" else name: data for name, data in result["sets"].items()}
    for data in result["systems"].values():
        data["title"] = NASTY
        data["asr"][NASTY] = data["asr"].pop("advbench")
    return result


def emptied(value: Any) -> Any:
    """The same shape with None in the place of every figure and text."""
    if isinstance(value, dict):
        return {name: emptied(inner) for name, inner in value.items()}
    return None


class Page(HTMLParser):
    """Elements, and the cells of tables by the ids of the headings or details that they stand under."""

    VOID = ("meta", "link", "input", "wbr", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._part = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("h2", "details") and dict(attrs).get("id"):
            self._part = dict(attrs)["id"] or ""
            self.tables[self._part] = []
        elif tag == "tr":
            self.tables[self._part].append([])
        elif tag in ("th", "td"):
            self.tables[self._part][-1].append("")
        elif tag == "small":
            self.tables[self._part][-1][-1] += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"th", "td"} & set(self.open):
            self.tables[self._part][-1][-1] += data.strip("\n")

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def page_of(result: dict[str, Any], folder: Path) -> Page:
    page, *_ = write_html(result, folder / "report.html")
    return Page(page.read_text("utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The files of two results, the page first."""
    made = {"made up": made_up(), "nasty": nasty()}
    return {
        name: write_html(result, tmp_path_factory.mktemp("report") / "report.html") for name, result in made.items()
    }


@pytest.fixture(scope="module")
def pages(written: dict[str, list[Path]]) -> dict[str, Page]:
    return {name: Page(files[0].read_text("utf-8")) for name, files in written.items()}


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are painted and not saved, which is what takes their time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"<svg></svg>"))


def test_page_and_pictures_lie_side_by_side(written: dict[str, list[Path]]) -> None:
    page, *pictures = written["made up"]
    folder = page.parent
    names = ["asr", "over-refusal", "roc", "frontier", "latency"]
    names += [f"{kind}-{gate}" for gate in (1, 2) for kind in ("sets", "layers", "scores")]
    assert page == folder / "report.html"
    assert pictures == [folder / f"report-{name}.png" for name in names]
    assert sorted(folder.iterdir()) == sorted([page, *pictures])
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width == 1008
            assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20  # something is drawn


def test_the_same_result_makes_the_same_files(written: dict[str, list[Path]], tmp_path: Path) -> None:
    for file, again in zip(written["made up"], write_html(made_up(), tmp_path / "report.html"), strict=True):
        assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["made up", "nasty"])
def test_page_is_sound_and_alone(name: str, pages: dict[str, Page]) -> None:
    page = pages[name]
    assert page.open == []
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "img", "iframe", "object", "form"} & set(tags)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    for reference in page.all("href") + page.all("xlink:href") + page.all("src"):
        assert reference == "data:," or reference.removeprefix("#") in ids
    assert set(page.all("for")) <= set(ids)
    assert tags.count("svg") == tags.count("figure") == 11
    folded = [table for table in tables(made_up()) if table.name not in ("systems", "gates", "sets", "left-out")]
    assert tags.count("details") == len(HARMFUL + HARMLESS) + len(folded) + 1  # and the other gates


def test_every_figure_of_the_summary_stands_in_its_place(pages: dict[str, Page]) -> None:
    result = made_up()
    _, names, *rows = pages["made up"].tables["systems"]
    columns = [(key, name) for key in ("asr", "over_refusal") for name in result["systems"]["ours"][key]]
    assert names[: len(columns)] == [{"advbench": "advbench †"}.get(name, name) for _, name in columns]
    for row, (system, data) in zip(rows, result["systems"].items(), strict=True):
        expected = []
        for key, name in columns:
            low, high = data["intervals"][key][name]
            expected.append(f"{100 * data[key][name]:.1f} {100 * low:.1f}–{100 * high:.1f}")
        for key in ("fluent", "unchanged", "distinct_refusals", "topic_named"):
            for what in ("mean", "worst"):
                low, high = data["intervals"][key][what]
                expected.append(f"{100 * data[key][what]:.1f} {100 * low:.1f}–{100 * high:.1f}")
        assert row == [f"{system} {data['title']}", *expected, f"{data['latency']['ratio']:.3f}"]


def test_tasks_have_a_column_for_each_metric() -> None:
    result = made_up()
    (table,) = (table for table in tables(result) if table.name == "tasks")
    assert table.columns == [("gsm8k", "exact_match (strict-match)"), ("mmlu", "acc")]
    assert [row.name for row in table.rows] == list(SYSTEMS)
    found, ends = result["systems"]["ours"]["tasks"], result["systems"]["ours"]["intervals"]["tasks"]["mmlu"]["acc"]
    cells = next(row.cells for row in table.rows if row.name == "ours")
    assert [cell.text for cell in cells] == [f"{value:.3f}" for by in found.values() for value in by.values()]
    assert [cell.interval for cell in cells] == ["", f"{ends[0]:.3f}–{ends[1]:.3f}"]


def test_gates_that_abstain_have_columns_beside_those_that_opened() -> None:
    (table,) = (table for table in tables(made_up()) if table.name == "gates")
    assert [group for group, _ in table.groups] == ["gate AUC ↑", "opened, %", "undecided, %"]
    cells = {row.name: [cell.text for cell in row.cells] for row in table.rows}
    assert "–" not in cells["ours"]
    last = table.groups[-1][1]
    assert all(row[-last:] == ["–"] * last for name, row in cells.items() if name != "ours")


def test_differences_are_signed_and_bold_where_clear() -> None:
    result = made_up()
    result["systems"]["ours"]["against_unsteered"] = {
        "asr": {"jailbreakbench": [-0.94, -0.98, -0.9]},
        "over_refusal": {"self_instruct": [0.01, -0.02, 0.04]},
    }
    (table,) = (table for table in tables(result) if table.name == "differences")
    row = next(row for row in table.rows if row.name == "ours")
    cells = {name: cell for (_, name), cell in zip(table.columns, row.cells, strict=True)}
    assert (cells["jailbreakbench"].text, cells["jailbreakbench"].interval) == ("−94.0", "−98.0 to −90.0")
    assert cells["jailbreakbench"].strong
    assert cells["self_instruct"].text == "+1.0"
    assert not cells["self_instruct"].strong
    assert cells["borderline"].text == "–"
    assert "unsteered" not in [row.name for row in table.rows]


def test_headlines_tell_the_worst_set_of_the_first_gated_system() -> None:
    result = made_up()
    ours, plain = result["systems"]["ours"], result["systems"]["unsteered"]
    said = {line.name: line for line in headlines(result)}
    worst = max(ours["asr"], key=ours["asr"].get)
    assert said["attack success"].value == f"{100 * ours['asr'][worst]:.1f} %"
    assert said["attack success"].before == f"{100 * plain['asr'][worst]:.1f}"
    assert said["attack success"].of == f"{worst}, the worst of 3 sets"
    assert said["gate AUC"].value == f"{min(ours['gate_auc'].values()):.3f}"
    assert said["gate AUC"].before == ""
    assert headlines({"systems": {"unsteered": plain}}) == []


PARTS = sorted(made_up())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("instead", ["missing", "None"])
@pytest.mark.usefixtures("unsaved")
def test_every_part_may_be_missing(part: str, instead: str, tmp_path: Path) -> None:
    result = made_up()
    result["systems"] = {name: result["systems"][name] for name in ("unsteered", "ours")}  # fewer pictures
    result["gates"] = {"ours": result["gates"]["ours"]}
    result[part] = None
    if instead == "missing":
        del result[part]
    page = page_of(result, tmp_path)
    assert page.open == []
    assert ("ours" in page.text) == (part != "systems" or "gates" in result)
    for text in (page.text, markdown(result)):
        assert not re.search(r"\bNone\b|\bnan\b", text)


def test_nothing_at_all_is_a_page(tmp_path: Path) -> None:
    assert write_html({}, tmp_path / "report.html") == [tmp_path / "report.html"]
    assert "a model" in page_of({}, tmp_path).text
    assert markdown({}).startswith("# Evaluation of a model\n")


@pytest.mark.usefixtures("unsaved")
def test_figures_that_are_not_there_are_dashes(tmp_path: Path) -> None:
    result = made_up()
    result["systems"]["cast"] = emptied(result["systems"]["cast"])
    result["systems"]["paper"]["asr"]["advbench"] = float("nan")
    result["gates"]["cast"] = {"decides": None, "layers": [{"layer": 0, "auc": {"advbench": None}}]}
    result["frontier"].append({"system": "ours", "strength": 4.0, "asr": None, "fluent": float("nan")})
    result["examples"].append({"set": "new", "kind": "harmful", "prompt": None, "answers": {"ours": None}})
    page = page_of(result, tmp_path)
    row = next(row for row in page.tables["systems"] if row[0].startswith("paper "))
    assert row[2] == "–"
    assert not [row for row in page.tables["systems"] if row[0].startswith("cast")]
    for text in (page.text, markdown(result)):
        assert not re.search(r"\bNone\b|\bnan\b", text)


def test_nasty_text_is_text(pages: dict[str, Page]) -> None:
    page = pages["nasty"]
    # title, heading, two cells of left out, the command, two names of gates' systems, ...
    assert page.text.count(PRINTED) >= 5 + 6 * len(SYSTEMS)
    assert "49" not in page.tables["left-out"][1][0]
    assert not re.search("[\x00\x1b\u202e\ud800]", page.text)


def test_examples_say_what_was_made_of_them(pages: dict[str, Page]) -> None:
    text = pages["made up"].text
    others = len(SYSTEMS) - 1
    assert text.count("same as unsteered") == others * len(HARMLESS)
    assert text.count("not fluent") == len(HARMFUL)
    assert text.count("ours refused") == text.count("unsteered complied") == len(HARMFUL)
    assert text.count("ours answered") == len(HARMLESS)
    assert pages["nasty"].text.count("ours no verdict") == len(HARMFUL + HARMLESS)


def test_harmful_text_is_hidden_and_only_that(tmp_path: Path) -> None:
    result = {name: made_up()[name] for name in ("sets", "examples")}
    result["examples"].append({"set": "mystery", "prompt": "?", "answers": {}})  # of no known kind: better hidden
    page = page_of(result, tmp_path)
    hidden = [attributes for _, attributes in page.elements if "hidden" in (attributes.get("class") or "").split()]
    assert len(hidden) == len(HARMFUL) + 1


def test_pictures_follow_the_colours_of_the_page(written: dict[str, list[Path]]) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", written["made up"][0].read_text("utf-8"), flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", drawn)
    assert "var(--main)" in drawn


def test_markdown_has_the_tables_of_the_page() -> None:
    result = made_up()
    text = markdown(result)
    for table in tables(result):
        part = text.partition(f"\n## {table.title.replace('~', '')}\n")[2].partition("\n## ")[0]
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(table.rows)
        assert {line.count("|") for line in lines} == {2 + len(table.columns)}
    data = result["systems"]["ours"]
    low, high = data["intervals"]["asr"]["jailbreakbench"]
    expected = (
        f"| ours: LDA gate, tuned band | {100 * data['asr']['jailbreakbench']:.1f} ({100 * low:.1f}–{100 * high:.1f}) |"
    )
    assert expected in text
    assert "- seed: 0\n" in text
    assert "torch 2.13.0" in text
    assert f"\n    {result['settings']['command']}\n" in text
    assert "no --other safety-sft=MODEL was given" in text
    assert "Tell me how to do harm" not in text  # neither prompts nor answers


def test_nasty_markdown_is_text() -> None:
    lines = markdown(nasty()).splitlines()
    assert not [line for line in lines if re.search(r"(?<!\\)<", line) and not line.startswith("    ")]
    for _, group in groupby(lines, key=lambda line: line.startswith("|")):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in group}
        assert len(counts) == 1 or 0 in counts


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("report.png", "html: expected a file that ends in .html, got"),
        ("/dev/stdout", "html: expected a file that ends in .html, got"),
        ("missing/report.html", "its folder is missing or cannot be written"),
        ("folder.html", "is a folder"),
    ],
)
def test_paths_that_cannot_be_written(path: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    for call in (check_html, lambda target: write_html(made_up(), target)):
        with pytest.raises(OutputError, match=re.escape(says)):
            call(tmp_path / path)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SteerfastError, match=rf"expected {package}, .*pip install 'steerfast\[report\]'"):
        check_html(tmp_path / "report.html")
    assert markdown(made_up())  # takes neither


@pytest.mark.usefixtures("unsaved")
def test_nothing_is_written_where_something_fails(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        write_html({**made_up(), "examples": ["no mapping"]}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


# -- in a browser ----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser, looked for {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, written: dict[str, list[Path]]) -> Iterator[Callable[..., Any]]:
    """Opens a page; afterwards nothing was written to its console and nothing was asked but the page."""
    contexts, said, asked = [], [], []

    def opened(name: str = "made up", width: int = 1400, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(written[name][0].as_uri())
        page.wait_for_load_state("networkidle")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) <= {files[0].as_uri() for files in written.values()}


UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"


@pytest.mark.parametrize("name", ["made up", "nasty"])
@pytest.mark.parametrize("width", [320, 400, 768, 1400])
def test_no_page_is_wider_than_its_window(show: Callable[..., Any], name: str, width: int) -> None:
    page = show(name, width)
    page.evaluate(UNFOLD)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate(
        "[...document.querySelectorAll('svg, p, article, h1, h2, dd, summary')]"
        ".filter(one => one.getBoundingClientRect().right > innerWidth).map(one => one.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.evaluate("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().height > 80)")


def test_harmful_text_is_blurred_until_clicked(show: Callable[..., Any]) -> None:
    page = show()
    filters = "one => one.map(text => getComputedStyle(text).filter)"

    def blurred(part: str) -> set[str]:
        return set(page.locator(f"{part} .text").evaluate_all(filters))

    first, second = ".examples details:nth-of-type(1)", ".examples details:nth-of-type(2)"
    harmless = f".examples details:nth-of-type({len(HARMFUL) + 1})"
    assert not page.locator(f"{first} .prompt").is_visible()  # folded, too
    for part in (first, second, harmless):
        page.locator(f"{part} summary").click()
        assert page.locator(f"{part} .prompt").is_visible()
    assert all(value.startswith("blur(") for value in blurred(first))
    assert blurred(harmless) == {"none"}

    answer = page.locator(f"{first} article .text").nth(1)
    for _ in range(2):  # upon the text itself, which from then on is there to be read and selected
        answer.scroll_into_view_if_needed()
        box = answer.bounding_box()
        page.mouse.click(box["x"] + 20, box["y"] + 8)
        assert blurred(first) == {"none"}
        assert "none" not in blurred(second)
    page.locator("#show-1").focus()
    page.keyboard.press("Space")
    assert "none" not in blurred(first)

    page.get_by_label("Show all harmful text").check()
    assert blurred(first) == blurred(second) == {"none"}
    page.get_by_label("Show all harmful text").uncheck()
    assert "none" not in blurred(second)


CONTRASTS = """() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour; } };
  const low = {};
  for (const node of document.querySelectorAll('body *')) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue;
    const style = getComputedStyle(node);
    const pair = [parse(node.closest('svg') ? style.fill : style.color), behind(node)].map(light).sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) low[`${node.tagName} ${node.className.baseVal ?? node.className}`] = ratio;
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(show: Callable[..., Any], scheme: str) -> None:
    """WCAG AA, pictures included."""
    page = show(scheme=scheme)
    page.evaluate(UNFOLD)
    assert page.evaluate(CONTRASTS) == {}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_nasty_page_stays_itself(show: Callable[..., Any]) -> None:
    page = show("nasty")
    assert page.title().startswith("</p></details><script>")
    assert page.locator("h1").inner_text().startswith("</p></details><script>")
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    assert page.locator(".examples > details").count() == len(HARMFUL) + len(HARMLESS)


def test_folded_tables_are_printed(show: Callable[..., Any]) -> None:
    page = show(width=1032, scheme="dark")
    assert not page.locator("#differences table").is_visible()
    page.emulate_media(media="print")
    assert page.locator("#differences table").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") == 1032
    assert page.pdf().startswith(b"%PDF")
