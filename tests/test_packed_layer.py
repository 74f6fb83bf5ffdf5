"""The packed KV cache layer against plain loops that pack each row's own tokens, one row at a time."""

import gc
import itertools
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lvlm_fix.packed_bytes import bytes_by_row
from lvlm_fix.packed_layer import GROUP, PackedLayer
from lvlm_fix.packed_tail import TAIL_ROOM
from lvlm_fix.quantization import dequantize_kv, quantize_kv

always = settings(derandomize=True, max_examples=40, deadline=None)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def prompt(rows, length, *, pads=None, share=0.3, dtype=torch.float32, seed=0, heads=2, width=8):
    """Keys, values, important and real of left-padded rows; what stands in the padding would spoil any range."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, heads, length, width, generator=g)
    important = torch.rand(rows, length, generator=g) < share
    real = torch.arange(length) >= torch.tensor(pads or [0] * rows)[:, None]
    keys[~real[:, None].expand(-1, heads, -1)] = 1e4
    values[~real[:, None].expand(-1, heads, -1)] = -1e4
    return keys.to(dtype), values.to(dtype), important, real


def tokens(rows, count, *, dtype=torch.float32, seed=1, heads=2, width=8):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, rows, heads, count, width, generator=g).to(dtype))


class SlowRow:
    """One row in lists: {column: (key, value)}, (heads, width) each. What it takes is packed and unpacked at once."""

    def __init__(self, keys, values, important, real, bits=4, low_bits=2, window=32, evict=False):
        self.bits, self.window, self.prompt, self.length, self.due = bits, window, *[keys.shape[1]] * 2, GROUP
        old = [t for t in range(max(self.length - window, 0)) if real[t]]
        self.held = {t: (keys[:, t], values[:, t]) for t in range(self.length) if real[t]}
        self.packed = set(old)
        self._pack([t for t in old if important[t]], bits)
        rest = [t for t in old if not important[t]]
        if evict:
            for t in rest:
                del self.held[t]
        else:
            self._pack(rest, low_bits)

    def _pack(self, chosen, bits):
        self.packed |= set(chosen)
        if not chosen:
            return
        keys = torch.stack([self.held[t][0] for t in chosen], dim=1)[None]
        values = torch.stack([self.held[t][1] for t in chosen], dim=1)[None]
        keys = dequantize_kv(quantize_kv(keys, bits, dim=-2))[0]
        values = dequantize_kv(quantize_kv(values, bits, dim=-1, channel_normalize=True))[0]
        for i, t in enumerate(chosen):
            self.held[t] = keys[:, i], values[:, i]

    def append(self, keys, values):
        """The tokens (heads, Q, width) of one call: they see each other, and what is older, at full size."""
        while self.length >= self.prompt + self.due:
            old = self.prompt + self.due - self.window
            self._pack([t for t in sorted(self.held) if t < old and t not in self.packed], self.bits)
            self.due += GROUP
        for t in range(keys.shape[1]):
            self.held[self.length] = keys[:, t], values[:, t]
            self.length += 1


def slow_rows(keys, values, important, real, **settings):
    return [SlowRow(*row, **settings) for row in zip(keys, values, important, real, strict=True)]


def append(slow, keys, values):
    for row, key, value in zip(slow, keys, values, strict=True):
        row.append(key, value)


def by_column(layer, keys, values):
    """What `update` returned, as one {column: (key, value)} a row; no column may come twice."""
    found = []
    for row, columns in enumerate(layer.columns.tolist()):
        assert len(columns) == keys.shape[2] == values.shape[2]
        slots = [slot for slot, column in enumerate(columns) if column != -1]
        found.append({columns[s]: (keys[row, :, s], values[row, :, s]) for s in slots})
        assert len(found[-1]) == len(slots)
    return found


def now(layer):
    """The layer's content as the next call meets it, without appending anything."""
    rows, heads, _, width = layer.keys.shape
    nothing = torch.empty(rows, heads, 0, width, dtype=layer.dtype)
    return by_column(layer, *layer.update(nothing, nothing))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert sorted(ours) == sorted(theirs)
        for column in theirs:
            assert torch.equal(ours[column][0], theirs[column][0]), column
            assert torch.equal(ours[column][1], theirs[column][1]), column


