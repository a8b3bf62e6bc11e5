"""Trains in forked children that are killed, signalled, poisoned or run out of disk at chosen moments; nothing is imported twice.

A child marks in shared memory what it is doing, so that its parent can wait for a moment and say where a kill fell. The parent itself
starts no thread: it only reads files and compares bytes.

    python failure_worker.py RECIPE FOLDER KILLS VERB...        VERB is kill, stop, fill or lose; prints one JSON object
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Container
from itertools import cycle
from pathlib import Path

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torchvision  # noqa: F401

from latentae import cli
from latentae.files import read_json
from latentae.training import checkpoint, loop, steps, summary, train  # noqa: F401
from latentae.training.checkpoint import find_checkpoint, verify
from latentae.training.mirror import Mirror
from latentae.training.validation import Validation

START, STEP, EVALUATION, SAVE, BETWEEN = range(5)
NAMES = ["start", "step", "evaluation", "save", "between"]
_memory = mmap.mmap(-1, 4096)
counts = memoryview(_memory)[:64].cast("I")  # [0]: what the child is doing; [1 + phase]: how often it began to
seconds = memoryview(_memory)[64:128].cast("d")  # by phase


def marked(phase: int, function: Callable, before: Callable[[], None] = lambda: None) -> Callable:
    def run(*arguments, **options):
        outer, began = counts[0], time.perf_counter()
        counts[0] = phase
        counts[1 + phase] += 1
        before()
        try:
            return function(*arguments, **options)
        finally:
            seconds[phase] += time.perf_counter() - began
            counts[0] = BETWEEN if outer == START and phase != START else outer  # it starts until the first step

    return run


def spawn(
    recipe: Path,
    run: Path,
    *options: str,
    before_save: Callable[[], None] = lambda: None,
    poisoned: Container[int] = (),
    environment: dict[str, str] | None = None,
) -> int:
    """A child that trains and exits as the command line would; its output goes to RUN.log.

    Args:
        recipe, run, options: of `latentae train`.
        before_save: called in the child as a save begins.
        poisoned: steps whose images are no numbers.
        environment: as a launcher sets it; only the first process leaves marks.
    """
    environment = environment or {}
    rank = int(environment.get("RANK", 0))
    if not rank:
        counts[:] = memoryview(bytes(64)).cast("I")
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        log = os.open(log_of(run, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        poison(poisoned)
        train.write_summary = lambda run: run  # drawing takes longer than training here
        if not rank:
            train.build_loader = marked(START, train.build_loader)
            train.Trainer.update = marked(STEP, train.Trainer.update)
            Validation.run = marked(EVALUATION, Validation.run)
            train.save_checkpoint = marked(SAVE, train.save_checkpoint, before_save)
        cli.main(["train", str(recipe), "--output", str(run), *options])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def poison(at: Container[int]) -> None:
    update, to_float, step = train.Trainer.update, steps.to_float, [0]

    def poisoned_update(self, *arguments):
        step[0] = self.state.step
        return update(self, *arguments)

    train.Trainer.update = poisoned_update
    steps.to_float = lambda images: to_float(images) * (float("nan") if step[0] in at else 1.0)


def log_of(run: Path, rank: int = 0) -> Path:
    return run.with_name(f"{run.name}.{rank}.log")


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def reached(child: int, phase: int, occurrence: int) -> bool:
    """Wait for a child to be in a phase for the nth time; False if it ended first."""
    while counts[0] != phase or counts[1 + phase] < occurrence:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return True


def complete(recipe: Path, run: Path, *options: str) -> None:
    code = finish(spawn(recipe, run, *options))
    assert code == 0, f"{run} ended with {code}: {tail(run)}"


def tail(run: Path, rank: int = 0) -> str:
    return log_of(run, rank).read_text()[-2000:]


def check_whole(run: Path, store: Path | None = None) -> None:
    """There is a whole checkpoint or none yet; a copy that has its list is whole too."""
    latest = find_checkpoint(run)
    if latest is not None:
        verify(latest)
    for meta in store.glob("step-*/meta.json") if store else ():
        verify(meta.parent)


def differences(run: Path, other: Path) -> list[str]:
    """Files and tensors of two finished runs' last checkpoints, and logged steps, that are not equal."""
    a, b = find_checkpoint(run), find_checkpoint(other)
    names = sorted({file.name for folder in (a, b) for file in folder.iterdir()} - {"meta.json", "optimizers.pt", "recipe.toml"})
    found = [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]
    states = [torch.load(folder / "optimizers.pt", weights_only=True) for folder in (a, b)]
    for name in states[0]:
        for index, values in states[0][name]["state"].items():
            other_values = states[1][name]["state"][index]
            found += [f"{name} optimizer {index} {key}" for key, v in values.items() if not torch.equal(v, other_values[key])]
    if logged(run) != logged(other):
        found.append(f"metrics.jsonl: steps {logged(run)} and {logged(other)}")
    return found


