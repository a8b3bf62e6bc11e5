"""Every benchmark program runs to its end on a few small inputs. Of its figures only those that
can't be noise are checked.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from latentae_kernels import aot
from PIL import Image

pytest.importorskip("diffusers")
TOOLS = Path(__file__).resolve().parents[2] / "tools"
DATA = ["--images", "24", "--shard-size", "4", "--batch", "2", "--repeats", "1"]
counts_bytes = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes in /proc")
times_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["bench_autoencoder", "--preset", "kl-f9"], 1, "unknown model preset 'kl-f9'"),
        (["bench_encode", "--preset", "kl-f9"], 1, "unknown model preset 'kl-f9'"),
        (["bench_evaluate", "--preset", "nothing"], 1, "unknown model preset 'nothing'"),
        (["bench_kernels", "--filter", "no such case"], 1, "no case has 'no such case' in its name"),
        (["bench_tiling", "tiny", "--side", "64", "--tile", "30"], 1, "tile is 30 pixels"),
        (["bench_training", "--variants", "diffuser"], 2, "invalid choice"),
    ],
)
def test_a_mistyped_option_is_refused_by_name(words, code, message, run, tmp_path):
    found, output = run(*words, "--out", tmp_path / "result.json")
    assert found == code
    assert message in output
    assert not (tmp_path / "result.json").exists()


@times_the_cpu
@pytest.mark.parametrize("in_new_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_autoencoder_compares_both_models(in_new_processes, run, tmp_path, monkeypatch):
    if not in_new_processes:  # each of the four would import torch and diffusers to measure its memory
        run("bench_autoencoder", "--help")
        monkeypatch.setattr(
            "bench_autoencoder.ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
        )
    file = tmp_path / "autoencoder.json"
    code, output = run("bench_autoencoder", "--preset", "tiny", "--size", 32, "--repeats", 1, "--out", file)
    assert code == 0, output
    record = json.loads(file.read_text())
    assert record["commit"]
    assert "--preset tiny" in record["command"]
    assert [(row["step"], row["size"]) for row in record["rows"]] == [("encode", 32), ("decode", 32)]
    for row in record["rows"]:
        assert row["dtype"] == "float32"
        assert row["ratio"]["diffusers"] == pytest.approx(
            row["seconds"]["diffusers"] / row["seconds"]["ours"]
        )
        assert row["largest_difference"] < 1e-4 * row["largest_output"]
        assert max(row["error"].values()) < 1e-5


def rows_by_measure(report: dict) -> dict[str, list[dict]]:
    return {
        name: [row for row in report["rows"] if row["measure"] == name]
        for name in {row["measure"] for row in report["rows"]}
    }


@counts_bytes
def test_data_times_every_stage_on_the_same_pixels(run, tmp_path):
    code, output = run("bench_data", *DATA, "--stages-only", "--out", tmp_path / "data.json")
    assert code == 0, output
    report = json.loads((tmp_path / "data.json").read_text())
    assert {"device", "commit", "command", "webdataset", "pillow"} <= report.keys()
    rows = rows_by_measure(report)
    assert {row["stage"] for row in rows["stage"]} == {"header", "decode", "crop and resize", "both"}
    assert rows["levels apart from PIL"][0]["largest"] <= 2


@pytest.mark.slow
@counts_bytes
def test_data_times_both_loaders_and_counts_their_bytes(tmp_path):
    command = [sys.executable, str(TOOLS / "bench_data.py"), *DATA, "--worlds", "1", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "data.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_by_measure(json.loads((tmp_path / "data.json").read_text()))
    loaders = {row["loader"]: row for row in rows["loader"]}
    assert {"webdataset + PIL", "latentae, Pillow only"} <= loaders.keys()
    assert all(row["images"] == 24 and row["images_per_cpu_second"] > 0 for row in loaders.values())
    for row in rows["read amplification"]:
        assert row["used_bytes"] > 24 * 5000
        assert row["amplification"] >= 1


def test_encode_times_both_whole_and_in_memory(run, tmp_path):
    file = tmp_path / "encode.json"
    sizes = (
        "--images",
        5,
        "--shard-size",
        3,
        "--batch",
        2,
        "--resolution",
        32,
        "--workers",
        1,
        "--repeats",
        1,
    )
    code, output = run("bench_encode", "--preset", "tiny", *sizes, "--out", file)
    assert code == 0, output
    report = json.loads(file.read_text())
    assert {"device", "torch", "commit", "command", "diffusers", "compute"} <= report.keys()
    timed = [(row["measure"], row["variant"]) for row in report["rows"] if "variant" in row]
    variants = ("latentae encode", "DataLoader + diffusers")
    assert timed == [(measure, variant) for variant in variants for measure in ("whole", "in memory")]
    assert all(
        row["images_per_second"] == pytest.approx(5 / row["seconds"])
        for row in report["rows"]
        if "variant" in row
    )
    assert [row["stage"] for row in report["rows"] if row["measure"] == "stage"] == [
        "load",
        "read",
        "decode",
        "write",
    ]
    seconds = {(row["measure"], row["variant"]): row["seconds"] for row in report["rows"] if "variant" in row}
    whole = seconds["whole", "latentae encode"]
    assert report["over_memory"] == pytest.approx(whole / seconds["in memory", "latentae encode"])
    assert report["times_the_baseline"] == pytest.approx(seconds["whole", "DataLoader + diffusers"] / whole)


def test_evaluate_times_every_part(run, tmp_path):
    file = tmp_path / "evaluate.json"
    sizes = ("--images", 2, "--batch", 2, "--resolution", 32, "--repeats", 1, "--stream", 8)
    code, output = run("bench_evaluate", "--preset", "tiny", *sizes, "--out", file)
    assert code == 0, output
    report = json.loads(file.read_text())
    seconds = {row["part"]: row["seconds_per_image"] for row in report["rows"]}
    assert {
        "model",
        "whole",
        "PSNR and SSIM",
        "sums over latents",
        "pca",
        "dct",
        "jpeg",
        "webp",
    } <= seconds.keys()
    assert report["times_the_model"] == pytest.approx(seconds["whole"] / seconds["model"])
    assert {"device", "torch", "commit", "command", "grown_mib"} <= report.keys()


@times_the_cpu
def test_kernels_times_every_op(run, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as users run it
    sizes = ("--filter", "64x64", "--shrink", 64, "--repeats", 1)
    code, output = run("bench_kernels", *sizes, "--out", tmp_path / "kernels.json")
    assert code == 0, output
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {"device", "torch", "triton", "commit", "command"} <= report.keys()
    assert "--shrink 64" in report["command"]
    assert {row["op"] for row in report["rows"]} == {
        "norm_act",
        "norm_act_conv2d",
        "row_norm_act",
        "lpips_head",
        "upsample_conv2d",
    }
    for row in report["rows"]:
        assert list(row["seconds"]) == ["eager NCHW", "eager channels_last", "ours"]
        assert all(value > 0 for value in row["seconds"].values())
        assert row["error"] < 1e-4
        assert row["dtype"] == "float32"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="registers come from Triton's compiler"
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_predicts_bytes_floors_and_registers(compiled, run, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled:
        used = aot.Resources(registers=100, shared=0, local=0, spills=0, wide_loads=1, f64=False)
        names = [
            f"norm_act/{kernel} nhwc bf16 C=512 HW=4096"
            for kernel in ("chunk_statistics", "merge_statistics", "apply")
        ]
        monkeypatch.setattr(
            aot, "compile_all", lambda **options: [aot.Outcome(name, 90, used, ()) for name in names]
        )
    code, output = run(
        "bench_kernels", "--predict", "--filter", "forward 8x512x64x64", "--out", tmp_path / "kernels.json"
    )
    assert code == 0, output
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["device"] is None
    assert "not measurements" in report["assumption"]
    row = next(row for row in report["rows"] if row["op"] == "norm_act")
    elements = math.prod(row["shape"])
    assert row["bytes"] == {"eager": 10 * elements, "two_pass": 6 * elements, "one_pass": 4 * elements}
    assert row["predicted_seconds"]["one_pass"] == pytest.approx(4 * elements / (0.9 * 3.35e12))
    assert row["registers"]
    assert all(0 < count <= 128 for count in row["registers"].values())
    assert row["measured"] is None
    assert "seconds" not in row


def test_tiling_compares_methods_at_the_same_tile(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 128), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    file = tmp_path / "tiling.json"
    code, output = run(
        "bench_tiling",
        "tiny",
        "--images",
        tmp_path / "photo.png",
        "--tile",
        64,
        "--overlap",
        0.125,
        "--out",
        file,
    )
    assert code == 0, output
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["untiled", "diffusers", "blended", "exact"] * 2
    for row in rows:
        assert (row["height"], row["width"]) == (128, 96)
        if row["method"] in ("untiled", "exact"):
            assert row["computed"] == 1
            assert row["max"] < 1e-4
    # tiles of 64 at every 48: 64 * 2 + 32 rows and 64 + 48 columns
    computed = [row["computed"] for row in rows if row["method"] == "diffusers"]
    assert computed == [pytest.approx(160 * 112 / (128 * 96), abs=1e-3)] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is the system's count")
def test_tiling_measures_memory_in_a_process_of_its_own(tmp_path):
    """The system counts the memory of a process from that of its parent on, which is larger in a
    test than in the program.
    """
    file = tmp_path / "memory.json"
    command = [sys.executable, str(TOOLS / "bench_tiling.py"), "tiny", "--memory", "128", "--tile", "64"]
    command += ["--step", "decode", "encode", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == ["decode", "encode"]
    assert all(row["peak_resident_bytes"] > row["of_these_before_the_call"] > 2**26 for row in rows)


def test_training_times_the_same_step_on_both_models(run, tmp_path):
    file = tmp_path / "training.json"
    sizes = ("--batch", 2, "--resolution", 32, "--repeats", 1)
    code, output = run("bench_training", *sizes, "--variants", "diffusers", "latentae", "--out", file)
    assert code == 0, output
    record = json.loads(file.read_text())
    assert [row["variant"] for row in record["rows"]] == ["diffusers", "latentae"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in record["rows"])
    assert len({row["autoencoder_bytes"] for row in record["rows"]}) == 1  # the same weights
    assert record["resolution"] == 32
    assert record["commit"]
