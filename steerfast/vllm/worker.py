"""What runs in vLLM's workers: profiles on the device, the tables of each step, and the op at the steered layers.

vLLM has two model runners. Each tells, shortly before a step's forward pass, which requests lie where in its rows
(`_adapt`); all else is the same for both. Whom a request is steered by stands in its ``extra_args["steerfast"]``, which
the engine core writes and no client can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, ProfileError, SteerfastError
from steerfast.kernels.contract import GateOperands, Kinds, Operands
from steerfast.kernels.gate import gate_unchecked_, mean_gate_unchecked_
from steerfast.kernels.steer import steer_unchecked_
from steerfast.profile import ModelIdentity, SteeringProfile, embedding_sketch, sketched_rows
from steerfast.runtime.bank import Bank
from steerfast.runtime.roster import Request, Requests
from steerfast.runtime.tables import UNSTEERED
from steerfast.vllm import compat
from steerfast.vllm.assignment import Assignment
from steerfast.vllm.compat import around
from steerfast.vllm.config import KEY, ServingConfig, identity_of, splits_prompts
from steerfast.vllm.ops import activate, serve_

__all__ = ["Runtime", "find_layers", "install"]


@dataclass
class _Served(Request):
    """A request, and its name."""

    name: str = ""


class Runtime:
    """Profiles and requests of one worker.

    Args:
        config: the engine's.
        model: its identity; profiles have to fit.
        layers: those of `config.layers` that this worker has (a stage of a pipeline has some).
        device: where the model lives.
        max_rows: the most rows of a step, padding included. max_requests: the most requests of a step.
        split: whether a prompt may come in several steps.
        first, last: whether this worker has the first, the last stage of the pipeline.

    Attributes:
        bank: profiles by slot. requests: those that have not ended.
        incoming: tensors that the stage before sent with this step.
    """

    def __init__(
        self,
        config: ServingConfig,
        model: ModelIdentity,
        layers: Iterable[int],
        device: torch.device,
        max_rows: int,
        max_requests: int,
        *,
        split: bool = True,
        first: bool = True,
        last: bool = True,
    ) -> None:
        self.config = config
        self.identity = model
        self.split, self.first, self.last = split, first, last
        kinds = Kinds(config.kinds)
        self.bank = Bank(model.num_layers, model.hidden_size, config.slots, device, kinds=kinds)
        self.requests = Requests(self.bank, max_rows, max_requests)
        self.incoming: Any = None
        self._kinds = int(kinds)
        self._gates: dict[int, list[int]] = {}  # slot -> the layers where its gate decides
        self._pending: dict[str, _Served] = {}  # steered, and their prompt's last token has yet to come
        self._awaiting: list[_Served] = []  # those whose decision falls in this step
        self._decided: _Decisions | None = None
        self._deciding = True  # until the first step, so that warm-ups launch gates
        self._resting = True
        self._settled: _Settled | None = None
        self._expected = set(layers)
        self._seen: set[int] = set()
        for slot, path in enumerate(config.profiles.values()):
            self.write(slot, path)
        everywhere = config.directory is not None
        loaded = [self.bank.profile(name) for name in self.bank.names]
        gates = {layer for at in self._gates.values() for layer in at}
        sensors = {profile.sensor for profile in loaded if profile.gate.kind == "prompt"}
        means = {layer for profile in loaded if profile.gate.pooling == "mean" for layer in profile.gate_layers}
        self._views = {
            layer: self._view(layer, *(everywhere or layer in some for some in (gates, sensors, means)))
            for layer in self._expected
        }

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        bank, requests = self.bank, self.requests
        tensors = [bank.vectors, bank.directions, bank.table, bank.gates, bank.means, bank.sensors]
        tensors += [requests.values, requests.scores, requests.sums, *requests.decides]
        tables = requests.tables
        tensors += [tables.rows, tables.deciding, tables.slot, tables.strength, tables.member, tables.total]
        return sum(tensor.nbytes for tensor in tensors)

    # -- profiles ------------------------------------------------------------------------------------------------------

    def write(self, slot: int, path: str, checksum: str | None = None) -> None:
        """Load the profile at `path` into an empty slot.

        Raises:
            ProfileError: it cannot be read, is not the one of this checksum, or does not fit; the slot is taken.
        """
        profile = SteeringProfile.load(path)
        if checksum is not None and profile.checksum != checksum:
            raise ProfileError(f"profile {path!r}: expected checksum {checksum}, got {profile.checksum}")
        self.config.check(path, profile, self.identity, split=self.split)
        self.bank.add(_bank_name(slot), profile, slot)
        self._gates[slot] = profile.gate_layers

    def clear(self, slot: int) -> None:
        """Empty a slot, if it is not; its requests have ended."""
        if self._gates.pop(slot, None) is not None:
            self.bank.remove(_bank_name(slot))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def begin(self, scheduled: Any) -> None:
        """Learn from a scheduler's output which requests ended and which are new.

        Raises:
            SteerfastError: a request names a slot that holds no profile.
        """
        ended = scheduled.finished_req_ids
        self.requests.end(ended)
        for name in ended:
            self.requests.forget(name)
            self._pending.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self._settled = None
            if new.req_id not in self.requests:  # else it was preempted, and is what it was
                self._add(new.req_id, new.sampling_params, new.prompt_len)

    def _add(self, name: str, sampling_params: Any, prompt_length: int) -> None:
        extra = getattr(sampling_params, "extra_args", None) or {}
        given = Assignment(**extra[KEY]) if extra.get(KEY) else Assignment(UNSTEERED, 0.0, late=True, open=False)
        slot = given.slot
        if slot != UNSTEERED and slot not in self._gates:
            raise SteerfastError(f"request {name!r}: expected a slot that holds a profile, got {slot}")
        reach = (given.late, given.open, given.answer_rows, given.mean)
        request = _Served(slot, given.strength, prompt_length, *reach, name)
        self.requests.add(name, request)
        if slot != UNSTEERED:
            self._pending[name] = request

    def step(
        self,
        names: Sequence[str],
        past: Sequence[int] | NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        padded_rows: int,
    ) -> None:
        """Set up a step, on the current stream: see `Requests.step`.

        Raises:
            SteerfastError: the deciding row of a request was never computed.
        """
        activate(self)
        before, count = np.array(past), np.array(lengths)  # copies: a runner may give views of what it counts on in
        if self._settled is not None and self._settled.same(names, before, count, padded_rows):
            self._deciding = False
            return
        if self._pending:
            self._awaiting = []
            for name, start, length in zip(names, past, lengths, strict=True):
                request = self._pending.get(name)
                if request is None or request.prompt_length > start + length:
                    continue
                if request.prompt_length <= start:
                    raise SteerfastError(f"request {name!r}: the last token of its prompt came from a cache")
                self._awaiting.append(request)
            self._awaiting.sort(key=lambda request: request.name)  # stages may order their batches each in its own way
        self._deciding = self.requests.step(names, past, lengths, padded_rows)
        self._resting = False
        prompts, ends = self.requests.bounds(names)
        settled = _Settled(list(names), prompts, ends, before, count, padded_rows)
        self._settled = settled if settled.beyond(before) else None
        if self._awaiting and not self.first:
            self._receive(self.incoming.tensors.pop(KEY))
        self.incoming = None

    def rest(self) -> None:
        """Before a forward pass that serves no requests: nothing is steered, and no latch moves."""
        activate(self)
        self._settled = None
        if not self._resting:
            self._deciding = self.requests.step([], [], [], len(self.requests.tables.rows))
            self._resting = True

    def serve(self, x: Tensor, residual: Tensor | None, layer: int) -> None:
        """What the op does: decide this layer's gates, and edit x in place."""
        self._seen.add(layer)
        view, tables = self._views[layer], self.requests.tables
        if len(x) > len(tables.rows):
            raise SteerfastError(f"x: expected at most {len(tables.rows)} rows, got {len(x)}")
        # A captured graph decides in every replay, where rows are named.
        if view.gate and (self._deciding or (x.is_cuda and torch.cuda.is_current_stream_capturing())):
            gates = GateOperands(tables.slot, view.directions, view.table, view.scores, view.values)
            gate_unchecked_(x, residual, view.deciding, gates)
            if view.mean:
                member = tables.member[: len(x)]
                mean_gate_unchecked_(x, residual, member, tables.total, view.closes, view.sums, gates)
            if view.sense:
                values = self.requests.values
                values.copy_(torch.where(view.senses, view.values[:, 0], values))
        bank = (view.vectors, view.directions, view.table)
        operands = Operands(tables.rows[: len(x)], view.values, tables.strength, *bank, self._kinds)
        steer_unchecked_(x, residual, operands)

    def launched(self, output: Any) -> Any:
        """The step's forward pass lies on the current stream; `output`: what the runner gave for it.

        Returns:
            `output`, with the decisions of this step where another stage follows.

        Raises:
            ArchitectureError: the pass left out a layer that it was to steer.
        """
        if self._seen != self._expected:
            raise ArchitectureError(
                f"model: expected its forward pass to steer layers {sorted(self._expected)}, it did "
                f"{sorted(self._seen)}"
            )
        self.requests.launched()
        if not self._awaiting:
            return output
        awaiting, self._awaiting = self._awaiting, []
        for request in awaiting:
            del self._pending[request.name]
        latches = self._latches(awaiting)
        if not self.last:
            return type(output)({**output.tensors, KEY: latches})
        layers = [self._gates[request.slot] for request in awaiting]
        self._decided = _Decisions([request.name for request in awaiting], layers, latches)
        return output

    def tell(self, output: Any) -> Any:
        """Put the last step's decisions on its ModelRunnerOutput, or on the one that it will become."""
        decided, self._decided = self._decided, None
        if decided is None:
            return output
        if not hasattr(output, "get_output"):
            output.steerfast = decided.read()
            return output
        get_output = output.get_output

        def with_decisions() -> Any:
            ready = get_output()
            ready.steerfast = decided.read()
            return ready

        output.get_output = with_decisions
        return output

    def _latches(self, requests: list[_Served]) -> Tensor:
        """Values and scores, float32 [2, layers, n], on the device."""
        columns = self._columns(requests)
        return torch.stack([t.index_select(1, columns) for t in (self.requests.values, self.requests.scores)])

    def _receive(self, latches: Tensor) -> None:
        """Take over what the stages before decided, as their `_latches`."""
        columns = self._columns(self._awaiting)
        for own, theirs in zip((self.requests.values, self.requests.scores), latches, strict=True):
            own.index_copy_(1, columns, theirs)

    def _columns(self, requests: list[_Served]) -> Tensor:
        device = self.requests.values.device
        columns = torch.tensor([request.column for request in requests], pin_memory=device.type == "cuda")
        return columns.to(device, non_blocking=True)

    def _view(self, layer: int, gate: bool, sense: bool, mean: bool) -> _View:
        bank, requests = self.bank.layer(layer), self.requests
        return _View(
            gate=gate,
            sense=gate and sense,
            mean=gate and mean,
            deciding=requests.decides.row[layer],
            closes=requests.decides.closes[layer],
            senses=requests.decides.senses[layer],
            sums=requests.sums[layer][:, None],
            scores=requests.scores[layer][:, None],
            values=requests.values[layer][:, None],
            vectors=bank.vectors,
            directions=bank.directions,
            table=bank.table,
        )


