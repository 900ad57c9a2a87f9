"""The benchmarks of ops and serving steps: what they time is right, and how much a captured step launches."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import steerfast
from steerfast._records import Records
from steerfast.fitting.contrast import SHARE, Contrast
from steerfast.fitting.labelled import Labelled
from steerfast.text.corpus import corpus
from steerfast.text.duplicates import near_duplicates
from steerfast.text.examples import Example, read_examples

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(script: str, *arguments: str) -> list[str]:
    """Return the lines that a script prints."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def serve_graph() -> list[dict[str, Any]]:
    arguments = ("--device", "cpu", "--shape", "tiny", "--seconds", "0", "--rounds", "3", "--weights", "bf16", "fp8")
    return [json.loads(line) for line in run("serve_graph.py", *arguments)]


def test_a_serving_step_is_timed_beside_every_system(serve_graph: list[dict[str, Any]]) -> None:
    timed = {(line["weights"], line["system"]) for line in serve_graph if line["op"] == "serve-graph"}
    systems = {"idle", "shut", "open-one", "open-all", "directory", "directory-open", "profiles-64"}
    assert timed == {(weights, name) for weights in ("bf16", "fp8") for name in ("stock", "control", *systems)}


@pytest.mark.contract
def test_a_captured_layer_holds_two_launches_with_a_sensor_and_one_without(serve_graph: list[dict[str, Any]]) -> None:
    sensors = {"open-all": {0}, "profiles-64": {0}, "directory": set(range(4)), "directory-open": set(range(4))}
    layers = [line for line in serve_graph if line.get("pass") == "captured"]
    assert len({line["system"] for line in layers}) == 7
    for line in layers:
        most = 2 if line["layer"] in sensors.get(line["system"], {2}) else 1
        assert line.get("steerfast", 0) <= most, line
        assert line.get("other", 0) == 0, line


@pytest.mark.contract
def test_a_settled_step_launches_one_edit_a_layer_and_nothing_between_steps(serve_graph: list[dict[str, Any]]) -> None:
    settled = [line for line in serve_graph if "settled" in (line.get("pass"), line.get("between"))]
    for line in settled:
        acts = "pass" in line and (not line["system"].startswith("directory") or line["layer"] == 2)
        assert line.get("steerfast", 0) <= int(acts), line
        assert line.get("other", 0) == 0, line


