"""cls_row: the torch path, the Triton kernel by the interpreter, and what that takes of a GPU."""

import pytest
import torch

from lvlm_fix import functional
from lvlm_fix.kernels import cls_row, last_used

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("loud", [1, 100])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "num_heads"),
    [(1, 2, 8, 1), (3, 145, 192, 3), (5, 50, 1000, 1), (2, 99, 160, 4)],
)
def test_the_torch_path_agrees_with_its_oracle(dtype, loud, batch, tokens, width, num_heads):
    torch.manual_seed(0)
    query, key = (torch.randn(2, batch, tokens, width) * loud).to(dtype).unbind()
    reference = functional.cls_scores(query.double(), key.double(), num_heads)
    for asking in (query, query[:, :1]):
        out = cls_row(asking, key, num_heads)
        assert last_used()["cls_row"] == "torch"
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert out.shape == (batch, tokens - 1)
        assert (out - reference).norm() <= TOLERANCE[dtype] * reference.norm()


def test_what_does_not_fit_is_said_in_a_sentence():
    x = torch.zeros(2, 5, 8)

    def message(*inputs):
        with pytest.raises(ValueError) as caught:
            cls_row(*inputs)
        return str(caught.value)

    assert "at least one image token" in message(x[:, :1], x[:, :1], 2)
    assert "query must have 1 or 5 tokens, got 2" in message(x[:, :2], x, 2)
    assert "num_heads=3 must divide width 8" in message(x, x, 3)
    assert "share one floating dtype" in message(x.half(), x, 2)


def test_the_interpreter_agrees_with_the_oracle():
    pytest.importorskip("triton")
    from ahead_of_time import run_interpreted

    run_interpreted("cls_row.py", passed=15)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_fit_on_the_gpu(capability):
    pytest.importorskip("triton")
    from ahead_of_time import TYPES, compiled_usage, require_fits

    from lvlm_fix.kernels.fused import cls_row as fused

    types = dict.fromkeys(["logits", "sums", "out"], "*fp32")
    types |= dict.fromkeys(["tokens", "blocks", "heads"], "i32")
    types |= dict.fromkeys(["query_b", "key_b", "key_t"], "i32!")
    # A tower's head, one of no power of two, and the full width.
    for dtype, width in [("bfloat16", 64), ("float16", 88), ("float32", 1024)]:
        rows, columns = fused.cls_row_configuration(width)
        constants = {"WIDTH": width, "ROWS": rows, "COLUMNS": columns}
        both = types | {"query": TYPES[dtype], "key": TYPES[dtype]}
        require_fits(compiled_usage(fused._cls_logits, capability, both, constants, num_warps=4), capability)
    constants = {"BLOCKS": 64, "ROWS": fused.TOKENS}
    require_fits(compiled_usage(fused._mean_of_heads, capability, types, constants, num_warps=4), capability)
