"""The kernels' benchmark, run as a person would type it."""

import json
import subprocess
import sys

import pytest
import torch

from lvlm_fix import kernels
from lvlm_fix.kernels.bench import against_floor, main
from lvlm_fix.kernels.timing import Clock, Spread
from lvlm_fix.kernels.workloads import CASES, HEADS, SHAPES, Size, heads_within, sparse_prefill_case


def test_every_front_is_measured():
    fronts = set(kernels.__all__) - {"Redistribution", "last_used"}
    assert fronts
    assert fronts <= set(CASES)


def test_a_quick_run_writes_what_it_promises(tmp_path):
    written, table = tmp_path / "deep" / "times.json", tmp_path / "table.md"
    typed = [
        sys.executable,
        "-m",
        "lvlm_fix.kernels.bench",
        "--quick",
        "--shape",
        "llava-1.5",
        "--device",
        "cpu",
    ]
    files = ["--json", written, "--markdown", table, "--date", "a Monday", "--machine", "ours"]
    ran = subprocess.run([*typed, *files], capture_output=True, text=True, check=True)
    result = json.loads(written.read_text())
    assert result["machine"]["name"] == "ours"
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["settings"] == {"dtype": "float32", "device": "cpu", "quick": True, "date": "a Monday"}
    rates = result["rates"]
    assert rates["bytes_per_second"] > 0 and rates["flops_per_second"] > 0
    assert {row["kernel"] for row in result["results"]} == set(CASES)
    assert len(result["results"]) == sum(len(cases) for cases in CASES.values())
    for row in result["results"]:
        assert row["implementation"] == "torch"
        for form in ("front", "peer", "reference"):
            assert 0 < row[form]["lower"] <= row[form]["median"] <= row[form]["upper"]
            assert row[form]["runs"] >= 3
        assert row["wall_seconds"] > 0
        for form in ("peer", "reference"):
            ratio = row[form]["median"] / row["front"]["median"]
            assert row[f"speed_over_{form}"] == pytest.approx(ratio)
        limits = row["bytes"] / rates["bytes_per_second"], row["flops"] / rates["flops_per_second"]
        assert row["floor"]["seconds"] == pytest.approx(max(limits))
        assert row["floor"]["share"] == pytest.approx(max(limits) / row["front"]["median"])
        # The fronts compute what the references do; packed tensors are not compared.
        assert row["difference"] is None if row["kernel"] == "pack" else row["difference"] <= 1e-5
    for text in (table.read_text(), ran.stdout):
        assert all(kernel in text for kernel in CASES)
        assert "ours" in text


def test_what_a_processor_cannot_do_in_time_is_left_out_and_said(tmp_path):
    # Given two kernels at 64k tokens, then attention over all pairs is left out and the one row is not.
    written = tmp_path / "times.json"
    chosen = ["--kernel", "sparse_prefill", "--kernel", "contrast", "--shape", "video-64k"]
    main([*chosen, "--quick", "--device", "cpu", "--json", str(written)])
    sparse, contrast = json.loads(written.read_text())["results"]
    assert "too much arithmetic" in sparse["left_out"]
    assert "front" not in sparse and "front" in contrast


def test_heads_shrink_until_the_arithmetic_fits():
    prefill = CASES["visual_attention"][0]
    counts = [heads_within(prefill, tokens, 2e10) for tokens in SHAPES.values()]
    assert counts[0] == HEADS
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert heads_within(prefill, SHAPES["video-64k"], float("inf")) == HEADS


def test_the_floor_is_the_longer_of_bytes_and_flops():
    row = {"bytes": 100, "flops": 10, "front": {"median": 20.0}}
    assert against_floor(row, {"bytes_per_second": 10, "flops_per_second": 10})["floor"] == {
        "seconds": 10.0,
        "set_by": "bytes",
        "share": 0.5,
    }
    assert against_floor(row, {"bytes_per_second": 1e9, "flops_per_second": 1})["floor"]["set_by"] == "flops"


def test_forms_take_turns():
    order = []
    clock = Clock(torch.device("cpu"))
    spreads = clock.compare({name: lambda name=name: order.append(name) for name in "abc"}, budget=0.0)
    # Two calls each to warm up, then every form starts one of three rounds.
    assert "".join(order[6:]) == "abcbcacab"
    assert all(spread.runs == 3 for spread in spreads.values())


def test_the_spread_holds_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, lower=2.0, upper=4.0, runs=5)


def test_sparse_prefill_counts_what_it_reads_and_writes():
    torch.manual_seed(0)
    work = sparse_prefill_case(Size(100, 2, torch.float32, torch.device("cpu")))
    kept = int((work.front()[0, 0] != 0).any(-1).sum())
    assert 0 < kept < 100
    assert work.bytes_moved == 4 * 2 * 128 * (100 + 3 * kept)
    assert work.flops == 2 * 2 * 128 * kept**2


def test_a_missing_gpu_is_said_in_a_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as caught:
        main(["--device", "cuda"])
    assert caught.value.code == 2
    assert "torch sees no CUDA device here; run with --device cpu" in capsys.readouterr().err
