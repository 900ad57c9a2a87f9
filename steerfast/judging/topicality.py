"""Do refusals speak of the request? How many differ, and how many name its topic."""

from __future__ import annotations

import re
from collections.abc import Sequence

from steerfast.judging.spoken import fold, without_thought

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_STOP_WORDS = _words(
    """
    a about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each few for from further had has have having he her here hers herself
    him himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or
    other our ours out over own same she should so some such than that the their them then there these they this those
    through to too under until up very was we were what when where which while who whom why will with would you your
    yours yourself
    without within upon may might must shall cannot ll ve re get got like one way thing something anything someone
    anyone people person
    """
)
"""Words of grammar: they are in every text."""
_REQUEST_WORDS = _words(
    """
    sorry apologize unable able help assist assistance support provide give offer tell explain describe show teach
    write create make generate produce draft develop list answer respond response question ask request prompt please
    want need know information detail instruction step guide guideline tutorial example content task topic discuss
    talk share suggest use fulfill comply refuse decline engage promote encourage ai assistant language model
    """
)
"""Words of requests and refusals: a refusal has them, whatever it was asked."""


def distinct(answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether none before it says the same, but for case, signs and spaces."""
    seen: set[tuple[str, ...]] = set()
    first = []
    for answer in answers:
        said = tuple(_WORD.findall(fold(without_thought(answer))))
        first.append(said not in seen)
        seen.add(said)
    return first


def names_topic(prompt: str, answer: str) -> bool:
    """Return whether the answer holds a content word of the prompt, in any common English form.

    Words of grammar, and those that any request or refusal has, are no topic. Both lists are English, so an answer in
    another language names a topic too easily. A language that does not part words by spaces has no topic here.
    """
    return bool(_content(prompt) & _content(without_thought(answer)))


def _content(text: str) -> set[str]:
    words = (word.removesuffix("'s").partition("'")[0] for word in _WORD.findall(fold(text)))
    stems = {stem(word) for word in words if word not in _STOP_WORDS}
    return {one for one in stems if len(one) > 1} - _REQUEST_STEMS


def stem(word: str) -> str:
    """Return a lower-case word without its common English ending: ``hacking``, ``hacked`` and ``hacks`` are ``hack``.

    The stem need be no word: ``making`` and ``make`` are ``mak``.
    """
    for ending, instead in (("ies", "y"), ("ing", ""), ("ied", "y"), ("ed", ""), ("es", "e"), ("s", "")):
        if word.endswith(ending) and len(word) - len(ending) > 2 and not word.endswith(("ss", "us", "is")):
            word = word.removesuffix(ending) + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


_REQUEST_STEMS = frozenset(map(stem, _REQUEST_WORDS))
