from __future__ import annotations

from latentae.evaluation.compared_folders import _rows


def test_every_image_of_a_key_that_shards_repeat_is_a_row(tmp_path):
    (tmp_path / "per_image.csv").write_text("key,psnr\n0,30.5\n1,31.5\n0,20.5\n")
    assert dict(_rows(tmp_path / "per_image.csv")) == {
        ("0", 0): {"psnr": 30.5},
        ("1", 0): {"psnr": 31.5},
        ("0", 1): {"psnr": 20.5},
    }
