"""The command line as a user meets it: exit codes, one-line errors, what is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from latentae import cli
from latentae.errors import OutputError, RecipeError


def call(*words: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trian"], 2, "did you mean train?"),
        (["export", "--foo"], 2, "No such option '--foo'"),
        (["train", "tiny-cpu"], 2, "--output"),
        (["train", "--output", "x"], 2, "RECIPE"),
        (["train", "tiny-cpu", "kl-f8", "--output", "x"], 2, "expected one RECIPE"),
        (["init", "dc-tiny", "shards"], 2, "expected RECIPE SHARDS OUT, got dc-tiny shards"),
        (["init", "tiny-cpu", "shards", "x"], 2, "only an AutoencoderDC can start there"),
        (["init", "dc-tiny", "nowhere", "x"], 1, "nowhere"),
        (["train", "tiny-cpu", "--optimizer.lrr", "3", "--output", "x"], 2, "did you mean optimizer.lr?"),
        (["train", "tiny-cpu", "--optimizer.lr", "--output", "x"], 2, "--optimizer.lr needs a value"),
        (["train", "tiny-cup", "--output", "x"], 2, "did you mean tiny-cpu?"),
        (["train", "tiny-cpu", "--data.shards", "nowhere", "--output", "x"], 1, "nowhere"),
        (["evaluate", "nowhere", "nothing"], 1, "nowhere does not exist"),
        (["encode", "nowhere", "nothing", "x"], 1, "nowhere does not exist"),
        (["export", "nowhere", "x"], 1, "nowhere does not exist"),
        (["reconstruct", "nowhere", "a.png"], 1, "nowhere does not exist"),
        (["shards", "nowhere", "x"], 1, "nowhere does not exist"),
        (
            ["quickstart", "--out", "x", "--minutes", "0"],
            2,
            "minutes is 0, expected above 0 and below 100000",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    got, out, err = call(*words, capsys=capsys)
    assert got == code, err
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("latentae: error: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_options_come_before_or_after_with_dash_or_underscore_or_equals(capsys):
    expected = call("config", "tiny-cpu", "--batch-size", "4", "--optimizer.lr", "2e-4", capsys=capsys)[1]
    assert "batch_size = 4" in expected
    assert call("config", "--batch_size=4", "--optimizer.lr=2e-4", "tiny-cpu", capsys=capsys)[1] == expected


def test_negative_values_are_values(capsys):
    assert (
        "initial_logvar = -6.0"
        in call("config", "tiny-cpu", "--model.initial-logvar", "-6", capsys=capsys)[1]
    )


def test_version_and_bare_call(capsys):
    from latentae import __version__

    assert call("--version", capsys=capsys)[:2] == (0, __version__ + "\n")
    assert "Usage" in "".join(call(capsys=capsys)[1:])


def test_debug_shows_the_error_itself():
    with pytest.raises(RecipeError):
        cli.main(["config", "nowhere", "--debug"])


def test_train_help_lists_the_recipes_and_their_options(capsys):
    code, out, _ = call("train", "--help", capsys=capsys)
    assert code == 0
    assert "--optimizer.warmup-images" in out
    assert "kl-f16-z32" in out


def test_a_full_disk_and_ctrl_c_are_one_line(monkeypatch, capsys):
    import latentae

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "shards/000000.tar")

    monkeypatch.setattr(latentae, "shards", full, raising=False)
    code, _, err = call("shards", "a", "b", capsys=capsys)
    assert (code, err) == (1, "latentae: error: No space left on device: shards/000000.tar\n")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(latentae, "shards", interrupted, raising=False)
    code, _, error = call("shards", "a", "b", capsys=capsys)
    assert code == 130
    assert "interrupted; run the same command again to resume" in error


def test_other_ranks_sign_their_errors(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert "latentae (rank 3): error: " in call("config", "nowhere", capsys=capsys)[2]


def test_errors_have_exit_codes_of_their_own():
    assert RecipeError.exit_code == 2
    assert OutputError.exit_code == 1


def test_the_line_works_from_a_folder_of_images(tmp_path, monkeypatch, capsys):
    """The first command as a process, the rest in this one."""
    monkeypatch.chdir(tmp_path)
    for index in range(4):
        Image.effect_noise((48, 40), 60).convert("RGB").save(f"photo {index}.png")
    Path("photo 0.txt").write_text("a caption")
    done = subprocess.run(
        [sys.executable, "-m", "latentae", "shards", ".", "shards"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    model = [
        "--model.block_out_channels",
        "[8,8,8]",
        "--model.norm-num-groups",
        "4",
        "--loss.perceptual.net",
        "none",
    ]
    train = [
        "train",
        "tiny-cpu",
        *model,
        "--data.shards",
        "shards",
        "--data.resolution=32",
        "--images",
        "4",
        "--output",
        "run",
    ]
    for words in (
        [*train, "--batch_size", "2"],
        ["evaluate", "run", "shards", "--out", "evaluation", "--perceptual", "none", "--no-details"],
        ["encode", "run", "shards", "latents"],
        ["export", "run", "export", "--statistics", "latents", "--metrics", "evaluation"],
        ["reconstruct", "export", "photo 0.png", "photo 1.png", "--out", "grid.png"],
        [*train, "--batch-size", "2"],
    ):
        code, _, err = call(*words, capsys=capsys)
        assert code == 0, f"{words}: {err}"
    assert "is finished" in err
    for made in (
        "shards/000000.tar",
        "evaluation/report.html",
        "latents/statistics.json",
        "export/config.json",
        "grid.png",
    ):
        assert Path(made).is_file(), made