def held_bytes(thing, seen=None):
    """Bytes of every storage that can be reached from an object, found by the garbage collector's references."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, str, torch.dtype)):
        return 0
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        fresh = (storage.data_ptr(), "storage") not in seen
        seen[(storage.data_ptr(), "storage")] = storage
        return storage.nbytes() if fresh else 0
    if hasattr(thing, "__dict__"):
        return held_bytes(vars(thing), seen)
    return sum(held_bytes(part, seen) for part in gc.get_referents(thing))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("bits, low_bits", [(4, 2), (8, 4), (2, 2)])
def test_each_column_holds_what_the_plain_loops_pack(dtype, evict, bits, low_bits):
    how = {"bits": bits, "low_bits": low_bits, "window": 16, "evict": evict}
    batch = prompt(4, 60, pads=[0, 7, 50, 60], dtype=dtype)
    layer, slow = PackedLayer.compress(*batch, **how), slow_rows(*batch, **how)
    assert_same(now(layer), [row.held for row in slow])
    new = tokens(4, 3, dtype=dtype)
    keys, values = layer.update(*new)
    append(slow, *new)
    assert keys.dtype == values.dtype == layer.dtype == dtype
    assert_same(by_column(layer, keys, values), [row.held for row in slow])


def test_slots_come_in_the_order_important_rest_tail():
    keys, values, important, real = prompt(1, 50)
    layer = PackedLayer.compress(keys, values, important, real, window=10)
    layer.update(*tokens(1, 2))
    chosen = [t for t in range(40) if important[0, t]]
    rest = [t for t in range(40) if not important[0, t]]
    assert layer.columns.dtype == torch.long
    assert layer.columns[0].tolist() == chosen + rest + list(range(40, 52))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype):
    batch, new = prompt(4, 70, pads=[0, 20, 55, 66], dtype=dtype), tokens(4, 90, dtype=dtype)
    together = PackedLayer.compress(*batch)
    found = by_column(together, *together.update(*new))
    for row, pad in enumerate([0, 20, 55, 66]):
        one = slice(row, row + 1)
        alone = PackedLayer.compress(*(part[one] for part in batch))
        assert_same(by_column(alone, *alone.update(*(part[one] for part in new))), found[one])
        # Without its padding too, also where only part of the window is left of it.
        bare = PackedLayer.compress(
            *(part[one, ..., pad:, :] for part in batch[:2]), *(m[one, pad:] for m in batch[2:])
        )
        shifted = [{column - pad: pair for column, pair in found[row].items()}]
        assert_same(by_column(bare, *bare.update(*(part[one] for part in new))), shifted)


def test_padding_that_is_not_a_number_stays_out():
    keys, values, important, real = prompt(2, 60, pads=[0, 55])
    keys[1, :, :55], values[1, :, :55] = torch.nan, torch.nan
    layer = PackedLayer.compress(keys, values, important, real, window=5)
    now_keys, now_values = layer.update(*tokens(2, 1))
    assert now_keys.isfinite().all() and now_values.isfinite().all()
    assert (layer.columns[1] >= 0).sum() == 6


@pytest.mark.parametrize("length", [1, 7, 32])
def test_a_prompt_within_the_window_is_kept_as_it_is(length):
    batch = prompt(2, length, pads=[0, length // 2])
    layer = PackedLayer.compress(*batch)
    new = tokens(2, 1)
    keys, values = layer.update(*new)
    assert torch.equal(keys, torch.cat([batch[0], new[0]], 2))
    assert torch.equal(values, torch.cat([batch[1], new[1]], 2))
    assert layer.columns[0].tolist() == list(range(length + 1))
    assert layer.columns[1].tolist() == [-1] * (length // 2) + list(range(length // 2, length + 1))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_of_the_two_precisions_may_have_no_token(share):
    batch = prompt(2, 50, pads=[0, 10], share=share)
    for evict in (False, True):
        layer, slow = PackedLayer.compress(*batch, evict=evict), slow_rows(*batch, evict=evict)
        keys, _ = layer.update(*tokens(2, 0))
        assert keys.shape[2] == (32 if share == 0 and evict else 50)
        assert_same(now(layer), [row.held for row in slow])


@pytest.mark.parametrize("length, window", [(60, 32), (10, 32), (5, 80)])
@pytest.mark.parametrize("steps", [[1] * 200, [200], [63, 1, 1, 70, 65]])
def test_long_generations_are_packed_64_at_a_time(length, window, steps):
    batch = prompt(2, length, pads=[0, length // 2], dtype=torch.float16)
    layer, slow = PackedLayer.compress(*batch, window=window), slow_rows(*batch, window=window)
    new = tokens(2, sum(steps), dtype=torch.float16)
    done = 0
    for count in steps:
        part = [x[:, :, done : done + count] for x in new]
        returned = layer.update(*part)
        append(slow, *part)
        done += count
        assert layer.get_seq_length() == length + done
        assert layer.keys.shape[2] < window + GROUP + count
        assert_same(by_column(layer, *returned), [row.held for row in slow])
        tail = slice(-count, None)
        assert all(
            torch.equal(x[:, :, tail], y) for x, y in zip((layer.keys, layer.values), part, strict=True)
        )
        assert layer.columns[:, tail].tolist() == [list(range(length + done - count, length + done))] * 2
    append(slow, *(x[:, :, :0] for x in new))
    assert_same(now(layer), [row.held for row in slow])
    assert layer.keys.shape[2] < window + GROUP
    assert layer.nbytes < layer.full_nbytes


@pytest.mark.parametrize("before", [0, 40, 100])
def test_a_later_token_of_a_call_changes_no_earlier_slot(before):
    """Nor does it move one behind the tokens that see it: the last slots are the call's own, in their order."""
    batch, first, new = prompt(2, 60, pads=[0, 50]), tokens(2, before, seed=3), tokens(2, 100)
    later = [torch.cat([x[:, :, :25], 9 * x[:, :, 25:]], dim=2) for x in new]
    found = []
    for part in (new, later):
        layer = PackedLayer.compress(*batch, window=8)
        layer.update(*first)
        found.append(layer.update(*part))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours[:, :, :-75], theirs[:, :, :-75])
    assert layer.columns[:, -100:].tolist() == [list(range(60 + before, 160 + before))] * 2


