"""What the equations share: wide sums, plain attention, and checks with one-sentence errors."""

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32, so that sums over many tokens keep their digits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def masked_sum(weights: Tensor, mask: Tensor) -> Tensor:
    """Sum of (B, H, Q, T) over the tokens of a (B, T) mask: (B, H, Q)."""
    return weights.masked_fill(~mask[:, None, None], 0).sum(-1)


def attention_weights(query: Tensor, key: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """Softmax of query (B, H, Q, D) over key (B, K, T, D) where visible (B, Q, T); blind rows are zero."""
    heads, shared = query.shape[1], key.shape[1]
    require(heads % shared == 0, f"{shared} key heads do not divide {heads} query heads")
    hidden = ~visible[:, None]
    logits = wide(query) @ wide(key).repeat_interleave(heads // shared, dim=1).mT
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def sizes(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Sizes by letter; a letter that appears twice must have one size."""
    found: dict[str, int] = {}
    for name, (tensor, pattern) in tensors.items():
        letters, shape = pattern.split(), tensor.shape
        fits = len(shape) == len(letters) and all(
            found.get(letter, size) == size for letter, size in zip(letters, shape, strict=True)
        )
        if not fits:  # words cost more than the check, which runs in every layer of every step
            expected = ", ".join(
                f"{letter}={found[letter]}" if letter in found else letter for letter in letters
            )
            raise ValueError(f"{name} must have shape ({expected}), got {tuple(shape)}")
        found.update(zip(letters, shape, strict=True))
    return found


def require_bool(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.bool, f"{name} must be bool, got {tensor.dtype}")


def require_unit_range(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value <= 1, f"{name} must lie in 0..1, got {value}")
