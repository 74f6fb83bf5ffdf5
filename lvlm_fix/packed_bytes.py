"""How many bytes the tokens of a packed KV cache take (ZipVL, arXiv 2410.08584), row by row.

Letters: R rows of the batch, N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvlm_fix.packed_group import EMPTY


@dataclass(frozen=True, eq=False)
class Share:
    """Slots that are held together.

    Attributes:
        places: (R, 1, N, 1) int32, EMPTY where a row's slot holds nothing.
        each: bytes of a row's token.
        whole: bytes of what all of a row's tokens share, if it has any.
        room: tokens to come that every row has memory for.
    """

    places: Tensor
    each: int
    whole: int = 0
    room: int = 0


def bytes_a_slot(tensors: Sequence[Tensor]) -> int:
    """Bytes of one row's slot in all tensors (R, ?, N, ?) together."""
    return sum(x.shape[1] * x.shape[3] * x.itemsize for x in tensors)


def bytes_by_row(shares: Sequence[Share]) -> Tensor:
    """Bytes of each row (R,), long, on the device of the first share.

    >>> places = torch.tensor([[EMPTY, EMPTY], [EMPTY, -1]], dtype=torch.int32)[:, None, :, None]
    >>> bytes_by_row([Share(places, each=10, whole=3), Share(places, each=1, room=5)])
    tensor([ 5, 19])
    """
    rows = torch.zeros(len(shares[0].places), dtype=torch.long, device=shares[0].places.device)
    for share in shares:
        count = (share.places != EMPTY).sum((1, 2, 3)).to(rows.device)
        rows += (count + share.room) * share.each + count.clamp_max(1) * share.whole
    return rows
