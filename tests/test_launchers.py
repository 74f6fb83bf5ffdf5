"""Runs as people start them on several processes: the launchers themselves, and what they say in the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_fix.evals.processes import Process, warn_if_alone
from lvlm_fix.evals.records import read_json

MEASURED = ("compute_seconds", "tokens_per_second", "seconds_per_answer", "peak_memory_bytes")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
CHAIR = [
    "eval", "chair", "--limit", "7", "--max-new-tokens", "8", "--batch-size", "2", "--fix", "vtc_cls(keep=72)",
]  # fmt: skip
POPE = [
    "eval", "pope", "--limit", "12", "--max-new-tokens", "3", "--batch-size", "4", "--fix", "vtc_cls(keep=72)",
]  # fmt: skip
TUNE = [
    "tune", "vtc_cls", "--grid", "keep=36,72", "--limit", "8", "--max-new-tokens", "8", "--batch-size", "2",
]  # fmt: skip
NAMES = [
    f"{name}{part}"
    for name in ("", "OMPI_COMM_WORLD_")
    for part in ("RANK", "WORLD_SIZE", "SIZE", "LOCAL_RANK")
] + ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"]


def start(launcher: list[str], words: list[str], out: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "-m", "lvlm_fix", *words, "--out", str(out), "--json"],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def results(out: Path) -> dict[str, list[dict]]:
    """All results lines below a folder, without what is measured."""
    found = {}
    for path in sorted(out.rglob("results-*.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(out))] = [
            {key: value for key, value in row.items() if key not in ("seconds", "memory")} for row in rows
        ]
    return found


def unmeasured(value):
    """JSON without what is measured."""
    if isinstance(value, dict):
        return {key: unmeasured(inner) for key, inner in value.items() if key not in MEASURED}
    return [unmeasured(one) for one in value] if isinstance(value, list) else value


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "words", "processes"),
    [
        ([*ACCELERATE, "--multi_gpu", "--num_processes", "2"], POPE, 2),
        ([*TORCHRUN, "--nproc_per_node", "3"], CHAIR, 3),
        ([*TORCHRUN, "--nproc_per_node", "2"], TUNE, 2),
    ],
    ids=["accelerate", "torchrun", "torchrun-tune"],
)
def test_launched_processes_share_the_work_and_merge_to_the_same(
    launcher, words, processes, tmp_path
) -> None:
    alone = start([sys.executable], words, tmp_path / "alone")
    shared = start(launcher, words, tmp_path / "shared")
    assert results(tmp_path / "shared") == results(tmp_path / "alone")
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    summaries = {name for name in files(tmp_path / "alone") if name.endswith(("summary.json", "tune.json"))}
    assert summaries
    for name in summaries:
        one, other = (read_json(tmp_path / kind / name) for kind in ("alone", "shared"))
        assert unmeasured(one) == unmeasured(other)
    assert unmeasured(json.loads(shared.stdout)) == unmeasured(json.loads(alone.stdout))
    for path in (tmp_path / "shared").rglob("manifest.json"):
        assert read_json(path)["environment"]["processes"] == processes


@pytest.mark.slow
def test_accelerate_that_starts_one_process_for_two_is_told_of(tmp_path) -> None:
    words = ["eval", "chair", "--limit", "2", "--max-new-tokens", "2"]
    done = start([*ACCELERATE, "--cpu", "--num_processes", "2"], words, tmp_path)
    assert "accelerate launch --cpu starts one process without mpirun" in done.stderr
    assert len(results(tmp_path)["results-none.jsonl"]) == 2


@pytest.fixture
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "process"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, (0, 2, 0)),
        ({"RANK": "0"}, (0, 1, 0)),
    ],
)
def test_launchers_say_which_process_it_is(bare, variables, process) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    assert Process.from_environment() == process


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"PMI_RANK": "x", "PMI_SIZE": "2"}])
def test_variables_that_do_not_go_together_are_named(bare, variables) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    with pytest.raises(ValueError, match=next(iter(variables))):
        Process.from_environment()


def test_a_lone_process_is_only_warned_where_more_were_asked_for(bare, recwarn) -> None:
    warn_if_alone()
    bare.setenv("ACCELERATE_USE_CPU", "True")
    warn_if_alone()
    assert not recwarn
    bare.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="torchrun --nproc_per_node"):
        warn_if_alone()
    bare.setenv("OMPI_COMM_WORLD_RANK", "0")
    bare.setenv("OMPI_COMM_WORLD_SIZE", "2")
    recwarn.clear()
    warn_if_alone()
    assert not recwarn