def test_empty_slots_come_before_a_groups_tokens():
    layer = PackedLayer.compress(*prompt(3, 60, pads=[0, 30, 60]), window=8)
    for group in layer.groups:
        filled = group.places[:, 0, :, 0] != torch.iinfo(torch.int32).min
        assert filled.any() and not filled.all()
        assert torch.equal(filled, filled.sort(dim=1).values)


def test_bytes_by_row_are_those_of_the_row_alone():
    batch, new = prompt(4, 70, pads=[0, 20, 55, 66]), tokens(4, 90)
    layer = PackedLayer.compress(*batch, window=8)
    for count in (40, 50):
        layer.update(*(x[:, :, :count] for x in new))
        now(layer)
    for row, pad in enumerate([0, 20, 55, 66]):
        one = slice(row, row + 1)
        own = [x[one, ..., pad:, :] for x in batch[:2]] + [mask[one, pad:] for mask in batch[2:]]
        alone = PackedLayer.compress(*own, window=8)
        for count in (40, 50):
            alone.update(*(x[one, :, :count] for x in new))
            now(alone)
        assert layer.nbytes_by_row()[row] == alone.nbytes == alone.nbytes_by_row().item()


def test_what_was_held_can_be_counted_later():
    layer = PackedLayer.compress(*prompt(3, 60, pads=[0, 30, 60]), window=8)
    before, noted = layer.nbytes_by_row(), layer.shares()
    for seed in range(GROUP + 2):
        layer.update(*tokens(3, 1, seed=seed))
    layer.batch_repeat_interleave(2)
    assert torch.equal(bytes_by_row(noted), before)
    assert (layer.nbytes_by_row()[::2] > before).all()


def test_generated_tokens_shrink_in_memory():
    layer = PackedLayer.compress(*prompt(1, 40, dtype=torch.float16, heads=4, width=64))
    start = layer.nbytes
    layer.update(*tokens(1, 64 * 20, dtype=torch.float16, heads=4, width=64))
    now(layer)
    assert layer.nbytes - start < 0.35 * (layer.full_nbytes - 40 * 4 * 64 * 2 * 2)


