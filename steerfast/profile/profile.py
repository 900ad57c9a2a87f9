"""The profile: what a gate reads, what an edit does, and where both came from.

A profile belongs to one model. It knows no model object and no device: tensors live on the CPU in float32,
`steerfast.runtime.bank` puts them on a device and `steerfast.models` attaches them.

File format 1: one safetensors file, data only. Tensors ``layer.<l>.direction`` and ``layer.<l>.vector`` [H],
``layer.<l>.candidate.<kind>`` [H], ``threshold``, ``strength``, ``norm`` and, where gates abstain, ``abstain``
[layers]; everything else is JSON under the header key ``steerfast``, with a SHA-256 over that JSON and every tensor.
The parameters of an edit stand there where the edit has some: ``low`` and ``high`` (null: no limit), ``angle``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from steerfast._files import content_checksum, read_checked, write_checked
from steerfast.errors import ProfileError
from steerfast.profile.checks import check_instance, check_one_of, is_number
from steerfast.profile.identity import ModelIdentity

FORMAT_VERSION = 1

GATE_KINDS = ("always", "prompt", "token")
SCORES = ("cosine", "dot")
POOLINGS = ("last", "mean")
EDITS = ("add", "ablate", "clamp", "keep_norm", "rotate")
POSITIONS = ("all", "response")

_PER_LAYER = ("threshold", "strength", "norm")
_TENSOR_NAME = re.compile(r"layer\.(\d+)\.(direction|vector|candidate\..+)", re.DOTALL)
_LEAST_PLANE = 1.0  # degrees between a vector and a direction that are to span a plane


@dataclass(frozen=True)
class Gate:
    """How a decision is taken.

    kind: ``always`` (no gate), ``prompt`` (decided at the prompt's last token, latched), ``token`` (each row for
        itself).
    score: ``cosine`` or ``dot`` with the layer's direction.
    sharpness: 0 is a hard gate, g = [score > threshold]; above 0 soft, g = sigmoid(sharpness·(score − threshold)).
    pooling: of a prompt gate: the score of the prompt's ``last`` token, or the ``mean`` score of its tokens that the
        model reads then (a chat template's included, those of earlier turns in a cache not).
    window: of so many of them, the last ones, the mean is taken; None: of all. Bounded, text put before a request moves
        the mean only so far.
    """

    kind: Literal["always", "prompt", "token"] = "prompt"
    score: Literal["cosine", "dot"] = "cosine"
    sharpness: float = 0.0
    pooling: Literal["last", "mean"] = "last"
    window: int | None = None

    def __post_init__(self) -> None:
        check_one_of("gate.kind", self.kind, GATE_KINDS)
        check_one_of("gate.score", self.score, SCORES)
        check_one_of("gate.pooling", self.pooling, POOLINGS)
        if self.pooling != "last" and self.kind != "prompt":
            raise ProfileError(f"gate.pooling: expected 'last' for a gate of kind {self.kind!r}, got {self.pooling!r}")
        window = self.window
        if window is not None and not (isinstance(window, int) and not isinstance(window, bool) and window >= 1):
            raise ProfileError(f"gate.window: expected None or a whole number >= 1, got {window!r}")
        if window is not None and self.pooling != "mean":
            raise ProfileError(f"gate.window: expected None where no mean is read, got {window}")
        if not (is_number(self.sharpness) and 0 <= self.sharpness < math.inf):
            raise ProfileError(f"gate.sharpness: expected a finite number >= 0, got {self.sharpness!r}")


@dataclass(frozen=True, eq=False)
class SteeringProfile:
    """Directions, thresholds, steering vectors and strengths of every decoder layer of one model.

    Args:
        model: the model the profile belongs to.
        direction: float32 [layers, H], unit rows; what the gate reads. A zero row: the layer has no gate.
        threshold: float32 [layers], in units of the score.
        vector: float32 [layers, H], residual-stream units; what the edit works with. A zero row: no edit.
        strength: float32 [layers]; 0: the layer is not steered.
        norm: float32 [layers], mean norm of the residual rows the profile was fitted on; 0 where unknown.
        gate: how a decision is taken.
        abstain: float32 [layers], at most the threshold, -inf for no lower end: a score above it that does not exceed
            the threshold lies in its abstain band. The gate stays shut there, as without a band, but does not know
            (`undecided`). None: no band.
        edit: what an open gate does to a row x, with b = strength · gate value.
            ``add``: x + b·v. ``keep_norm``: x + b·v, scaled back to the norm of x.
            ``ablate``: takes the component along v out. ``clamp``: moves the coefficient along v, ⟨x,v⟩/⟨v,v⟩, into
            ``low``..``high``; ``low == high`` sets it. ``rotate``: turns the part of x in the plane of v and the
            direction to ``angle`` and keeps its length (angular steering, Vu & Nguyen). These three go the share b of
            the way: at b = 1 they are done.
        low, high: the limits of ``clamp``, in units of v; one of them may be infinite.
        angle: the target of ``rotate`` in degrees: 0 is along v, 90 is orthogonal to it on the direction's side.
        sensor: ``"own"`` (each layer decides for itself, arXiv 2401.11206) or the layer that decides for itself and
            every other one. Steered layers before it know the decision in a second pass over the prompt, which only
            sequences whose gate fired take (`second_pass`); a token gate has none and refuses them.
        positions: ``"all"`` edits every token of a fired prompt and all that follows, ``"response"`` the prompt's
            last token and all that follows.
        answer_tokens: how many tokens of an answer are chosen under steering: the rows that predict the tokens after
            those stay as they are. None: all of them. 1: the first, so that no row of the answer is edited.
        vector_kind: how `vector` was made (``ssv``, ``alignment``, ``forced``, ``srv``, ``learned`` or an importer's
            word).
        candidates: other steering vectors, kind -> float32 [layers, H], for `steerfast.tune` to choose from.
        fitted, calibration, tuned: how it was made and measured; JSON data.

    Raises:
        ProfileError: a wrong shape, a non-finite value, a direction that is not unit, an unknown word.
    """

    model: ModelIdentity
    direction: Tensor
    threshold: Tensor
    vector: Tensor
    strength: Tensor
    norm: Tensor
    gate: Gate = Gate()
    abstain: Tensor | None = None
    edit: Literal["add", "ablate", "clamp", "keep_norm", "rotate"] = "add"
    low: float = -math.inf
    high: float = math.inf
    angle: float | None = None
    sensor: int | Literal["own"] = "own"
    positions: Literal["all", "response"] = "all"
    answer_tokens: int | None = None
    vector_kind: str = "ssv"
    candidates: Mapping[str, Tensor] = field(default_factory=dict)
    fitted: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, hidden = self.model.num_layers, self.model.hidden_size
        wide = {"direction": self.direction, "vector": self.vector}
        wide |= {f"candidates[{kind!r}]": tensor for kind, tensor in self.candidates.items()}
        for name, tensor in wide.items():
            _check_tensor(name, tensor, (layers, hidden))
        for name in _PER_LAYER:
            _check_tensor(name, getattr(self, name), (layers,))
        self._check_abstain()
        length = self.direction.norm(dim=1)
        wrong = ((length > 0) & ((length - 1).abs() > 1e-3)).nonzero()
        if len(wrong):
            layer = int(wrong[0])
            raise ProfileError(f"direction of layer {layer}: expected unit norm, got norm {float(length[layer]):.4g}")
        check_instance("vector_kind", self.vector_kind, str, "a string")
        for name in ("fitted", "calibration", "tuned"):
            check_instance(name, getattr(self, name), Mapping, "a mapping")
        self._check_edit()
        check_one_of("positions", self.positions, POSITIONS)
        tokens = self.answer_tokens
        if tokens is not None and not (isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1):
            raise ProfileError(f"answer_tokens: expected None or a whole number >= 1, got {tokens!r}")
        if self.sensor != "own" and not (isinstance(self.sensor, int) and 0 <= self.sensor < layers):
            raise ProfileError(f"sensor: expected 'own' or a layer in 0..{layers - 1}, got {self.sensor!r}")
        self._check_steered(length)

    def _check_abstain(self) -> None:
        if self.abstain is None:
            return
        check_instance("abstain", self.abstain, Tensor, "a tensor or None")
        _check_tensor("abstain", self.abstain, (self.model.num_layers,), open_below=True)
        if len(above := (self.abstain > self.threshold).nonzero()):
            layer = int(above[0])
            raise ProfileError(
                f"abstain of layer {layer}: expected at most its threshold, {float(self.threshold[layer]):g}, "
                f"got {float(self.abstain[layer]):g}"
            )

    def _check_edit(self) -> None:
        check_one_of("edit", self.edit, EDITS)
        for name, wrong in (("low", math.inf), ("high", -math.inf)):
            value = getattr(self, name)
            if not is_number(value) or value == wrong:
                raise ProfileError(f"{name}: expected a number or {-wrong}, got {value!r}")
        limited = (self.low, self.high) != (-math.inf, math.inf)
        if self.edit == "clamp":
            if not limited:
                raise ProfileError("low, high: a clamp expects at least one limit, got none")
            if self.low > self.high:
                raise ProfileError(f"low: expected at most high, {self.high:g}, got {self.low:g}")
        elif limited:
            raise ProfileError(f"low, high: only a clamp has limits, got {self.low:g}..{self.high:g} for {self.edit!r}")
        if self.edit == "rotate":
            if not is_number(self.angle) or math.isinf(self.angle):
                raise ProfileError(f"angle: a rotation expects a finite number of degrees, got {self.angle!r}")
        elif self.angle is not None:
            raise ProfileError(f"angle: only a rotation has one, got {self.angle!r} for {self.edit!r}")

    def _check_steered(self, direction_norm: Tensor) -> None:
        steered = self.steered_layers
        for layer in steered:
            if not bool(self.vector[layer].any()):
                raise ProfileError(
                    f"strength of layer {layer}: {float(self.strength[layer]):g}, but its vector is zero"
                )
            if self.edit == "rotate":
                self._check_plane(layer)
        if self.gate.kind == "always" or not steered:
            return
        if self.sensor != "own" and steered[0] < self.sensor and self.gate.kind == "token":
            raise ProfileError(
                f"sensor: with a token gate layer {self.sensor} decides for itself and later layers, "
                f"but layer {steered[0]} before it has strength {float(self.strength[steered[0]]):g}"
            )
        for layer in steered if self.sensor == "own" else [self.sensor]:
            if not direction_norm[layer] > 0:
                raise ProfileError(f"direction of layer {layer}: a {self.gate.kind} gate reads it, but it is zero")

    def _check_plane(self, layer: int) -> None:
        v, d = self.vector[layer].double(), self.direction[layer].double()
        rest = (d - v * (v @ d) / (v @ v)).norm()  # of the direction, beside the vector
        if not rest >= d.norm() * math.sin(math.radians(_LEAST_PLANE)) > 0:
            raise ProfileError(
                f"direction of layer {layer}: a rotation turns in the plane of the direction and the vector, expected "
                f"them at least {_LEAST_PLANE:g} degree from parallel"
            )

    @property
    def steered_layers(self) -> list[int]:
        """Layers with a strength other than 0, ascending."""
        return [int(layer) for layer in self.strength.nonzero().flatten()]

    @property
    def second_pass(self) -> bool:
        """Whether a layer before the sensor is steered: a prompt that fires is then read a second time."""
        gated = self.sensor != "own" and self.gate.kind == "prompt"
        return gated and any(layer < self.sensor for layer in self.steered_layers)  # type: ignore[operator]

    @property
    def gate_layers(self) -> list[int]:
        """Layers whose gate decides: the sensor, or each steered layer; none for an ``always`` gate."""
        if self.gate.kind == "always":
            return []
        return self.steered_layers if self.sensor == "own" else [self.sensor]

    @property
    def deciding_layers(self) -> list[int]:
        """Layers whose gate decides, or will once a layer is steered."""
        return self.gate_layers or ([] if self.sensor == "own" else [self.sensor])

    def undecided(self, scores: Tensor) -> Tensor:
        """Whether the gates do not know: none of them opens, and the score of at least one lies in its band.

        Args:
            scores: [..., layers] on the CPU, every layer's; those of `gate_layers` count. NaN opens a gate.

        Returns:
            bool [...]; False throughout where `abstain` is None.
        """
        if self.abstain is None:
            return torch.zeros(scores.shape[:-1], dtype=torch.bool, device="cpu")
        gates = self.gate_layers
        decided = scores[..., gates]
        shut = (decided <= self.threshold[gates]).all(dim=-1)
        return shut & (decided > self.abstain[gates]).any(dim=-1)

    def with_vector(self, kind: str) -> SteeringProfile:
        """The same profile, adding the candidate vectors of `kind`."""
        if kind == self.vector_kind:
            return self
        if kind not in self.candidates:
            have = ", ".join(sorted({self.vector_kind, *self.candidates}))
            raise ProfileError(f"vector: expected one of {have}, got {kind!r}")
        rest = {k: v for k, v in self.candidates.items() if k != kind} | {self.vector_kind: self.vector}
        return replace(self, vector=self.candidates[kind], vector_kind=kind, candidates=rest)

    def with_band(self, layers: range | list[int], strength: float) -> SteeringProfile:
        """The same profile, steering exactly `layers`, each at `strength`."""
        values = torch.zeros_like(self.strength)
        for layer in layers:
            if not 0 <= layer < self.model.num_layers:
                raise ProfileError(f"layer: expected 0..{self.model.num_layers - 1}, got {layer}")
            values[layer] = strength
        return replace(self, strength=values)

    @property
    def checksum(self) -> str:
        """SHA-256 over all that the profile holds."""
        return content_checksum(self._header(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` (safetensors). The file appears whole or not at all.

        Raises:
            OutputError: `path` cannot be written.
        """
        write_checked(path, self._header(), self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringProfile:
        """Read a profile and verify all of it.

        Raises:
            ProfileError: missing, truncated, not a profile, a newer format, a wrong checksum, inconsistent content.
        """
        header, tensors = read_checked(path, "profile", FORMAT_VERSION, ProfileError)
        try:
            return cls._from_parts(header, tensors)
        except ProfileError as error:
            raise ProfileError(f"profile {str(path)!r}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"profile {str(path)!r}: incomplete or malformed ({error!r})") from None

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "model": asdict(self.model),
            "gate": asdict(self.gate),
            "edit": self.edit,
            "sensor": self.sensor,
            "positions": self.positions,
            "vector_kind": self.vector_kind,
            "fitted": self.fitted,
            "calibration": self.calibration,
            "tuned": self.tuned,
        }
        if self.edit == "clamp":
            header |= {name: _finite_or_none(getattr(self, name)) for name in ("low", "high")}
        if self.edit == "rotate":
            header["angle"] = self.angle
        for name, default in (("pooling", "last"), ("window", None)):  # profiles without them keep their checksums
            if header["gate"][name] == default:
                del header["gate"][name]
        if self.answer_tokens is not None:
            header["answer_tokens"] = self.answer_tokens
        try:
            return json.loads(json.dumps(header))  # so that it hashes the same before and after a round trip
        except (TypeError, ValueError) as error:
            raise ProfileError(f"fitted, calibration, tuned: expected JSON data ({error})") from None

    def _tensors(self) -> dict[str, Tensor]:
        # Copies: safetensors refuses tensors that share memory.
        tensors = {name: getattr(self, name).clone() for name in _PER_LAYER}
        if self.abstain is not None:
            tensors["abstain"] = self.abstain.clone()
        wide = {"direction": self.direction, "vector": self.vector}
        wide |= {f"candidate.{kind}": tensor for kind, tensor in self.candidates.items()}
        for name, tensor in wide.items():
            for layer in tensor.any(dim=1).nonzero().flatten().tolist():
                tensors[f"layer.{layer}.{name}"] = tensor[layer].clone()
        return tensors

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> SteeringProfile:
        identity = dict(header["model"])
        if identity["embedding_sketch"] is not None:
            identity["embedding_sketch"] = tuple(identity["embedding_sketch"])
        model = ModelIdentity(**identity)
        shape = (model.num_layers, model.hidden_size)
        zeros = partial(torch.zeros, shape, dtype=torch.float32, device="cpu")
        wide = {"direction": zeros(), "vector": zeros()}
        for name, tensor in tensors.items():
            if name in (*_PER_LAYER, "abstain"):
                continue
            match = _TENSOR_NAME.fullmatch(name)
            if match is None or int(match[1]) >= model.num_layers:
                raise ProfileError(
                    f"tensor {name!r}: expected layer.<l>.direction, .vector or .candidate.<kind>, "
                    f"l in 0..{model.num_layers - 1}"
                )
            _check_tensor(name, tensor, (model.hidden_size,))
            wide.setdefault(match[2], zeros())[int(match[1])] = tensor
        return cls(
            model=model,
            direction=wide.pop("direction"),
            vector=wide.pop("vector"),
            threshold=tensors["threshold"],
            strength=tensors["strength"],
            norm=tensors["norm"],
            gate=Gate(**header["gate"]),
            abstain=tensors.get("abstain"),
            edit=header["edit"],
            low=-math.inf if header.get("low") is None else header["low"],
            high=math.inf if header.get("high") is None else header["high"],
            angle=header.get("angle"),
            sensor=header["sensor"],
            positions=header["positions"],
            answer_tokens=header.get("answer_tokens"),
            vector_kind=header["vector_kind"],
            candidates={name.removeprefix("candidate."): tensor for name, tensor in wide.items()},
            fitted=header["fitted"],
            calibration=header["calibration"],
            tuned=header["tuned"],
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, open_below: bool = False) -> None:
    if tuple(tensor.shape) != shape:
        raise ProfileError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ProfileError(f"{name}: expected float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    allowed = tensor.isfinite() | (tensor.isneginf() if open_below else False)
    if not bool(allowed.all()):
        where = [int(i) for i in (~allowed).nonzero()[0]]
        numbers = "finite numbers or -inf" if open_below else "finite numbers"
        raise ProfileError(f"{name}: expected {numbers}, got {float(tensor[tuple(where)])} at {where}")
