"""Dimensions of the hidden states in which sink tokens have massive activations: VAR's sink dimensions."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lvlm_fix.models import family_of

TAU = 20.0
"""|x| / rms(x) from which VAR counts a token as a sink (its section 3), for decoders 4096 wide and more."""

MASSIVE = 100.0
"""Least |x| of a massive activation, in medians of |x| over its token. Sun et al. (arXiv 2402.17762) find more than
1,000, at the layer where it is largest; a tenth of that, as the median over layers is taken here. A Gaussian state
as wide as any decoder stays below 10, and the embedded LVLM, which has no sinks, reaches 12."""

ALONE = 5.0
"""Least |x| at BOS, in medians of that dimension over the other tokens: a dimension that is large in every token marks
none of them. Not normalised, for |x| / rms(x) saturates."""

FIRST_LAYER = 2
"""First layer whose input is looked at, as in VAR: massive activations arise in the layers before."""

PROMPTS, TOKENS = 4, 32
RULE = 1
"""Number of the rule above: results cached under another one are not read."""

# LLaMA-2's and its children's (Vicuna 1.5, so LLaVA-1.5 and LLaVA-NeXT): width, layers, intermediate width, heads
PAPER = {(4096, 32, 11008, 32): (1415, 2533), (5120, 40, 13824, 40): (2100, 4743)}

MOST_CACHED = 256
_KNOWN: WeakKeyDictionary[nn.Module, tuple[str, SinkDims]] = WeakKeyDictionary()


@dataclass(frozen=True)
class SinkDims:
    """Sink dimensions of a decoder.

    Attributes:
        dims: the dimensions, ascending; none in a decoder without massive activations.
        threshold: |x| / rms(x) above which a token is a sink at this width.
        values: |x| / rms(x) at BOS in each of `dims`; 0 where the paper's dimensions were taken unmeasured.
        width: dimensions of a hidden state.
        source: `paper`, `measured`, or `cached` from an earlier measurement.
        profile: |x| / rms(x) at BOS in every dimension, median over prompts and layers; empty where not measured now.
    """

    dims: tuple[int, ...]
    threshold: float
    values: tuple[float, ...]
    width: int
    source: str
    profile: tuple[float, ...] = ()

    def draw(self, path: str | Path) -> None:
        """Draw the activation of BOS by dimension, with threshold and names, as a PNG.

        Raises:
            ValueError: the profile was not measured; call `find_sink_dims` with `picture=`.
        """
        from lvlm_fix.sinks_plot import draw_sink_dims

        if not self.profile:
            raise ValueError(
                "these sink dimensions were not measured now: call find_sink_dims(model, picture=PATH)"
            )
        draw_sink_dims(self, MASSIVE, path)


def find_sink_dims(model: Any, *, picture: str | Path | None = None, use_cache: bool = True) -> SinkDims:
    """The dimensions in which the decoder's sink tokens have massive activations.

    For LLaMA-2-7B and 13B, told by their shape, those of VAR (arXiv 2503.03321): {1415, 2533} and {2100, 4743}. For
    any other decoder they are measured at BOS over a few prompts of random tokens, and kept in memory and in the
    user's cache folder. A sink dimension is above `threshold`, `MASSIVE` times the token's median and `ALONE` times
    what other tokens have there.

    Args:
        model: a model of a supported family; it is run, not changed.
        picture: where to draw the activations of BOS, a PNG.
        use_cache: read and write earlier results; the paper's are not used either without it.

    Raises:
        UnsupportedModelError: the model is of no supported family.

    >>> from lvlm_fix import load
    >>> find_sink_dims(load()[0]).dims
    ()
    """
    family = family_of(model)
    decoder = family.decoder(model)
    found = _known(model, decoder) if use_cache else None
    if found is None or (picture is not None and not found.profile):
        measured = _measure(decoder)
        if found is None:
            found = measured
            if use_cache:
                _keep(model, decoder, found)
        else:
            values = tuple(measured.profile[dim] for dim in found.dims)
            found = SinkDims(found.dims, found.threshold, values, found.width, found.source, measured.profile)
    if picture is not None:
        found.draw(picture)
    return found


def threshold_at(width: int, tau: float = TAU) -> float:
    """`tau` for a decoder of this width: |x| / rms(x) cannot pass the root of the width."""
    return tau * min(1.0, (width / 4096) ** 0.5)


def massive_dims(profile: Tensor, over_median: Tensor, over_others: Tensor, threshold: float) -> list[int]:
    """Dimensions that stand out at one token, of (C,) measures of each dimension.

    Args:
        profile: |x| / rms(x) of the token.
        over_median: |x| in medians of |x| over the token's dimensions.
        over_others: |x| in medians of this dimension over ordinary tokens.
        threshold: least `profile`.

    >>> massive_dims(torch.tensor([9.0, 0.1]), torch.tensor([900.0, 1.0]), torch.tensor([99.0, 1.0]), 5.0)
    [0]
    """
    massive = (profile > threshold) & (over_median > MASSIVE) & (over_others > ALONE)
    return massive.nonzero()[:, 0].tolist()


def _measure(decoder: Any) -> SinkDims:
    config = decoder.config
    profiles: list[Tensor] = []
    over_median: list[Tensor] = []
    over_others: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = (args[0] if args else kwargs["hidden_states"]).float()
        bos, rest = states[:, 0].abs(), states[:, 1:].flatten(0, 1).abs()
        profiles.append((bos / bos.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)).cpu())
        over_median.append((bos / bos.median(-1, keepdim=True).values.clamp_min(1e-12)).cpu())
        over_others.append((bos / rest.median(0).values.clamp_min(1e-12)).cpu())

    layers = list(decoder.layers)[FIRST_LAYER:] or list(decoder.layers)[-1:]
    training = [module for module in decoder.modules() if module.training]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            decoder(input_ids=_prompts(decoder), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    # The median, for a prompt or the last layers may differ: sinks are the same dimensions in all of them.
    profile, median, others = (
        torch.cat(values).median(0).values for values in (profiles, over_median, over_others)
    )
    threshold = threshold_at(config.hidden_size)
    dims = massive_dims(profile, median, others, threshold)
    values = tuple(round(float(profile[dim]), 4) for dim in dims)
    rounded = tuple(round(value, 4) for value in profile.tolist())
    return SinkDims(tuple(dims), threshold, values, config.hidden_size, "measured", rounded)


def _prompts(decoder: Any) -> Tensor:
    """(PROMPTS, TOKENS) ids: BOS, where there is one, and random ones. What they say does not matter to sinks."""
    embedding = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(embedding), (PROMPTS, TOKENS), generator=generator)
    bos = _bos(decoder.config)
    if bos is not None:
        ids[:, 0] = bos
    return ids if embedding.is_meta else ids.to(embedding.device)


def _bos(config: Any) -> int | None:
    bos = getattr(config, "bos_token_id", None)
    return bos[0] if isinstance(bos, list) else bos


def _known(model: Any, decoder: Any) -> SinkDims | None:
    config = decoder.config
    shape = tuple(
        getattr(config, name, None)
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    )
    # 4096 positions and a vocabulary of 32,000 tell LLaMA-2 from LLaMA-1, Mistral, Llama-3 and others of its width.
    positions, words = getattr(config, "max_position_embeddings", 0), getattr(config, "vocab_size", 0)
    llama_2 = config.model_type == "llama" and positions == 4096 and 32000 <= words < 32128
    if llama_2 and shape in PAPER:
        dims = PAPER[shape]  # type: ignore[index]
        return SinkDims(
            dims, threshold_at(config.hidden_size), (0.0,) * len(dims), config.hidden_size, "paper"
        )
    key = _key(model, decoder)
    held = _KNOWN.get(model)
    if held is not None and held[0] == key:
        return held[1]
    entry = _read().get(key)
    if entry is None:
        return None
    found: SinkDims | None
    try:
        found = SinkDims(
            tuple(int(dim) for dim in entry["dims"]),
            float(entry["threshold"]),
            tuple(float(value) for value in entry["values"]),
            int(entry["width"]),
            "cached",
        )
    except (KeyError, TypeError, ValueError):
        found = None
    if found is None or found.width != config.hidden_size or not set(found.dims) <= set(range(found.width)):
        _warn_unreadable("an entry is damaged")
        return None
    return found


def _keep(model: Any, decoder: Any, found: SinkDims) -> None:
    key = _key(model, decoder)
    entry = asdict(found)
    del entry["profile"], entry["source"]
    _KNOWN[model] = (key, SinkDims(**entry, source="cached", profile=found.profile))
    entries = {name: value for name, value in _read(warn=False).items() if name != key} | {key: entry}
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            json.dump(dict(list(entries.items())[-MOST_CACHED:]), part)
        os.replace(part.name, path)
    except OSError as error:
        warnings.warn(
            f"cannot write {path} ({error.strerror}): the sink dimensions will be measured again",
            stacklevel=3,
        )


def cache_file() -> Path:
    """Where sink dimensions are kept from run to run."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lvlm-fix" / "sink_dims.json"


