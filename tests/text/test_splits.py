"""The user's examples by split: dealt where they name none, and without near-duplicates of another split."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

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
def test_a_prompt_is_in_one_split_whatever_stands_beside_it(examples: list[Example]) -> None:
    parted = part(examples)
    assert [one.prompt for one in parted] == [one.prompt for one in examples]
    assert all(new.split == old.split for new, old in zip(parted, examples, strict=True) if old.split)
    assert part(examples[::-1]) == parted[::-1]
    for one in parted:
        assert part([replace(one, split="", source="another", label="harmful")])[0].split == (
            part([replace(one, split="")])[0].split
        )


def test_a_third_of_the_rows_without_a_split_calibrates() -> None:
    counts = Counter(one.split for one in part([Example(str(i), "harmless", "mine") for i in range(3000)]))
    assert set(counts) == {"fit", "calibrate"}
    assert 900 < counts["calibrate"] < 1100


def test_chats_without_text_of_the_user_are_not_alike() -> None:
    chats = [[{"role": "human", "content": f"Plan evening {i} of nine near Tromsø."}] for i in range(2)]
    mine = [Example(chats[0], "harmless", "mine", "calibrate"), Example(chats[1], "harmless", "mine", "calibrate")]
    assert own_examples(mine, "calibrate") == (mine, 0)


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
