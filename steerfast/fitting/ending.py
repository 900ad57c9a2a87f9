"""A vector that ends an answer where it might end: after the last sentence of a refusal.

A model that was not taught to refuse does not stop after it: it offers help, repeats itself, or complies after all.
Added to the rows of the last layer, this vector raises the logit of the token that ends a turn, and those of all others
as little as it can. In the middle of a sentence that logit is far below the next word's, and nothing changes; at the
end of one it is close. Only the output embedding reads the last layer's rows, so keys and values do not change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.errors import ArchitectureError, ProfileError
from steerfast.hf.generation import end_tokens
from steerfast.hf.structure import find_decoder, is_distributed
from steerfast.profile import SteeringProfile

_SHRINKAGE = 0.05  # weight of the identity in the covariance of the output embedding
_CHUNK = 8192  # tokens whose embeddings are held in float64 at once


def with_ending(profile: SteeringProfile, ending: Tensor, logits: float) -> SteeringProfile:
    """Return the profile, without its candidates, that also ends the answers it steers.

    Args:
        ending: from `ending_vector`, for the profile's model.
        logits: how far the end's logit rises over the mean of all others, in a row of the profile's mean norm.

    Raises:
        ProfileError: the last layer is steered, another edit than an addition, or no norm of its rows is known.
    """
    last = profile.model.num_layers - 1
    if profile.edit != "add":
        raise ProfileError(f"ending: expected a profile that adds vectors, got edit {profile.edit!r}")
    if last in profile.steered_layers:
        raise ProfileError(f"ending: expected the last layer, {last}, for it alone, got a profile that steers it")
    if not float(profile.norm[last]) > 0:
        raise ProfileError(f"ending: expected a profile with the norm of its rows, got none for layer {last}")
    vector, strength = profile.vector.clone(), profile.strength.clone()
    vector[last] = ending * profile.norm[last]
    strength[last] = logits
    kind = f"{profile.vector_kind} + ending"
    return replace(profile, vector=vector, strength=strength, vector_kind=kind, candidates={})


@torch.no_grad()
def ending_vector(model: nn.Module, tokenizer: Any) -> Tensor:
    """Return the vector that raises the logit of the end of a turn by 1, in a row of norm 1: float32 [H] on the CPU.

    Fisher's discriminant of the end's output embedding against those of all tokens, behind the final norm: along it the
    other logits differ least.

    Raises:
        ArchitectureError: no output embedding [V, H] of real numbers, or no single final norm before it.
        ProfileError: neither the model nor the tokenizer names a token that ends a turn.
    """
    read = _read_through_norm(model)
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    weight = getattr(head, "weight", None)
    hidden = len(read)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden:
        raise ArchitectureError(f"model: expected an output embedding [tokens, {hidden}], got {type(head).__name__}")
    if is_distributed(weight) or weight.is_meta or not weight.is_floating_point():
        raise ArchitectureError(
            f"model: expected an output embedding of floats in one piece, got {weight.dtype} on {weight.device}"
        )
    weight = weight.detach()
    count = len(weight)
    total = torch.zeros(hidden, dtype=torch.float64, device=weight.device)
    products = torch.zeros(hidden, hidden, dtype=torch.float64, device=weight.device)
    for chunk in weight.split(_CHUNK):
        rows = chunk.double()
        total += rows.sum(dim=0)
        products += rows.T @ rows
    # The factor of the norm on a change of the row works on the embeddings as well.
    read = read.double().to(weight.device)
    mean = total / count
    covariance = read @ (products / count - torch.outer(mean, mean)) @ read.T
    covariance += _SHRINKAGE * covariance.trace() / hidden * torch.eye(hidden, device=weight.device)
    contrast = read @ (weight[turn_ends(model, tokenizer)].double().mean(dim=0) - mean)
    vector = torch.linalg.solve(covariance, contrast)
    # The norm makes a row's mean square 1, so that one of norm 1 is read hidden ** 0.5 times as large.
    return (vector / (vector @ contrast) / hidden**0.5).float().cpu()


def turn_ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the token that the chat template puts behind it, or all ends of generation.

    Raises:
        ProfileError: neither the model nor the tokenizer names any.
    """
    ends = sorted(end_tokens(model, tokenizer))
    if not ends:
        raise ProfileError("ending: expected a token that ends a turn, neither the model nor its tokenizer has one")
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=True)["input_ids"]
        if behind := [token for token in ids if token in ends]:
            return behind[-1:]
    return ends


def _read_through_norm(model: nn.Module) -> Tensor:
    """Return the linear map of the final norm on a row of mean square 1, transposed: float32 [H, H].

    Its outputs show whether the norm subtracts the mean, and how it stores its weight.
    """
    decoder = find_decoder(model)
    norms = [
        (name, module)
        for name, module in decoder.backbone.named_children()
        if [tuple(one.shape) for one in module.parameters()] in ([(decoder.hidden_size,)], [(decoder.hidden_size,)] * 2)
    ]
    if len(norms) != 1:
        names = ", ".join(name for name, _ in norms) or "none"
        raise ArchitectureError(
            f"model: expected one final norm beside the layers of {type(decoder.backbone).__name__}, found {names}"
        )
    _, norm = norms[0]
    weight = next(norm.parameters())
    ones = torch.ones(decoder.hidden_size, dtype=weight.dtype, device=weight.device)
    signs = ones.clone()
    signs[1::2] = -1

    def odd(row: Tensor) -> Tensor:  # without a bias
        return ((norm(row[None]) - norm(-row[None]))[0] / 2).float()

    scale = torch.diag(odd(signs) * signs.float())
    centres = not bool(odd(ones).any())
    return scale - scale.mean(dim=0) if centres else scale
