"""Reward and cost heads on the base model's own hidden states: no second model, no second pass.

A head reads the latent state of an answer (`steerfast.guard.parts`), which generation computed anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerfast.errors import GuardError, PromptError
from steerfast.guard.parts import AnyPath, check_model, check_states, deviation, read_file, state_size, write_file
from steerfast.guard.scores import Blocks
from steerfast.profile import ModelIdentity

_KIND = "head"
_FOLDS = 5
_FACTORED = "harm.direction"
_HARM_PENALTY = 0.5  # on the squared slope: prompts that a line separates would make it infinite


@dataclass(frozen=True, eq=False)
class HiddenHead:
    """A linear scorer: ``out(x)`` of the standardised latent state x.

    A cost can be *factored*: an answer is unsafe if the prompt asks for harm and the answer complies. The log-odds of
    both are those of σ(a)·σ(b), −log(e^−a + e^−b + e^−(a+b)). a = ``harm.scale`` · cos(prompt, ``harm.direction``) +
    ``harm.offset``, of the state's part ``prompt``; b = ``comply.out(x)``, of its part ``mean``.

    kind: ``cost`` (the log-odds of an unsafe answer, plus `boundary`) or ``reward`` (in the units of its labels).
    boundary: the score of an answer that is as likely unsafe as safe; usually the budget, which it then just spends.
    fitted: options of the fit, and its accuracy on prompts that it was not fitted on; JSON data.
    """

    kind: Literal["cost", "reward"]
    model: ModelIdentity
    tensors: Mapping[str, Tensor]
    boundary: float = 0.0
    fitted: Mapping[str, Any] = field(default_factory=dict)
    prompt_layer: int | None = None

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

    def check(self, model: ModelIdentity) -> None:
        """Raise GuardError if the head was fitted on another model."""
        check_model(f"{self.kind} {_KIND}", self.model, model)

    def save(self, path: AnyPath) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {name: getattr(self, name) for name in ("boundary", "fitted", "prompt_layer")}
        write_file(path, _KIND, self.tensors, {**header, "head": self.kind}, self.model)

    @classmethod
    def load(cls, path: AnyPath) -> HiddenHead:
        """Read a head; GuardError if the file is missing, damaged or no head."""
        tensors, header, identity = read_file(path, _KIND)
        if any("into." in name for name in tensors):
            raise GuardError(f"head {str(path)!r}: this version reads no hidden layer, fit it again")
        rest = {name: header[name] for name in ("boundary", "fitted", "prompt_layer")}
        return cls(header["head"], identity, tensors, **rest)


def fit_head(
    hidden: Tensor,
    labels: Tensor | Sequence[float],
    model: ModelIdentity,
    kind: Literal["cost", "reward"],
    *,
    prompt_layer: int | None = None,
    groups: Sequence[int] | None = None,
    regularisation: float = 100.0,
    boundary: float = 0.0,
) -> HiddenHead:
    """Fit a head that is not factored: logistic regression for a cost, ridge regression for a reward.

    Its ``fitted`` holds ``auc`` (cost) or ``r2`` (reward) over folds of prompts, nan with too few of them.

    Args:
        hidden: float [n, S], latent states of the base model at the end of answers or of parts of them.
        labels: n numbers. ``cost``: above 0 is unsafe, others are safe. ``reward``: any finite numbers.
        groups: number of the prompt that each example answers; None: every example has a prompt of its own.
        regularisation: weight of the squared weights against the sum of losses, of standardised features.
        prompt_layer, boundary: see `HiddenHead`; a boundary is for a cost alone.

    Raises:
        GuardError: wrong shapes, non-finite numbers, cost labels of one class.
    """
    if kind not in ("cost", "reward"):
        raise GuardError(f"kind: expected 'cost' or 'reward', got {kind!r}")
    if kind == "reward" and boundary:
        raise GuardError(f"boundary: only a cost has one, got {boundary:g}")
    head = HiddenHead(kind, model, {}, boundary, {"regularisation": regularisation}, prompt_layer)
    x, y, ids = _check_examples(head, hidden, labels, groups, ())

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        target = _two_classes("labels", y[at], "safe and unsafe answers") if kind == "cost" else y[at]
        standard = _standard(x[at])
        return standard | _fit_linear(_standardise(standard, x[at]), target, kind, regularisation)

    return _fit(head, x, ids, fit, {"r2": (y, _forward)} if kind == "reward" else {"auc": ((y > 0).float(), _forward)})


def fit_factored_cost(
    hidden: Tensor,
    labels: Tensor | Sequence[tuple[float, float]],
    model: ModelIdentity,
    *,
    prompt_layer: int,
    direction: Tensor | None = None,
    groups: Sequence[int] | None = None,
    regularisation: float = 100.0,
    boundary: float = 0.0,
) -> HiddenHead:
    """Fit a factored cost: b on all examples, a's slope and offset on one example of each prompt; see `fit_head`.

    Its ``fitted`` holds ``auc`` (unsafe: harmful and complied) and ``comply_auc`` (b alone).

    Args:
        labels: n pairs. The first is above 0 if the prompt asks for harm, the second if the answer complies.
        direction: [H], of the prompts' rows, not fitted again; None: an LDA of these prompts.

    Raises:
        GuardError: see `fit_head`; prompts of one kind, answers that all comply or all do not.
        PromptError: no direction, and fewer than two prompts of a kind or too little variation for one.
    """
    head = HiddenHead("cost", model, {}, boundary, {"regularisation": regularisation}, prompt_layer)
    x, y, ids = _check_examples(head, hidden, labels, groups, (2,))

    def fit(at: np.ndarray) -> dict[str, Tensor]:
        first = at[np.unique(ids[at], return_index=True)[1]]  # one example of each prompt
        harm = _two_classes("harmful", y[first, 0], "prompts of both kinds")
        comply = _two_classes("complied", y[at, 1], "answers that comply and that do not")
        standard = _standard(x[at])
        layer = _fit_linear(_standardise(standard, x[at]).chunk(3, dim=1)[1], comply, "cost", regularisation)
        named = {f"comply.{name}": tensor for name, tensor in layer.items()}
        return standard | _fit_harm(x[first].chunk(3, dim=1)[2], harm, direction) | named

    unsafe, complied = (y > 0).all(dim=1).float(), (y[:, 1] > 0).float()
    return _fit(head, x, ids, fit, {"auc": (unsafe, _forward), "comply_auc": (complied, _comply_odds)})


def _fit(head: HiddenHead, x: Tensor, ids: np.ndarray, fit: Any, wanted: Mapping[str, Any]) -> HiddenHead:
    """Fit a head on all examples x [n, S] of prompts ids [n], with figures over folds of prompts.

    Args:
        fit: examples -> tensors. wanted: figure -> labels [n], and the score of tensors and states. ``r2`` is the share
            of variance explained, others are AUCs; nan if a fold's examples do not suffice or all labels are equal.
    """
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.model_selection import GroupKFold

    tensors, prompts = fit(np.arange(len(x))), len(np.unique(ids))
    figures = dict.fromkeys(wanted, float("nan"))
    scores = {name: torch.empty(len(x)) for name in wanted} if prompts > 1 else {}
    try:
        for train, test in GroupKFold(min(_FOLDS, prompts)).split(x, groups=ids) if scores else ():
            fold = fit(train)
            for name, (_, score) in wanted.items():
                scores[name][test] = score(fold, x[test])
    except (GuardError, PromptError):
        scores = {}
    for name, found in scores.items():
        labels, metric = wanted[name][0], r2_score if name == "r2" else roc_auc_score
        if name == "r2" or len(labels.unique()) > 1:
            figures[name] = float(metric(labels.numpy(), found.numpy()))
    mean_label = float(next(iter(wanted.values()))[0].mean())
    about = {"examples": len(x), "groups": prompts, "mean_label": mean_label, **figures}
    return replace(head, tensors=tensors, fitted={**head.fitted, **about})


def _check_examples(
    head: HiddenHead, hidden: Tensor, labels: Any, groups: Sequence[int] | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return states float32 [n, S], labels float32 [n, *shape] and prompt numbers [n] on the CPU."""
    x = hidden.detach().to("cpu", torch.float32)
    y = torch.as_tensor(labels).detach().to("cpu", torch.float32)
    ids = np.arange(len(x)) if groups is None else np.asarray(groups)
    size = state_size(head.model.hidden_size, head.prompt_layer)
    if x.shape != (len(y), size) or y.shape[1:] != shape or len(ids) != len(y) or not len(y):
        raise GuardError(
            f"hidden, labels, groups: expected [n, {size}], {['n', *shape]} and [n], "
            f"got {list(x.shape)}, {list(y.shape)} and [{len(ids)}]".replace("'", "")
        )
    for part, values in (("hidden", x), ("labels", y)):
        if not bool(values.isfinite().all()):
            raise GuardError(f"{part}: expected finite numbers, got {int((~values.isfinite()).sum())} that are not")
    return x, y, ids


