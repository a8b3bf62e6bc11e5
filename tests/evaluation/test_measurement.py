from __future__ import annotations

import multiprocessing
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentae.errors import OutputError
from latentae.evaluation.measurement import ORIGINALS, ChunkFiles, Measurement, chunks_of, spread
from latentae.measures.latents.report import LatentReport
from latentae.measures.scores import Scores
from latentae.models.base import DiagonalGaussian


def measured(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    report = LatentReport()
    report.add(
        DiagonalGaussian(torch.randn(count, 4, 8, 8, generator=generator)),
        torch.rand(count, 3, 32, 32, generator=generator),
    )
    numbers = np.random.default_rng(seed)
    return Measurement(
        positions=[5, 7, 9][:count],
        keys=["a", "b/\\udcff", "c"][:count],
        labels=["cat", "", "dog"][:count],
        scores={
            "model": Scores({"psnr": [1.5, float("inf"), float("nan")], "bytes": [1.0, 2.0, 3.0]}),
            "pca": Scores({"psnr": [0.1] * 3}),
        },
        features={ORIGINALS: [numbers.random((2, 5), np.float32), numbers.random((1, 5), np.float32)]},
        pooled=[numbers.random((2, 6), np.float32)],
        latents=report,
        latent_shape=(2, 8, 8),
        skipped=[("bad", "why")],
        counts={"gray": 2},
    )


def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path):
    chunk = measured(0)
    chunk.save(tmp_path / "0.npz")
    read = Measurement.load(tmp_path / "0.npz")
    for name in ("positions", "keys", "labels", "latent_shape", "skipped", "counts"):
        assert getattr(read, name) == getattr(chunk, name)
    for method, scores in chunk.scores.items():
        for metric, values in scores.values.items():
            np.testing.assert_array_equal(read.scores[method].values[metric], values)
    np.testing.assert_array_equal(read.feature_rows(ORIGINALS), chunk.feature_rows(ORIGINALS))
    assert read.latents.result() == chunk.latents.result()
    Measurement(skipped=[("a", "cut short")]).save(tmp_path / "1.npz")  # without any image
    read = Measurement.load(tmp_path / "1.npz")
    assert (read.skipped, read.keys) == ([("a", "cut short")], [])


def test_damage_is_one_line(tmp_path):
    measured(0).save(tmp_path / "0.npz")
    data = (tmp_path / "0.npz").read_bytes()
    for damaged in (b"", data[:100], data[:-50], b"nothing"):
        (tmp_path / "0.npz").write_bytes(damaged)
        with pytest.raises(OutputError, match=r"0\.npz is damaged"):
            Measurement.load(tmp_path / "0.npz")


@given(st.integers(1, 100_000))
def test_chunks_cover_every_position_once(total):
    chunks = chunks_of(total)
    assert [position for chunk in chunks for position in chunk] == list(range(total))
    assert len(chunks) <= 32
    assert all(len(chunk) == len(chunks[0]) and len(chunk) % 16 == 0 for chunk in chunks[:-1])


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_spread_has_the_ends_and_no_position_twice(count, wanted):
    positions = spread(count, wanted)
    assert len(positions) == len(set(positions)) == min(wanted, count)
    assert positions == sorted(positions)
    assert positions[0] == 0
    if len(positions) > 1:
        assert positions[-1] == count - 1


@given(st.integers(1, 700), st.integers(1, 9))
def test_the_shares_of_all_tasks_are_all_chunks(tmp_path_factory, total, tasks):
    files = ChunkFiles(tmp_path_factory.mktemp("parts"), total)
    shares = [files.share(task, tasks) for task in range(tasks)]
    assert sorted(number for share in shares for number in share) == list(range(len(files.chunks)))


def hold(folder, taken):
    with ChunkFiles(folder, 1).lock() as mine:
        taken.put(mine)
        signal.pause()


def test_one_process_at_a_time_finishes_and_a_dead_one_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    taken = context.SimpleQueue()
    process = context.Process(target=hold, args=(tmp_path, taken))
    process.start()
    assert taken.get() is True
    with ChunkFiles(tmp_path, 1).lock() as mine:
        assert mine is False
    process.kill()
    process.join()
    with ChunkFiles(tmp_path, 1).lock() as mine:
        assert mine is True


def test_a_folder_cleared_away_is_nobodys_to_finish(tmp_path):
    files = ChunkFiles(tmp_path / "parts", 20)
    (tmp_path / "parts").rmdir()
    assert not files.complete()
    with files.lock() as mine:
        assert mine is False
    assert not (tmp_path / "parts").exists()