@dataclass(frozen=True)
class _View:
    """A layer's part of the bank and of the requests' state. gate: whether some profile may decide here; sense:
    whether one may do so for all layers; mean: whether one may read a mean.
    """

    gate: bool
    sense: bool
    mean: bool
    deciding: Tensor
    closes: Tensor
    senses: Tensor
    sums: Tensor
    scores: Tensor
    values: Tensor
    vectors: Tensor
    directions: Tensor
    table: Tensor


@dataclass(frozen=True)
class _Settled:
    """A step in which no request had a row of its prompt: while others are like it, the tables stay as they are.

    Then what a step costs the host hardly depends on the number of requests.
    """

    names: list[str]
    prompts: NDArray[np.int64]
    ends: NDArray[np.int64]
    past: NDArray[np.integer]
    lengths: NDArray[np.integer]
    padded_rows: int

    @cached_property
    def was_steered(self) -> NDArray[np.int64]:
        return self.steered(self.past)

    def steered(self, past: NDArray[np.integer]) -> NDArray[np.int64]:
        """How many of its rows in a step after `past` a request is steered in: [n]."""
        return np.clip(self.ends - past, 0, self.lengths)

    def beyond(self, past: NDArray[np.integer]) -> bool:
        return bool((past >= self.prompts).all())

    def same(
        self, names: Sequence[str], past: NDArray[np.integer], lengths: NDArray[np.integer], padded_rows: int
    ) -> bool:
        return (
            padded_rows == self.padded_rows
            and names == self.names
            and np.array_equal(lengths, self.lengths)
            and self.beyond(past)
            and np.array_equal(self.steered(past), self.was_steered)
        )


