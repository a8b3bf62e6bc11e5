"""Simulate encoding a billion images on 1 to 4096 workers: duration, idle time and repeated work.
Nothing is measured.

    python tools/simulate_scale.py [--images 1000000000] [--image-seconds 0.004] [--shard-sizes
                                   1000,10000] [--workers 1,4,...,4096] [--seed 0] [--out FILE.json]

A worker takes a shard, waits for its requests to the store, encodes it, and takes the next. There
are two policies:

- stride: worker w of W has the shards w, w + W, w + 2W, ... (`latentae encode` with task ids).
  Every worker lists the store at each start, and once more at its end, when the last one reads all
  sidecars. Nobody takes over the shards of a slow worker.
- claim: a driver hands out the next free shard (`--engine ray`). It alone lists the store, and
  reads the sidecars at the end; each hand-out takes it `claim_seconds`. The shard of a crashed
  worker goes to the next that is free.

Each worker has its own speed: the time of an image is `image_seconds` times exp(speed_sigma z), z
standard normal, and each shard has its own factor of mean 1. A preemption comes after an
exponential working time: the current shard is lost, and the worker is away for `away_seconds`, then
starts again. The time of all workers until the end is

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
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

POLICIES: tuple[Literal["stride", "claim"], ...] = ("stride", "claim")
PARTS = ("useful", "wasted", "requests", "starting", "closing", "away", "idle")
LISTINGS = 3  # per planning of the work
PAGE = 1000  # names per response of an object store
# maximum time of a shard, in mean times between two preemptions; e^6 = 400 attempts are hopeless
LONGEST = 6.0


@dataclass(frozen=True)
class Case:
    """One simulated job; every default is an assumption."""

    policy: Literal["stride", "claim"] = "stride"
    workers: int = 1
    images: int = 1_000_000_000
    shard_size: int = 10_000  # images per shard
    image_seconds: float = 0.004  # to read, decode, encode and write one image at ordinary speed
    speed_sigma: float = 0.2  # standard deviation of the logarithm of the workers' speeds
    shard_sigma: float = 0.05  # the same for the shards' times on one worker
    preempt_hours: float = 24.0  # mean working time between two preemptions of a worker; 0 is never
    away_seconds: float = 300.0  # from a preemption until the worker is back
    load_seconds: float = 20.0  # to start the program and load the model
    latency_seconds: float = 0.05  # of one request to the store
    # sequential requests per shard: read it, look for its output, write files and sidecar, read
    # back
    shard_requests: float = 8.0
    start_requests: float = 0.0  # per shard when the work is planned: 1 for an HTTP server (each size)
    end_requests: float = 1.0  # per shard at the end: its sidecar
    parallel_requests: int = 16  # of start_requests and end_requests
    store_requests_per_second: float = 5000.0  # of all workers together
    claim_seconds: float = 0.001  # of the driver, to hand out one shard
    seed: int = 0

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.images / self.shard_size)

    def images_of(self, shard: int) -> int:
        """Images of a shard; the last one may have fewer."""
        return min(self.shard_size, self.images - shard * self.shard_size)

    @property
    def planning_requests(self) -> float:
        """Requests to plan: three listings (shards, sizes, output), start_requests per shard."""
        return LISTINGS * math.ceil(self.shards / PAGE) + self.start_requests * self.shards

    def planning_seconds(self, starting_together: int) -> float:
        """Time to plan the work, bound by latency or by the store's request rate."""
        listings = LISTINGS * math.ceil(self.shards / PAGE)
        sequential = listings + self.start_requests * self.shards / self.parallel_requests
        shared = starting_together * self.planning_requests / self.store_requests_per_second
        return max(sequential * self.latency_seconds, shared)

    def closing(self, done: int) -> tuple[float, float]:
        """Requests to list the output (at the end also sidecars), and their minimum seconds."""
        pages, sidecars = math.ceil(done / PAGE), self.end_requests * done if done == self.shards else 0.0
        return pages + sidecars, (pages + sidecars / self.parallel_requests) * self.latency_seconds

    @property
    def restart_seconds(self) -> float:
        """From a worker's return until its next shard; with a driver it does not list the store."""
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
    end: float = 0.0  # when the last worker finished, in seconds since the start
    done: int = 0  # images encoded and kept
    shards: int = 0  # finished shards
    lost: float = 0.0  # images encoded and lost
    preemptions: int = 0
    store_requests: float = 0.0


