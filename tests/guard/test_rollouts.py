"""Rollouts: what is kept, scores at block ends by hand, and collections that are killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_rollouts import ASKED, MODEL, OPTIONS, PROMPTS, MadeUp, kill, roll_out, roll_out_and_stall

from steerfast.errors import GuardError
from steerfast.guard.candidates import Sampling
from steerfast.guard.rollouts import RolloutOptions, Rollouts, collect, load_rollouts
from steerfast.guard.scores import Blocks, CallableScorer

INF = float("inf")


def test_answers_and_states_are_those_of_the_generator(tmp_path: Path) -> None:
    for index, found in enumerate(roll_out(tmp_path, rollouts=3, seed=5)):
        candidates = MadeUp().start(PROMPTS[index], 3, (5 << 32) + index)
        answers: list[list[int]] = [[], [], []]
        states = []
        length = 0
        while length < 30 and not candidates.finished.all():
            before = candidates.finished.clone()
            tokens = MadeUp().extend(candidates, min(8, 30 - length))
            length += 8
            for i in range(3):
                answers[i] += tokens[i]
                if not before[i]:
                    states.append((i, len(answers[i]), candidates.hidden[i]))
        states.sort(key=lambda state: state[:2])
        assert found.prompt == PROMPTS[index]
        assert found.answers == answers
        assert max(map(len, answers)) <= 30
        assert torch.equal(found.finished, candidates.finished)
        assert found.owner.tolist() == [i for i, _, _ in states]
        assert found.ends.tolist() == [end for _, end, _ in states]
        assert torch.equal(found.hidden, torch.stack([row for _, _, row in states]))
        assert found.ends[found.last].tolist() == [len(answer) for answer in answers]


def by_hand() -> Rollouts:
    return Rollouts(
        prompt=[1, 2],
        question="why ?",
        label="harmful",
        answers=[[10, 11, 12], [20], [30, 31]],
        finished=torch.tensor([True, True, False]),
        owner=torch.tensor([0, 0, 1, 2]),
        ends=torch.tensor([2, 3, 1, 2]),
        hidden=torch.arange(16.0).view(4, 4),
    )


def test_scorers_see_the_answer_so_far() -> None:
    blocks = by_hand().blocks(None)
    assert blocks.prompts == [[1, 2]] * 4
    assert blocks.answers == [[10, 11], [10, 11, 12], [20], [30, 31]]
    assert blocks.finished.tolist() == [False, True, True, False]
    assert blocks.questions == ["why ?"] * 4


def test_costs_are_those_of_blocks_and_rewards_of_answers() -> None:
    def table(blocks: Blocks) -> list[float]:
        return [{2: 1.5, 3: 4.0, 1: -2.0}[len(answer)] + blocks.prompts[0][0] - 1 for answer in blocks.answers]

    scorer = CallableScorer(table, takes="blocks")
    found = by_hand().scored(None, scorer, scorer, refund=True)
    assert found.cost is not None
    assert found.cost.tolist() == [1.5, 2.5, -2.0, 1.5]
    assert found.reward is not None
    assert found.reward.tolist() == [4.0, -2.0, 1.5]
    alone = CallableScorer(table, takes="blocks", cumulative=False)
    found = by_hand().scored(None, alone, alone, refund=True)
    assert found.cost is not None
    assert found.cost.tolist() == [1.5, 4.0, -2.0, 1.5]
    found = by_hand().scored(None, alone, alone)
    assert found.cost is not None
    assert found.cost.tolist() == [1.5, 4.0, 0.0, 1.5]
    assert found.reward is not None
    assert found.reward.tolist() == [5.5, -2.0, 1.5]


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=5), min_size=1, max_size=4))
def test_without_refund_an_answer_owes_the_highest_of_its_scores(scores: list[list[float]]) -> None:
    owner = torch.tensor([n for n, each in enumerate(scores) for _ in each])
    ends = torch.tensor([1 + n for each in scores for n in range(len(each))])
    answers = [list(range(len(each))) for each in scores]
    done = torch.ones(len(scores), dtype=torch.bool)
    rollouts = Rollouts([1], "why ?", "harmful", answers, done, owner, ends, torch.zeros(len(owner), 4))
    scorer = CallableScorer(lambda blocks: [one for each in scores for one in each], takes="blocks")
    found = rollouts.scored(None, scorer, scorer).cost
    assert found is not None
    assert float(found.min()) >= 0
    for number, each in enumerate(scores):
        costs = found[owner == number].double()
        highest = torch.tensor([0.0, *each], dtype=torch.float64).cummax(0).values[1:]
        torch.testing.assert_close(costs.cumsum(0), highest, rtol=1e-5, atol=1e-5)


def test_scores_that_are_no_numbers_fail_closed() -> None:
    broken = CallableScorer(lambda b: [float("nan") if len(a) == 2 else 1.0 for a in b.answers], takes="blocks")
    found = by_hand().scored(None, broken, broken)
    assert found.cost is not None
    assert found.cost.tolist() == [INF, INF, 1.0, INF]
    assert found.reward is not None
    assert found.reward.tolist() == [1.0, 1.0, -INF]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def test_files_hold_all_of_it_and_the_same_call_generates_nothing_again(tmp_path: Path) -> None:
    made = roll_out(tmp_path)
    files = contents(tmp_path)
    assert len(files) == 7
    assert {one.prompt_layer for one in made} == {None}
    silent = MadeUp()
    again = collect(silent, ASKED, tmp_path, MODEL, OPTIONS)
    assert silent.blocks == 0
    assert contents(tmp_path) == files
    for found in (again, load_rollouts(tmp_path)):
        for one, other in zip(made, found, strict=True):
            for name, value in vars(one).items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(value, getattr(other, name)), name
    assert [(one.prompt, one.question, one.label) for one in made] == ASKED


def test_the_prompt_layer_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    wide = MadeUp()
    wide.prompt_layer = 3
    made = collect(wide, ASKED, tmp_path / "wide", MODEL, OPTIONS)
    assert {one.prompt_layer for one in [*made, *load_rollouts(tmp_path / "wide")]} == {3}
    with pytest.raises(GuardError, match=r"prompt_layer: .* has rollouts with 3, got None"):
        collect(MadeUp(), ASKED, tmp_path / "wide", MODEL, OPTIONS)


def test_a_killed_collection_ends_with_the_same_files(tmp_path: Path) -> None:
    roll_out(tmp_path / "whole")
    folder = tmp_path / "killed"
    kill(roll_out_and_stall, folder, when=lambda: len(list(folder.glob("prompt-*"))) == 2)
    done = contents(folder)
    assert 2 <= len(done) - 1 < len(PROMPTS)
    roll_out(folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert done.items() <= contents(folder).items()


def test_prompts_roll_out_the_same_whatever_else_is_collected(tmp_path: Path) -> None:
    whole = roll_out(tmp_path / "a")
    few = collect(MadeUp(), ASKED[:2], tmp_path / "b", MODEL, OPTIONS)
    assert [one.answers for one in few] == [one.answers for one in whole[:2]]
    assert few[0].cost is None


def test_other_settings_prompts_and_models_are_refused(tmp_path: Path) -> None:
    roll_out(tmp_path)
    with pytest.raises(GuardError, match=r"depth: .* has rollouts with 30, got 31"):
        roll_out(tmp_path, depth=31)
    with pytest.raises(GuardError, match=r"sampling: .* has rollouts with None, got"):
        roll_out(tmp_path, sampling=Sampling(temperature=0.7))
    with pytest.raises(GuardError, match="rollout: the rollout was made for 'made up'"):
        collect(MadeUp(), ASKED, tmp_path, replace(MODEL, hidden_size=8), OPTIONS)
    with pytest.raises(GuardError, match="expected prompt 1 of this call"):
        collect(MadeUp(), [ASKED[0], ([99], "question 1", "harmless")], tmp_path, MODEL, OPTIONS)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    for name in ("rollouts", "block", "depth"):
        with pytest.raises(GuardError, match=f"{name}: expected at least 1, got 0"):
            roll_out(tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()
    with pytest.raises(GuardError, match="expected some in the folder"):
        load_rollouts(tmp_path)


def test_states_of_a_model_are_those_of_a_pass_over_prompt_and_answer(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    """Also where blocks end in the middle of an answer, and the backend goes on in the same memory."""
    from steerfast.guard.backend import HFBackend
    from steerfast.hf.structure import identify

    def ending(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:  # so that some answers end early
        ends = torch.tensor([2])
        return logits.index_fill(1, ends, float(logits.max()))

    prompts, identity = [[5, 6, 7], [9, 8, 30, 31, 32, 33]], identify(tiny_llama)
    backend, sampling = HFBackend(tiny_llama, tiny_tokenizer), Sampling(temperature=1.5, top_k=50, processors=ending)
    options = RolloutOptions(rollouts=4, block=4, depth=10, sampling=sampling, progress=False)
    asked = [(ids, "why ?", "harmful") for ids in prompts]
    made = collect(backend, asked, tmp_path, identity, options)
    for one in made:
        answers = [answer[:end] for answer, end in zip([one.answers[i] for i in one.owner], one.ends, strict=True)]
        with torch.no_grad():
            passes = [tiny_llama.model(torch.tensor([one.prompt + answer])) for answer in answers]
        expected = torch.stack([output.last_hidden_state[0, -1] for output in passes])
        torch.testing.assert_close(one.hidden, expected, atol=2e-5, rtol=1e-4)
        assert all((answer[-1] == 2) == bool(over) for answer, over in zip(one.answers, one.finished, strict=True))
        assert not one.hidden.is_inference()
    lengths = [len(answer) for one in made for answer in one.answers]
    assert 10 in lengths
    assert min(lengths) < 10
    assert collect(backend, asked, tmp_path, identity, options)[1].answers == made[1].answers
    with pytest.raises(GuardError, match="sampling: "):
        collect(backend, asked, tmp_path, identity, replace(options, sampling=Sampling()))


def test_a_backend_without_hidden_states_is_refused(tmp_path: Path) -> None:
    class Silent(MadeUp):
        def start(self, *given: Any) -> Any:
            return replace(super().start(*given), hidden=None)

    with pytest.raises(GuardError, match="backend: expected hidden states with the tokens, got none from Silent"):
        collect(Silent(), ASKED, tmp_path, MODEL, OPTIONS)