def _two_classes(name: str, labels: Tensor, expected: str) -> Tensor:
    """Return 1.0 for a label above 0, else 0.0; refuse labels of one class."""
    y = (labels > 0).float()
    if not 0 < float(y.mean()) < 1:
        raise GuardError(f"{name}: expected {expected}, got {int(y.sum())} above 0 of {len(y)}")
    return y


def _forward(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    if _FACTORED not in tensors:
        return F.linear(_standardise(tensors, hidden), tensors["out.weight"], tensors["out.bias"])[:, 0]
    prompt = F.normalize(hidden.float().chunk(3, dim=1)[2], dim=1)
    a = prompt @ tensors["harm.direction"] * tensors["harm.scale"] + tensors["harm.offset"]
    b = _comply_odds(tensors, hidden)
    return -torch.stack([-a, -b, -a - b]).logsumexp(dim=0)


def _comply_odds(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Return b, the log-odds that the answer complies."""
    mean = _standardise(tensors, hidden).chunk(3, dim=1)[1]
    return F.linear(mean, tensors["comply.out.weight"], tensors["comply.out.bias"])[:, 0]


def _standard(x: Tensor) -> dict[str, Tensor]:
    return {"mean": x.mean(dim=0), "scale": deviation(x)}


def _standardise(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    return (hidden.float() - tensors["mean"]) / tensors["scale"]


def _fit_linear(rows: Tensor, labels: Tensor, kind: str, regularisation: float) -> dict[str, Tensor]:
    """Return ``out``, fitted on standardised rows."""
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = rows.double().numpy(), labels.double().numpy()
    if kind == "cost":
        # The loss of scikit-learn is sum + |w|²/(2C).
        model = LogisticRegression(C=0.5 / max(regularisation, 1e-12), max_iter=1000, tol=1e-8).fit(x, y)
    else:
        model = Ridge(alpha=regularisation, solver="cholesky" if regularisation else "svd").fit(x, y)
    weight = torch.from_numpy(np.atleast_2d(model.coef_)).float()
    return {"out.weight": weight, "out.bias": torch.tensor(np.atleast_1d(model.intercept_)).float()}


def _fit_harm(rows: Tensor, harmful: Tensor, direction: Tensor | None) -> dict[str, Tensor]:
    """Return ``harm.*`` from a row [H] of each prompt: the direction (fitted if None is given), slope and offset."""
    from steerfast.fitting.directions import fit_direction, project, unit

    if direction is None:
        pointing = F.normalize(rows.double(), dim=1)
        direction = fit_direction(pointing[harmful > 0], pointing[harmful == 0], "lda")
    direction = unit(direction).float()
    cosine = project(rows, direction, "cosine")[:, None]
    standard = _standard(cosine)
    layer = _fit_linear((cosine - standard["mean"]) / standard["scale"], harmful, "cost", _HARM_PENALTY)
    slope = layer["out.weight"][0, 0] / standard["scale"][0]
    offset = layer["out.bias"][0] - slope * standard["mean"][0]
    return {"harm.direction": direction, "harm.scale": slope.float(), "harm.offset": offset.float()}
