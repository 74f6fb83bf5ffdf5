"""A decoder with VAR and ZipVL in it, written to be read: one prompt, explicit loops, no kernels, no batch, no padding.

It is the tests' answer key. It shares with lvlm_fix only the packing of numbers (`quantize_kv`), which has tests of its
own, and takes weights and rotations from the model's modules.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import torch

from lvlm_fix.functional import dequantize_kv, quantize_kv
from lvlm_fix.methods import DAMRO, VAR, VTCCLS, ZipVL


@dataclass
class Slot:
    """A token in one layer's cache: keys and values (K, D), and what it is."""

    key: torch.Tensor
    value: torch.Tensor
    image: bool
    sink: bool
    packed: bool = False


@dataclass
class State:
    """Of one prompt: the slots of each layer, the next position, and how many tokens came after the prompt."""

    layers: list[list[Slot]] = field(default_factory=list)
    next_position: int = 0
    appended: int = 0
    kinds_of_position: int = 1
    kept: list[int] = field(default_factory=list)
    sinks: list[list[int]] = field(default_factory=list)


class SlowDecoder:
    """A Llama-like text model, run token by token and head by head."""

    def __init__(self, decoder, lm_head) -> None:
        self.decoder, self.lm_head = copy.deepcopy(decoder).eval(), lm_head
        self.count = len(self.decoder.layers)

    def prefill(self, embeddings, image, var=None, zipvl=None, positions=None, next_position=None):
        """Logits after a prompt (T, C) whose tokens `image[t]` are of the image, and the state to go on from."""
        tokens = len(embeddings)
        if positions is None:
            positions = torch.arange(tokens)[None]
        last_image = max((t for t in range(tokens) if image[t]), default=None)
        first_query = tokens if last_image is None else last_image + 1
        after = tokens if next_position is None else next_position
        state, x = State(next_position=after, kinds_of_position=len(positions)), embeddings
        for index, layer in enumerate(self.decoder.layers):
            queries, keys, values = self._project(layer, x, positions)
            sinks = self._sinks(x, index, var)
            important = self._important(queries, keys, image, zipvl, layer.self_attn.scaling)
            any_image_sink = any(image[s] and sinks[s] for s in range(tokens) if important[s])
            rows = []
            for t in range(tokens):
                if not important[t]:
                    rows.append(torch.zeros(queries.shape[1] * queries.shape[2]))
                    continue
                seen = [s for s in range(t + 1) if important[s]]
                moved = var if t >= first_query and any_image_sink else None
                flags = [image[s] for s in seen], [sinks[s] for s in seen]
                rows.append(
                    self._attend(queries[t], keys[seen], values[seen], *flags, moved, layer.self_attn.scaling)
                )
            x = self._finish(layer, x, torch.stack(rows))
            state.kept.append(sum(important))
            state.sinks.append([t for t in range(tokens) if sinks[t]])
            slots = [Slot(keys[s], values[s], image[s], sinks[s]) for s in range(tokens)]
            state.layers.append(slots if zipvl is None else pack(slots, important, zipvl))
        return self.lm_head(self.decoder.norm(x[-1:]))[0], state

    def step(self, embedding, state, var=None, zipvl=None):
        """Logits after one more token (C,)."""
        if zipvl is not None and state.appended and state.appended % 64 == 0:
            state.layers = [pack_newest(slots, zipvl) for slots in state.layers]
        state.appended += 1
        position, x = torch.full((state.kinds_of_position, 1), state.next_position), embedding[None]
        state.next_position += 1
        for index, layer in enumerate(self.decoder.layers):
            queries, keys, values = self._project(layer, x, position)
            slots = state.layers[index]
            slots.append(Slot(keys[0], values[0], False, False))
            moved = var if any(slot.image and slot.sink for slot in slots) else None
            keys, values = (torch.stack(some) for some in ([s.key for s in slots], [s.value for s in slots]))
            flags = [slot.image for slot in slots], [slot.sink for slot in slots]
            attended = self._attend(queries[0], keys, values, *flags, moved, layer.self_attn.scaling)
            x = self._finish(layer, x, attended[None])
        return self.lm_head(self.decoder.norm(x))[0]

    def _project(self, layer, x, positions):
        """Queries (T, H, D), keys and values (T, K, D), rotated."""
        attention, normed = layer.self_attn, layer.input_layernorm(x)[None]
        shape = (1, len(x), -1, attention.head_dim)
        parts = [
            projection(normed).view(shape).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        cos, sin = self.decoder.rotary_emb(normed, positions if len(positions) == 1 else positions[:, None])
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        parts[:2] = rotate(parts[0], parts[1], cos, sin)
        return [part[0].transpose(0, 1) for part in parts]

    def _sinks(self, x, index, var):
        if var is None or not var.first_layer <= index < self.count - 1:
            return [False] * len(x)
        threshold = var.tau * min(1.0, (x.shape[1] / 4096) ** 0.5)
        return [
            any(abs(row[dim]) / row.square().mean().sqrt() > threshold for dim in var.sink_dims) for row in x
        ]

    def _important(self, queries, keys, image, zipvl, scale):
        tokens = len(queries)
        if zipvl is None:
            return [True] * tokens
        older = max(tokens - zipvl.recent, 0)
        drawn = torch.randperm(older, generator=torch.Generator().manual_seed(zipvl.seed))[: zipvl.random]
        probes = sorted(drawn.tolist()) + list(range(older, tokens))
        scores, seen_by = torch.zeros(tokens), torch.zeros(tokens)
        for probe in probes:
            seen_by[: probe + 1] += 1
            for head in range(queries.shape[1]):
                own = keys[: probe + 1, head // (queries.shape[1] // keys.shape[1])]
                scores[: probe + 1] += (own @ queries[probe, head] * scale).softmax(0) / queries.shape[1]
        droppable = [zipvl.scope == "all" or image[t] for t in range(tokens)]
        candidates = [t for t in range(tokens) if droppable[t]]
        total, reached, needed = sum(float(scores[t]) for t in candidates), 0.0, 0
        if zipvl.tau == 1:
            needed = len(candidates)
        for score in sorted((float(scores[t]) for t in candidates), reverse=True):
            if needed and reached >= zipvl.tau * total:
                break
            reached, needed = reached + score, needed + 1
        normalised = [float(scores[t] / max(seen_by[t], 1)) for t in range(tokens)]
        chosen = sorted(candidates, key=lambda t: (-normalised[t], t))[:needed]
        return [t in chosen or not droppable[t] or t >= tokens - zipvl.window for t in range(tokens)]

    @staticmethod
    def _attend(query, keys, values, image, sink, var, scale):
        """One query (H, D) over keys and values (S, K, D) of tokens that are of the image, or sinks: (H * D,)."""
        heads = []
        for head in range(len(query)):
            group = head // (len(query) // keys.shape[1])
            weights = (keys[:, group] @ query[head] * scale).softmax(0)
            if var is not None:
                weights = redistributed(weights, image, sink, var)
            heads.append(weights @ values[:, group])
        return torch.cat(heads)

    @staticmethod
    def _finish(layer, x, attended):
        x = x + layer.self_attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))


