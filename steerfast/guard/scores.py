"""Reward and cost of answers so far: the protocol of scorers, and adapters to it.

A score belongs to the whole answer up to the end of a block. The cost of a block is the difference of two such scores;
without refund it counts from the highest score so far. Models with another tokenizer read the text, tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.parts import expect
from steerfast.hf.generation import device_of, evaluating


@dataclass(frozen=True)
class Blocks:
    """Answers to score, each at the end of a block.

    prompts, answers: token ids, n of both. hidden: latent states float32 [n, S] (`steerfast.guard.parts`), if known.
    tokenizer: the base model's. finished: bool [n]. questions: the prompts as users wrote them, if known.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    hidden: Tensor | None
    tokenizer: Any
    finished: Tensor
    questions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def pairs(self) -> list[tuple[str, str]]:
        """Return (prompt, answer) pairs as text, without special tokens."""
        asked = self.questions or [self._text(prompt) for prompt in self.prompts]
        return [(question, self._text(answer)) for question, answer in zip(asked, self.answers, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class Scorer(Protocol):
    """Score answers so far: float32 [n]. A higher reward is better, a higher cost is worse.

    A scorer with an attribute ``cumulative = False`` scores the last block alone, others the whole answer so far.
    """

    def __call__(self, blocks: Blocks) -> Tensor: ...


def scores_of(scorer: Scorer, blocks: Blocks, kind: Literal["cost", "reward"]) -> Tensor:
    """Return the scores of `blocks`: float32 [n] on the CPU; GuardError for another number of scores.

    It fails closed: a cost that is NaN or infinite, of either sign, becomes +inf; such a reward -inf.
    """
    if not len(blocks):
        return torch.empty(0)
    scores = torch.as_tensor(scorer(blocks)).detach().to("cpu", torch.float32)
    if scores.shape != (len(blocks),):
        raise GuardError(f"{kind}: expected one score per answer, [{len(blocks)}], got shape {list(scores.shape)}")
    return torch.where(scores.isfinite(), scores, float("inf") if kind == "cost" else -float("inf"))


def block_costs(scorer: Scorer, now: Tensor, before: Tensor, refund: bool = True) -> Tensor:
    """Return the cost of the last block from scores, float32 [n]: at its end, and at its beginning.

    Without refund `before` is the highest score so far, at least 0, and no cost is below 0. The cost is infinite if
    either score is. The first block begins at 0: so with refund the costs of an answer sum up to its score, without it
    to the highest of its scores, and a harmful prompt buys no tolerance.
    """
    if getattr(scorer, "cumulative", True):
        now = torch.where(now.isfinite() & before.isfinite(), now - before, float("inf"))
    return now if refund else now.clamp(min=0)


class CallableScorer:
    """A function that returns n numbers, as a scorer; see `Scorer` for `cumulative`.

    It takes ``pairs`` (n of prompt and answer), ``answers`` (n texts), or ``blocks``: the `Blocks` themselves.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, takes: Literal["pairs", "answers", "blocks"] = "pairs",
        cumulative: bool = True,
    ) -> None:  # fmt: skip
        expect(takes in ("pairs", "answers", "blocks"), "takes", "'pairs', 'answers' or 'blocks'", takes)
        self._function, self._takes, self.cumulative = function, takes, cumulative

    def __call__(self, blocks: Blocks) -> Tensor:
        given: Any = blocks if self._takes == "blocks" else blocks.pairs()
        if self._takes == "answers":
            given = [answer for _, answer in given]
        return torch.as_tensor(self._function(given), dtype=torch.float32)


NO_SCORE = CallableScorer(lambda blocks: torch.zeros(len(blocks)), takes="blocks")  # of any answer: 0


class SequenceClassifier:
    """A HuggingFace sequence classifier or reward model (``AutoModelForSequenceClassification``).

    Its input is the chat of prompt and answer if its tokenizer has a chat template, else the two as a pair. Its score
    is the only label's logit, or the log-odds of `label` (name or number) against all others.

    The sign is 1, or -1 if a high score means the opposite (a reward model as a cost).

    Raises:
        GuardError: an unknown label, a missing one of several, another sign, a batch_size below 1.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, label: str | int | None = None, sign: int = 1, batch_size: int = 16
    ) -> None:
        config: Any = model.config
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        expect(sign in (1, -1), "sign", "1 or -1", sign)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model, self.tokenizer, self.sign = model, tokenizer, sign
        # Pooling at the last token that is not padding: without a padding token it knows only batches of one.
        self.batch_size = 1 if getattr(config, "pad_token_id", None) is None else batch_size
        names: dict[int, str] = dict(config.id2label)
        alone = 0 if label is None and len(names) == 1 else label
        self.label = next((number for number, name in names.items() if alone in (number, name)), None)
        expect(self.label is not None, "label", f"one of {', '.join(names.values())}", label)
        self.limit = min(getattr(config, "max_position_embeddings", None) or 2**31, tokenizer.model_max_length)

    @torch.inference_mode()
    def __call__(self, blocks: Blocks) -> Tensor:
        encoded = self._encode(blocks.pairs())
        longest = max((len(ids) for ids in encoded["input_ids"]), default=0)
        if longest > self.limit:
            raise GuardError(f"SequenceClassifier: its model reads {self.limit} tokens, got {longest}")
        scores = []
        with evaluating(self.model):
            for start in range(0, len(blocks), self.batch_size):
                rows = {name: values[start : start + self.batch_size] for name, values in encoded.items()}
                batch = self.tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
                logits = self.model(**batch.to(device_of(self.model))).logits.float().cpu()
                score = logits[:, self.label]
                if logits.shape[1] > 1:
                    score = score - logits[:, torch.arange(logits.shape[1]) != self.label].logsumexp(dim=1)
                scores.append(self.sign * score)
        return torch.cat(scores)

    def _encode(self, pairs: list[tuple[str, str]]) -> Any:
        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in pairs
        ]
        return self.tokenizer(self.tokenizer.apply_chat_template(chats, tokenize=False), add_special_tokens=False)