def _read(warn: bool = True) -> dict[str, Any]:
    reason = "it is not a JSON object"
    try:
        entries = json.loads(cache_file().read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        entries, reason = None, str(error)
    if isinstance(entries, dict):
        return entries
    if warn:
        _warn_unreadable(reason)
    return {}


def _warn_unreadable(reason: str) -> None:
    warnings.warn(f"cannot read {cache_file()} ({reason}): it is ignored and written anew", stacklevel=4)


def _key(model: Any, decoder: Any) -> str:
    """The model's name, and a fingerprint by which no other model of the name shares its entry."""
    told = hashlib.sha256(f"rule {RULE}".encode())
    told.update(json.dumps(decoder.config.to_dict(), sort_keys=True, default=str).encode())
    samples = [_sample(weight) for weight in decoder.parameters() if not weight.is_meta]
    bos, words = _bos(decoder.config), decoder.get_input_embeddings().weight
    if bos is not None and not words.is_meta:
        samples.append(words.detach()[bos].float().cpu())
    for sample in samples:
        told.update(sample.numpy().tobytes())
    return f"{getattr(model, 'name_or_path', '')}#{told.hexdigest()[:24]}"


def _sample(weight: Tensor, count: int = 64) -> Tensor:
    """A few elements of a weight, evenly spread."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // count)][:count].float().cpu()
