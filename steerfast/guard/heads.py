"""Reward and cost heads on the base model's own hidden states: no second model, no second pass.

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
from steerfast.guard.latent import check_states, parts, spread, state_size
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

    A cost can be *factored*: an answer is unsafe if the prompt asks for harm and the answer complies. The log-odds of
    both are those of σ(a)·σ(b), −log(e^−a + e^−b + e^−(a+b)). a = ``harm.scale`` · cos(prompt, ``harm.direction``) +
    ``harm.offset``, of the state's part ``prompt``; b = ``comply.out(x)``, with ``comply.into`` as above, of its part
    ``mean``. No answer changes a, and one token changes b only by its share of the mean.

    kind: ``cost`` (the log-odds of an unsafe answer, plus `boundary`) or ``reward`` (in the units of its labels).
    model: the model whose hidden states it reads. boundary: the score of an answer that is as likely unsafe as safe; if
    that equals a guard's budget, such an answer spends exactly the budget.
    fitted: options of the fit, and its accuracy on prompts that it was not fitted on; JSON data.
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
        """Return scores of latent states [n, S]: float32 [n], on their device; NaN for a state that is not finite."""
        return torch.where(hidden.isfinite().all(dim=-1), self.raw(hidden) + self.boundary, float("nan"))

    def raw(self, hidden: Tensor) -> Tensor:
        """Return scores without the boundary of latent states [n, S], differentiable: float32 [n], on their device."""
        check_states(f"{self.kind} {_KIND}", hidden, self.model, self.prompt_layer)
        return _forward({name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}, hidden)

    def to(self, device: torch.device | str) -> HiddenHead:
        """Return the same head with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def check(self, model: ModelIdentity) -> None:
        """Raise GuardError if the head was fitted on another model."""
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
        """Read a head; if `model` is given, the head must have been fitted on it.

        Raises:
            GuardError: the file is missing, damaged, no head, or of another model.
        """
        tensors, header, identity = read_file(path, _KIND)
        layer = header["prompt_layer"]
        head = cls(header["head"], identity, tensors, header["boundary"], header["fitted"], layer)
        if model is not None:
            head.check(model)
        return head


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    groups: number of the prompt that each example answers; the figures are of prompts that a fold was not fitted on.
        None: every example has a prompt of its own.
    width: of a hidden layer (GELU); 0: a linear head, logistic regression or ridge.
    regularisation: weight of the squared weights against the sum of losses, of standardised features; with a hidden
        layer, decoupled weight decay of regularisation / n.
    boundary: see `HiddenHead`; for a cost alone.
    epochs: full-batch steps of Adam, with a hidden layer.
    """

    groups: Sequence[int] | None = None
    width: int = 0
    regularisation: float = 100.0
    boundary: float = 0.0
    epochs: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 0 or self.epochs < 1 or not self.regularisation >= 0:
            raise GuardError(
                f"width, epochs, regularisation: expected at least 0, 1 and 0, "
                f"got {self.width}, {self.epochs}, {self.regularisation}"
            )


def fit_head(
    hidden: Tensor,
    labels: Tensor | Sequence[float],
    model: ModelIdentity,
    kind: Literal["cost", "reward"],
    *,
    prompt_layer: int | None = None,
    **options: Any,
) -> HiddenHead:
    """Fit a head that is not factored.

    Args:
        hidden: float [n, S], latent states of the base model at the end of answers or of parts of them.
        labels: n numbers. ``cost``: above 0 is unsafe, others are safe. ``reward``: any finite numbers.
        prompt_layer: of the states.
        options: see `FitOptions`.

    Returns:
        The head; ``fitted`` holds ``auc`` (cost) or ``r2`` (reward) over folds of prompts, nan with too few of them.

    Raises:
        GuardError: wrong shapes, non-finite numbers, cost labels of one class, a limit out of range.
    """
    chosen = FitOptions(**options)
    if kind not in ("cost", "reward"):
        raise GuardError(f"kind: expected 'cost' or 'reward', got {kind!r}")
    if kind == "reward" and chosen.boundary:
        raise GuardError(f"boundary: only a cost has one, got {chosen.boundary:g}")
    x, y, ids = _checked(hidden, "labels", labels, model, prompt_layer, chosen.groups)
    if kind == "cost":
        y = _two_classes("labels", y, "safe and unsafe answers", "unsafe")

    def ready(at: np.ndarray) -> bool:
        return kind == "reward" or len(y[at].unique()) == 2

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        standard = _standard(x[at])
        return standard | _fit_layers(_standardised(standard, x[at]), y[at], kind, chosen)

    recipe = _Recipe(ready, fit, {"auc" if kind == "cost" else "r2": (y, _forward)})
    return _head(kind, model, prompt_layer, chosen, x, ids, recipe)


def fit_factored_cost(
    hidden: Tensor,
    harmful: Tensor | Sequence[float],
    complied: Tensor | Sequence[float],
    model: ModelIdentity,
    prompt_layer: int,
    *,
    direction: Tensor | None = None,
    **options: Any,
) -> HiddenHead:
    """Fit a factored cost: b on all examples, a's slope and offset on one example of each prompt.

    Args:
        harmful: n numbers, above 0 if the prompt asks for harm. complied: n numbers, above 0 if the answer does what
            the prompt asks for.
        direction: [H], of the prompts' rows; None: an LDA of these prompts (`steerfast.fitting.directions`).
        options: see `FitOptions`; width and regularisation are b's.

    Returns:
        The head; ``fitted`` holds ``auc`` (unsafe: harmful and complied) and ``comply_auc`` (b alone), as `fit_head`.
        The folds do not fit a given direction again.

    Raises:
        GuardError: see `fit_head`; prompts of one kind, answers that all comply or all do not.
        PromptError: no direction, and fewer than two prompts of a kind or too little variation for one.
    """
    chosen = FitOptions(**options)
    x, kind, ids = _checked(hidden, "harmful", harmful, model, prompt_layer, chosen.groups)
    _, done, _ = _checked(hidden, "complied", complied, model, prompt_layer, chosen.groups)
    kind = _two_classes("harmful", kind, "prompts of both kinds", "harmful")
    done = _two_classes("complied", done, "answers that comply and that do not", "that do")

    def first(at: np.ndarray) -> np.ndarray:
        """Return one example of each prompt."""
        rows: np.ndarray = at[np.unique(ids[at], return_index=True)[1]]
        return rows

    def ready(at: np.ndarray) -> bool:
        prompts = kind[first(at)].long().bincount(minlength=2)
        return int(prompts.min()) >= (1 if direction is not None else 2) and len(done[at].unique()) == 2

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        standard = _standard(x[at])
        answers = parts(_standardised(standard, x[at]))[1]
        comply = _fit_layers(answers, done[at], "cost", chosen)
        harm = _fit_harm(parts(x[first(at)])[2], kind[first(at)], direction)
        return standard | harm | {f"comply.{name}": tensor for name, tensor in comply.items()}

    recipe = _Recipe(ready, fit, {"auc": (kind * done, _forward), "comply_auc": (done, _complied)})
    return _head("cost", model, prompt_layer, chosen, x, ids, recipe)


@dataclass(frozen=True)
class _Recipe:
    """A fit. ready: whether examples suffice for it. fit: examples -> tensors. wanted: figure -> labels, score."""

    ready: Callable[[np.ndarray], bool]
    fit: Callable[[np.ndarray], dict[str, Tensor]]
    wanted: Mapping[str, tuple[Tensor, Callable[[Mapping[str, Tensor], Tensor], Tensor]]]


def _head(
    kind: Literal["cost", "reward"],
    model: ModelIdentity,
    prompt_layer: int | None,
    options: FitOptions,
    x: Tensor,
    ids: np.ndarray,
    recipe: _Recipe,
) -> HiddenHead:
    """Fit a head on all examples x [n, S] of prompts ids [n], with its figures over folds of prompts."""
    labels = next(iter(recipe.wanted.values()))[0]
    about = {
        **{name: getattr(options, name) for name in ("width", "regularisation", "epochs", "seed")},
        "examples": len(x),
        "groups": len(np.unique(ids)),
        "mean_label": float(labels.mean()),
        **_held_out(x, ids, recipe),
    }
    return HiddenHead(kind, model, recipe.fit(np.arange(len(x))), options.boundary, about, prompt_layer)


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
    for part, values in (("hidden", x), (name, y)):
        if not bool(values.isfinite().all()):
            raise GuardError(f"{part}: expected finite numbers, got {int((~values.isfinite()).sum())} that are not")
    return x, y, ids


def _two_classes(name: str, labels: Tensor, expected: str, counted: str) -> Tensor:
    """Return 1.0 where a label is above 0, else 0.0; refuse labels of one class."""
    y = (labels > 0).float()
    if not 0 < float(y.mean()) < 1:
        raise GuardError(f"{name}: expected {expected}, got {int(y.sum())} {counted} of {len(y)}")
    return y


# -- the formula -----------------------------------------------------------------------------------


def _forward(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    if _FACTORED not in tensors:
        return _layers(tensors, _standardised(tensors, hidden))
    a, b = _harm(tensors, hidden), _complied(tensors, hidden)
    return -torch.stack([-a, -b, -a - b]).logsumexp(dim=0)


def _harm(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Return a, the log-odds that the prompt asks for harm."""
    prompt = parts(hidden.float())[2]
    return F.normalize(prompt, dim=1) @ tensors["harm.direction"] * tensors["harm.scale"] + tensors["harm.offset"]