class Worker:
    """One machine: its speed and its random events."""

    def __init__(self, number: int, case: Case) -> None:
        # its own generator, so that another worker does not change it
        self.random = random.Random(f"{case.seed}/{number}")
        self.image_seconds = case.image_seconds * math.exp(case.speed_sigma * self.random.gauss(0, 1))
        self.shard_sigma = case.shard_sigma
        self.rate = 1 / (3600 * case.preempt_hours) if case.preempt_hours else 0.0

    def seconds_of(self, images: int) -> float:
        """Time to encode a shard of `images`."""
        spread = self.shard_sigma
        factor = math.exp(spread * self.random.gauss(0, 1) - spread * spread / 2) if spread else 1.0
        return images * self.image_seconds * factor

    def until_preempted(self) -> float:
        """Working time until the next preemption, drawn for each shard (memoryless)."""
        return self.random.expovariate(self.rate) if self.rate else math.inf


class Queue:
    """The order in which workers take shards."""

    def __init__(self, case: Case) -> None:
        self.claimed = case.policy == "claim"
        lots = 1 if self.claimed else case.workers
        self.lots: list[Iterator[int]] = [iter(range(lot, case.shards, lots)) for lot in range(lots)]
        self.returned: list[list[int]] = [[] for _ in range(lots)]  # of preempted workers, taken first

    def take(self, worker: int) -> int | None:
        """The next shard for this worker, or None."""
        lot = 0 if self.claimed else worker
        return self.returned[lot].pop() if self.returned[lot] else next(self.lots[lot], None)


def simulate(case: Case) -> Account:
    """Run one case from the first start to the last shard.

    Raises:
        ValueError: shards are so long that a preempted worker would hardly ever finish one.
    """
    workers = [Worker(number, case) for number in range(case.workers)]
    _refuse_hopeless(case, workers)
    queue, account = Queue(case), Account()
    start = driver = _first_start(case, account)
    # (time, worker that becomes free), or (time, ~shard that was lost)
    events = [(start, number) for number in range(case.workers)]
    waiting: list[tuple[float, int]] = []  # since when, and the idle worker
    over = 0.0  # end of the last shard started so far
    answered = 0.0  # end of the sidecar reads so far
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
        else:  # no other worker takes it
            queue.returned[number].append(shard)
    account.end = max(account.end, over)
    if queue.claimed:
        requests, least = case.closing(account.shards)
        account.store_requests += requests
        account.end += max(least, requests / case.store_requests_per_second)
    _close(case, account, [since for since, _ in waiting])
    return account


def _first_start(case: Case, account: Account) -> float:
    """All workers start together; with a driver they wait until it has planned the work."""
    lookers = case.workers if case.policy == "stride" else 1
    until = case.planning_seconds(lookers) + case.load_seconds
    account.store_requests += lookers * case.planning_requests
    account.starting += case.workers * until
    return until


class Attempt(NamedTuple):
    """The result of one shard on one worker."""

    over: float  # when the shard was done or its worker was preempted
    free: float  # when the worker can take another shard
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
    """Account for each worker until the end; `last` has the time when each ran out of work."""
    for since in last:
        account.idle += max(0.0, account.end - since)
        late = max(0.0, since - account.end)  # the end came before it was back
        account.starting -= min(late, case.restart_seconds)
        account.away -= late - min(late, case.restart_seconds)


def _refuse_hopeless(case: Case, workers: list[Worker]) -> None:
    if not case.preempt_hours:
        return
    slowest = max(worker.image_seconds for worker in workers)
    slowest *= min(case.shard_size, case.images) / 3600
    if slowest > LONGEST * case.preempt_hours:
        raise ValueError(
            f"a shard of {case.shard_size} images takes the slowest worker {slowest:.1f} h, "
            f"with preemptions every {case.preempt_hours:g} h; choose smaller shards"
        )


def row_of(case: Case) -> dict[str, Any]:
    """Results of one case; shares are of the time of all workers until the end."""
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
        first = f"{row['policy']:7}{row['workers']:8}{row['shard_size']:8}{row['hours']:12.2f}"
        lines.append(f"{first}{shares}{row['preemptions']:11}{row['store_requests']:12.3g}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    single = [field for field in fields(Case) if field.name not in ("policy", "workers", "shard_size")]
    for field in single:
        name, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(name, type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--workers", default="1,4,16,64,256,1024,4096", help="worker counts, with commas")
    parser.add_argument("--shard-sizes", default="1000,10000", help="images per shard, with commas")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = vars(parser.parse_args())
    assumed = {field.name: options[field.name] for field in single}
    base, rows = Case(**assumed), []
    sizes, counts = (list(map(int, options[name].split(","))) for name in ("shard_sizes", "workers"))
    for size, workers, policy in product(sizes, counts, POLICIES):
        try:
            rows.append(row_of(replace(base, policy=policy, workers=workers, shard_size=size)))
        except ValueError as error:
            raise SystemExit(f"simulate_scale: {error}") from None
    print(table(rows))
    if out := options["out"]:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = f'"measured": null,\n "assumptions": {json.dumps(assumed)}'
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f'{{\n {head},\n "rows": [\n{lines}\n ]\n}}\n')
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
