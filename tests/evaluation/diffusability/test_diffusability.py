from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from moods import MOODS, Patches, batches, moods, statistics_of
from torch import Tensor

from latentae.data.transforms import to_uint8
from latentae.errors import DataError, RecipeError
from latentae.evaluation.diffusability.diffusability import diffusability
from latentae.measures.frechet import frechet_distance
from latentae.models.latent_statistics import Moments


def run(
    count=40, model=None, size=8, channels=3, images=None, **arguments
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`diffusability` on images of one color each; arguments replace the defaults."""
    model = model or Patches(channels)
    images = moods(count, channels=channels) if images is None else images
    defaults = {
        "statistics": statistics_of(model, images),
        "seeds": (0,),
        "steps": 2,
        "batch": 8,
        "samples": 8,
    }
    return diffusability(model, batches(images, size), MOODS, **{**defaults, **arguments})


def test_a_trained_flow_is_nearer_to_the_floor_than_an_untrained_one():
    untrained = run(count=48, steps=0, samples=48)[0]
    trained = run(count=48, steps=50, batch=32, samples=48)[0]
    floor, before, after = trained["floor"], untrained["flow"]["frechet"], trained["flow"]["frechet"]
    assert 0 < floor < 0.3 * before["mean"]
    assert after["mean"] < 0.75 * before["mean"]
    assert untrained["flow"]["loss"]["values"] == [None]
    assert all(loss < 1 for loss in trained["flow"]["loss"]["values"])


def test_the_result_is_plain_json_and_says_what_was_done():
    result, pictures = run(seeds=(0, 4), samples=16)
    result = json.loads(json.dumps(result, allow_nan=False))
    assert {"extractor": "FD-moods", "images": 40, "seen": 40}.items() <= result.items()
    assert "ranking aid" in result["limits"]
    assert {"neighbours": 10, "from": "the same images", "references": 40}.items() <= result[
        "interpolated"
    ].items()
    flow = result["flow"]
    assert 1e6 < flow["parameters"] < 3e6
    expected = {"patch": 1, "tokens": 16, "steps": 2, "batch": 8, "samples": 16, "seeds": [0, 4]}
    assert expected.items() <= flow.items()
    values = flow["frechet"]["values"]
    assert flow["frechet"]["mean"] == pytest.approx(sum(values) / 2)
    assert flow["frechet"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == {
        "samples": (3, 4 + 2 * 20, 4 + 8 * 20),
        "interpolated": (3, 4 + 3 * 20, 4 + 8 * 20),
    }
    assert all(picture.dtype == torch.uint8 for picture in pictures.values())


def test_everything_is_a_function_of_the_seed():
    first, again, other = run(), run(size=7), run(seed=1)
    assert first[0] == again[0]
    assert torch.equal(first[1]["samples"], again[1]["samples"])
    assert first[0]["flow"]["frechet"] != other[0]["flow"]["frechet"]
    assert first[0]["interpolated"]["frechet"] != other[0]["interpolated"]["frechet"]
    torch.manual_seed(9)
    assert run()[0] == first[0]


def test_half_way_to_an_equal_neighbour_is_the_reconstruction():
    images, model = moods(40), Patches()
    copies = torch.cat([images] * 10)  # all ten nearest neighbours of an image are its copies
    result, _ = run(neighbors=batches(copies, 50))
    made = to_uint8(model.decode(model.encode(images / 127.5 - 1).mode()))
    expected = frechet_distance(Moments.of(MOODS(images)), Moments.of(MOODS(made)))
    assert expected < 1e-6
    assert result["interpolated"]["frechet"] == pytest.approx(expected, abs=1e-3)
    assert result["interpolated"]["from"] == "training images"


def test_neighbours_that_are_alike_lie_nearer_than_neighbours_that_are_not():
    smooth = run(samples=2)[0]["interpolated"]["frechet"]
    strange = 255 * torch.randint(0, 2, (40, 3, 16, 16), dtype=torch.uint8)
    assert run(samples=2, neighbors=batches(strange, 8))[0]["interpolated"]["frechet"] > 3 * smooth


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_transparent_images_work(channels):
    result, pictures = run(count=6, channels=channels, samples=4)
    assert result["flow"]["samples"] == 4
    assert result["interpolated"]["neighbours"] == 5
    assert pictures["samples"].shape == (3, 24, 4 + 4 * 20)


def test_a_real_model_with_large_images_works(tiny_model, smooth_images):
    result, pictures = run(
        model=tiny_model().eval(), images=smooth_images(2, 320), steps=1, batch=2, samples=2
    )
    assert {"patch": 10, "tokens": 64, "samples": 2}.items() <= result["flow"].items()
    assert pictures["samples"].shape == (3, 264, 4 + 2 * 260)  # shown at 256 pixels


def test_a_model_that_draws_nothing_finite_has_no_value_but_a_reason():
    model = Patches()
    model.broken = True
    result, pictures = run(model=model)
    result = json.loads(json.dumps(result, allow_nan=False))
    assert result["flow"]["frechet"] == {"mean": None, "std": None, "values": [None]}
    assert "1 of 1 flows diverged" in result["flow"]["missing"]
    assert "no finite image" in result["interpolated"]["missing"]
    assert pictures == {}


def test_too_few_images_are_a_reason():
    assert "found 1 images" in run(count=1)[0]["missing"]
    result = run(count=2, neighbors=[])[0]
    assert "no training images" in result["interpolated"]["missing"]
    assert result["flow"]["samples"] == 2
    few = run(count=9, limit=2)[0]
    assert (few["images"], few["interpolated"]["neighbours"]) == (2, 1)


def test_numbers_and_images_that_make_no_sense_are_refused():
    for arguments in ({"steps": -1}, {"batch": 0}, {"samples": 1}, {"seeds": ()}, {"limit": 1}):
        with pytest.raises(RecipeError, match="at least 0, 1, 2, 2 and one seed"):
            run(count=2, **arguments)
    two_sizes = [*batches(moods(2), 2), *batches(moods(2, 8), 2)]
    with pytest.raises(DataError, match="one size"):
        diffusability(Patches(), two_sizes, MOODS, statistics=statistics_of(Patches(), moods(2)))


def test_progress_says_how_long_it_will_take(capsys):
    run(count=4, seeds=(0, 1), steps=3, batch=2, samples=2)
    lines = capsys.readouterr().err
    assert "encoding images: 4 img" in lines
    assert "decoding between neighbours: 4/4 img" in lines
    assert f"fitting tiny flows: {2 * (3 * 3 * 2 + 50 * 2)}/{2 * (3 * 3 * 2 + 50 * 2)} passes" in lines
