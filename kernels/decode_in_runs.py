"""VAR's decoding (arXiv 2503.03321) in half precision on CPU, by runs of tokens of one class.

The derivation is in `visual_attention`.
"""

import torch
from torch import Tensor

from lvlm_fix._tensors import wide
from lvlm_fix.kernels.changed_rows import changed_rows, class_columns, redistribute_
from lvlm_fix.kernels.packing import take
from lvlm_fix.kernels.redistribution import Redistribution

# Tokens that cost less to gather than a call of the fused attention does.
SHORT = 64


def decode_in_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image: Tensor,
    sink: Tensor,
    start: Tensor,
    given: Redistribution,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """One query row in half precision on CPU: no key is widened but the sinks'; (B, H, 1, D).

    Widening keys takes twice the time of the attention itself. So the tokens are split in runs of one class
    (the image, what is before it, what is after it), torch's fused attention gives each run's output and the
    log of its weight, and the run then stands for one token with that value and that logit. Sinks, text
    between two images, and runs too short to be worth a call are gathered instead: they are few.
    """
    batch, heads, _, width = query.shape
    shared, tokens = key.shape[1:3]
    columns = image.any(0).nonzero()
    low, high = int(columns[0]), int(columns[-1]) + 1
    runs = [slice(low, high)]
    apart = sink.clone()
    apart[:, low:high] |= ~image[:, low:high]
    for run in (slice(0, low), slice(high, tokens)):
        if run.stop - run.start > SHORT:
            runs.append(run)
        else:
            apart[:, run] = True
    hidden = apart
    if key_mask is not None:
        apart, hidden = apart & key_mask, apart | ~key_mask
    count = int(apart.sum(-1).max())
    if count > SHORT + tokens // 8:
        return changed_rows(query, key, value, image, sink, start, given, False, key_mask, scale)

    folded = query.unflatten(1, (shared, -1)).flatten(2, 3)
    bias = torch.zeros(batch, 1, 1, tokens).masked_fill_(hidden[:, None, None], -torch.inf)
    values, logits = [], []
    for run in runs:
        # The public function keeps the log of the weights' sum to itself.
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key[:, :, run], value[:, :, run], attn_mask=bias[..., run], scale=scale
        )
        empty = hidden[:, run].all(-1)[:, None, None]
        values.append(output)
        logits.append(log_sum.masked_fill_(empty, -torch.inf))

    # Not `packed`: raster order does not matter here, and this is a third of its time.
    filled, index = apart.to(torch.int8).topk(count)
    filled = filled.bool()
    k, v = wide(take(key, index)), wide(take(value, index))
    gathered = (wide(folded) * (width**-0.5 if scale is None else scale)) @ k.mT
    gathered.masked_fill_(~filled[:, None, None], -torch.inf)
    weights = torch.cat([torch.stack(logits, dim=-1), gathered], dim=-1).softmax(-1)
    if key_mask is not None:
        weights.masked_fill_(~key_mask.any(-1)[:, None, None, None], 0)

    # The image's run holds receivers and nothing else, the other runs neither image nor sinks.
    is_image = (torch.arange(len(runs)) == 0).expand(batch, -1)
    image = torch.cat([is_image, image.gather(1, index) & filled], dim=1)
    sink = torch.cat([torch.zeros_like(is_image), sink.gather(1, index) & filled], dim=1)
    may = (tokens - 1 >= start)[:, None].expand(batch, heads)
    redistribute_(weights.flatten(1, 2), class_columns(image, sink, weights.dtype), may, given)
    by_run, by_token = weights.split([len(runs), count], dim=-1)
    out = by_token @ v
    for weight, output in zip(by_run.split(1, dim=-1), values, strict=True):
        out += weight * output
    return out.flatten(1, 2)[:, :, None].to(query.dtype)
