"""Edits that begin after a thought: where the answer of each sequence of a padded batch begins, and its rows.

Columns count from the beginning of the cache. As after a prompt, the first row that is edited is the one before the
answer: it predicts the answer's first token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from steerfast.errors import SteerfastError
from steerfast.hf.arguments import NO_TOKEN, Call
from steerfast.hf.latch import Latch
from steerfast.runtime.batch import Plan
from steerfast.runtime.span import NO_END, UNSTEERED, Thought
from steerfast.runtime.tables import RowTable


def without_thoughts(
    rows: RowTable, thought: Thought, plan: Plan, latch: Latch, call: Call, valid: Tensor, columns: int | Tensor
) -> RowTable:
    """Return the tables of a step without the rows of thoughts, and without those after the end of an edit.

    Args:
        rows: tables in which no edit ends.
        latch: notes which thoughts end in the call.
        valid: bool [N, T], False on padding. columns: how many of the call's columns are prompt.

    Raises:
        SteerfastError: the call has no token ids, or a part of a prompt; or tokens before it were taken back, of which
            an end may hold some.
    """
    _follow(thought, latch, call, valid, columns)
    assert latch.answers is not None
    answers = latch.answers.numpy()[:, None, None]
    limits = np.array(plan.each(lambda entry: entry.span.answer_rows), dtype=np.int64)[:, None]
    column = call.past + np.arange(call.width)[None, :, None]
    begun = (column >= answers - 1) | (answers == latch.prompt)  # behind a prompt, its last valid row is known
    edited = torch.from_numpy(begun & (column < answers + limits)).flatten(0, 1).to(rows.slots.device)
    return replace(rows, slots=torch.where(edited, rows.slots, UNSTEERED))


def _follow(thought: Thought, latch: Latch, call: Call, valid: Tensor, columns: int | Tensor) -> None:
    """Note in `latch` which thoughts end in a call; its token ids come to the host."""
    if call.given.get("input_ids") is None:
        raise SteerfastError("thinking: expected input_ids, in which a thought ends, got a call without them")
    tokens = call.on_host(valid)
    prompts = columns.tolist() if isinstance(columns, Tensor) else [columns] * len(tokens)
    if max(prompts) > call.width:
        raise SteerfastError("thinking: expected the whole prompt in one call, got a part of it")
    kept = len(thought.end) - 1
    answers = [NO_END] * len(tokens) if latch.answers is None else latch.answers.tolist()
    recent = [[NO_TOKEN] * kept] * len(tokens) if latch.recent is None else latch.recent.tolist()
    for n, (row, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        begin = call.past + max(0, prompt)
        if prompt > 0:
            known = row[:prompt][row[:prompt] != NO_TOKEN]
            goes_on = answers[n] <= call.past and not thought.opens_reply(known)
            answers[n] = begin if goes_on or thought.over(known) else NO_END
            recent[n] = [NO_TOKEN] * kept
        elif answers[n] > begin:  # a draft with the end of the thought was rejected
            answers[n] = NO_END
        if kept and prompt <= 0 and answers[n] == NO_END and call.past != latch.tokens:
            raise SteerfastError("thinking: expected no rejected drafts, as the end of a thought has several tokens")
        seen = [*recent[n], *row[max(0, prompt) :].tolist()]
        if answers[n] == NO_END and (place := thought.after(seen)) is not None:
            answers[n] = begin + place - kept
        recent[n] = seen[len(seen) - kept :]
    latch.answers = torch.tensor(answers, dtype=torch.int64, device="cpu")
    latch.recent = torch.tensor(recent, dtype=torch.int64, device="cpu").view(len(tokens), kept)
