"""Light reward and cost heads on the base model's own hidden states: no second model, no second pass.

A head reads the latent state of an answer (`steerfast.guard.latent`), which generation computed anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerfast.errors import GuardError
from steerfast.guard.files import check_model, read_file, write_file
from steerfast.guard.latent import check_states, completed, parts, spread, state_size
from steerfast.guard.scores import Blocks
from steerfast.profile import ModelIdentity

__all__ = ["HiddenHead", "fit_factored_cost", "fit_head"]

_KIND = "head"
_FOLDS = 5
_FACTORED = "harm.direction"
_HARM_PENALTY = 0.5  # on the squared slope: prompts that a line separates would make it infinite


@dataclass(frozen=True, eq=False)
class HiddenHead:
    """A scorer: ``out(gelu(into(x)))`` or, without a hidden layer, ``out(x)``, of the standardised latent state x.

    A cost can be *factored*: an answer is unsafe where the prompt asks for harm and the answer complies. The log-odds
    of both are those of σ(a)·σ(b), −log(e^−a + e^−b + e^−(a+b)). a = ``harm.scale`` · cos(prompt, ``harm.direction``) +
    ``harm.offset``, of the state's part ``prompt``; b = ``comply.out(x)``, with ``comply.into`` as above, of its part
    ``mean``. No choice among answers moves a, and a token moves b by its share of the mean.

    kind: ``cost`` (the log-odds of an unsafe answer, plus `boundary`) or ``reward`` (in the units of its labels).
    model: whose hidden states it reads. boundary: the score at which an answer is as likely unsafe as safe; equal to a
    guard's budget, such an answer spends exactly that.
    fitted: how it was made, and how well it predicts prompts that it was not fitted on; JSON data.
    prompt_layer: of the states that it reads.
    """

    kind: Literal["cost", "reward"]
    model: ModelIdentity
    tensors: Mapping[str, Tensor]
    boundary: float = 0.0
    fitted: Mapping[str, Any] = field(default_factory=dict)
    prompt_layer: int | None = None

    cumulative = True

    def __call__(self, blocks: Blocks) -> Tensor:
        if blocks.hidden is None:
            raise GuardError(f"{self.kind} head: expected hidden states with the answers, got none")
        return self.score(blocks.hidden)

    @torch.no_grad()
    def score(self, hidden: Tensor) -> Tensor:
        """Scores of latent states [n, S]: float32 [n], on their device; NaN where a state is not finite."""
        return torch.where(hidden.isfinite().all(dim=-1), self.raw(hidden) + self.boundary, float("nan"))

    def raw(self, hidden: Tensor) -> Tensor:
        """Scores without the boundary, differentiable: float32 [n], on their device.

        Args:
            hidden: [n, S], latent states, or last rows [n, H] (`steerfast.guard.latent.completed`).
        """
        check_states(f"{self.kind} {_KIND}", hidden, self.model, self.prompt_layer)
        return _forward({name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}, hidden)

    def to(self, device: torch.device | str) -> HiddenHead:
        """The same head with its tensors on `device`, where `score` then copies none."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def check(self, model: ModelIdentity) -> None:
        """Refuse another model than the one it was fitted on (GuardError)."""
        check_model(f"{self.kind} {_KIND}", self.model, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {
            "head": self.kind,
            "boundary": self.boundary,
            "fitted": dict(self.fitted),
            "prompt_layer": self.prompt_layer,
        }
        write_file(path, _KIND, self.tensors, header, self.model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: ModelIdentity | None = None) -> HiddenHead:
        """Read a head; `model`, where given, must be the one it was fitted on.

        Raises:
            GuardError: missing, damaged, no head, of another model.
        """
        tensors, header, identity = read_file(path, _KIND)
        layer = header.get("prompt_layer")
        head = cls(header["head"], identity, tensors, header["boundary"], header["fitted"], layer)
        if model is not None:
            head.check(model)
        return head


def fit_head(
    hidden: Tensor,
    labels: Tensor | Sequence[float],
    model: ModelIdentity,
    kind: Literal["cost", "reward"],
    *,
    prompt_layer: int | None = None,
    groups: Sequence[int] | None = None,
    width: int = 0,
    regularisation: float = 100.0,
    boundary: float = 0.0,
    epochs: int = 200,
    seed: int = 0,
) -> HiddenHead:
    """Fit a head that is not factored.

    Args:
        hidden: float [n, S], latent states of the base model at the end of answers or of parts of them.
        labels: n numbers. ``cost``: above 0 is unsafe, all else safe. ``reward``: any finite numbers.
        prompt_layer: of the states.
        groups: which prompt each example answers: the figures are of prompts that a fold was not fitted on. Default:
            every example for itself.
        width: of a hidden layer (GELU); 0: a linear head, logistic regression or ridge.
        regularisation: weight of the squared weights against the sum of losses, of standardised features; decoupled
            weight decay of regularisation / n where there is a hidden layer.
        boundary: see `HiddenHead`; ``cost`` alone.
        epochs: full-batch steps of Adam where there is a hidden layer.

    Returns:
        The head; ``fitted`` holds ``auc`` (cost) or ``r2`` (reward) over folds of prompts, nan with too few of them.

    Raises:
        GuardError: wrong shapes, non-finite numbers, cost labels of one class, a limit out of range.
    """
    if kind not in ("cost", "reward"):
        raise GuardError(f"kind: expected 'cost' or 'reward', got {kind!r}")
    if kind == "reward" and boundary:
        raise GuardError(f"boundary: only a cost has one, got {boundary:g}")
    x, y, ids = _checked(hidden, "labels", labels, model, prompt_layer, groups)
    if kind == "cost":
        y = _two_classes("labels", y, "safe and unsafe answers", "unsafe")
    options = _options(width, regularisation, epochs, seed)

    def ready(at: np.ndarray) -> bool:
        return kind == "reward" or len(y[at].unique()) == 2

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        standard = _standard(x[at])
        return standard | _fit_layers(_standardised(standard, x[at]), y[at], kind, **options)

    figures = _held_out(x, ids, ready, fit, {"auc" if kind == "cost" else "r2": (y, _forward)})
    about = {**options, "examples": len(y), "groups": len(np.unique(ids)), "mean_label": float(y.mean()), **figures}
    return HiddenHead(kind, model, fit(np.arange(len(x))), boundary, about, prompt_layer)


def fit_factored_cost(
    hidden: Tensor,
    harmful: Tensor | Sequence[float],
    complied: Tensor | Sequence[float],
    model: ModelIdentity,
    prompt_layer: int,
    *,
    direction: Tensor | None = None,
    groups: Sequence[int] | None = None,
    width: int = 0,
    regularisation: float = 100.0,
    boundary: float = 0.0,
    epochs: int = 200,
    seed: int = 0,
) -> HiddenHead:
    """Fit a factored cost: b on all examples, a's slope and offset on one of each prompt.

    Args:
        harmful: n numbers, above 0 where the prompt asks for harm. complied: n numbers, above 0 where the answer does
            what the prompt asks for, whatever that is.
        direction: [H], of the prompts' rows; None: an LDA of these prompts' own (`steerfast.fitting.directions`).
        width, regularisation: of b. All others: see `fit_head`.

    Returns:
        The head; ``fitted`` holds ``auc`` (unsafe: harmful and complied) and ``comply_auc`` (b alone), as `fit_head`.
        A given direction is not fitted anew in the folds.

    Raises:
        GuardError: see `fit_head`; prompts of one kind, answers that all comply or all do not.
        PromptError: no direction, and fewer than two prompts of a kind or too little variation for one.
    """
    x, kind, ids = _checked(hidden, "harmful", harmful, model, prompt_layer, groups)
    _, done, _ = _checked(hidden, "complied", complied, model, prompt_layer, groups)
    kind = _two_classes("harmful", kind, "prompts of both kinds", "harmful")
    done = _two_classes("complied", done, "answers that comply and that do not", "that do")
    options = _options(width, regularisation, epochs, seed)

    def first(at: np.ndarray) -> np.ndarray:
        """An example of each prompt."""
        found: np.ndarray = at[np.unique(ids[at], return_index=True)[1]]
        return found

    def ready(at: np.ndarray) -> bool:
        prompts = kind[first(at)].long().bincount(minlength=2)
        return int(prompts.min()) >= (1 if direction is not None else 2) and len(done[at].unique()) == 2

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        standard = _standard(x[at])
        answers = parts(_standardised(standard, x[at]))[1]
        comply = _fit_layers(answers, done[at], "cost", **options)
        harm = _fit_harm(parts(x[first(at)])[2], kind[first(at)], direction)
        return standard | harm | {f"comply.{name}": tensor for name, tensor in comply.items()}

    unsafe = kind * done
    figures = _held_out(x, ids, ready, fit, {"auc": (unsafe, _forward), "comply_auc": (done, _complied)})
    mean = float(unsafe.mean())
    about = {**options, "examples": len(x), "groups": len(np.unique(ids)), "mean_label": mean, **figures}
    return HiddenHead("cost", model, fit(np.arange(len(x))), boundary, about, prompt_layer)


def _checked(
    hidden: Tensor,
    name: str,
    labels: Tensor | Sequence[float],
    model: ModelIdentity,
    prompt_layer: int | None,
    groups: Sequence[int] | None,
) -> tuple[Tensor, Tensor, np.ndarray]:
    x = hidden.detach().to("cpu", torch.float32)
    y = torch.as_tensor(labels).detach().to("cpu", torch.float32)
    ids = np.arange(len(x)) if groups is None else np.asarray(groups)
    size = state_size(model.hidden_size, prompt_layer)
    if x.shape != (len(y), size) or len(ids) != len(y) or not len(y):
        raise GuardError(
            f"hidden, {name}, groups: expected [n, {size}], [n] and [n], "
            f"got {list(x.shape)}, {list(y.shape)} and [{len(ids)}]"
        )
    for what, values in (("hidden", x), (name, y)):
        if not bool(values.isfinite().all()):
            raise GuardError(f"{what}: expected finite numbers, got {int((~values.isfinite()).sum())} that are not")
    return x, y, ids


def _two_classes(name: str, labels: Tensor, expected: str, counted: str) -> Tensor:
    """1.0 where a label is above 0, else 0.0; there have to be both."""
    y = (labels > 0).float()
    if not 0 < float(y.mean()) < 1:
        raise GuardError(f"{name}: expected {expected}, got {int(y.sum())} {counted} of {len(y)}")
    return y


def _options(width: int, regularisation: float, epochs: int, seed: int) -> dict[str, Any]:
    if width < 0 or epochs < 1 or not regularisation >= 0:
        raise GuardError(
            f"width, epochs, regularisation: expected at least 0, 1 and 0, got {width}, {epochs}, {regularisation}"
        )
    return {"width": width, "regularisation": regularisation, "epochs": epochs, "seed": seed}


# -- the formula -----------------------------------------------------------------------------------


def _forward(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    if _FACTORED not in tensors:
        return _layers(tensors, _standardised(tensors, hidden))
    a, b = _harm(tensors, hidden), _complied(tensors, hidden)
    return -torch.stack([-a, -b, -a - b]).logsumexp(dim=0)


def _harm(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """a: log-odds that the prompt asks for harm."""
    prompt = parts(completed(hidden.float(), tensors["mean"]))[2]
    return F.normalize(prompt, dim=1) @ tensors["harm.direction"] * tensors["harm.scale"] + tensors["harm.offset"]


def _complied(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """b: log-odds that the answer complies."""
    return _layers(tensors, parts(_standardised(tensors, hidden))[1], "comply.")


def _standard(x: Tensor) -> dict[str, Tensor]:
    return {"mean": x.mean(dim=0), "scale": spread(x)}


def _standardised(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    return (completed(hidden.float(), tensors["mean"]) - tensors["mean"]) / tensors["scale"]


def _layers(tensors: Mapping[str, Tensor], x: Tensor, prefix: str = "") -> Tensor:
    if f"{prefix}into.weight" in tensors:
        x = F.gelu(F.linear(x, tensors[f"{prefix}into.weight"], tensors[f"{prefix}into.bias"]))
    return F.linear(x, tensors[f"{prefix}out.weight"], tensors[f"{prefix}out.bias"])[:, 0]


# -- fits ------------------------------------------------------------------------------------------


def _fit_layers(
    rows: Tensor, y: Tensor, kind: str, *, width: int, regularisation: float, epochs: int, seed: int
) -> dict[str, Tensor]:
    """``out`` and, with a width, ``into``, for standardised rows."""
    if not width:
        return _fit_linear(rows.double().numpy(), y.double().numpy(), kind, regularisation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.ModuleDict({"into": nn.Linear(rows.shape[1], width), "out": nn.Linear(width, 1)})
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-2, weight_decay=regularisation / len(y))
    loss = F.binary_cross_entropy_with_logits if kind == "cost" else F.mse_loss
    with torch.enable_grad():
        for _ in range(epochs):
            optimiser.zero_grad()
            loss(_layers(dict(layers.named_parameters()), rows), y).backward()
            optimiser.step()
    return {name: value.detach() for name, value in layers.named_parameters()}


def _fit_linear(rows: np.ndarray, y: np.ndarray, kind: str, regularisation: float) -> dict[str, Tensor]:
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == "cost":
        # The loss of scikit-learn is sum + |w|²/(2C).
        fitted = LogisticRegression(C=0.5 / max(regularisation, 1e-12), max_iter=1000, tol=1e-8).fit(rows, y)
    else:
        fitted = Ridge(alpha=regularisation, solver="cholesky" if regularisation else "svd").fit(rows, y)
    weight = torch.from_numpy(np.atleast_2d(fitted.coef_)).float()
    return {"out.weight": weight, "out.bias": torch.tensor(np.atleast_1d(fitted.intercept_)).float()}


def _fit_harm(rows: Tensor, harmful: Tensor, direction: Tensor | None) -> dict[str, Tensor]:
    """``harm.*`` from a row [H] of each prompt: the direction where none is given, slope and offset."""
    from steerfast.fitting.directions import fit_direction, project, unit

    if direction is None:
        pointing = F.normalize(rows.double(), dim=1)
        direction = fit_direction(pointing[harmful > 0], pointing[harmful == 0], "lda")
    direction = unit(direction).float()
    cosine = project(rows, direction, "cosine")[:, None]
    standard = _standard(cosine)
    fitted = _fit_linear(
        ((cosine - standard["mean"]) / standard["scale"]).numpy(), harmful.double().numpy(), "cost", _HARM_PENALTY
    )
    slope = fitted["out.weight"][0, 0] / standard["scale"][0]
    offset = fitted["out.bias"][0] - slope * standard["mean"][0]
    return {"harm.direction": direction, "harm.scale": slope.float(), "harm.offset": offset.float()}


def _held_out(
    x: Tensor,
    groups: np.ndarray,
    ready: Callable[[np.ndarray], bool],
    fit: Callable[[np.ndarray], Mapping[str, Tensor]],
    wanted: Mapping[str, tuple[Tensor, Callable[[Mapping[str, Tensor], Tensor], Tensor]]],
) -> dict[str, float]:
    """The `wanted` figures of labels [n] and scores, each example scored by a fit on the other prompts: ``r2`` is the
    share of variance explained, all others are AUCs. nan where a fold is not `ready` for a fit, or of one class.
    """
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.model_selection import GroupKFold

    found = dict.fromkeys(wanted, float("nan"))
    count = min(_FOLDS, len(np.unique(groups)))
    folds = list(GroupKFold(count).split(x, groups=groups)) if count > 1 else []
    if not folds or not all(ready(train) for train, _ in folds):
        return found
    scores = {name: torch.empty(len(x)) for name in wanted}
    for train, test in folds:
        tensors = fit(train)
        for name, (_, score) in wanted.items():
            scores[name][test] = score(tensors, x[test])
    for name, (labels, _) in wanted.items():
        if name == "r2" or len(labels.unique()) > 1:
            figure = r2_score if name == "r2" else roc_auc_score
            found[name] = float(figure(labels.numpy(), scores[name].numpy()))
    return found
