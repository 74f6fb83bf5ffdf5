"""What all fronts promise: their oracles' arguments, and a sentence where tensors do not belong together."""

import inspect

import pytest
import torch
from torch.utils import deterministic

from lvlm_fix import functional, kernels
from lvlm_fix.kernels import Redistribution, pack, quantized_decode, visual_attention
from lvlm_fix.kernels.fused import launch

# Fronts have their oracles' names, but for these.
NAMES = {"probe_scores": "probe_importance", "cls_row": "cls_scores", "contrast": "contrast_logits"}
FRONTS = sorted(set(kernels.__all__) - {"Redistribution", "last_used"})
VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory is NaN, so that what nothing writes is seen."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(out, reference):
    size = reference.norm()
    return float((out.double() - reference).norm() / (size if size > 0 else 1))


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_takes_what_its_oracle_takes(front):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(x.name, x.kind, x.default) for x in parameters]

    taken = arguments(getattr(kernels, front))
    if front == "contrast":
        # The oracle leaves the argmax to whoever wants it; the front has it at no cost.
        assert taken.pop() == ("argmax", inspect.Parameter.KEYWORD_ONLY, False)
    assert taken == arguments(getattr(functional, NAMES.get(front, front)))


def test_tensors_on_two_devices_are_said_in_a_sentence():
    x, mask = torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be on one device, got query on cpu, key on meta"):
        visual_attention(x, x.to("meta"), x, mask, mask, first_query=0, **VAR)
    group = pack(x, x, 4)
    moved = [group[0], group[1].__class__(**vars(group[1]) | {"packed": group[1].packed.to("meta")})]
    with pytest.raises(ValueError, match=r"groups\[0\] must hold"):
        quantized_decode(x[:, :, :1], [tuple(moved)], x, x)


@pytest.mark.parametrize("change", ["codes", "zero point", "dtype"])
def test_codes_of_another_shape_never_reach_a_kernel(change):
    x = torch.randn(1, 1, 4, 8)
    keys, values = pack(x, x, 4)
    held = {
        "codes": {"packed": keys.packed[..., :3]},
        "zero point": {"zero_point": keys.zero_point[..., :3]},
        "dtype": {"packed": keys.packed.to(torch.int8)},
    }[change]
    with pytest.raises(ValueError, match=r"groups\[0\] must hold"):
        quantized_decode(x[:, :, :1], [(type(keys)(**vars(keys) | held), values)], x, x)


def test_triton_is_left_out_where_it_cannot_run(monkeypatch):
    class OnCuda:
        """What `fits` asks of a tensor on a GPU that is not here."""

        is_cuda, dtype, device, shape = True, torch.float16, torch.device("cuda", 7), (2, 64)

        def numel(self):
            return 128

    def found(capability, hip=None, spec="here"):
        launch._has_kernels.cache_clear(), launch._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(launch, "find_spec", lambda name: spec)
        return launch.fits_attention(OnCuda())

    assert found((8, 0)) and found((9, 0))
    assert not found((7, 5))
    assert not found((9, 4), hip="6.2")
    assert not found((9, 0), spec=None)
    launch._has_kernels.cache_clear(), launch._capability.cache_clear()


@every_dtype
@pytest.mark.parametrize("image", [(0, 0), (3, 30)], ids=["no image", "image"])
@pytest.mark.parametrize("loud", [1, 30])
def test_packed_decoding_of_all_sinks_and_huge_logits(dtype, image, loud):
    x, query = torch.randn(1, 2, 40, 256).to(dtype), (torch.randn(1, 4, 1, 256) * loud).to(dtype)
    group, mask = pack(x, x, 4), torch.zeros(1, 41, dtype=torch.bool)
    mask[:, slice(*image)] = True
    moved = Redistribution(mask, torch.ones_like(mask), 0, **VAR)
    out = quantized_decode(query, [group], x[:, :, :1], x[:, :, :1], redistribution=moved)
    # The oracle in float64 on what the codes stand for, not rounded to the dtype again.
    wide = [_doubled(q) for q in group]
    tail = x[:, :, :1].double()
    expected = functional.quantized_decode(query.double(), [tuple(wide)], tail, tail, redistribution=moved)
    assert out.isfinite().all() and error(out, expected) <= TOLERANCE[dtype]


def test_a_cache_of_one_token_gives_its_value():
    x = torch.randn(2, 2, 1, 64)
    torch.testing.assert_close(quantized_decode(x, [], x, x), x)


def test_probes_that_see_nothing_give_nothing():
    x = torch.randn(1, 2, 9, 32)
    hidden = torch.zeros(1, 9, dtype=torch.bool)
    for scores in kernels.probe_scores(x[:, :, -3:], x, torch.arange(6, 9), key_mask=hidden):
        assert not scores.any()


def test_contrast_of_halves_agrees_with_float64():
    logits, negative = (torch.randn(2, 3, 4000) * 5).half().unbind()
    out = kernels.contrast(logits, negative, 1.0, 0.1)
    expected = functional.contrast_logits(logits.double(), negative.double(), 1.0, 0.1)
    kept = expected.isfinite()
    assert torch.equal(kept, out.isfinite()) and error(out[kept], expected[kept]) <= 2e-3


def _doubled(q):
    names = ("scale", "zero_point", "channel_scale")
    held = {name: getattr(q, name) for name in names}
    return type(q)(**vars(q) | {name: x.double() for name, x in held.items() if x is not None})


@pytest.mark.slow
@every_dtype
def test_nine_thousand_tokens(dtype):
    tokens = 9000
    query, key, value = torch.randn(3, 1, 1, tokens, 64).to(dtype).unbind()
    place = torch.arange(tokens)[None]
    image, sink, real = (place > 500) & (place < 8900), place % 3000 == 600, place >= 400
    given = VAR | {"first_query": 8950}
    few = slice(tokens - 60, tokens)
    wide = [x.double() for x in (query[:, :, few], key, value)]
    for key_mask in (None, real):
        expected = functional.visual_attention(*wide, image, sink, key_mask=key_mask, **given)
        for rows in (slice(0, tokens), few, slice(tokens - 1, tokens)):
            out = visual_attention(query[:, :, rows], key, value, image, sink, key_mask=key_mask, **given)
            count = min(60, out.shape[2])
            assert error(out[:, :, -count:], expected[:, :, -count:]) <= TOLERANCE[dtype]
    chosen = place % 3 == 0
    out = kernels.sparse_prefill(query, key, value, chosen)
    expected = functional.sparse_prefill(*(x.double() for x in (query, key, value)), chosen)
    assert error(out, expected) <= TOLERANCE[dtype]
    probes = torch.arange(0, tokens, 100)
    for one, other in zip(
        kernels.probe_scores(query[:, :, probes], key, probes),
        functional.probe_importance(query[:, :, probes].double(), key.double(), probes),
        strict=True,
    ):
        assert error(one, other) <= 1e-5
    group, tail = pack(key[:, :, :-64], value[:, :, :-64], 4), [x[:, :, -64:] for x in (key, value)]
    out = quantized_decode(query[:, :, -1:], [group], *tail)
    expected = functional.quantized_decode(
        query[:, :, -1:].double(), [tuple(map(_doubled, group))], *(x.double() for x in tail)
    )
    assert error(out, expected) <= TOLERANCE[dtype]