def redistributed(weights, image, sink, var):
    """VAR's rule on one row of attention weights (S,)."""
    free = [i for i in range(len(weights)) if image[i] and not sink[i]]
    to_image = sum(weights[i] for i in range(len(weights)) if image[i])
    to_free = sum(weights[i] for i in free)
    if not free or to_image < var.min_image_attention or to_free < var.rho * to_image:
        return weights
    budget = var.p * sum(weights[i] for i in range(len(weights)) if sink[i])
    moved = weights.clone()
    for i in range(len(weights)):
        if sink[i]:
            moved[i] = (1 - var.p) * weights[i]
    for i in free:
        moved[i] = weights[i] + budget * weights[i] / to_free
    return moved


def pack(slots, important, zipvl):
    """What ZipVL keeps of a layer's slots after the prefill."""
    split = max(len(slots) - zipvl.window, 0)
    kept = []
    for bits, wanted in ((zipvl.bits, True), (zipvl.low_bits, False)):
        group = [slots[t] for t in range(split) if important[t] == wanted]
        if not (zipvl.evict and not wanted):
            kept += packed(group, bits)
    return kept + slots[split:]


def pack_newest(slots, zipvl):
    """The same after 64 further tokens: what was not packed yet is, but for the window."""
    tail = [slot for slot in slots if not slot.packed]
    split = max(len(tail) - zipvl.window, 0)
    return [slot for slot in slots if slot.packed] + packed(tail[:split], zipvl.bits) + tail[split:]


def packed(group, bits):
    """Slots as they come back from being packed together."""
    if not group:
        return []
    keys = torch.stack([slot.key for slot in group], dim=1)[None]
    values = torch.stack([slot.value for slot in group], dim=1)[None]
    keys = dequantize_kv(quantize_kv(keys, bits, dim=-2))[0]
    values = dequantize_kv(quantize_kv(values, bits, dim=-1, channel_normalize=True))[0]
    return [Slot(keys[:, i], values[:, i], slot.image, slot.sink, True) for i, slot in enumerate(group)]


def best(scores, count):
    """Indices of the `count` highest, of equals the earlier, in raster order."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def contrasted(positive, negative, damro):
    logits = (1 + damro.alpha) * positive - damro.alpha * negative
    chances = positive.softmax(-1)
    return logits.masked_fill(chances < damro.beta * chances.max(), -torch.inf)


def stages(fix):
    """The methods of `fix` by kind: VTCCLS, DAMRO, VAR, ZipVL, each or None."""
    return [
        next((method for method in fix if isinstance(method, kind)), None)
        for kind in (VTCCLS, DAMRO, VAR, ZipVL)
    ]


def largest_difference(logits, expected):
    """Largest absolute difference; tokens cut to -inf must be the same."""
    assert torch.equal(logits.isinf(), expected.isinf())
    kept = ~expected.isinf()
    return (logits[kept] - expected[kept]).abs().max().item()


class Conversation:
    """One prompt of a contrasting or plain run: its branches, and the greedy or given words that follow."""

    def __init__(self, decoder, branches, fix) -> None:
        """`branches`: of each, embeddings (T, C), image flags, and optionally positions and the next one."""
        _, self.damro, self.var, self.zipvl = stages(fix)
        if not any(branches[0][1]):  # without a picture there is nothing to contrast
            self.damro = None
        self.decoder = decoder
        self.states, first = [], []
        for branch in branches:
            logits, state = decoder.prefill(*branch[:2], self.var, self.zipvl, *branch[2:])
            self.states.append(state)
            first.append(logits)
        self.logits = self._joined(first)

    def say(self, embedding):
        """Logits after one more word."""
        self.logits = self._joined(
            [self.decoder.step(embedding, state, self.var, self.zipvl) for state in self.states]
        )
        return self.logits

    def _joined(self, logits):
        if self.damro is None:
            return logits[0]
        sure = self.damro.gate is not None and logits[0].softmax(-1).max() >= self.damro.gate
        return contrasted(logits[0], logits[0] if sure else logits[1], self.damro)
