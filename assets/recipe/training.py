"""What both training stages share: schedule, optimiser, checkpoints, log."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger("lvlm_fix.recipe")


def optimiser(modules: Iterable[nn.Module], rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[int], dict[str, Tensor]],
    folder: Path,
    *,
    steps: int,
    rate: float,
    decay: float = 0.05,
    every: int = 200,
) -> None:
    """Run `steps` steps; `loss_of(step)` returns named losses, of which `loss` is minimised.

    A checkpoint is written every `every` steps and a run that was stopped goes on from the last one. One JSON line
    of the log per 20 steps.
    """
    device = next(modules.parameters()).device
    optimizer = optimiser(modules.values(), rate, decay)
    path = folder / f"{name}.pt"
    first = 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        log.info("%s: going on from step %d", name, first)
    started, record = time.monotonic(), folder / f"{name}.jsonl"
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, min(300, steps // 10 + 1))
        with torch.autocast(device.type, torch.bfloat16):
            losses = loss_of(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 or step == steps - 1:
            values = {key: round(float(value.detach()), 4) for key, value in losses.items()}
            bar.set_postfix(values)
            with record.open("a") as lines:
                lines.write(
                    json.dumps({"step": step + 1, "seconds": round(time.monotonic() - started, 1)} | values)
                    + "\n"
                )
        if (step + 1) % every == 0 or step == steps - 1:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
