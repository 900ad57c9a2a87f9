"""Styles: one request in many forms, so that a gate fitted on harmful and harmless ones learns harm, not form."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

from steerfast.errors import PromptError

PLAIN = "plain"
_LONGEST = 300  # characters of a request that is restyled

Part = Literal["fit", "calibrate"]


class Prompts(list[str]):
    """Prompts with their style and the request they make.

    Attributes:
        styles: a name per prompt, ``plain`` by default.
        requests: a text per prompt, itself by default; prompts of one request are never on both sides of a split.

    Raises:
        PromptError: another number of styles or requests than prompts.
    """

    def __init__(
        self, prompts: Iterable[str] = (), styles: Sequence[str] | None = None, requests: Sequence[str] | None = None
    ) -> None:
        super().__init__(prompts)
        known = prompts if isinstance(prompts, Prompts) else None
        self.styles: list[str] = list(styles or (known.styles if known is not None else [PLAIN] * len(self)))
        self.requests: list[str] = list(requests or (known.requests if known is not None else self))
        for name, values in (("styles", self.styles), ("requests", self.requests)):
            if len(values) != len(self):
                raise PromptError(f"{name}: expected one per prompt ({len(self)}), got {len(values)}")

    def joined(self, other: Prompts) -> Prompts:
        """Return these prompts, then the others."""
        return Prompts([*self, *other], self.styles + other.styles, self.requests + other.requests)

    def in_style(self, style: str) -> list[bool]:
        """Return for each prompt whether it is in a style."""
        return [own == style for own in self.styles]

    def counts(self) -> dict[str, int]:
        """Return the number of prompts in each style."""
        return {style: self.styles.count(style) for style in dict.fromkeys(self.styles)}


def style_names() -> list[str]:
    """Return the styles of `restyle`."""
    return list(_data()["fit"])


def restyle(prompts: Sequence[str], count: int, *, part: Part = "fit", seed: int = 0) -> Prompts:
    """Return the prompts, and a sample of them in each of the styles of `style_names`.

    The frames are of this project: personas, fiction, overridden instructions, demanded openings, random suffixes,
    pretexts, code, worked examples, split and misspelt text. Do the same to harmful and harmless prompts.

    Args:
        count: prompts per style; fewer where fewer are short enough to frame. part: which half of the frames; those
            of ``calibrate`` are new to a gate fitted with ``fit``. seed: of the sample, the noise and the misspellings.

    Raises:
        PromptError: a negative count.
    """
    if count < 0:
        raise PromptError(f"count: expected at least 0, got {count}")
    plain = Prompts(prompts)
    rng = random.Random(seed)
    known = zip(plain, plain.styles, plain.requests, strict=True)
    short = [(prompt, request) for prompt, style, request in known if style == PLAIN and len(prompt) <= _LONGEST]
    made = plain
    for style, frames in _data()[part].items():
        chosen = rng.sample(short, min(count, len(short)))
        texts = [_framed(prompt, frames[i % len(frames)], rng) for i, (prompt, _) in enumerate(chosen)]
        made = made.joined(Prompts(texts, [style] * len(texts), [request for _, request in chosen]))
    return made


@lru_cache
def _data() -> dict[str, Any]:
    """Return frames by part and style; tokens of a vocabulary under ``noise``."""
    file = resources.files("steerfast") / "data" / "frames.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _framed(prompt: str, frame: str, rng: random.Random) -> str:
    words = prompt.split(" ")
    cut = max(1, (len(words) + rng.randint(-1, 1)) // 2)
    return frame.format(
        prompt=prompt,
        first=" ".join(words[:cut]),
        second=" ".join(words[cut:]),
        noise=_noise(rng),
        upper=prompt.upper(),
        typos=_misspelt(prompt, rng),
        leet="".join(_LEET[c] if c in _LEET and rng.random() < 0.4 else c for c in prompt.lower()),
    )


_LEET = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5"}


def _noise(rng: random.Random) -> str:
    """Return random tokens, like a suffix that was optimised token by token."""
    return "".join(rng.choices(_data()["noise"], k=rng.randint(14, 26))).strip()


def _misspelt(prompt: str, rng: random.Random) -> str:
    """Return the prompt in lower case, with two letters swapped in a third of the longer words."""
    words = prompt.lower().split(" ")
    for i, word in enumerate(words):
        if len(word) > 4 and rng.random() < 0.35:
            at = rng.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
