"""Simulate encoding a billion images on 1 to 4096 workers: how long, how much of it idle, how much done twice. Nothing here is measured.

    python tools/simulate_scale.py [--images 1000000000] [--image-seconds 0.004] [--shard-sizes 1000,10000] [--workers 1,4,...,4096]
                                   [--seed 0] [--out FILE.json]

A worker takes a shard, pays for its requests to the store, encodes it, and takes the next. Two ways to take it:

- stride: worker w of W has the shards w, w + W, w + 2W, ... (`latentae encode` with task ids). Every worker looks through the store at
  each of its starts, and once more at its end, when the last one reads all sidecars; nobody takes over the shards of a slow one.
- claim: a driver hands out the next shard that nobody has (`--engine ray`). It alone looks through the store, and reads the sidecars once
  all is done; each hand-out takes it `claim_seconds`. The shard of a worker that dies goes to the next that asks.

A worker has its own speed: the time of an image is `image_seconds` times exp(speed_sigma z), z standard normal, and each shard has a
factor of mean 1 of its own. A preemption comes after an exponential time at work; the shard in hand is lost, and the worker is away for
`away_seconds`, then starts again. The time of all workers until the end is split without remainder:

    workers x end = useful + wasted (encoded, then lost) + requests + starting + closing + away
                    + idle (nothing to take, or waiting for the driver)

The same seed gives the same figures on every machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

POLICIES: tuple[Literal["stride", "claim"], ...] = ("stride", "claim")
PARTS = ("useful", "wasted", "requests", "starting", "closing", "away", "idle")
LISTINGS = 3  # when the work is planned
PAGE = 1000  # names in one answer of an object store
LONGEST = 6.0  # times between two preemptions that a shard may take: e^6, 400 attempts, are already hopeless


@dataclass(frozen=True)
class Case:
    """One simulated job. Every figure is an assumption unless a benchmark is named beside it."""

    policy: Literal["stride", "claim"] = "stride"
    workers: int = 1
    images: int = 1_000_000_000
    shard_size: int = 10_000
    """Images of a shard."""
    image_seconds: float = 0.004
    """Reading, decoding, encoding and writing one image on a worker of ordinary speed."""
    speed_sigma: float = 0.2
    """Spread of the workers' speeds: standard deviation of the logarithm."""
    shard_sigma: float = 0.05
    """Spread of the shards' times on one worker."""
    preempt_hours: float = 24.0
    """Mean time at work between two preemptions of one worker; 0 is never."""
    away_seconds: float = 300.0
    """From a preemption until the worker is back."""
    load_seconds: float = 20.0
    """Starting the program and loading the model."""
    latency_seconds: float = 0.05
    """One request to the store."""
    shard_requests: float = 8.0
    """Requests of a shard, one after another: read it, look for it, write it, its files and its sidecar, read back."""
    start_requests: float = 0.0
    """Requests for each shard of the data set when the work is planned: 1 from an HTTP server, which is asked for each size."""
    end_requests: float = 1.0
    """Requests for each shard once all are done: its sidecar."""
    parallel_requests: int = 16
    """How many of those are under way at once."""
    store_requests_per_second: float = 5000.0
    """What the store answers to all workers together."""
    claim_seconds: float = 0.001
    """The driver's time to hand out one shard."""
    seed: int = 0

    @property
    def shards(self) -> int:
        """How many."""
        return math.ceil(self.images / self.shard_size)

    def images_of(self, shard: int) -> int:
        """As many as a shard holds, but for the last."""
        return min(self.shard_size, self.images - shard * self.shard_size)

    @property
    def planning_requests(self) -> float:
        """Those of one look through the store: three listings (shards, their sizes, output) and what each shard takes."""
        return LISTINGS * math.ceil(self.shards / PAGE) + self.start_requests * self.shards

    def planning_seconds(self, starting_together: int) -> float:
        """One look through the store while others look too: bound by latency, or by what the store can answer."""
        alone = (
            LISTINGS * math.ceil(self.shards / PAGE)
            + self.start_requests * self.shards / self.parallel_requests
        )
        return max(
            alone * self.latency_seconds,
            starting_together * self.planning_requests / self.store_requests_per_second,
        )

    def closing(self, done: int) -> tuple[float, float]:
        """Requests of a look at the output when `done` shards are, and the least seconds they take: the sidecars once all are."""
        pages, sidecars = math.ceil(done / PAGE), self.end_requests * done if done == self.shards else 0.0
        return pages + sidecars, (pages + sidecars / self.parallel_requests) * self.latency_seconds

    @property
    def restart_seconds(self) -> float:
        """From being back until the next shard; with a driver a worker need not look through the store."""
        return self.load_seconds + (self.planning_seconds(1) if self.policy == "stride" else 0.0)


