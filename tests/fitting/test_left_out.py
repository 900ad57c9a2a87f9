"""Sources left out of a fit: a direction may not know the prompts that it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steerfast.fitting.directions import fit_direction, project
from steerfast.fitting.labelled import Labelled
from steerfast.fitting.left_out import FitWithout, auc_by_group, leave_sources_out
from steerfast.text.examples import Example

WIDTH, LAYERS, EACH = 8, 2, 30
HARMFUL, HARMLESS = ("alone", "bulk", "chat"), ("ask", "book", "code")


def mean_of(rows: Tensor, known: Labelled) -> Tensor:
    return fit_direction(rows[known.harmful], rows[~known.harmful], "mean")


def lda_of(rows: Tensor, known: Labelled) -> Tensor:
    """A fit as `extract` makes it."""
    weights = known.weights[known.harmful], known.weights[~known.harmful]
    return fit_direction(rows[known.harmful], rows[~known.harmful], weights=weights)


def without(fit: Callable[[Tensor, Labelled], Tensor]) -> FitWithout:
    def fits(rows: Tensor, known: Labelled, folds: Sequence[Tensor]) -> list[Tensor]:
        return [fit(rows[~out], known.select(~out)) for out in folds]

    return fits


mean, lda = without(mean_of), without(lda_of)


def made_up(seed: int, each: int = EACH) -> tuple[Labelled, Tensor]:
    """Harm lies along axis 0, and more clearly in the second layer; ``alone`` shows none, but a mark along axis 1."""
    kinds = [("harmful", name) for name in HARMFUL] + [("harmless", name) for name in HARMLESS]
    found = [Example(f"{source} {i}", label, source) for label, source in kinds for i in range(each)]
    examples = Labelled.of(found[: 3 * each], found[3 * each :])
    rows = torch.randn(6 * each, LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed))
    rows[:each, :, 1] += 8
    rows[each : 3 * each, :, 0] += torch.tensor([2.0, 4.0])
    return examples, rows


def test_a_shortcut_of_one_source_is_found_out() -> None:
    examples, rows = made_up(0, each=200)
    known = torch.stack([project(rows[:, i], lda_of(rows[:, i], examples), "dot") for i in range(LAYERS)], dim=1)
    unseen = leave_sources_out(examples, rows, lda, score="dot")
    assert unseen is not None
    fitted, left_out = (auc_by_group(examples, scores)["source"] for scores in (known, unseen))
    assert min(fitted["alone"]) > 0.97
    assert max(left_out["alone"]) < 0.7
    assert left_out["bulk"][1] > 0.95
    assert left_out["bulk"][1] > left_out["bulk"][0]


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_scores_are_those_of_directions_fitted_without_the_source(score: str) -> None:
    examples, rows = made_up(1)
    found = leave_sources_out(examples, rows, mean, score=score)
    assert found is not None
    assert (found.dtype, found.shape) == (torch.float64, (6 * EACH, LAYERS))
    for number in range(3):  # a harmful source stands aside with a harmless one
        out = torch.tensor([one.source in (HARMFUL[number], HARMLESS[number]) for one in examples.examples])
        for layer in range(LAYERS):
            here = rows[:, layer].double()
            pair = here[~out & examples.harmful], here[~out & ~examples.harmful]
            direction = pair[0].mean(0) - pair[1].mean(0)
            direction /= direction.norm()
            values = here @ direction / (here.norm(dim=1) if score == "cosine" else 1)
            middle = (values[~out & examples.harmful].mean() + values[~out & ~examples.harmful].mean()) / 2
            torch.testing.assert_close(found[out, layer], values[out] - middle, rtol=1e-9, atol=1e-12)


def test_a_middle_has_the_weights_of_the_sources() -> None:
    examples, rows = made_up(2, each=80)
    keep = torch.ones(len(examples), dtype=torch.bool)
    keep[100:160] = False  # 20 prompts of bulk remain, at a half of its weight
    rows[80:160, :, 0] += 3
    few, rows = examples.select(keep), rows[keep]
    found = leave_sources_out(few, rows, mean, score="dot")
    assert found is not None
    out = torch.tensor([one.source in ("alone", "ask") for one in few.examples])
    kept = few.select(~out)
    values = project(rows[~out, 0], mean_of(rows[~out, 0], kept), "dot")
    middle = sum(float(kept.weights[side] @ values[side]) for side in (kept.harmful, ~kept.harmful)) / 2
    expected = project(rows[out, 0], mean_of(rows[~out, 0], kept), "dot") - middle
    torch.testing.assert_close(found[out, 0], expected, rtol=1e-12, atol=1e-12)
    plain = (values[kept.harmful].mean() + values[~kept.harmful].mean()) / 2
    assert abs(middle - float(plain)) > 0.05


def test_rows_of_a_source_do_not_move_the_direction_that_judges_it() -> None:
    examples, rows = made_up(3)
    before = leave_sources_out(examples, rows, lda)
    moved, first = rows.clone(), torch.tensor([one.source == "bulk" for one in examples.examples])
    moved[int(first.nonzero()[0])] = 100.0
    after = leave_sources_out(examples, moved, lda)
    assert before is not None
    assert after is not None
    with_it = torch.tensor([one.source in ("bulk", "book") for one in examples.examples])  # its fold
    same = before == after
    assert bool(same[with_it].all(dim=1).sum() == with_it.sum() - 1)  # all but the prompt itself
    assert not bool(same[~with_it].any())


def test_a_single_source_has_no_figures() -> None:
    examples, rows = made_up(4)
    one = Labelled.of(
        [Example(one.prompt, "harmful", "one") for one in examples.examples if one.label == "harmful"],
        [one for one in examples.examples if one.label != "harmful"],
    )
    assert leave_sources_out(one, rows, mean) is None


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_by_source_and_context_against_harmless_sources_alike() -> None:
    harmful = [Example(f"a {i}", "harmful", "ab"[i % 2], context=("bare", "json")[i > 5]) for i in range(20)]
    harmless = [Example(f"b {i}", "harmless", "few" if i < 4 else "many") for i in range(40)]
    borderline = [Example(f"c {i}", "borderline", "edge") for i in range(10)]
    examples = Labelled.of(harmful, [*harmless, *borderline])
    scores = torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = auc_by_group(examples, scores)
    assert {kind: list(names) for kind, names in found.items()} == {"source": ["a", "b"], "context": ["bare", "json"]}

    def area(bad: list[int], layer: int) -> float:
        """Each harmless source alike; borderline prompts do not count."""
        areas = [
            roc_auc_score([1] * len(bad) + [0] * len(good), scores[[*bad, *good], layer])
            for good in (range(20, 24), range(24, 60))
        ]
        return sum(areas) / 2

    for kind, names in found.items():
        for name, aucs in names.items():
            bad = [i for i, one in enumerate(harmful) if getattr(one, kind) == name]
            assert aucs == [round(area(bad, layer), 4) for layer in range(3)]


def test_borderline_prompts_stand_in_where_no_prompt_is_harmless() -> None:
    examples = Labelled.of(["a", "b"], [Example("c", "borderline", "x"), Example("d", "borderline", "y")])
    scores = torch.tensor([[1.0], [3.0], [2.0], [0.0]], dtype=torch.float64)
    assert auc_by_group(examples, scores)["source"] == {"harmful": [0.75]}