class _Decisions:
    """What gates decided in a step, on its way to the host."""

    def __init__(self, names: list[str], layers: list[list[int]], latches: Tensor) -> None:
        self._names, self._layers = names, layers
        self._latches = latches.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if latches.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> dict[str, tuple[list[float], list[float]]]:
        """Gate values and scores by request, of its slot's gate layers in ascending order."""
        if self._copied is not None:
            self._copied.synchronize()
        told = {}
        for number, (name, layers) in enumerate(zip(self._names, self._layers, strict=True)):
            values, scores = self._latches[:, layers, number].tolist()
            told[name] = values, scores
        return told


def _bank_name(slot: int) -> str:
    return f"slot {slot}"


# -- the model -----------------------------------------------------------------------------------------------------


def find_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder layers of one of vLLM's models; where it is a stage of a pipeline, those of others are placeholders.

    They are the shallowest ModuleList with as many entries as the text config counts layers, beside the embedding of
    tokens: vision towers have such lists, too.

    Raises:
        ArchitectureError: there is none, or several.
    """
    kinds = compat.VocabParallelEmbedding, compat.PPMissingLayer

    def embeds(parent: nn.Module) -> bool:
        beside = [child for child in parent.children() if not isinstance(child, nn.ModuleList)]
        return any(isinstance(part, kinds) for c in beside for part in c.modules())

    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and embeds(model.get_submodule(path.rpartition(".")[0]))
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == depth]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ArchitectureError(
            f"model: expected one list of {count} decoder layers in {type(model).__name__}, found {names}"
        )
    return found[0][1]


def _steer_layers(layers: nn.ModuleList, declared: Iterable[int], hidden_size: int) -> list[int]:
    """Let the declared layers that are here call the op on what they return; return their numbers."""
    here = [at for at in declared if not isinstance(layers[at], compat.PPMissingLayer)]
    for at in here:
        layer: Any = layers[at]
        _wrap_forward(type(layer))
        layer.steerfast_layer, layer.steerfast_width = at, hidden_size
        layer.steerfast_adds = any("RMSNorm" in type(child).__name__ for child in layer.children())
    return here


def _wrap_forward(cls: Any) -> None:
    """Once for each class. A layer without the attribute, of a drafter or of another engine, is as it was."""
    if vars(cls).get("steerfast_layer", 0) is None:
        return
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        # A subclass that calls this one's forward has its own wrapper.
        if self.steerfast_layer is not None and type(self) is cls:
            _serve_output(self, output)
        return output

    cls.steerfast_layer = None
    cls.forward = forward


def _serve_output(layer: Any, output: Any) -> None:
    """Layers return the stream as one tensor, as (stream, None), or as (x, residual), which the next norm adds."""
    x, residual = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != layer.steerfast_width:
        raise ArchitectureError(
            f"model: expected {type(layer).__name__} to return rows [n, {layer.steerfast_width}] or a pair of such, "
            f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    if residual is not None and not layer.steerfast_adds:
        raise ArchitectureError(
            f"model: {type(layer).__name__} returns a pair, but has no RMSNorm: expected one, which adds the two"
        )
    serve_(x, residual, layer.steerfast_layer)


def _sketch(model: nn.Module, vocabulary: int) -> tuple[float, ...] | None:
    """The sketch of the model's embedding, None where it lies on another stage. All ranks of a stage have to ask."""
    for module in model.modules():
        if isinstance(module, compat.VocabParallelEmbedding) and not isinstance(module, compat.ParallelLMHead):
            if not 0 < vocabulary <= module.org_vocab_size:
                return None
            with torch.inference_mode():
                return embedding_sketch(module(sketched_rows(vocabulary).to(next(module.parameters()).device)))
    return None


