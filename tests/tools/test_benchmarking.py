"""What the benchmark programs refuse, before they measure anything."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")


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
