from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
from made_output import Made

from latentae import LatentDataset
from latentae.encoding.sidecar import write_sidecar
from latentae.encoding.stats import stats, stats_table
from latentae.errors import OutputError


@pytest.fixture(params=["disk", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    return tmp_path / "out" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out"


def expected(means: list[np.ndarray], logvars: list[np.ndarray]) -> dict[str, np.ndarray]:
    """NumPy over all latents at once, [z, values] in double precision."""
    mean, variance = np.concatenate(means, 1), np.exp(np.concatenate(logvars, 1))
    both = mean.var() + variance.mean()
    return {
        "latents_mean": mean.mean(1),
        "latents_std": np.sqrt(mean.var(1) + variance.mean(1)),
        "posterior_mean_std": mean.std(1),
        "posterior_std": np.sqrt(variance.mean(1)),
        "scaling_factor": 1 / np.sqrt(both),
        "shift_factor": mean.mean(),
    }


def check(summary: dict, means: list[np.ndarray], logvars: list[np.ndarray]) -> None:
    assert summary["samples"] == len(means)
    for name, value in expected(means, logvars).items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def values(tensor) -> np.ndarray:
    return tensor.double().numpy().reshape(tensor.shape[0], -1)


@pytest.mark.parametrize(
    ("dtype", "packed"), [("bf16", False), ("fp16", True), ("fp32", False), ("fp32", True)]
)
def test_equal_to_numpy(out: str | Path, tmp_path: Path, dtype: str, packed: bool) -> None:
    counts = {"a.tar": 3, "deep/b.tar": 0, "deep/c.tar": 50, "deep/d.tar": 1}
    made = Made(
        out,
        tmp_path / "in",
        dtype=dtype,
        packed=packed,
        flip=True,
        counts=counts,
        skipped={"a.tar": ["x", "y"]},
    ).finish()
    tensors = made.tensors.values()
    summary = stats(out)
    check(summary, [values(t["mean"]) for t in tensors], [values(t["logvar"]) for t in tensors])
    assert (summary["finished"], summary["shards"], summary["planned"], summary["dtype"]) == (
        True,
        4,
        4,
        dtype,
    )
    assert summary["skipped"] == {"unreadable image": 2}


def test_of_what_encode_wrote(encoded: Path) -> None:
    dataset = LatentDataset(encoded)
    latents = [dataset[index] for index in range(len(dataset))]
    summary = stats(encoded)
    check(summary, [values(latent.mean) for latent in latents], [values(latent.logvar) for latent in latents])
    assert summary["finished"]
    for name in ("scaling_factor", "latents_std"):
        assert dataset.statistics[name] == summary[name]


def test_so_far(out: str | Path, tmp_path: Path) -> None:
    made = Made(out, tmp_path / "in")
    made.store.remove("a.tar.done.json")
    made.replace("deep/b.tar", b"cut")
    summary = stats(out)
    assert (summary["finished"], summary["shards"], summary["planned"], summary["samples"]) == (
        False,
        1,
        3,
        5,
    )
    tensors = [made.tensors[key] for key in made.tensors if key.startswith("deep/c")]
    check(summary, [values(t["mean"]) for t in tensors], [values(t["logvar"]) for t in tensors])
    assert "5 latents in 1 of 3 shards, not finished" in stats_table(summary)
    made.store.remove("deep/c.tar.done.json")
    summary = stats(out)
    assert (summary["shards"], summary["samples"], summary["scaling_factor"]) == (0, 0, None)
    assert stats_table(summary).count("\n") == 0


def test_table(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", tmp_path / "in", skipped={"a.tar": ["x"]}).finish()
    summary = stats(tmp_path / "out")
    lines = stats_table(summary).splitlines()
    assert lines[0].endswith("out: 8 latents in 3 of 3 shards, finished")
    assert lines[1] == "skipped, unreadable image: 1"
    assert lines[2].split() == ["channel", "mean", "std", "std", "of", "means", "mean", "sigma"]
    assert [float(line.split()[1]) for line in lines[3:6]] == pytest.approx(summary["latents_mean"], abs=1e-6)
    assert float(lines[6].split()[-1]) == pytest.approx(summary["scaling_factor"], rel=1e-5)
    assert float(lines[7].split()[-1]) == pytest.approx(summary["shift_factor"], rel=1e-5)
    assert "no scaling_factor" in stats_table({**summary, "scaling_factor": None})
    write_sidecar(made.store, made.sidecars["a.tar"].model_copy(update={"fingerprint": "e" * 64}))
    with pytest.raises(OutputError, match="different jobs"):
        stats(made.out)