def _complied(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Return b, the log-odds that the answer complies."""
    return _layers(tensors, parts(_standardised(tensors, hidden))[1], "comply.")


def _standard(x: Tensor) -> dict[str, Tensor]:
    return {"mean": x.mean(dim=0), "scale": spread(x)}


def _standardised(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    return (hidden.float() - tensors["mean"]) / tensors["scale"]


def _layers(tensors: Mapping[str, Tensor], x: Tensor, prefix: str = "") -> Tensor:
    if f"{prefix}into.weight" in tensors:
        x = F.gelu(F.linear(x, tensors[f"{prefix}into.weight"], tensors[f"{prefix}into.bias"]))
    return F.linear(x, tensors[f"{prefix}out.weight"], tensors[f"{prefix}out.bias"])[:, 0]


# -- fits ------------------------------------------------------------------------------------------


def _fit_layers(rows: Tensor, y: Tensor, kind: str, options: FitOptions) -> dict[str, Tensor]:
    """Return ``out`` and, with a width, ``into``, fitted on standardised rows."""
    if not options.width:
        return _fit_linear(rows.double().numpy(), y.double().numpy(), kind, options.regularisation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        layers = nn.ModuleDict({"into": nn.Linear(rows.shape[1], options.width), "out": nn.Linear(options.width, 1)})
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-2, weight_decay=options.regularisation / len(y))
    loss = F.binary_cross_entropy_with_logits if kind == "cost" else F.mse_loss
    with torch.enable_grad():
        for _ in range(options.epochs):
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
    """Return ``harm.*`` from a row [H] of each prompt: the direction (fitted if None is given), slope and offset."""
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


def _held_out(x: Tensor, groups: np.ndarray, recipe: _Recipe) -> dict[str, float]:
    """Return the figures that the recipe wants, each example scored by a fit on the other prompts.

    ``r2`` is the share of variance explained, other figures are AUCs. nan if a fold is not ready for a fit, or if all
    labels are equal.
    """
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.model_selection import GroupKFold

    figures = dict.fromkeys(recipe.wanted, float("nan"))
    count = min(_FOLDS, len(np.unique(groups)))
    folds = list(GroupKFold(count).split(x, groups=groups)) if count > 1 else []
    if not folds or not all(recipe.ready(train) for train, _ in folds):
        return figures
    scores = {name: torch.empty(len(x)) for name in recipe.wanted}
    for train, test in folds:
        tensors = recipe.fit(train)
        for name, (_, score) in recipe.wanted.items():
            scores[name][test] = score(tensors, x[test])
    for name, (labels, _) in recipe.wanted.items():
        if name == "r2" or len(labels.unique()) > 1:
            metric = r2_score if name == "r2" else roc_auc_score
            figures[name] = float(metric(labels.numpy(), scores[name].numpy()))
    return figures
