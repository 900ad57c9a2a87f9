"""The profile: what a gate reads, what an edit does, and where both came from.

A profile belongs to one model. It knows no model object and no device: its tensors are float32 on the CPU.
`steerfast.runtime.bank` puts them on a device, `steerfast.hf` and `steerfast.vllm` attach them to a model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steerfast._files import checked_bytes, content_checksum, read_checked, write_checked
from steerfast.errors import ProfileError
from steerfast.kernels.edit_kinds import EDITS
from steerfast.profile import file, hub
from steerfast.profile.checks import check_instance, check_one_of, check_tensor, is_count, is_layer, is_real
from steerfast.profile.gate import Gate
from steerfast.profile.identity import ModelIdentity

if TYPE_CHECKING:
    from steerfast.profile.stack import ProfileStack

POSITIONS = ("all", "response")

_POINT = re.compile(r"[a-z0-9_-]{1,32}", re.ASCII)
_LEAST_PLANE = 1.0  # degrees between a vector and a direction that are to span a plane


def _line(profile: SteeringProfile) -> str:
    """Return a line about a profile."""
    gate = "no gate" if profile.gate.kind == "always" else f"a {profile.gate.kind} gate"
    layers = ", ".join(map(str, profile.steered_layers)) or "none"
    edit = f"{profile.edit} ({profile.vector_kind!r}) at layers {layers}"
    return f"<SteeringProfile of {profile.model.name!r}: {gate}, {edit}>"


@dataclass(frozen=True, eq=False)
class SteeringProfile:
    """Directions, thresholds, steering vectors and strengths of every decoder layer of one model.

    Args:
        model: the model the profile belongs to.
        direction: float32 [layers, H], which the gate reads; unit rows for the score ``cosine``. A zero row: the layer
            has no gate. With ``gate.pooling="both"`` the pair of `direction` and `mean_direction` may have norm 1
            instead, ‖d‖² + ‖m‖² = 1: so one reading may weigh more than the other.
        threshold: float32 [layers], in units of the score.
        vector: float32 [layers, H], in units of the residual stream, which the edit uses. A zero row: no edit.
        strength: float32 [layers]; 0: the layer is not steered.
        norm: float32 [layers], mean norm of the residual rows that the profile was fitted on; of pairs the median. 0
            where unknown.
        gate: how the profile decides.
        mean_direction: float32 [layers, H], what the gate reads in the mean over a prompt; None: `direction`.
        abstain: float32 [layers], at most the threshold; -inf: no lower end. A score above it and not above the
            threshold lies in the abstain band. There the gate stays shut, and the profile is `undecided`. None: no
            band.
        points: named thresholds, name -> float32 [layers], such as ``strict`` (lower, so it fires more), ``balanced``
            and ``permissive`` (higher, so it fires less). `threshold` is the one in use, `at` chooses another.
        edit: what an open gate does to a row: a name of `EDITS`, whose records describe each kind.
        low, high, angle: the parameters of the kinds ``clamp`` and ``rotate``, see `EDITS`.
        sensor: ``"own"`` (each layer decides for itself, arXiv 2401.11206), or the layer that decides for all layers.
            Steered layers before the sensor get the decision in a second pass over the prompt, which only sequences
            whose gate fired take (`second_pass`). A token gate has no second pass and refuses such layers.
        positions: ``"all"`` edits every token of a fired prompt and all that follow, ``"response"`` the last token of
            the prompt and all that follow.
        answer_tokens: how many tokens of an answer are chosen under steering; the rows that predict later tokens are
            not edited. None: all tokens. 1: the first token, so no row of the answer is edited.
        vector_kind: how `vector` was made (``ssv``, ``alignment``, ``forced``, ``srv``, ``learned`` or a word of an
            importer).
        candidates: other steering vectors, kind -> float32 [layers, H], for `steerfast.tune` to choose from.
        fitted, calibration, tuned: how the profile was made and measured; JSON data.

    Raises:
        ProfileError: a wrong shape, a non-finite value, a direction that is not unit, an unknown word.
    """

    model: ModelIdentity
    direction: Tensor
    threshold: Tensor
    vector: Tensor
    strength: Tensor
    norm: Tensor
    gate: Gate = field(default_factory=Gate)
    mean_direction: Tensor | None = None
    abstain: Tensor | None = None
    points: Mapping[str, Tensor] = field(default_factory=dict)
    edit: str = "add"
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
        directions = {"direction": self.direction}
        if self.mean_direction is not None:
            if self.gate.pooling == "last":
                raise ProfileError("mean_direction: expected None where no mean is read, got a tensor")
            directions["mean_direction"] = self.mean_direction
        wide = {**directions, "vector": self.vector}
        wide |= {f"candidates[{kind!r}]": tensor for kind, tensor in self.candidates.items()}
        for name, tensor in wide.items():
            check_tensor(name, tensor, (layers, hidden))
        for name in file.PER_LAYER:
            check_tensor(name, getattr(self, name), (layers,))
        self._check_points()
        self._check_abstain()
        if self.gate.score == "cosine":
            _check_unit(directions, self.gate)
        check_instance("vector_kind", self.vector_kind, str, "a string")
        for name in ("fitted", "calibration", "tuned"):
            check_instance(name, getattr(self, name), Mapping, "a mapping")
        self._check_edit()
        check_one_of("positions", self.positions, POSITIONS)
        if self.answer_tokens is not None and not is_count(self.answer_tokens):
            raise ProfileError(f"answer_tokens: expected None or a whole number >= 1, got {self.answer_tokens!r}")
        if self.sensor != "own" and not is_layer(self.sensor, self.model):
            raise ProfileError(f"sensor: expected 'own' or a layer in 0..{layers - 1}, got {self.sensor!r}")
        self._check_steered(self.direction.norm(dim=1))

    __repr__ = _line

    def _check_points(self) -> None:
        check_instance("points", self.points, Mapping, "a mapping of names and thresholds")
        for name, threshold in self.points.items():
            if not (isinstance(name, str) and _POINT.fullmatch(name)):
                raise ProfileError(f"points: expected names of 1 to 32 of a-z, 0-9, '_' and '-', got {name!r}")
            check_instance(f"points[{name!r}]", threshold, Tensor, "a tensor")
            check_tensor(f"points[{name!r}]", threshold, (self.model.num_layers,))

    def _check_abstain(self) -> None:
        if self.abstain is None:
            return
        check_instance("abstain", self.abstain, Tensor, "a tensor or None")
        check_tensor("abstain", self.abstain, (self.model.num_layers,), open_below=True)
        if len(above := (self.abstain > self.threshold).nonzero()):
            layer = int(above[0])
            raise ProfileError(
                f"abstain of layer {layer}: expected at most its threshold, {float(self.threshold[layer]):g}, "
                f"got {float(self.abstain[layer]):g}"
            )

    def _check_edit(self) -> None:
        check_one_of("edit", self.edit, EDITS)
        for edit in EDITS.values():
            given = edit.given(self)
            problem = edit.check(**given) if edit.name == self.edit else None
            if edit.name != self.edit and given != edit.defaults:
                problem = f"{edit.misplaced(**given)} for {self.edit!r}"
            if problem is not None:
                raise ProfileError(problem)

    def _check_steered(self, direction_norm: Tensor) -> None:
        steered = self.steered_layers
        for layer in steered:
            if not bool(self.vector[layer].any()):
                raise ProfileError(
                    f"strength of layer {layer}: {float(self.strength[layer]):g}, but its vector is zero"
                )
            if EDITS[self.edit].reads_direction:
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
        rest = (d - v * (v @ d) / (v @ v)).norm()  # of the direction, orthogonal to the vector
        if not rest >= d.norm() * math.sin(math.radians(_LEAST_PLANE)) > 0:
            raise ProfileError(
                f"direction of layer {layer}: a rotation turns in the plane of the direction and the vector, expected "
                f"them at least {_LEAST_PLANE:g} degree from parallel"
            )

    @property
    def read_in_mean(self) -> Tensor:
        """Return what the gate reads in the mean over a prompt, float32 [layers, H]."""
        return self.direction if self.mean_direction is None else self.mean_direction

    @property
    def steered_layers(self) -> list[int]:
        """Return the layers with a strength other than 0, ascending."""
        return [int(layer) for layer in self.strength.nonzero().flatten()]

    @property
    def second_pass(self) -> bool:
        """Say whether a layer before the sensor is steered: a prompt that fires is then read a second time."""
        gated = self.sensor != "own" and self.gate.kind == "prompt"
        return gated and any(layer < self.sensor for layer in self.steered_layers)  # type: ignore[operator]

    @property
    def reads_end(self) -> bool:
        """Whether steering depends on which token is the prompt's last."""
        return self.positions == "response" or self.gate.kind == "prompt"

    @property
    def gate_layers(self) -> list[int]:
        """Return the layers whose gate decides: the sensor, or each steered layer; none for an ``always`` gate."""
        if self.gate.kind == "always":
            return []
        return self.steered_layers if self.sensor == "own" else [self.sensor]

    @property
    def deciding_layers(self) -> list[int]:
        """Return the layers whose gate decides, or will decide once a layer is steered."""
        return self.gate_layers or ([] if self.sensor == "own" else [self.sensor])

    def undecided(self, scores: Tensor) -> Tensor:
        """Say whether the profile abstains: no gate opens, and the score of at least one lies in its band.

        Args:
            scores: [..., layers] on the CPU, of every layer; those of `gate_layers` count. NaN opens a gate.

        Returns:
            bool [...]; False throughout where `abstain` is None.
        """
        if self.abstain is None:
            return torch.zeros(scores.shape[:-1], dtype=torch.bool, device="cpu")
        gates = self.gate_layers
        decided = scores[..., gates]
        shut = (decided <= self.threshold[gates]).all(dim=-1)
        return shut & (decided > self.abstain[gates]).any(dim=-1)

    @property
    def point(self) -> str | None:
        """Return the name that `points` has for the threshold in use; None: it has none."""
        return next((name for name, threshold in self.points.items() if torch.equal(threshold, self.threshold)), None)

    def at(self, point: str) -> SteeringProfile:
        """Return the same profile with the threshold of this name; its band ends at that threshold or below.

        Raises:
            ProfileError: the profile has no such point.
        """
        if point not in self.points:
            have = ", ".join(sorted(self.points)) or "none, as this profile has one threshold"
            raise ProfileError(f"threshold: expected one of {have}, got {point!r}")
        threshold = self.points[point]
        abstain = None if self.abstain is None else self.abstain.minimum(threshold)
        return replace(self, threshold=threshold, abstain=abstain)

    def without_gate(self) -> SteeringProfile:
        """Return the same profile without its gate: it steers every sequence."""
        unit = torch.nn.functional.normalize(self.direction, dim=1)  # a pair's part is shorter
        return replace(self, gate=Gate("always"), direction=unit, mean_direction=None)

    def with_vector(self, kind: str) -> SteeringProfile:
        """Return the same profile with the candidate vectors of `kind`."""
        if kind == self.vector_kind:
            return self
        if kind not in self.candidates:
            have = ", ".join(sorted({self.vector_kind, *self.candidates}))
            raise ProfileError(f"vector: expected one of {have}, got {kind!r}")
        rest = {k: v for k, v in self.candidates.items() if k != kind} | {self.vector_kind: self.vector}
        return replace(self, vector=self.candidates[kind], vector_kind=kind, candidates=rest)

    def with_band(self, layers: range | list[int], strength: float) -> SteeringProfile:
        """Return the same profile that steers exactly `layers`, each with `strength`."""
        values = torch.zeros_like(self.strength)
        for layer in layers:
            self._check_layer(layer)
            values[layer] = strength
        return replace(self, strength=values)

    def _check_layer(self, layer: object) -> None:
        if not is_layer(layer, self.model):
            raise ProfileError(f"layer: expected 0..{self.model.num_layers - 1}, got {layer!r}")

    def only(self, layers: Iterable[int]) -> SteeringProfile:
        """Return the same profile that steers no other layers: ``profile.only(range(10, 20))``. Gates stay.

        Raises:
            ProfileError: a layer that the model does not have, or none of `layers` is steered.
        """
        kept = set(layers)
        for layer in kept:
            self._check_layer(layer)
        chosen = torch.tensor([layer in kept for layer in range(self.model.num_layers)], device="cpu")
        strength = self.strength.where(chosen, 0.0)
        if not bool(strength.any()):
            raise ProfileError(f"layers: expected some of {self.steered_layers}, which are steered, got {sorted(kept)}")
        return replace(self, strength=strength)

    def for_model(self, model: ModelIdentity) -> SteeringProfile:
        """Return the same profile for another model of its shape. A mismatch is kept in ``fitted["accepted"]``.

        Raises:
            ProfileError: the model has other layers or another hidden size.
        """
        problem = self.model.mismatch(model)
        if problem is None:
            return self
        for of in ("hidden_size", "num_layers"):
            if getattr(self.model, of) != getattr(model, of):
                raise ProfileError(f"model: no profile fits a model of another shape; {problem}")
        accepted = [*self.fitted.get("accepted", ()), {"model": model.name, "mismatch": problem}]
        return replace(self, model=model, fitted={**self.fitted, "accepted": accepted})

    # -- algebra -----------------------------------------------------------------------------------------------------

    def __mul__(self, factor: Any) -> SteeringProfile:
        """Return the same profile with `factor` times its strengths. Gates stay."""
        if not is_real(factor):
            return NotImplemented
        return replace(self, strength=(self.strength.double() * factor).float())

    __rmul__ = __mul__

    def __neg__(self) -> SteeringProfile:
        """Return the same profile with its vectors turned around. Gates stay.

        Raises:
            ProfileError: the edit is an ablation, which takes both ways out.
        """
        if self.edit == "ablate":
            raise ProfileError("edit: an ablation has no opposite, as it takes out both ways along its vector")
        candidates = {_opposite(kind): -vector for kind, vector in self.candidates.items()}
        return replace(self, vector=-self.vector, vector_kind=_opposite(self.vector_kind), candidates=candidates)

    def __add__(self, other: Any) -> ProfileStack:
        """Return a stack of both: each gate decides for its own profile, and edits follow in order."""
        from steerfast.profile.stack import ProfileStack

        return ProfileStack([self]).__add__(other)

    def __sub__(self, other: Any) -> ProfileStack:
        from steerfast.profile.stack import ProfileStack

        return ProfileStack([self]).__sub__(other)

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def checksum(self) -> str:
        """Return the SHA-256 over the whole content."""
        return content_checksum(file.header(self), file.tensors(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` (safetensors). The file appears whole or not at all.

        Raises:
            OutputError: `path` cannot be written.
        """
        write_checked(path, file.header(self), file.tensors(self))

    def push_to_hub(self, repository: str, *, message: str = "Upload a steerfast profile", **options: Any) -> str:
        """Write the profile to a repository of the HuggingFace hub, which is made where there is none.

        Args:
            repository: ``owner/name``. options: private, token, revision.

        Returns:
            The address of the commit.

        Raises:
            OutputError: no token, no permission or no network.
        """
        return hub.upload(checked_bytes(file.header(self), file.tensors(self)), repository, message=message, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> SteeringProfile:
        """Read a profile from its file, a model's folder, or a repository of the HuggingFace hub.

        Args:
            options: of the hub: revision, token, cache_dir, local_files_only.

        Raises:
            ProfileError: as `load`, or the hub has no such profile or cannot be reached.
        """
        return cls.load(hub.find(os.fspath(name), **options))

    @classmethod
    def from_tensors(
        cls,
        vectors: Mapping[int, Tensor],
        model: ModelIdentity,
        *,
        strength: float | Mapping[int, float] = 1.0,
        **fields: Any,
    ) -> SteeringProfile:
        """Return a profile without a gate that adds vectors to every sequence.

        Args:
            vectors: layer -> [H] of any float dtype, in units of the residual stream, added to the layer's output.
            model: `steerfast.identify(model, tokenizer)`.
            strength: of all layers, or layer -> strength; a layer without one is not steered.
            fields: other fields of a profile, such as ``positions``, ``edit`` or a gate with its direction.

        Raises:
            ProfileError: a layer that the model does not have, a vector of another size, or as the class.
        """
        zeros = torch.zeros(model.num_layers, model.hidden_size, dtype=torch.float32, device="cpu")
        rows, strengths = zeros.clone(), zeros[:, 0].clone()
        for layer, vector in vectors.items():
            if not is_layer(layer, model):
                raise ProfileError(f"vectors: expected layers in 0..{model.num_layers - 1}, got {layer!r}")
            if not isinstance(vector, Tensor) or tuple(vector.shape) != (model.hidden_size,):
                shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
                raise ProfileError(f"vectors[{layer}]: expected a tensor [{model.hidden_size}], got {shape}")
            rows[layer] = vector.detach().to("cpu", torch.float32)
            value = strength.get(layer, 0.0) if isinstance(strength, Mapping) else strength
            if not is_real(value):
                raise ProfileError(f"strength: expected a number of each layer, got {value!r}")
            # Infinite where float32 cannot hold it.
            strengths[layer] = torch.tensor(value, dtype=torch.float64, device="cpu")
        plain: dict[str, Any] = {"direction": zeros, "threshold": zeros[:, 0].clone(), "norm": zeros[:, 0].clone()}
        plain |= {"gate": Gate("always"), "vector_kind": "given", **fields}
        return cls(model=model, vector=rows, strength=strengths, **plain)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringProfile:
        """Read a profile and verify all of it.

        Raises:
            ProfileError: missing, truncated, not a profile, a newer format, a wrong checksum, inconsistent content, or
                a stack (`ProfileStack.load`).
        """
        profile, *others = read(path)
        if others:
            raise ProfileError(
                f"profile {str(path)!r}: expected one profile, got a stack of {len(others) + 1}; save each of its "
                "profiles, `for profile in ProfileStack.load(...)`"
            )
        return profile


def read(path: str | os.PathLike[str]) -> list[SteeringProfile]:
    """Read the profiles of a file, which holds one or a stack; errors as `SteeringProfile.load`."""
    content, tensors = read_checked(path, "profile", file.FORMAT_VERSION, ProfileError)
    try:
        return [SteeringProfile(**file.fields(*part)) for part in file.parts(content, tensors)]
    except ProfileError as error:
        raise ProfileError(f"profile {str(path)!r}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"profile {str(path)!r}: incomplete or malformed ({error!r})") from None


def _opposite(kind: str) -> str:
    return kind[1:] if kind.startswith("-") else f"-{kind}"


def _check_unit(directions: Mapping[str, Tensor], gate: Gate) -> None:
    """Raise ProfileError if a row is neither zero nor of norm 1; a gate that reads both may have a pair of norm 1."""
    norms = {name: tensor.norm(dim=1) for name, tensor in directions.items()}
    pairs = gate.pooling == "both" and len(norms) == 2
    is_pair = _is_unit(torch.stack([*norms.values()]).norm(dim=0)) if pairs else False
    for name, norm in norms.items():
        wrong = (~((norm == 0) | _is_unit(norm) | is_pair)).nonzero()
        if len(wrong):
            layer = int(wrong[0])
            pair = " or a pair of norm 1 with the other direction" if pairs else ""
            raise ProfileError(f"{name} of layer {layer}: expected unit norm{pair}, got norm {float(norm[layer]):.4g}")


def _is_unit(norm: Tensor) -> Tensor:
    return (norm - 1).abs() <= 1e-3
