"""The user's examples by split: dealt where they name none, and without near-duplicates of another split."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from steerfast.text.corpus import corpus
from steerfast.text.examples import LABELS, SPLITS, Example
from steerfast.text.splits import own_examples, part

rows = st.lists(
    st.builds(
        Example,
        st.text(max_size=3),
        st.sampled_from(LABELS),
        st.sampled_from("ab"),
        st.sampled_from(("", *SPLITS)),
    ),
    max_size=20,
)


@settings(max_examples=50, deadline=None)
@given(rows)
def test_a_third_of_the_rows_without_a_split_calibrates(examples: list[Example]) -> None:
    parted = part(examples)
    assert [one.prompt for one in parted] == [one.prompt for one in examples]
    assert all(new.split == old.split for new, old in zip(parted, examples, strict=True) if old.split)
    free = [new for new, old in zip(parted, examples, strict=True) if not old.split]
    for group, count in Counter((one.source, one.label) for one in free).items():
        mine = Counter(one.split for one in free if (one.source, one.label) == group)
        assert mine == Counter({"fit": count - count // 3, "calibrate": count // 3})


def test_what_another_split_knows_is_left_out() -> None:
    known = {split: next(one for one in corpus(split) if isinstance(one.prompt, str)).prompt for split in SPLITS}
    mine = [Example(f"{prompt} !", "harmless", "mine", "fit") for prompt in known.values()]
    mine += [
        Example("Translate my aunt's chutney recipe into Danish.", "harmless", "mine", "calibrate"),
        Example("Translate my aunt's chutney recipes into Danish!", "harmless", "mine", "fit"),
        Example("Plan nine evenings of stargazing near Tromsø.", "harmless", "mine", "fit"),
    ]
    kept, left_out = own_examples(mine, "fit")
    assert [one.prompt for one in kept] == [f"{known['fit']} !", mine[-1].prompt]
    assert left_out == 3
    assert own_examples(mine, "calibrate") == ([mine[3]], 0)
