"""What the fronts share: which implementation ran, and checks of their inputs."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from lvlm_fix._tensors import require, require_bool, sizes
from lvlm_fix.quantization import QuantizedTensor

Facts = TypeVar("Facts")
Groups = Sequence[tuple[QuantizedTensor, QuantizedTensor]]
_ran: dict[str, str] = {}


def note(kernel: str, implementation: str) -> None:
    """Remember that `implementation` ran the front named `kernel`."""
    _ran[kernel] = implementation


def last_used() -> dict[str, str]:
    """Which implementation each front ran on its last call in this process; fronts never called are absent.

    >>> import torch
    >>> from lvlm_fix.kernels import last_used, probe_scores
    >>> _ = probe_scores(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.tensor([2]))
    >>> last_used()["probe_scores"]
    'torch'
    """
    return dict(_ran)


def once_for_groups(find: Callable[..., Facts]) -> Callable[..., Facts]:
    """`find` of packed groups, remembered until one of them goes or another comes: decoding asks at every token.

    Further arguments are part of the question, and must be hashable.
    """
    known: WeakKeyDictionary[QuantizedTensor, tuple[list[ref[QuantizedTensor]], dict[Any, Facts]]]
    known = WeakKeyDictionary()

    @wraps(find)
    def remembered(groups: Groups, *rest: Any) -> Facts:
        if not groups:
            return find(groups, *rest)
        # New groups come at the end.
        newest, members = groups[-1][0], [part for group in groups for part in group]
        held, facts = known.get(newest, ([], {}))
        if len(held) != len(members) or not all(map(_is_still, held, members)):
            held, facts = known[newest] = [ref(part) for part in members], {}
        if rest not in facts:
            facts[rest] = find(groups, *rest)
        return facts[rest]

    return remembered


def _is_still(held: ref[QuantizedTensor], part: QuantizedTensor) -> bool:
    return held() is part


def attention_sizes(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> dict[str, int]:
    """Sizes B H Q D K T of attention's inputs, which fit together."""
    n = sizes(query=(query, "B H Q D"), key=(key, "B K T D"), value=(value, "B K T D"))
    require_one_device(query=query, key=key, value=value, key_mask=key_mask)
    require_heads(query, key)
    require_one_dtype(query=query, key=key, value=value)
    require(n["Q"] <= n["T"], f"there are more queries ({n['Q']}) than positions ({n['T']})")
    if key_mask is not None:
        sizes(key=(key, "B K T D"), key_mask=(key_mask, "B T"))
        require_bool(key_mask=key_mask)
    return n


def require_heads(query: Tensor, key: Tensor) -> None:
    heads, shared = query.shape[1], key.shape[1]
    fits = shared > 0 and heads % shared == 0
    require(fits, f"{shared} key heads do not divide {heads} query heads")


def require_one_device(**tensors: Tensor | None) -> None:
    """Kernels are given addresses, which mean something else on another device."""
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"{' and '.join(found)} must be on one device, got {listed}")


def require_one_dtype(**tensors: Tensor) -> None:
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    listed = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
    one = len(set(found.values())) == 1 and all(dtype.is_floating_point for dtype in found.values())
    require(one, f"{' and '.join(found)} must share one floating dtype, got {listed}")