def test_the_launches_of_the_sanitizer_agree_with_plain_torch() -> None:
    assert run("sanitize.py", "--device", DEVICE)[-1].endswith(f"launches on {DEVICE}")


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the benchmarks import each other, as they do when run as scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.parametrize("active", [1.0, 0.0])
@pytest.mark.parametrize(
    ("op", "other"),
    [
        ("add_steer_rms_norm", "torch"),
        ("add_steer_rms_norm.deciding", "steerfast-plain"),
        ("steer_", "torch"),
        ("steer_.deciding", "steerfast-plain"),
        ("score_", "torch"),
    ],
)
def test_the_compared_providers_do_the_same(neighbours: Any, op: str, other: str, active: float) -> None:
    cases, providers = neighbours("cases"), neighbours("providers")
    found = []
    with torch.inference_mode():
        for name in ("steerfast", other):
            torch.manual_seed(0)
            tensors = cases.Tensors(cases.Case(op, 300, 64, active, profiles=16, dtype=torch.float32), DEVICE)
            tensors.vectors.mul_(1e4)  # far from the tolerance
            (buffers,) = tensors.buffers(1)
            before = buffers.pair.clone()
            result = providers.providers(tensors)[name](buffers)
            outputs = result if isinstance(result, tuple) else (buffers.x, buffers.residual)
            found.append((*outputs, tensors.gates.row_scores))
            steered = tensors.moved_rows > 0
            assert op == "score_" or "rms" in op or torch.equal(buffers.pair, before) != steered
    for one, two in zip(*(each[:2] for each in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    if op == "score_":
        torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)


def test_bars_read_the_lines_of_serving_steps(neighbours: Any) -> None:
    bars = neighbours("bars")
    step = {"batch": 64, "context": 1024, "weights": "bf16", "of_floor": 1.2, "ratio": 1.01}
    lines = [
        {**step, "system": "stock", "declared": 0, "us": 5000.0, "more_us": 0.0},
        {**step, "system": "open-one", "declared": 1, "us": 5002.0, "more_us": 2.0},
        {**step, "system": "open-all", "declared": 32, "us": 5050.0, "more_us": 48.5},
        {**step, "system": "profiles-64", "declared": 32, "us": 5100.5, "more_us": 98.5},
    ]
    found = {name: values for name, _, values, _ in bars.bars(bars.Results([], [], lines), cuda=True)}
    assert found["captured sensor layer, to batch 64, us"][0][0] == 2.0
    assert found["captured edited layer, to batch 64, us"][0][0] == 1.5
    assert found["64 profiles over one"][0][0] == pytest.approx(1.01)
    assert found["idle declared layer, us"] == []


def test_bars_read_the_lines_of_engines_and_servers(neighbours: Any) -> None:
    bars = neighbours("bars")
    lines = [
        {"system": name, "batch": 32, "ratio": ratio, "least": least}
        for name, ratio, least in (
            ("idle", 1.001, 0.998), ("one-layer:off", 1.002, 1.0), ("one-layer:one", 1.006, 1.0),
            ("all-layers:all", 1.02, 1.0), ("all-layers:64", 1.03, 1.0), ("directory:off", 1.001, 1.0),
            ("directory:one", 1.004, 1.0),
        )
    ]  # fmt: skip
    found = {name: values for name, _, values, _ in bars.bars(bars.Results([], [], [], serving=lines), cuda=True)}
    assert found["idle engine over stock, least of the rounds"] == [(0.998, "idle, batch 32")]
    assert found["engine with one layer, steered, over stock"] == [(1.006, "one-layer:one, batch 32")]
    assert found["engine with 64 profiles over one"] == [(1.03 / 1.02, "all-layers:64, batch 32")]
    assert [value for value, _ in found["engine that may load profiles over stock"]] == [1.001, 1.004]
    lines = [
        {"system": "idle", "round": 0, "model": "m", "tpot_ms": 20.0},
        {"system": "idle", "model": "m", "tpot_ms_ratio": [1.01, 0.99, 1.03]},
        {"system": "open", "model": "m", "tpot_ms_ratio": [1.015, 0.99, 1.03]},
    ]
    found = {name: values for name, _, values, _ in bars.bars(bars.Results([], [], [], serving=lines), cuda=False)}
    assert found["idle server over stock, least of the rounds"] == [(0.99, "m")]
    assert found["steered server over stock"] == [(1.015, "m")]


def labelled_rows(shift: float) -> tuple[Labelled, torch.Tensor]:
    """Return prompts of two harmful and two harmless sources, and rows in which the first column tells them apart."""
    examples = Labelled.of(
        [Example(f"{source} {i}", "harmful", source) for source in "ab" for i in range(40)],
        [
            *(Example(f"edge {i}", "borderline", "a") for i in range(40)),
            *(Example(f"{source} {i}", "harmless", source) for source in "cd" for i in range(40)),
        ],
    )
    rows = torch.randn(len(examples), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 0] += shift * examples.harmful
    return examples, rows


@pytest.mark.parametrize(("shift", "low", "high"), [(8.0, 0.999, 1.0), (0.0, 0.35, 0.65)])
def test_a_ceiling_is_what_the_rows_tell_and_no_more(neighbours: Any, shift: float, low: float, high: float) -> None:
    examples, rows = labelled_rows(shift)
    found = neighbours("ceiling").ceilings(examples, rows, rows[:, 0])
    assert [(row["source"], row["against"], row["n"]) for row in found] == [
        ("a", "harmless sources", [40, 80]),
        ("a", "its borderline prompts", [40, 40]),
        ("b", "harmless sources", [40, 80]),
    ]
    for row in found:
        assert low <= row["ceiling"][0] <= high
        assert row["auc"][1] <= row["auc"][0] <= row["auc"][2]


def test_no_prompt_scores_itself(neighbours: Any) -> None:
    _, rows = labelled_rows(1.0)
    harmful, others = list(range(80)), [list(range(80, 200))]
    scores = neighbours("ceiling").crossed(rows, harmful, others)
    rows[0] += 1000
    again = neighbours("ceiling").crossed(rows, harmful, others)
    same_fold = harmful[5::5] + others[0][::5]
    assert torch.equal(scores[same_fold], again[same_fold])
    assert not torch.equal(scores[harmful[1:5]], again[harmful[1:5]])


def test_the_sweep_tells_right_types_from_refused_ones(tmp_path: Path) -> None:
    page = tmp_path / "sweep.md"
    lines = run("sweep.py", "llama", "gpt2", "mamba", "--markdown", str(page))
    found = {line["type"]: (line["hooks"], line["fused"]) for line in map(json.loads, lines)}
    assert found == {"llama": ("right", "right"), "gpt2": ("right", ""), "mamba": ("refused", "")}
    assert "## Right, and fused\n\nllama\n" in page.read_text("utf-8")


@pytest.fixture
def behaviours(neighbours: Any, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on a tiny model that also judges, with one package that adds the mean difference of last rows."""
    script, peers = neighbours("behaviours"), neighbours("peers")

    def train(model: Any, tokenizer: Any, texts: Any, layers: Any) -> dict[int, torch.Tensor]:
        with torch.no_grad():
            one, other = (
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0, -1]
                for text in texts[0]
            )
        return dict.fromkeys(layers, one - other)

    def attach(model: Any, vectors: Any) -> None:
        for layer, vector in vectors.items():
            model.model.layers[layer].register_forward_hook(lambda module, inputs, output, v=vector: output + v)

    def missing(*given: Any) -> None:
        raise ImportError("No module named 'other'")

    monkeypatch.setattr(script, "PEERS", {"hooks": peers.Peer(train, attach), "other": peers.Peer(missing, attach)})
    monkeypatch.setattr(script, "ROUNDS", 1)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["yes", "no", "Yes", "No"])
    for module in (script.steerfast, neighbours("yes_no")):
        monkeypatch.setattr(module, "load_model", lambda name, dtype: (tiny_llama, tokenizer))
    return script


def test_behaviours_compare_systems_and_go_on(behaviours: Any, tmp_path: Path) -> None:
    arguments = ["happy", "--model", "tiny", "--judge", "tiny", "--prompts", "3", "--development", "2"]
    arguments += ["--max-new-tokens", "4", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]
    first = CliRunner().invoke(behaviours.main, arguments, catch_exceptions=False)
    lines = [json.loads(line) for line in first.output.splitlines()]
    assert [line["system"] for line in lines if "left_out" not in line] == [
        "unsteered",
        "system prompt",
        "steerfast",
        "hooks",
    ]
    assert [line["system"] for line in lines if "left_out" in line] == ["other"]
    result = json.loads((tmp_path / "result.json").read_text())
    part = result["behaviours"]["happy"]
    assert [line["strength"] is None for line in part["systems"]] == [True, True, False, False]
    assert part["systems"][1]["prompt_tokens"] > part["systems"][0]["prompt_tokens"]
    again = CliRunner().invoke(behaviours.main, arguments, catch_exceptions=False)
    assert [json.loads(line)["system"] for line in again.output.splitlines()] == ["other"]
    assert json.loads((tmp_path / "result.json").read_text())["behaviours"] == result["behaviours"]
    drawn = CliRunner().invoke(behaviours.main, ["--markdown", str(tmp_path / "result.json")], catch_exceptions=False)
    assert sum(line.startswith("| ") for line in drawn.output.splitlines()) == 1 + 4


def test_the_page_of_behaviours_shows_the_result(neighbours: Any) -> None:
    result = json.loads((BENCHMARKS / "results" / "behaviours-qwen-0.5b-cpu.json").read_text("utf-8"))
    page = (BENCHMARKS.parent / "docs" / "behaviours.md").read_text("utf-8")
    for name, part in result["behaviours"].items():
        assert neighbours("behaviours").markdown({"behaviours": {name: part}}) in page


def test_a_package_steers_by_its_code_as_its_profile_does(
    behaviours: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    peer = behaviours.PEERS["hooks"]
    texts = [("bake a cake", "burn a cake")]
    rows = Contrast(*torch.randn(2, 4, 5, 32, generator=torch.Generator().manual_seed(0)), norm=torch.full((5,), 2.0))
    vectors = peer.train(tiny_llama, tiny_tokenizer, texts, [1, 2])
    profile = behaviours.vectors_profile(vectors, rows, tiny_llama, "hooks")
    added = behaviours.added_vectors(profile)
    assert sum(float(one.norm()) for one in added.values()) == pytest.approx(SHARE * 2.0)
    ids = torch.tensor([tiny_tokenizer("how do I bake a cake")["input_ids"]])
    with steerfast.steer(tiny_llama, profile), torch.no_grad():
        steered = tiny_llama(ids).logits
    peer.attach(tiny_llama, added)
    with torch.no_grad():
        torch.testing.assert_close(tiny_llama(ids).logits, steered, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("yes", [True, False])
def test_the_judge_weighs_yes_against_no(behaviours: Any, tiny_llama: Any, tmp_path: Path, yes: bool) -> None:
    _, tokenizer = behaviours.steerfast.load_model("tiny", dtype="auto")
    likely, other = tokenizer.convert_tokens_to_ids(["Yes", "No"] if yes else ["No", "Yes"])

    def answer(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., likely], logits[..., other] = 8.0, 4.0
        return logits

    tiny_llama.lm_head.register_forward_hook(answer)
    file = tmp_path / "verdicts.jsonl"
    judge = behaviours.YesNoJudge("tiny", "auto", Records(file, "verdicts"))
    found = judge("help ?", ["bake", "how do I write a poem"], ["cake", "write it"])
    odds = math.log((math.exp(8) + 1) / (math.exp(4) + 1))
    assert found == pytest.approx([odds if yes else -odds] * 2, abs=1e-3)
    assert len(file.read_text().splitlines()) == 2
    tiny_llama.forward = None
    assert behaviours.YesNoJudge("tiny", "auto", Records(file, "verdicts"))("help ?", ["bake"], ["cake"]) == found[:1]


def test_prompts_from_outside_are_even_and_none_of_the_corpus(neighbours: Any, tmp_path: Path) -> None:
    outside = importlib.import_module("outside")
    known = corpus("fit", labels=["harmless"])[0].prompt
    for name in outside.SOURCES:
        rows = [
            {"prompt": f"{number} {name}: {label} zxq{number * 7919}", "label": label, "lang": lang}
            for label in ("harmful", "harmless")
            for lang in ("en", "fr")
            for number in range(60)
        ]
        rows += [{"prompt": known, "label": "harmless", "lang": "en"}] if name == "spider" else []
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    made = {}
    for most in ([], ["--most", "10"]):
        result = CliRunner().invoke(outside.main, [str(tmp_path), str(tmp_path / "out.jsonl"), *most])
        assert result.exit_code == 0, result.output
        found = read_examples(tmp_path / "out.jsonl")
        assert known not in [one.prompt for one in found]
        made[bool(most)] = Counter((one.source, one.label) for one in found)
    assert made[False]["agieval", "harmful"] == 100
    assert made[False]["xquad_multilingual", "harmful"] == 66
    assert made[True]["agieval", "harmless"] == 10
    assert made[True]["xsafety_harmful", "harmful"] == 20


def test_requests_in_ten_languages_are_none_of_the_corpus() -> None:
    """Eight of each label, new to every split."""
    given = read_examples(str(BENCHMARKS / "languages.jsonl"))
    counts = Counter((one.lang, one.label) for one in given)
    assert len({lang for lang, _ in counts}) == 10
    assert set(counts.values()) == {8}
    known = [one.prompt for one in corpus() if isinstance(one.prompt, str)]
    repeated = near_duplicates([str(one.prompt) for one in given], known)
    assert [one.prompt for one, known in zip(given, repeated, strict=True) if known] == []