@dataclass
class Account:
    """Seconds of all workers together, and counts."""

    useful: float = 0.0
    wasted: float = 0.0
    requests: float = 0.0
    starting: float = 0.0
    closing: float = 0.0
    away: float = 0.0
    idle: float = 0.0
    end: float = 0.0
    """When the last worker had nothing more to do, in seconds since the start."""
    done: int = 0
    """Images encoded and kept."""
    shards: int = 0
    """Shards done."""
    lost: float = 0.0
    """Images encoded and lost."""
    preemptions: int = 0
    store_requests: float = 0.0


class Worker:
    """One machine: its speed, and its luck."""

    def __init__(self, number: int, case: Case) -> None:
        self.random = random.Random(
            f"{case.seed}/{number}"
        )  # its own, so that one worker more changes no other
        self.image_seconds = case.image_seconds * math.exp(case.speed_sigma * self.random.gauss(0, 1))
        self.shard_sigma = case.shard_sigma
        self.rate = 1 / (3600 * case.preempt_hours) if case.preempt_hours else 0.0

    def seconds_of(self, images: int) -> float:
        """How long it will encode a shard of so many images."""
        spread = self.shard_sigma
        factor = math.exp(spread * self.random.gauss(0, 1) - spread * spread / 2) if spread else 1.0
        return images * self.image_seconds * factor

    def until_preempted(self) -> float:
        """Memoryless: drawn anew for each shard."""
        return self.random.expovariate(self.rate) if self.rate else math.inf


class Queue:
    """Which shard a worker takes next."""

    def __init__(self, case: Case) -> None:
        self.claimed = case.policy == "claim"
        lots = 1 if self.claimed else case.workers
        self.lots: list[Iterator[int]] = [iter(range(lot, case.shards, lots)) for lot in range(lots)]
        self.returned: list[list[int]] = [[] for _ in range(lots)]  # those of workers that died, taken first

    def take(self, worker: int) -> int | None:
        """The next shard for this worker; None where there is none now."""
        lot = 0 if self.claimed else worker
        return self.returned[lot].pop() if self.returned[lot] else next(self.lots[lot], None)


def simulate(case: Case) -> Account:
    """Run one case from the first start to the last shard.

    Raises:
        ValueError: shards so long that a preempted worker would hardly ever finish one.
    """
    workers = [Worker(number, case) for number in range(case.workers)]
    _refuse_hopeless(case, workers)
    queue, account = Queue(case), Account()
    start = driver = _first_start(case, account)
    events = [
        (start, number) for number in range(case.workers)
    ]  # a worker is free; below zero: shard ~number is nobody's again
    waiting: list[tuple[float, int]] = []  # workers with nothing to take, and since when
    over = 0.0  # when the last of the shards begun so far is done
    answered = 0.0  # when the store has answered those who read the sidecars so far
    while events:
        now, number = heapq.heappop(events)
        if number < 0:
            queue.returned[0].append(~number)
            if waiting:
                since, number = waiting.pop()
                account.idle += max(0.0, now - since)
                heapq.heappush(events, (max(now, since), number))
            continue
        shard = queue.take(number)
        if shard is None and queue.claimed:
            waiting.append((now, number))
            continue
        if shard is None:
            requests, least = case.closing(account.shards if now >= over else account.shards - 1)
            answered = max(answered, now) + requests / case.store_requests_per_second
            waiting.append((max(now + least, answered), number))
            account.store_requests += requests
            account.closing += waiting[-1][0] - now
            account.end = max(account.end, waiting[-1][0])
            continue
        if queue.claimed:  # one hand-out at a time
            driver = max(driver, now) + case.claim_seconds
            account.idle += driver - now
            now = driver
        attempt = _attempt(case, workers[number], shard, now, account)
        heapq.heappush(events, (attempt.free, number))
        if attempt.done:
            over = max(over, attempt.over)
        elif queue.claimed:
            heapq.heappush(events, (attempt.over, ~shard))
        else:  # nobody else takes it
            queue.returned[number].append(shard)
    account.end = max(account.end, over)
    if queue.claimed:
        requests, least = case.closing(account.shards)
        account.store_requests += requests
        account.end += max(least, requests / case.store_requests_per_second)
    _close(case, account, [since for since, _ in waiting])
    return account


def _first_start(case: Case, account: Account) -> float:
    """All workers begin together; with a driver they wait until it knows the work."""
    lookers = case.workers if case.policy == "stride" else 1
    until = case.planning_seconds(lookers) + case.load_seconds
    account.store_requests += lookers * case.planning_requests
    account.starting += case.workers * until
    return until


