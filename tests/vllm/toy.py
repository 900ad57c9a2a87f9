"""A toy model in stages, what vLLM would do around it, and what steering should make of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from steerfast.kernels.contract import Kinds
from steerfast.profile import SteeringProfile
from steerfast.runtime.span import EditSpan, Entry
from steerfast.vllm.assignment import stack_to_extra
from steerfast.vllm.config import KEY, ServingConfig, layers_of
from steerfast.vllm.ops import serve_
from steerfast.vllm.worker import WorkerRuntime, WorkerShape

LAYERS, HIDDEN = 5, 32  # as tiny_llama
TURN = (7, 8)  # opens a user turn


@dataclass
class Engine:
    """A model of layers x -> 0.9·x + a, in stages that each have a runtime; what vLLM would do around them."""

    profiles: dict[str, SteeringProfile]
    stages: list[list[int]]
    folder: Any
    max_rows: int = 24
    max_requests: int = 4
    pair: bool = False
    stack: int = 2
    directory: bool = False
    slots: int = 0  # of the bank; 0: one more than profiles
    runtimes: list[WorkerRuntime] = field(init=False)

    def __post_init__(self) -> None:
        paths = {}
        for name, profile in self.profiles.items():
            paths[name] = str(self.folder / f"{name}.safetensors")
            profile.save(paths[name])
        layers = range(LAYERS) if self.directory else sorted(set().union(*map(layers_of, self.profiles.values())))
        folder = str(self.folder) if self.directory else None
        config = ServingConfig(
            paths,
            None,
            False,
            self.slots or len(paths) + 1,
            tuple(layers),
            int(Kinds.ANY),
            folder,
            "",
            stack=self.stack,
        )
        model = next(iter(self.profiles.values())).model
        self.slot_of = {name: slot for slot, name in enumerate(paths)}
        self.bias = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
        self.runtimes = [
            WorkerRuntime(
                config,
                model,
                [layer for layer in stage if layer in layers],
                torch.device("cpu"),
                WorkerShape(
                    self.max_rows, self.max_requests, first=stage is self.stages[0], last=stage is self.stages[-1]
                ),
            )
            for stage in self.stages
        ]

    def extra(self, name: str | None, strength: float = 1.0) -> list[dict[str, Any]]:
        names = [] if name is None else name.split(",")
        return stack_to_extra(
            tuple(Entry(self.slot_of[each], strength, EditSpan.of(self.profiles[each])) for each in names)
        )

    def step(
        self,
        batch: list[tuple[str, int, int]],
        rows: dict[str, Tensor],
        new: list[Any] | None = None,
        ended: set[str] | None = None,
        padding: int = 0,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One step of (name, past, length) each. Returns the stream after the last layer by name, and decisions."""
        scheduled = SimpleNamespace(finished_req_ids=ended or set(), scheduled_new_reqs=new or [])
        x = torch.cat(
            [rows[name][past : past + length] for name, past, length in batch] + [torch.zeros(padding, HIDDEN)]
        )
        names, past, lengths = (list(column) for column in zip(*batch, strict=True))
        tensors: Any = None
        for stage, runtime in zip(self.stages, self.runtimes, strict=True):
            runtime.begin(scheduled)
            runtime.incoming = tensors
            runtime.step(names, past, lengths, len(x))
            assert tensors is None or KEY not in tensors.tensors
            x = self.forward(stage, x)
            tensors = runtime.launched(Sent({"hidden_states": x}))
        output = self.runtimes[-1].report(SimpleNamespace())
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found = {name: x[end - length : end] for (name, _, length), end in zip(batch, ends, strict=True)}
        return found, getattr(output, "steerfast", {})

    def forward(self, stage: list[int], x: Tensor) -> Tensor:
        for layer in stage:
            x = 0.9 * x + self.bias[layer]
            if layer in self.runtimes[0].config.layers:
                residual = None
                if self.pair:
                    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(layer))
                    x = x - residual
                serve_(x, residual, layer)
                x = x if residual is None else x + residual
        return x

    def truth(self, rows: Tensor, prompt: int, name: str | None, strength: float) -> tuple[Tensor, Any]:
        """All rows of a request through all layers, one at a time; each profile's gate values and scores."""
        x = rows.double()
        stack = [] if name is None else [self.profiles[each] for each in name.split(",")]
        decided: list[dict[int, Any]] = [{} for _ in stack]
        for layer in range(LAYERS):
            x = 0.9 * x + self.bias[layer].double()
            for profile, latch in zip(stack, decided, strict=True):
                if layer in profile.gate_layers:
                    latch[layer] = decision(profile, x, prompt, layer)
            edits = torch.zeros_like(x)
            for profile, latch in zip(stack, decided, strict=True):
                gate = 1.0
                if profile.gate.kind != "always":
                    gate = latch.get(layer if profile.sensor == "own" else profile.sensor, (0.0,))[0]
                first = prompt - 1 if profile.positions == "response" else 0
                edits[first : prompt + EditSpan.of(profile).answer_rows] += (
                    gate * strength * float(profile.strength[layer]) * profile.vector[layer].double()
                )
            x = x + edits
        both = [[latch[layer] for layer in sorted(latch)] for latch in decided]
        return x, [([value for value, _ in each], [score for _, score in each]) for each in both]


def decision(profile: SteeringProfile, x: Tensor, prompt: int, layer: int) -> tuple[float, float]:
    """The value and the score of a gate."""
    gate, score = profile.gate, torch.zeros((), dtype=torch.float64)
    begins = turn_of(prompt) + len(TURN) if gate.turn else 0
    until = prompt - gate.tail
    first = max(begins, until - (gate.window or prompt))
    for reads, rows, directions in (
        (gate.pooling != "mean", x[prompt - 1 : prompt], profile.direction),
        (gate.pooling != "last", x[first:until] if first < until else x[prompt - 1 : prompt], profile.read_in_mean),
    ):
        each = rows @ directions[layer].double()
        if gate.score == "cosine":
            each = each / rows.norm(dim=1)
        score = score + each.mean() * reads
    above = score - float(profile.threshold[layer])
    sharp = profile.gate.sharpness
    assert sharp or abs(float(above)) > 1e-4
    return float(torch.sigmoid(sharp * above) if sharp else above > 0), float(score)


def turn_of(prompt: int) -> int:
    """Where the last user turn of a prompt of so many tokens opens."""
    return prompt // 3


def ids_of(prompt: int) -> list[int]:
    """Token ids of a prompt with one or two user turns, or of a prompt that is too short for one."""
    ids, turn = [0] * prompt, turn_of(prompt)
    for place in (0, turn) if turn >= len(TURN) else (turn,):
        ids[place : place + len(TURN)] = TURN
    return ids[:prompt]


class Sent:
    """As vLLM's IntermediateTensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


def asked(name: str, extra: list[dict[str, Any]] | None, prompt: int) -> Any:
    parameters = SimpleNamespace(extra_args=None if extra is None else {KEY: extra})
    return SimpleNamespace(req_id=name, sampling_params=parameters, prompt_token_ids=ids_of(prompt), prompt_embeds=None)


def random_rows(count: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
