"""The steering of a vLLM worker: profiles on the device, the requests that they steer, and the step that runs now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.kernels.contract import Kinds
from steerfast.kernels.steer import steer_unchecked_
from steerfast.profile import ModelIdentity, SteeringProfile
from steerfast.runtime.bank import Bank, Reach
from steerfast.runtime.roster import Request, Roster
from steerfast.runtime.step import Repeat
from steerfast.vllm.assignment import stack_from_extra
from steerfast.vllm.config import KEY, ServingConfig
from steerfast.vllm.ops import activate, is_captured
from steerfast.vllm.ranks import RowLayout
from steerfast.vllm.registry import variants

Decisions = dict[str, list[tuple[list[float], ...]]]
"""Gate values and scores by request, for each profile those of its gate layers in ascending order."""


@dataclass(frozen=True)
class WorkerShape:
    """The sizes of a worker's steps, and its place in the pipeline.

    max_rows: the most rows of a step, padding included. max_requests: the most requests of a step.
    split: whether a prompt may come in several steps.
    first, last: whether this worker has the first, the last stage of the pipeline.
    """

    max_rows: int
    max_requests: int
    split: bool = True
    first: bool = True
    last: bool = True


class WorkerRuntime:
    """The profiles and requests of one worker.

    Args:
        config: the engine's.
        model: its identity; profiles have to fit.
        layers: those of `config.layers` that this worker has (a stage of a pipeline has some).
        device: where the model lives.
        shape: the sizes of its steps.
        layout: checks the rows that layers hand on. Default: one rank, rows unknown.

    Attributes:
        bank: profiles by slot. roster: requests that have not ended.
        incoming: tensors that the stage before sent with this step.
    """

    def __init__(
        self,
        config: ServingConfig,
        model: ModelIdentity,
        layers: Iterable[int],
        device: torch.device,
        shape: WorkerShape,
        layout: RowLayout | None = None,
    ) -> None:
        self.config, self.identity, self.shape = config, model, shape
        self.layout = RowLayout(model.name) if layout is None else layout
        kinds = Kinds(config.kinds)
        self.bank = Bank(model.num_layers, model.hidden_size, config.slots, device, kinds=kinds)
        self.roster = Roster(self.bank, shape.max_rows, shape.max_requests, config.stack)
        self.incoming: Any = None
        self._gates: dict[int, list[int]] = {}  # slot -> the layers where its gate decides
        self._files: dict[int, str] = {}  # slot -> path
        self._mismatch: str | None = None  # why these weights are not those of a profile
        self._decisions: Callable[[], Decisions] | None = None  # of the last step
        self._launch_gates = True  # until the first step, so that warm-ups launch gates
        self._empty = True  # the tables steer no row
        self._repeat: Repeat | None = None
        self._expected = set(layers)
        self._served: set[int] = set()
        self._reach = self._reach_of_profiles()
        slots = iter(range(config.slots))
        for path in config.profiles.values():
            self.write(slots, path)

    def _reach_of_profiles(self) -> Reach:
        """Return where the loaded profiles act."""
        return Reach.of(map(self.bank.profile, self.bank.names)) | Reach(kinds=self.bank.kinds)

    def _reach_of_graphs(self) -> Reach:
        """Return where profiles act, now and later: a captured graph keeps its launches."""
        if self.config.directory is None:
            return self._reach
        everywhere = frozenset(self.config.layers)
        return Reach(everywhere, everywhere, self.bank.kinds)

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return self.roster.nbytes + sum(tensor.nbytes for tensor in self.bank.tensors)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def write(self, slots: Iterable[int], path: str, checksum: str | None = None) -> None:
        """Load the profile at `path` into empty slots, one for each of its `variants`.

        Raises:
            ProfileError: the file cannot be read or has another checksum, the profile does not fit, or the slot is
                taken.
        """
        profile = SteeringProfile.load(path)
        if checksum is not None and profile.checksum != checksum:
            raise ProfileError(f"profile {path!r}: expected checksum {checksum}, got {profile.checksum}")
        self.config.check(path, profile, self.identity, split=self.shape.split)
        for variant, slot in zip(variants(profile).values(), slots, strict=False):  # takes no slot too many
            self.bank.add(_bank_name(slot), variant, slot)
            self._gates[slot], self._files[slot] = variant.gate_layers, path
        self._reach = self._reach_of_profiles()

    def identify(self, sketch: tuple[float, ...] | None) -> None:
        """Note the sketch of the embedding of weights that have just changed.

        Raises:
            ProfileError: a profile is another model's. Steered requests are refused until weights agree again.
        """
        self.identity, self._mismatch = replace(self.identity, embedding_sketch=sketch), None
        for slot, path in self._files.items():
            problem = self.bank.profile(_bank_name(slot)).model.mismatch(self.identity)
            if problem is not None:
                self._mismatch = f"profile {path!r}: {problem}"
                raise ProfileError(self._mismatch)

    def clear(self, slot: int) -> None:
        """Empty a slot, if it is not empty; its requests have ended."""
        if self._gates.pop(slot, None) is not None:
            self.bank.remove(_bank_name(slot))
            del self._files[slot]
            self._reach = self._reach_of_profiles()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def begin(self, scheduled: Any) -> None:
        """Read in a scheduler's output which requests ended and which are new.

        Raises:
            SteerfastError: a request names a slot that holds no profile.
        """
        self._decisions, self.roster.deciding = None, {}  # of a step that failed
        ended = scheduled.finished_req_ids
        self.roster.end(ended)
        for name in ended:
            self.roster.forget(name)
        for new in scheduled.scheduled_new_reqs:
            self._repeat = None
            if new.req_id not in self.roster:  # a preempted request is known
                self._add(new)

    def end_thoughts(self, answers: Mapping[str, int]) -> None:
        """See `Roster.end_thoughts`."""
        self._repeat = None
        self.roster.end_thoughts(answers)

    def _add(self, new: Any) -> None:
        name, ids = new.req_id, new.prompt_token_ids
        extra = getattr(new.sampling_params, "extra_args", None) or {}
        stack = stack_from_extra(extra.get(KEY) or [])
        for entry in stack:
            if entry.slot not in self._gates:
                raise SteerfastError(f"request {name!r}: expected a slot that holds a profile, got {entry.slot}")
        request = Request(stack, len(new.prompt_embeds if ids is None else ids), ids)
        if stack and self._mismatch is not None:
            raise SteerfastError(
                f"request {name!r}: expected weights of the profiles' model, got others: {self._mismatch}"
            )
        self.roster.add(name, request)

    def step(
        self,
        names: Sequence[str],
        past: Sequence[int] | NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        padded_rows: int,
        positions: Tensor | None = None,
    ) -> None:
        """Set up a step, on the current stream: see `Roster.step`.

        Args:
            positions: [rows] on the device, where drafts are in flight. `past` then counts drafts that may be rejected
                later, but no row of a prompt comes after a draft.

        Raises:
            SteerfastError: the deciding row of a request was never computed.
        """
        activate(self)
        before, count = np.array(past), np.array(lengths)  # copies: a runner may give views of its own counters
        key = (list(names), count.tolist(), padded_rows)
        if self._repeat is not None and self._repeat.covers(key, before, count):
            self._launch_gates = False
            return
        prompts, ends = self.roster.bounds(names)
        # Drafts in flight count as past. Where an end may have come, the device knows which rows lie after it.
        unsure = positions is not None and bool((ends < (before + count)[:, None]).any())
        least = np.minimum(before, prompts) if unsure else before
        self._launch_gates = self.roster.step(names, least, count, padded_rows)
        if positions is not None and unsure:
            self.roster.end_edits(ends, count, positions)
        self._empty = False
        self._repeat = None if unsure else Repeat.of(key, before, prompts, ends)
        if self.roster.deciding and not self.shape.first:
            self._receive(self.incoming.tensors.pop(KEY))
            self.roster.write_scales(padded_rows)
        self.incoming = None

    def rest(self) -> None:
        """Prepare for a forward pass without requests: it steers no row and changes no decision."""
        activate(self)
        self._repeat = None
        if not self._empty:
            self._launch_gates = self.roster.step([], [], [], len(self.roster.tables.slots))
            self._empty = True

    def serve(self, stream: Tensor, addend: Tensor | None, layer: int) -> None:
        """Decide this layer's gates and edit `stream`, [n, H], in place, for the op.

        The rows are those of `stream`, or of stream + addend.
        """
        self._served.add(layer)
        self.layout.check(layer, stream, addend)
        if len(stream) > (most := len(self.roster.tables.slots)):
            raise SteerfastError(f"stream: expected at most {most} rows, got {len(stream)}")
        captured = is_captured(stream)  # a graph decides in every replay, where the tables name rows
        reach = self._reach_of_graphs() if captured else self._reach
        edit = self.roster.current(len(stream), captured or self._launch_gates, reach).edit(layer, stream, addend)
        if edit is not None:
            steer_unchecked_(stream, addend, *edit)

    def launched(self, output: Any) -> Any:
        """Note that the step's forward pass lies on the current stream; `output` is the runner's.

        Returns:
            `output`, with the decisions of this step where another stage follows.

        Raises:
            ArchitectureError: the pass left out a steered layer.
        """
        if self._served != self._expected:
            raise ArchitectureError(
                f"model: expected its forward pass to steer layers {sorted(self._expected)}, it did "
                f"{sorted(self._served)}"
            )
        deciding = self._deciding
        self.roster.launched()
        if not deciding:
            return output
        columns = self.roster.columns(list(deciding.values()))
        latches = torch.stack([t.index_select(1, columns) for t in (self.roster.values, self.roster.scores)])
        if not self.shape.last:
            return type(output)({**output.tensors, KEY: latches})
        layers = {name: [self._gates[entry.slot] for entry in request.stack] for name, request in deciding.items()}
        self._decisions = _pending(layers, latches, self.roster.stack)
        return output

    def report(self, output: Any) -> Any:
        """Put the last step's decisions on its ModelRunnerOutput, or on the object that returns it later."""
        decisions, self._decisions = self._decisions, None
        if decisions is None or output is None:  # None: the forward pass failed, and its error is on its way
            return output
        if not hasattr(output, "get_output"):
            output.steerfast = decisions()
            return output
        get_output = output.get_output

        def with_decisions() -> Any:
            vars(output).pop("get_output", None)  # or the output, which holds tensors, waits for the garbage collector
            ready = get_output()
            ready.steerfast = decisions()
            return ready

        output.get_output = with_decisions
        return output

    @property
    def _deciding(self) -> dict[str, Request]:
        """The requests that decide in this step, by name: stages may order their batches differently."""
        return dict(sorted(self.roster.deciding.items()))

    def _receive(self, latches: Tensor) -> None:
        """Take over the decisions of the stages before, values and scores, float32 [2, layers, n·K]."""
        columns = self.roster.columns(list(self._deciding.values()))
        for own, sent in zip((self.roster.values, self.roster.scores), latches, strict=True):
            own.index_copy_(1, columns, sent)


def _pending(layers: dict[str, list[list[int]]], latches: Tensor, stack: int) -> Callable[[], Decisions]:
    """Send the decisions of a step to the host, and return a function that waits for them.

    Args:
        layers: gate layers by request and profile.
        latches: float32 [2, layers, n·K], values and scores. stack: K.
    """
    host = latches.unflatten(2, (-1, stack)).to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if latches.is_cuda else None
    if copied is not None:
        copied.record()

    def read() -> Decisions:
        if copied is not None:
            copied.synchronize()
        return {
            name: [tuple(host[:, at, number, k].tolist()) for k, at in enumerate(of_stack)]
            for number, (name, of_stack) in enumerate(layers.items())
        }

    return read


def _bank_name(slot: int) -> str:
    return f"slot {slot}"
