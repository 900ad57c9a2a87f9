"""Make the step of each forward pass: top to bottom, from a call's arguments to the tables that layers read.

A hook calls `Stepper.begin` before the pass. It ends in `_prefill` where the call holds rows of a prompt, so that gates
decide, and in `_decode` where it adds answer rows. A step like the last one is not made again.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, SteerfastError
from steerfast.hf import caches
from steerfast.hf import latch as latches
from steerfast.hf.arguments import NO_TOKEN, Call, is_flat, tokens_of
from steerfast.hf.fused import CompiledEdit, is_fused
from steerfast.hf.latch import Latch
from steerfast.hf.packed import PackedRuns, is_paged
from steerfast.hf.second_pass import SecondPass
from steerfast.hf.structure import Decoder
from steerfast.hf.thoughts import without_thoughts
from steerfast.kernels.contract import Kinds
from steerfast.runtime.batch import BatchRoster, Plan
from steerfast.runtime.buffers import Buffers
from steerfast.runtime.span import NO_END, UNSTEERED
from steerfast.runtime.step import LayerEdit, Repeat, Step, StepMemory, TokenStep
from steerfast.runtime.tables import RowTable, prompt_rows, response_rows

_log = logging.getLogger("steerfast.step")
_SEVERAL = -1  # in place of `Latch.prompt`: prompts ended at different columns


@dataclass(frozen=True, eq=False)
class GeneratedPrompt:
    """Describe the prompts that `generate` was called with.

    Attributes:
        count: number of prompts. length: padded length, rows already cached included.
        mask: the 2-d attention mask of the call, or None.
    """

    count: int
    length: int
    mask: Tensor | None


class Stepper:
    """Make the steps of one steered model.

    Attributes:
        step: the step that layers read. plan, latch: who steers its sequences, and their decisions.
        prompt: the prompts of the `generate` that runs. prompts: how many prompts the last batch was made of.
        lengths: tokens of the prompts outside of `generate`, padding left out, one number or one for each sequence;
            None: a call's tokens are a prompt, or an answer to one.
        compiled: the edit that a compiled model adds in this step, or None.
        second_pass: how to read this step's prompts again, or None.
        rereading: a second pass runs.
    """

    def __init__(self, decoder: Decoder, roster: BatchRoster, packed: PackedRuns) -> None:
        self.decoder = decoder
        self.roster = roster
        self.packed = packed
        self.step: Step | None = None
        self.plan: Plan | None = None
        self.latch: Latch | None = None
        self.prompt: GeneratedPrompt | None = None
        self.lengths: tuple[int, ...] | None = None
        self.prompts: int | None = None
        self.compiled: CompiledEdit | None = None
        self.second_pass: SecondPass | None = None
        self.rereading = False
        self.held = 0  # tokens in the cache after this step
        self._repeat: Repeat | None = None
        self._repeated: Tensor | None = None  # decisions of the step that may repeat
        self._buffers = Buffers()
        self._static = Buffers(most=math.inf)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out steps, whose tables may be another engine's, and the call that runs: a copy is in none."""
        now = dict.fromkeys(("step", "prompt", "second_pass", "_repeat", "_repeated"))
        return {**vars(self), **now, "rereading": False}

    def edit(self, layer: int, x: Tensor, residual: Tensor | None) -> LayerEdit | None:
        """Return how the rows of a layer are edited, see `Step.edit`."""
        step = self.step
        assert step is not None
        return step.edit(layer, x, residual)

    # -- a step, from top to bottom ----------------------------------------------------------------------------------

    def begin(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Make the step of a call of `module`. False where only the backbone's call can make it.

        Raises:
            ArchitectureError: the call has no tokens, or a mask of an unknown form.
            SteerfastError: the cache holds decisions of another number of sequences, or the call is an export.
        """
        if torch.compiler.is_exporting():
            raise SteerfastError(
                "torch.export: a steered model cannot be exported, as each step has tables of its own: detach first "
                "(steerfast bake writes an edit without a gate into the weights), or use torch.compile"
            )
        tokens, cache = tokens_of(given), caches.cache_in(given)
        if tokens is None:
            raise ArchitectureError(f"model: {type(module).__name__} was called without input_ids or inputs_embeds")
        if self.repeats(tokens, cache):
            return True
        self._repeat = None
        if is_paged(cache):
            self._begin_packed(cache, tokens.shape[1])
            return True
        call = Call(given, tokens, cache, latches.length(cache))
        self.prompts = None if self.prompt is None else self.prompt.count
        plan = self.roster.plan(call.count, self.prompts)
        latch = latches.attached(cache) if call.past else None
        if latch is not None and latch.owner != plan.owner:
            latch = None
        if latch is not None and latch.sequences != call.count:
            raise SteerfastError(
                f"past_key_values: its gates were decided for {latch.sequences} sequences, got {call.count}"
            )
        columns = self._prompt_columns(call, latch)
        prefills = isinstance(columns, Tensor) or columns > 0
        if prefills and plan.ahead and module is not self.decoder.backbone:
            return False
        self.plan, self.held = plan, call.past + call.width
        self.second_pass = self.compiled = None
        if prefills:
            self._prefill(call, plan, latch, columns)
        else:
            assert latch is not None  # where nothing is decided, something was
            self._decode(call, plan, latch)
        if _log.isEnabledFor(logging.DEBUG):
            what = f"prefill, {columns} prompt columns" if prefills else f"decode after {call.past} tokens"
            _log.debug("%s: rows %s, stacks %s, %s", what, list(tokens.shape[:2]), plan.stacks, plan.reach)
        return True

    def repeats(self, tokens: Tensor, cache: Any) -> bool:
        """Return whether this call repeats the last step: it only adds as many answer tokens to the same sequences.

        To make the step again would take longer than all that steering adds to a compiled step.
        """
        latch = self.latch
        if self._repeat is None or latch is None or latches.attached(cache) is not latch:
            return False
        if latch.values is not self._repeated:  # rows of the cache moved
            return False
        width = tokens.shape[1]
        if not self._repeat.covers(self._key(tokens), self.held, width) or latches.length(cache) != self.held:
            return False
        self.held += width
        return True

    def _key(self, tokens: Tensor) -> Any:
        """Return all that a step is made for, except the number of cached tokens."""
        return tokens.shape[:2], self.roster.current, self.prompt, self.lengths, self.roster.slots.changes

    def _prompt_columns(self, call: Call, latch: Latch | None) -> int | Tensor:
        """Return how many of the call's columns are prompt, of all sequences or of each as `prompt_rows` takes it."""
        prompt, past, width = self.prompt, call.past, call.width
        if prompt is None and self.lengths is not None:
            return call.columns(self.lengths)
        if prompt is not None and past < prompt.length:
            return min(width, prompt.length - past)
        if latch is None:  # a new prompt, or a cache filled without this steering: decide at this step's last token
            return width
        if prompt is None:
            return width if width > 1 else 0  # several tokens at once are the prompt of another turn
        return prompt.length - past

    def _prefill(self, call: Call, plan: Plan, latch: Latch | None, columns: int | Tensor) -> None:
        """Make a step of prompt rows: gates decide at each sequence's last valid one."""
        before = latches.attached(call.cache)  # of any steering: thoughts are the tokens' own
        latch = self._shut_latch(plan, call.device) if latch is None else latch.copy(call.device)
        if before is not None and before.answers is not None and len(before.answers) == call.count:
            latch.answers, latch.recent = before.answers, before.recent
        if isinstance(columns, Tensor):
            _refuse_parts(plan, columns, call.width)
            same = bool((columns == columns[0]).all())
            latch.prompt = call.past + int(columns[0]) if same else _SEVERAL
        else:
            latch.prompt = call.past + columns
        valid = self._valid(call)
        if any(p.reads_end for stack in plan.profiles for p in stack) and call.is_packed(valid):
            raise SteerfastError(
                "position_ids: expected one sequence per row, got several packed into one; pad them into rows, so that "
                "each has its own decision"
            )
        if plan.ahead:
            self.second_pass = SecondPass.of(call.given, call.cache, valid, columns)
        rows = self.prompt_tables(plan, valid, columns, plan.ahead)
        if (thought := self.roster.thought) is not None:
            rows = without_thoughts(rows, thought, plan, latch, call, valid, columns)
        if any(entry.span.mean_rows for stack in plan.stacks for entry in stack):
            rows = replace(rows, counted=self._mean_rows(call, plan, valid, columns))
        self.step, self.latch = self.make(plan, latch, rows, decides=True), latch

    def _decode(self, call: Call, plan: Plan, latch: Latch) -> None:
        """Make a step of answer rows: latched decisions hold, and token gates decide row by row.

        Raises:
            SteerfastError: an edit ends after some tokens, of prompts that ended at different columns.
        """
        if latch.prompt == _SEVERAL and any(
            n < NO_END for of_one in plan.each(lambda one: one.span.rows_after_prompt) for n in of_one
        ):
            raise SteerfastError(
                "prompt_length: expected the context of the prompt around its answer, too: answer_tokens counts from "
                "ends of prompts that differ"
            )
        rows = self._answer_tables(plan, call.width, call.past - latch.prompt, call.device)
        if (thought := self.roster.thought) is not None:
            rows = without_thoughts(rows, thought, plan, latch, call, self._valid(call), 0)
        latch = latch.copy() if plan.by_token else latch
        self.step, self.latch = self.make(plan, latch, rows, decides=plan.by_token), latch
        if plan.by_token:
            return
        adds = self.roster.slots.reach.kinds == Kinds.LATCHED_ADD
        if adds and is_fused(self.decoder.layers[0]):  # hooks would not read it
            self.compiled = self._compiled_edit(self.step.memory)
        begins = [latch.prompt] * call.count
        if thought is not None and latch.answers is not None:
            begins = latch.answers.tolist()
            if max(begins) > call.past + 1:  # a thought ends within this call, or later
                return
        stacks = zip(begins, plan.stacks, strict=True)
        ends = (begin + entry.span.answer_rows for begin, stack in stacks for entry in stack)
        until = min((end for end in ends if end > call.past), default=math.inf)
        self._repeat, self._repeated = Repeat(self._key(call.tokens), call.past, until), latch.values

    def _begin_packed(self, cache: Any, width: int) -> None:
        """Take the step whose tables a manager of continuous batching has written."""
        steps = self.packed.steps_of(cache)
        reach = self.roster.slots.reach
        self.prompts = self.second_pass = self.compiled = None
        self.plan = Plan((), (), reach, "", False, ())
        self.step = steps.roster.current(width, steps.deciding, reach)
        self.latch = steps.latch

    def make(self, plan: Plan, latch: Latch, rows: RowTable, decides: bool) -> Step:
        """Return the step of a plan."""
        roster, device = self.roster, rows.slots.device
        bank, loaded = roster.slots.bank, roster.slots.reach
        table = bank(device).table
        strength = self._tensor("strength", plan, lambda entry: entry.strength, torch.float32, device)
        if not plan.by_token:
            memory = StepMemory.of(rows, strength, latch.values.to(device), latch.scores.to(device), table)
            return Step(plan.reach, bank, memory, decides, loaded)
        strength = strength.repeat_interleave(len(rows.slots) // max(1, len(strength)), dim=0)
        rows = rows.each_for_itself()
        shut = torch.zeros(len(table), rows.deciders.numel(), dtype=torch.float32, device=device)
        memory = StepMemory.of(rows, strength, shut, torch.full_like(shut, float("-inf")), table)
        return TokenStep(latch.values, latch.scores, plan.reach, bank, memory, decides, loaded)

    def read_again(self, module: nn.Module, output: Any) -> Any:
        """Return the output of a step, after a second pass where one is due."""
        second_pass, self.second_pass = self.second_pass, None
        if second_pass is None:
            return output
        assert self.plan is not None
        assert self.latch is not None

        def reread(given: dict[str, Any], plan: Plan, latch: Latch, valid: Tensor, columns: int | Tensor) -> Any:
            step = self.step
            rows = self.prompt_tables(plan, valid, columns)
            self.step, self.rereading = self.make(plan, latch, rows, decides=False), True
            try:
                return module(**given)
            finally:
                self.step, self.rereading = step, False

        return second_pass.run(output, self.plan, self.latch, reread)

    # -- tables ------------------------------------------------------------------------------------------------------

    def prompt_tables(self, plan: Plan, valid: Tensor, columns: int | Tensor, waits: tuple[bool, ...] = ()) -> RowTable:
        """Return the rows of a step of prompt tokens, none of them `counted`.

        Sequences that wait for a second pass are not edited before they have decided. Where no token is padding these
        are the same tables every time, and not 40 operations on small tensors.
        """

        def make() -> RowTable:
            device = valid.device
            slot = self._tensor("slot", plan, lambda entry: entry.slot, torch.int32, device)
            after = plan.tensor(lambda entry: entry.span.after_prompt, torch.bool, device)
            answer = plan.tensor(lambda entry: entry.span.rows_after_prompt, torch.int32, device)
            rows = prompt_rows(valid, columns, slot, after, answer)
            if waits:
                waiting = torch.tensor(waits, device=device).repeat_interleave(valid.shape[1])[:, None]
                rows = replace(rows, slots=torch.where(waiting, UNSTEERED, rows.slots))
            return rows

        count, width = valid.shape
        if isinstance(columns, Tensor) or valid is not self._all_valid(count, width, valid.device):
            return make()
        key = ("prompt", plan.stacks, plan.owner, waits, count, width, columns, valid.device)
        return self._buffers.get(key, make)

    def _mean_rows(self, call: Call, plan: Plan, valid: Tensor, columns: int | Tensor) -> Tensor:
        """Return the rows of this step that each mean takes, as `RowTable.counted`; the token ids come to the host.

        A step that holds no beginning of a user turn continues one: a mean takes all its rows.
        """
        ids = call.given.get("input_ids")
        until = columns[:, None] if isinstance(columns, Tensor) else columns
        prompt = valid & (torch.arange(call.width, device=valid.device) < until)
        known = call.on_host(prompt)
        counted = []
        for start, (row, stack) in enumerate(zip(known, plan.each(lambda entry: entry.span), strict=True)):
            (places,) = (row != NO_TOKEN).nonzero()
            for span in stack:
                first, until, found = span.read(len(places), None if ids is None else row[places])
                if not found:
                    self.roster.warn_of_turns()
                at = start * call.width + places[first:until]
                counted.append((at[0], at[-1] + 1, len(at)) if len(at) else (0, 0, 0))
        return torch.tensor(np.array(counted, dtype=np.int32), device=call.device)

    def _answer_tables(self, plan: Plan, width: int, answered: int, device: torch.device) -> RowTable:
        """Return the rows of a step of answer tokens, the same tables until an edit ends."""
        edited = tuple(
            tuple(min(max(rows - answered, 0), width) for rows in stack)
            for stack in plan.each(lambda entry: entry.span.rows_after_prompt)
        )

        def make() -> RowTable:
            slot = self._tensor("slot", plan, lambda entry: entry.slot, torch.int32, device)
            each = torch.tensor(edited, dtype=torch.int32, device=device).view(slot.shape)
            return response_rows(slot, width, each)

        return self._buffers.get(("answer", plan.stacks, plan.owner, width, edited, device), make)

    def _compiled_edit(self, memory: StepMemory) -> CompiledEdit:
        """Write the edit of this step where compiled models read it.

        Not one of the buffers that may be dropped: a CUDA graph whose inputs moved is recorded again.
        """
        slots, scales = memory.rows.slots, memory.scales

        def make() -> CompiledEdit:
            own = torch.zeros_like(slots), torch.zeros_like(scales)
            edit = CompiledEdit(*own, self.roster.slots.bank(slots.device).vectors)
            for tensor in edit:
                torch._dynamo.mark_static_address(tensor)
            return edit

        edit = self._static.get((*slots.shape, slots.device), make)
        edit.slots.copy_(slots)
        edit.scales.copy_(scales)
        return edit

    def _shut_latch(self, plan: Plan, device: torch.device) -> Latch:
        """Return shut gates; those of profiles without gates are open."""

        def make() -> Latch:
            layers = self.roster.slots.identity.num_layers
            is_open = plan.tensor(lambda entry: float(entry.span.open and entry.slot >= 0), torch.float32, device)
            values = is_open.flatten().repeat(layers, 1)
            return Latch(values, torch.full_like(values, float("-inf")), plan.owner, plan.width)

        latch: Latch = self._buffers.get(("latch", plan.stacks, plan.owner, device), make)
        with torch.inference_mode(False):
            return latch.copy()

    def _tensor(self, name: str, plan: Plan, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a value of each entry as a tensor [N, K], made once."""
        key = (name, plan.stacks, plan.owner, dtype, device)
        return self._buffers.get(key, lambda: plan.tensor(value, dtype, device))

    def _valid(self, call: Call) -> Tensor:
        """Return which tokens are not padding, bool [N, T]; without padding, the same tensor every time."""
        mask = call.given.get("attention_mask")
        if self.prompt is not None and self.prompt.mask is not None and not is_flat(mask):
            mask = call.grown(self.prompt.mask)
        if mask is None or (is_flat(mask) and bool(mask.all())):
            return self._all_valid(call.count, call.width, call.device)
        return call.valid(mask)

    def _all_valid(self, count: int, width: int, device: torch.device) -> Tensor:
        key = ("valid", count, width, device)
        return self._buffers.get(key, lambda: torch.ones(count, width, dtype=torch.bool, device=device))


def _refuse_parts(plan: Plan, columns: Tensor, width: int) -> None:
    """Refuse a prompt that later calls go on with, if a gate or an edit needs all of it at once."""
    entries = [entry.span for stack in plan.stacks for entry in stack]
    whole = plan.ahead or any(one.mean_rows or not (one.after_prompt or one.open) for one in entries)
    if whole and not plan.by_token and bool((columns > width).any()):
        raise SteerfastError(
            "prompt_length: expected the whole prompt in one call, got a part of it: a gate that reads a mean, or that "
            "decides on an edit of the prompt, needs all of its rows"
        )
