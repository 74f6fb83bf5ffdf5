"""The newest tokens of a packed KV cache (ZipVL, arXiv 2410.08584), which are not packed: memory for those to come.

Letters: R rows of the batch, H key heads, N tokens, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lvlm_fix.growing_layer import may_be_written, with_room

TAIL_ROOM = 8
"""Tokens that there is room for: the tail is copied once in so many. Beside packed tokens, room is not cheap."""


class TailRoom:
    """Keys and values (R, H, N, D) and places (R, 1, N, 1) with room for `TAIL_ROOM` tokens that come one by one.

    >>> keys, values = torch.zeros(2, 1, 1, 3, 4)
    >>> room = TailRoom(keys, values, torch.arange(-3, 0, dtype=torch.int32).view(1, 1, 3, 1), appended=0)
    >>> keys, values, places = room.append(keys[:, :, :1], values[:, :, :1])
    >>> keys.shape, places.flatten().tolist(), room.takes_one_behind(keys)
    (torch.Size([1, 1, 4, 4]), [-3, -2, -1, 0], True)
    """

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor, appended: int) -> None:
        """Copy the tail; `appended` is the place of the token after it."""
        self.held, self._shown = keys.shape[2], keys
        # Tokens to come have places that are known now.
        ahead = torch.arange(appended, appended + TAIL_ROOM, dtype=torch.int32, device=places.device)
        places = torch.cat([places, ahead[:, None].expand(len(places), 1, -1, 1)], dim=2)
        columns = self.held + TAIL_ROOM
        self.tensors = with_room(keys, columns), with_room(values, columns), places

    def shows(self, keys: Tensor) -> bool:
        """Whether the keys at hand are those that `append` returned last."""
        return self._shown is keys

    def takes_one_behind(self, keys: Tensor) -> bool:
        """Whether the keys at hand are in here, and another may be written behind them."""
        room = self.tensors[0]
        return self._shown is keys and self.held < room.shape[2] and may_be_written(room)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write one token (R, H, 1, D); the tail with it."""
        keys, values, places = self.tensors
        keys.narrow(2, self.held, 1).copy_(key)
        values.narrow(2, self.held, 1).copy_(value)
        self.held += 1
        self._shown = keys.narrow(2, 0, self.held)
        return self._shown, values.narrow(2, 0, self.held), places.narrow(2, 0, self.held)


@lru_cache(maxsize=16)
def unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One NaN, (1, 1, 1, 1), which stands for keys and values that nobody is to read."""
    with torch.inference_mode(False):  # whichever mode it is first asked in
        return torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=device)