# -- vLLM ----------------------------------------------------------------------------------------------------------


def attach(runner: Any, config: ServingConfig) -> Runtime:
    """Steer a model runner whose model is loaded.

    Raises:
        ArchitectureError: its model cannot be steered.
        ProfileError: a profile is another model's.
    """
    compat.check_runner(runner)
    vllm_config, model = runner.vllm_config, runner.get_model()
    text_config = vllm_config.model_config.hf_text_config
    identity = replace(identity_of(text_config), embedding_sketch=_sketch(model, text_config.vocab_size))
    here = _steer_layers(find_layers(model, identity.num_layers), config.layers, identity.hidden_size)
    scheduler, stage = vllm_config.scheduler_config, compat.get_pp_group()
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    runtime = Runtime(
        config,
        identity,
        here,
        runner.device,
        max(scheduler.max_num_batched_tokens, graphs),
        scheduler.max_num_seqs,
        split=splits_prompts(vllm_config),
        first=stage.is_first_rank,
        last=stage.is_last_rank,
    )
    runner.steerfast = runtime
    if hasattr(runner, "model_memory_usage"):  # what is left is given to the KV cache
        runner.model_memory_usage += runtime.nbytes
    _adapt(runner, runtime)
    activate(runtime)
    return runtime


def _adapt(runner: Any, runtime: Runtime) -> None:
    """Have a runner tell its steps."""
    (_adapt_v1 if compat.is_v1(runner) else _adapt_v2)(runner, runtime)
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

    def execute(scheduled: Any, intermediate_tensors: Any = None, **kwargs: Any) -> Any:
        run = partial(execute_model, scheduled, intermediate_tensors, **kwargs)
        if kwargs.get("dummy_run"):
            runtime.rest()
            return run()
        runtime.begin(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return run()
        runtime.incoming = intermediate_tensors
        return runtime.launched(run())

    def sample(*args: Any, **kwargs: Any) -> Any:
        return runtime.tell(sample_tokens(*args, **kwargs))

    runner.execute_model, runner.sample_tokens = execute, sample


def _adapt_v1(runner: Any, runtime: Runtime) -> None:
    preprocess, dummy_run = runner._preprocess, runner._dummy_run

    def steered_preprocess(scheduled: Any, num_input_tokens: int, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        names = list(batch.req_ids)
        past = batch.num_computed_tokens_cpu[: len(names)]
        lengths = np.fromiter(map(scheduled.num_scheduled_tokens.__getitem__, names), np.int64, len(names))
        runtime.step(names, past, lengths, num_input_tokens)
        return preprocess(scheduled, num_input_tokens, *args, **kwargs)

    def steered_dummy_run(*args: Any, **kwargs: Any) -> Any:
        runtime.rest()
        return dummy_run(*args, **kwargs)

    runner._preprocess, runner._dummy_run = steered_preprocess, steered_dummy_run


def _adapt_v2(runner: Any, runtime: Runtime) -> None:
    state = runner.model_state
    preprocess_state = state.preprocess_state

    def steered_preprocess_state(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        runtime.step(
            list(input_batch.req_ids),
            input_batch.num_computed_tokens_np[: input_batch.num_reqs],
            input_batch.num_scheduled_tokens[: input_batch.num_reqs],
            input_batch.num_tokens_after_padding,
        )
        return preprocess_state(input_batch, *args, **kwargs)

    state.preprocess_state = steered_preprocess_state


def _runtime(worker: Any) -> Runtime:
    runtime = getattr(worker.model_runner, "steerfast", None)
    if runtime is None:
        raise SteerfastError("worker: expected one that steers, got one that was not configured for it")
    return runtime


def steerfast_steers(worker: Any) -> bool:
    """Whether a worker was told to steer, so that none can miss it silently."""
    return getattr(worker.model_runner, "steerfast", None) is not None


def steerfast_write(worker: Any, slot: int, path: str, checksum: str) -> str | None:
    """See `Runtime.write`. Returns what was wrong: vLLM leaves the answers of other workers unread if one raises."""
    try:
        _runtime(worker).write(slot, path, checksum)
    except Exception as error:
        return str(error)
    return None


def steerfast_clear(worker: Any, slot: int) -> None:
    """See `Runtime.clear`."""
    _runtime(worker).clear(slot)


def install() -> None:
    """Let workers of configured engines steer, and take `steerfast_*` by collective_rpc."""
    for function in (steerfast_steers, steerfast_write, steerfast_clear):
        setattr(compat.WorkerBase, function.__name__, function)

    # Not init_worker: a worker's process loads its plugins in the middle of that.
    @around("WorkerWrapperBase", "init_device")
    def init_device(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        config = ServingConfig.of(self.vllm_config)
        if config is not None:
            load_model = self.worker.load_model

            def steered_load_model(*args: Any, **kwargs: Any) -> Any:
                loaded = load_model(*args, **kwargs)
                attach(self.worker.model_runner, config)
                return loaded

            self.worker.load_model = steered_load_model
        return result
