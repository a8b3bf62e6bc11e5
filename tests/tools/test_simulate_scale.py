"""The simulation against cases that have an answer on paper."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("simulate_scale")


@pytest.fixture
def plain(tool):
    """10 050 images in 101 shards, the last one of 50, without spread, failures or requests."""
    return tool.Case(
        images=10_050,
        shard_size=100,
        image_seconds=0.5,
        speed_sigma=0,
        shard_sigma=0,
        preempt_hours=0,
        load_seconds=0,
        latency_seconds=0,
        start_requests=0,
        end_requests=0,
        claim_seconds=0,
        store_requests_per_second=math.inf,
    )


HARD = {
    "speed_sigma": 0.4,
    "shard_sigma": 0.2,
    "preempt_hours": 0.1,
    "load_seconds": 7,
    "latency_seconds": 0.02,
}
POLICIES = pytest.mark.parametrize("policy", ["stride", "claim"])


@POLICIES
def test_one_worker_takes_the_exact_sum(tool, plain, policy):
    account = tool.simulate(replace(plain, policy=policy))
    assert account.end == account.useful == 10_050 * 0.5
    assert account.done == 10_050
    assert (
        account.idle
        == account.wasted
        == account.away
        == account.starting
        == account.requests
        == account.preemptions
        == 0
    )


@POLICIES
def test_starts_requests_and_hand_outs_add_what_they_say(tool, plain, policy):
    case = replace(
        plain,
        policy=policy,
        load_seconds=20,
        latency_seconds=0.25,
        shard_requests=8,
        start_requests=4,
        end_requests=2,
        parallel_requests=2,
    )
    account = tool.simulate(replace(case, claim_seconds=0.125))
    planning = (3 * 1 + 4 * 101 / 2) * 0.25
    closing = (1 + 2 * 101 / 2) * 0.25
    handing_out = 101 * 0.125 if policy == "claim" else 0
    assert account.end == pytest.approx(
        10_050 * 0.5 + 101 * 8 * 0.25 + 20 + planning + handing_out + closing, rel=1e-12
    )
    assert account.store_requests == 3 + 4 * 101 + 8 * 101 + 1 + 2 * 101


@POLICIES
def test_equal_workers_end_together(tool, plain, policy):
    account = tool.simulate(replace(plain, policy=policy, images=6400, workers=8))
    assert account.end == 800 * 0.5
    assert account.idle == 0
    one_more = tool.simulate(replace(plain, policy=policy, images=6500, workers=8))
    assert one_more.end == 900 * 0.5
    assert one_more.idle == 7 * 100 * 0.5


@POLICIES
@pytest.mark.parametrize("workers", [1, 3, 40, 200])
@pytest.mark.parametrize("preempt_hours", [0.1, 0])
def test_no_second_and_no_image_is_lost(tool, plain, policy, workers, preempt_hours):
    """Every image is done once and all time is accounted for, also with idle workers."""
    case = replace(
        plain, policy=policy, workers=workers, claim_seconds=0.01, **{**HARD, "preempt_hours": preempt_hours}
    )
    account = tool.simulate(case)
    assert account.done == 10_050
    parts = (
        account.useful,
        account.wasted,
        account.requests,
        account.starting,
        account.closing,
        account.away,
        account.idle,
    )
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(workers * account.end, rel=1e-9)
    if not preempt_hours:
        assert account.preemptions == account.wasted == account.lost == account.away == 0


def test_preemptions_cost_what_theory_says(tool, plain):
    """Tries until one of length T survives at rate r take (e^(rT) - 1) / r, of which T is kept."""
    account = tool.simulate(replace(plain, images=2_000_000, preempt_hours=0.02))
    length, rate = 50.0, 1 / 72.0
    expected = (math.expm1(rate * length) / rate - length) * 20_000
    assert account.wasted == pytest.approx(expected, rel=0.02)
    assert account.preemptions == pytest.approx(20_000 * math.expm1(rate * length), rel=0.02)
    assert account.lost == pytest.approx(account.wasted / 0.5, rel=1e-9)


def test_a_claim_waits_less_for_slow_workers_than_a_stride(tool, plain):
    slow = replace(plain, images=1_000_000, workers=64, speed_sigma=0.3)
    stride, claim = (tool.simulate(replace(slow, policy=policy)) for policy in ("stride", "claim"))
    slowest = max(tool.Worker(number, slow).image_seconds for number in range(64))
    shards = max(len(range(number, slow.shards, 64)) for number in range(64))
    assert stride.end <= slowest * 100 * shards * (1 + 1e-12)
    assert claim.end < 0.7 * stride.end
    assert claim.idle <= 64 * slowest * 100  # nobody waits longer than the slowest needs for one shard


def test_the_shard_of_a_dead_worker_goes_to_another(tool, plain):
    """Two workers, two shards; where one dies and is away for a day, the other does its shard."""
    for seed in range(20):
        case = replace(
            plain, policy="claim", images=200, workers=2, preempt_hours=0.02, away_seconds=86_400, seed=seed
        )
        account = tool.simulate(case)
        if account.preemptions == 1:
            assert account.end < 300
            assert account.away < 300  # counted until the end only
            return
    pytest.fail("no seed had exactly one preemption")


def test_the_store_limits_many_that_start_at_once(tool, plain):
    case = replace(plain, workers=50, start_requests=1, store_requests_per_second=100, latency_seconds=1e-9)
    assert tool.simulate(case).starting / 50 == pytest.approx(50 * (3 + 101) / 100)
    assert tool.simulate(replace(case, policy="claim")).starting / 50 == pytest.approx((3 + 101) / 100)


def test_the_store_limits_many_that_end_at_once(tool, plain):
    """Ten workers with ten equal shards of 50 s each: the sidecars of 100 shards are read ten
    times. Listings take a little, too.
    """
    case = replace(
        plain, images=10_000, workers=10, end_requests=1, store_requests_per_second=10, latency_seconds=1e-9
    )
    stride = tool.simulate(case)
    assert stride.end == pytest.approx(10 * 3 / 10 + 500 + 10 * (1 + 100) / 10, rel=1e-6)
    assert stride.store_requests == 10 * 3 + 10 * 101 + 8 * 100
    late = replace(
        case, images=700, workers=3
    )  # the first two workers have one shard less: only the last reads the sidecars
    assert tool.simulate(late).store_requests == 3 * 3 + 8 * 7 + 3 * 1 + 7
    claim = tool.simulate(replace(case, policy="claim"))
    assert claim.end == pytest.approx(3 / 10 + 500 + (1 + 100) / 10, rel=1e-6)


def test_the_program_writes_the_same_figures_each_time(run, tmp_path):
    options = [
        "--images",
        "100000",
        "--shard-sizes",
        "100,1000",
        "--workers",
        "1,7,50",
        "--seed",
        "3",
        "--preempt-hours",
        "0.5",
    ]
    command = [sys.executable, str(TOOLS / "simulate_scale.py"), *options, "--out", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "stride" in done.stdout
    assert run("simulate_scale", *options, "--out", tmp_path / "b.json")[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["measured"] is None
    assert report["assumptions"]["seed"] == 3
    assert len(report["rows"]) == 12
    for row in report["rows"]:
        assert sum(value for name, value in row.items() if name.endswith("_share")) == pytest.approx(1)
    code, output = run("simulate_scale", *options, "--preempt-hours", "0.0001")
    assert code == 1
    assert "choose smaller shards" in output