def logged(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/total" in line]


def kill(recipe: Path, folder: Path, kills: int) -> dict:
    """SIGKILL at random moments of every phase, again and again; each run that gets to its end equals the uninterrupted one."""
    rng, whole = random.Random(0), folder / "whole"
    complete(recipe, whole, "--checkpoint-url", f"file://{folder}/store")
    means = [seconds[phase] / max(counts[1 + phase], 1) for phase in range(4)]
    means[START] = 0.3
    fell, runs, targets = dict.fromkeys(NAMES, 0), 0, cycle([SAVE, STEP, EVALUATION, SAVE, STEP, EVALUATION, START])
    while sum(fell.values()) < kills:
        run, store = folder / f"run{runs}", folder / f"store{runs}"
        target = next(targets)
        child = spawn(recipe, run, "--checkpoint-url", f"file://{store}")
        if reached(child, target, 0 if target == START else rng.randint(1, 3)):
            time.sleep(rng.random() * 1.2 * means[target])
            os.kill(child, signal.SIGKILL)
        code = finish(child)
        check_whole(run, store)
        if code == -signal.SIGKILL:
            fell[NAMES[counts[0]]] += 1
            continue
        assert code == 0, f"ended with {code}: {tail(run)}"
        runs += 1
        compare(run, whole, store)
    complete(recipe, run, "--checkpoint-url", f"file://{store}")
    compare(run, whole, store)
    return {"fell": fell, "finished_runs": runs + 1}


def compare(run: Path, whole: Path, store: Path) -> None:
    found = differences(run, whole)
    assert not found, f"{run} is not the uninterrupted run: {found}; {tail(run)}"
    copy = Mirror(f"file://{store}", read_json(run / "latentae.json")["inputs"], 1).newest(run.with_name(run.name + "-copy"))
    last = find_checkpoint(run)
    assert [(copy / f.name).read_bytes() == f.read_bytes() for f in last.iterdir()], f"the copy of {last} differs"


def stop(recipe: Path, folder: Path, kills: int) -> dict:
    """One run that every signal ends in every phase; at its end it equals the uninterrupted one."""
    rng, whole, run = random.Random(0), folder / "whole", folder / "stopped"
    complete(recipe, whole)
    ends = []
    for name, phase in [(n, p) for p in (START, STEP, EVALUATION, SAVE) for n in ("SIGTERM", "SIGUSR1", "SIGINT")]:
        before = step_of(run)
        child = spawn(recipe, run)
        assert reached(child, phase, 1), tail(run)
        time.sleep(rng.random() * 0.01)
        os.kill(child, getattr(signal, name))
        began, code = time.monotonic(), finish(child)
        check_whole(run)
        end = {"signal": name, "phase": NAMES[phase], "code": code, "took": time.monotonic() - began}
        ends.append({**end, "steps": step_of(run) - before, "last_line": tail(run).splitlines()[-1]})
    complete(recipe, run)
    return {"ends": ends, "differences": differences(run, whole)}


def step_of(run: Path) -> int:
    latest = find_checkpoint(run)
    return checkpoint.read_state(latest).step if latest else 0


def fill(recipe: Path, folder: Path, kills: int) -> dict:
    """A run whose disk takes no file above some size while a checkpoint is saved, for sizes between those of its parts."""
    whole = folder / "whole"
    complete(recipe, whole)
    sizes = sorted(file.stat().st_size for file in find_checkpoint(whole).iterdir())[-4:]
    ends = []
    for number, size in enumerate(sizes):
        run = folder / f"filled{number}"

        def limit(size: int = size) -> None:
            if counts[1 + SAVE] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))

        code = finish(spawn(recipe, run, before_save=limit))
        check_whole(run)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        ends.append({"code": code, "step": step_of(run), "left": left, "said": tail(run)})
        complete(recipe, run)
        ends[-1]["differences"] = differences(run, whole)
    return {"ends": ends}


def lose(recipe: Path, folder: Path, kills: int) -> dict:
    """Two processes: a step that only one finds bad, a signal that only one gets, and the end of one."""
    whole, run = folder / "whole", folder / "two"
    result = {"whole": pair(recipe, whole), "bad_step": pair(recipe, folder / "bad", poisoned={2})}
    result["skipped"] = checkpoint.read_state(find_checkpoint(folder / "bad")).skipped
    for victim, number in ((1, signal.SIGKILL), (1, signal.SIGTERM), (0, signal.SIGKILL)):
        children = start_pair(recipe, run)
        assert reached(children[0], STEP, 4), tail(run)
        os.kill(children[victim], number)
        began = time.monotonic()
        codes = [finish(child) for child in children]
        check_whole(run)
        result[f"{signal.Signals(number).name} {victim}"] = {
            "codes": codes,
            "took": time.monotonic() - began,
            "said": tail(run, 1 - victim),
            "step": step_of(run),
        }
    result["end"] = pair(recipe, run)
    return {**result, "differences": differences(run, whole)}


def start_pair(recipe: Path, run: Path, poisoned: Container[int] = ()) -> list[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [spawn(recipe, run, poisoned=poisoned if rank else (), environment=ranks[rank]) for rank in range(2)]


def pair(recipe: Path, run: Path, poisoned: Container[int] = ()) -> list[int]:
    codes = [finish(child) for child in start_pair(recipe, run, poisoned)]
    assert codes == [0, 0], f"{codes}: {tail(run)} {tail(run, 1)}"
    return codes


if __name__ == "__main__":
    recipe, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    results = {}
    for verb in sys.argv[4:]:
        began = time.monotonic()
        (folder / verb).mkdir()
        found = {"kill": kill, "stop": stop, "fill": fill, "lose": lose}[verb](recipe, folder / verb, kills)
        results[verb] = {**found, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(results))