@dataclass(frozen=True)
class Attempt:
    """What became of one shard on one worker."""

    over: float
    """When the shard was done, or its worker died."""
    free: float
    """When the worker can take another."""
    done: bool


def _attempt(case: Case, worker: Worker, shard: int, now: float, account: Account) -> Attempt:
    images = case.images_of(shard)
    asking, work = case.shard_requests * case.latency_seconds, worker.seconds_of(images)
    life = worker.until_preempted()
    account.store_requests += case.shard_requests
    if life >= asking + work:
        account.requests += asking
        account.useful += work
        account.done += images
        account.shards += 1
        return Attempt(now + asking + work, now + asking + work, True)
    account.preemptions += 1
    account.requests += min(life, asking)
    account.wasted += max(0.0, life - asking)
    account.lost += images * max(0.0, life - asking) / work
    account.store_requests += case.planning_requests if case.policy == "stride" else 0.0
    account.away += case.away_seconds
    account.starting += case.restart_seconds
    return Attempt(now + life, now + life + case.away_seconds + case.restart_seconds, False)


def _close(case: Case, account: Account, last: list[float]) -> None:
    """Account for each worker until the end; `last` is when each had nothing more to take."""
    for since in last:
        account.idle += max(0.0, account.end - since)
        late = max(0.0, since - account.end)  # it died, and the others finished before it was back
        account.starting -= min(late, case.restart_seconds)
        account.away -= late - min(late, case.restart_seconds)


def _refuse_hopeless(case: Case, workers: list[Worker]) -> None:
    if not case.preempt_hours:
        return
    slowest = max(worker.image_seconds for worker in workers) * min(case.shard_size, case.images) / 3600
    if slowest > LONGEST * case.preempt_hours:
        raise ValueError(
            f"a shard of {case.shard_size} images takes the slowest worker {slowest:.1f} h, and a preemption comes each "
            f"{case.preempt_hours:g} h; choose smaller shards"
        )


def row_of(case: Case) -> dict[str, Any]:
    """What is reported of one case: shares are of the time of all workers until the end."""
    account = simulate(case)
    total = case.workers * account.end or 1.0
    shares = {name: getattr(account, name) / total for name in PARTS}
    return {
        "policy": case.policy,
        "workers": case.workers,
        "shard_size": case.shard_size,
        "shards": case.shards,
        "hours": account.end / 3600,
        **{f"{name}_share": share for name, share in shares.items()},
        "preemptions": account.preemptions,
        "images_lost": round(account.lost),
        "store_requests": round(account.store_requests),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'policy':7}{'workers':>8}{'shard':>8}{'hours':>12}"
    head += "".join(f"{name:>8}" for name in ("useful", "wasted", "asking", "start", "close", "away", "idle"))
    lines = [f"{head}{'preempted':>11}{'requests':>12}"]
    for row in rows:
        shares = "".join(f"{100 * row[f'{name}_share']:7.2f}%" for name in PARTS)
        lines.append(
            f"{row['policy']:7}{row['workers']:8}{row['shard_size']:8}{row['hours']:12.2f}{shares}{row['preemptions']:11}"
            f"{row['store_requests']:12.3g}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    single = [field for field in fields(Case) if field.name not in ("policy", "workers", "shard_size")]
    for field in single:
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"default {field.default}",
        )
    parser.add_argument("--workers", default="1,4,16,64,256,1024,4096", help="worker counts, with commas")
    parser.add_argument("--shard-sizes", default="1000,10000", help="images of a shard, with commas")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = vars(parser.parse_args())
    base = Case(**{field.name: options[field.name] for field in single})
    rows = []
    for size in map(int, options["shard_sizes"].split(",")):
        for workers in map(int, options["workers"].split(",")):
            for policy in POLICIES:
                try:
                    rows.append(row_of(replace(base, policy=policy, workers=workers, shard_size=size)))
                except ValueError as error:
                    raise SystemExit(f"simulate_scale: {error}") from None
    print(table(rows))
    if options["out"]:
        assumed = {
            name: value
            for name, value in asdict(base).items()
            if name not in ("policy", "workers", "shard_size")
        }
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = (
            f'{{\n "measured": null,\n "assumptions": {json.dumps(assumed)},\n "rows": [\n{lines}\n ]\n}}\n'
        )
        options["out"].parent.mkdir(parents=True, exist_ok=True)
        options["out"].write_text(text)
        print(f"wrote {options['out']}")


if __name__ == "__main__":
    main()