@pytest.mark.parametrize(
    "evict, lengths", [(False, (90, 50)), (True, (50, 90)), (False, (90, 20)), (False, (12, 70))]
)
def test_stacked_layers_go_on_as_each_would_alone(evict, lengths):
    batches = [prompt(2, length, pads=[0, length // 3], seed=length) for length in lengths]
    alone = [PackedLayer.compress(*batch, evict=evict) for batch in batches]
    both = PackedLayer.stack([PackedLayer.compress(*batch, evict=evict) for batch in batches])
    longest = max(lengths)

    def shifted(found, length):
        return [{column + longest - length: pair for column, pair in row.items()} for row in found]

    beams = torch.tensor([1, 1])
    for step, count in enumerate([1, 70, 1, 64]):
        new = tokens(4, count, seed=step)
        parts = zip(alone, lengths, (slice(0, 2), slice(2, 4)), strict=True)
        expected = []
        for layer, length, rows in parts:
            expected += shifted(by_column(layer, *layer.update(*(x[rows] for x in new))), length)
            layer.reorder_cache(beams)
        assert_same(by_column(both, *both.update(*new)), expected)
        both.reorder_cache(torch.cat([beams, beams + 2]))
        assert both.get_seq_length() == longest + both.appended
    assert both.columns.max() == both.get_seq_length() - 1


def test_stacking_leaves_the_parts_as_they_were():
    parts = [PackedLayer.compress(*prompt(1, length, seed=length)) for length in (40, 80)]
    before = [now(part) for part in parts]
    both = PackedLayer.stack(parts)
    both.update(*tokens(2, 100))
    both.reset()
    for part, expected, length in zip(parts, before, (40, 80), strict=True):
        assert_same(now(part), expected)
        assert part.get_seq_length() == length


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move_with_all_they_hold(change, rows):
    layer = PackedLayer.compress(*prompt(3, 60, pads=[0, 9, 45]))
    layer.update(*tokens(3, 70))
    found, columns = now(layer), layer.columns
    change(layer)
    assert torch.equal(layer.columns, columns[rows])
    assert_same(now(layer), [found[row] for row in rows])
    new = tokens(len(rows), 1)
    keys, _ = layer.update(*new)
    assert torch.equal(keys[:, :, -1:], new[0])


@pytest.mark.parametrize("pads", [[0, 0], [0, 4]])
def test_room_for_tokens_to_come_is_counted_and_given_back(pads):
    batch = prompt(2, 40, pads=pads)
    layer, places = PackedLayer.compress(*batch, window=8), []
    for seed in range(GROUP + 3 * TAIL_ROOM):
        layer.update(*tokens(2, 1, seed=seed), dequantize=False)
        places.append(layer.keys.data_ptr())
        assert layer.nbytes == held_bytes(layer)
        alone = PackedLayer.compress(*(x[:1] for x in batch), window=8)
        if seed < 2 * TAIL_ROOM:
            for _ in range(seed + 1):
                alone.update(*tokens(1, 1))
            assert layer.nbytes_by_row()[0] == alone.nbytes
    # The tail is copied once in so many tokens, and once when a group of it is packed.
    assert sum(a != b for a, b in itertools.pairwise(places)) <= GROUP / TAIL_ROOM + 4
    for change in (
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_repeat_interleave(2),
    ):
        change()
        assert layer.nbytes == held_bytes(layer)


def test_what_was_made_in_inference_mode_goes_on_outside_of_it():
    batch, new = prompt(2, 50), tokens(2, 3)
    with torch.inference_mode():
        layer = PackedLayer.compress(*batch)
        layer.update(*(x[:, :, :1] for x in new))
    expected = PackedLayer.compress(*batch)
    expected.update(*(x[:, :, :1] for x in new))
    for token in (1, 2):
        one = [x[:, :, token : token + 1] for x in new]
        for ours, theirs in zip(layer.update(*one), expected.update(*one), strict=True):
            assert torch.equal(ours, theirs)


def test_gradients_pass_through_the_tail():
    layer, (key, value) = PackedLayer.compress(*prompt(2, 50)), tokens(2, 1)
    layer.update(*tokens(2, 1, seed=2))
    layer.update(key.requires_grad_(), value)[0].square().sum().backward()
    layer.update(*tokens(2, 1, seed=3))
    assert torch.equal(key.grad, 2 * key)


def test_what_was_shown_does_not_change_and_a_copy_goes_on_by_itself():
    layer = PackedLayer.compress(*prompt(2, 50))
    shown = layer.update(*tokens(2, 1), dequantize=False) and layer.keys
    kept, other = shown.clone(), deepcopy(layer)
    layer.update(*tokens(2, 1, seed=2))
    other.update(*tokens(2, 1, seed=3))
    assert torch.equal(shown, kept)
    assert torch.equal(layer.keys[:, :, -1:], tokens(2, 1, seed=2)[0])
    assert torch.equal(other.keys[:, :, -1:], tokens(2, 1, seed=3)[0])
    assert layer.columns.tolist() == other.columns.tolist()


@pytest.mark.parametrize("evict, most", [(False, 0.25), (True, 0.12)])
def test_bytes_are_those_of_the_tensors_held(evict, most):
    batch = prompt(1, 2000, dtype=torch.float16, heads=4, width=64)
    layer = PackedLayer.compress(*batch, evict=evict)
    assert layer.full_nbytes == 2 * batch[0].nbytes
    assert layer.nbytes / layer.full_nbytes < most
    assert layer.nbytes == held_bytes(layer)
    layer.update(*tokens(1, 100, dtype=torch.float16, heads=4, width=64))
    assert layer.nbytes == held_bytes(layer)
    assert layer.full_nbytes == 2 * batch[0].nbytes // 2000 * 2100
    both = PackedLayer.stack([layer, layer])
    assert both.nbytes == held_bytes(both) == 2 * layer.nbytes


def test_it_is_a_layer_of_a_transformers_cache():
    batch, new = prompt(2, 60, pads=[0, 9]), tokens(2, 2)
    cache = Cache(layers=[PackedLayer.compress(*batch), PackedLayer.compress(*batch, evict=True)])
    plain = DynamicLayer()
    plain.update(*batch[:2])
    assert len(cache) == 2 and cache.is_initialized and cache.is_sliding == [False, False]
    assert not cache.is_croppable and not cache.is_compileable
    assert cache.get_seq_length() == cache.get_seq_length(1) == plain.get_seq_length() == 60
    assert cache.get_mask_sizes(2, 1) == plain.get_mask_sizes(2) == (62, 0)
    assert cache.get_max_length() == plain.get_max_length() == -1
    keys, values = cache.update(*new, 0)
    cache.update(*new, 1)
    plain.update(*new)
    # Coarse, but the same tokens: no channel and no token spans more than all of them do.
    columns = cache.layers[0].columns[0]
    held = columns >= 0
    assert torch.equal(columns[held].sort().values, torch.arange(62))
    for ours, theirs in ((keys[0], plain.keys[0]), (values[0], plain.values[0])):
        assert (ours[:, held] - theirs[:, columns[held]]).abs().max() < (theirs.max() - theirs.min()) / 3
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert all(torch.equal(layer.columns[0], layer.columns[1]) for layer in cache.layers)
    assert (cache.layers[0].columns[0] >= 0).sum() == 62 - 9
    before = now(cache.layers[0])
    cache.offload(0)
    cache.layers[0].prefetch()
    assert_same(now(cache.layers[0]), before)
    with pytest.raises(NotImplementedError, match="without"):
        cache.crop(-1)


def test_a_model_decodes_from_it_as_from_its_own_cache():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape)).eval()
    ids, every = torch.randint(50, (2, 90)), torch.ones(2, 80, dtype=torch.bool)
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model(ids[:, :80], past_key_values=plain)
        # Important columns are scattered, so the slots are in another order than the tokens.
        important = torch.arange(80).expand(2, -1) % 3 == 0
        layers = [
            PackedLayer.compress(x.keys, x.values, important, every, bits=8, low_bits=8) for x in plain.layers
        ]
        packed = Cache(layers=layers)
        for t in range(80, 90):
            expected = model(ids[:, t : t + 1], past_key_values=plain).logits
            logits = model(ids[:, t : t + 1], past_key_values=packed).logits
            torch.testing.assert_close(logits, expected, atol=0.02 * expected.std().item(), rtol=0)
    assert packed.get_seq_length() == plain.get_seq_length() == 90


def test_reset_drops_everything_and_the_layer_starts_anew():
    layer = PackedLayer.compress(*prompt(2, 60))
    layer.update(*tokens(2, 70))
    layer.reset()
    assert not layer.is_initialized and layer.get_seq_length() == 0 and layer.columns.numel() == 0
    assert layer.nbytes == layer.full_nbytes == held_bytes(layer) == 0
    layer.reorder_cache(torch.tensor([0]))
    new = tokens(3, 5, dtype=torch.float16)
    keys, values = layer.update(*new)
    assert torch.equal(keys, new[0]) and torch.equal(values, new[1])
    assert layer.columns.tolist() == [list(range(5))] * 3


def test_an_empty_layer_can_be_initialised_early_and_fills_up():
    cache = Cache(layers=[PackedLayer(window=8)])
    assert not cache.is_initialized
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    new = tokens(2, 100)
    layer = cache.layers[0]
    found = by_column(layer, *cache.update(*new, 0))
    slow = slow_rows(*(x[:, :, :0] for x in new), *torch.zeros(2, 2, 0).bool(), window=8)
    append(slow, *new)
    assert_same(found, [row.held for row in slow])


@always
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    window=st.integers(1, 45),
    evict=st.booleans(),
)
def test_every_column_that_counts_appears_exactly_once(data, rows, length, window, evict):
    flags = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    important, real = (torch.tensor(data.draw(flags)).view(rows, length) for _ in range(2))
    keys, values, _, _ = prompt(rows, length, heads=1, width=4)
    layer = PackedLayer.compress(keys, values, important, real, window=window, evict=evict)
    count = data.draw(st.integers(0, 130))
    got, _ = layer.update(*tokens(rows, count, heads=1, width=4))
    assert layer.columns.shape == (rows, got.shape[2])
    recent = torch.arange(length) >= length - window
    for row, columns in enumerate(layer.columns.tolist()):
        kept = real[row] & (recent | important[row] | (not evict))
        expected = [*kept.nonzero().flatten().tolist(), *range(length, length + count)]
        assert sorted(column for column in columns if column != -1) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "bits and low_bits must be 2, 4 or 8, got 3, 2"),
        ({"low_bits": 16}, "bits and low_bits must be 2, 4 or 8, got 4, 16"),
        ({"window": 0}, "window must be at least 1 token, got 0"),
        ({"important": torch.ones(2, 40)}, "important must be bool"),
        ({"real": torch.ones(2, 40).long()}, "real must be bool"),
        ({"real": torch.ones(2, 39).bool()}, "real must have shape"),
        ({"values": torch.zeros(2, 2, 40, 7)}, "values must have shape"),
        ({"values": torch.zeros(2, 2, 40, 8).half()}, "must share a float dtype"),
        ({"keys": torch.zeros(2, 2, 0, 8)}, "values must have shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("keys", "values", "important", "real")
    with pytest.raises(ValueError, match=message):
        PackedLayer.compress(**(dict(zip(names, prompt(2, 40), strict=True)) | change))


def test_layers_that_do_not_fit_together_are_refused():
    layer = PackedLayer.compress(*prompt(1, 40))
    with pytest.raises(ValueError, match="compress their prompts first"):
        PackedLayer.stack([])
    with pytest.raises(ValueError, match="compress their prompts first"):
        PackedLayer.stack([layer, PackedLayer()])
    ahead = PackedLayer.compress(*prompt(1, 40))
    ahead.update(*tokens(1, 1))
    packed = [PackedLayer.compress(*prompt(1, 40)) for _ in range(2)]
    for one, counts in zip(packed, ((64,), (64, 0)), strict=True):
        for count in counts:
            one.update(*tokens(1, count))
    with pytest.raises(ValueError, match="of those packed"):
        PackedLayer.stack(packed)
    others = [
        PackedLayer.compress(*prompt(1, 40), window=8),
        PackedLayer.compress(*prompt(1, 40, width=4)),
        ahead,
    ]
    for other in others:
        with pytest.raises(ValueError, match="must have the same"):
            PackedLayer.stack([layer, other])
