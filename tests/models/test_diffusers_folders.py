"""diffusers folders with only a variant, only .bin, shards, wrapped names or new keys."""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from latentae.errors import ModelError
from latentae.models import pretrained
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.foreign import load_any_model
from latentae.models.pretrained import resolve_model
from latentae.models.weight_files import read_tensors

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)  # other weights than those of the models in the tests
    return diffusers.AutoencoderKL(**SHAPE)


def written(model, folder, **options):
    """A folder of diffusers; without an index the shards of a small model are one file."""
    model.save_pretrained(folder, **options)
    return folder


def same(path, model, dtype=torch.float32):
    found, expected = AutoencoderKL.from_pretrained(path).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key].to(dtype).float()) for key in expected
    )


@pytest.mark.parametrize("place", ["", "vae"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["1GB", "200KB"])
def test_every_form_that_diffusers_writes_is_read(place, variant, safe, size, theirs, tmp_path, capsys):
    model = diffusers.AutoencoderKL(**SHAPE).half() if variant else theirs
    written(model, tmp_path / place, variant=variant, safe_serialization=safe, max_shard_size=size)
    assert same(tmp_path, model)
    assert ("no weights in full precision, so this variant is read" in capsys.readouterr().err) == (
        variant is not None
    )
    source = resolve_model(tmp_path)
    assert same(source.weights_file, model)  # as `encode` hands it to its processes
    shutil.copytree(tmp_path / place, tmp_path.with_name(f"{tmp_path.name}-again"))
    assert resolve_model(tmp_path.with_name(f"{tmp_path.name}-again")).fingerprint == source.fingerprint


@pytest.mark.parametrize("size", ["1GB", "200KB"])
@pytest.mark.parametrize(("variant", "safe"), [("fp16", True), ("fp16", False), (None, False)])
def test_other_classes_of_diffusers_are_read_in_every_form(variant, safe, size, tmp_path):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(**SHAPE, layers_per_block=1, latent_channels=4).eval()
    written(model, tmp_path, variant=variant, safe_serialization=safe, max_shard_size=size)
    ours = load_any_model(tmp_path)[0]
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ours.encode(x).mode(), model.encode(x).latent_dist.mode())


def test_full_precision_and_safetensors_come_first(theirs, tmp_path):
    other = diffusers.AutoencoderKL(**SHAPE)
    written(other, tmp_path, variant="fp16")
    written(other, tmp_path, safe_serialization=False)
    assert resolve_model(tmp_path).weights_file.name == "diffusion_pytorch_model.bin"
    written(theirs, tmp_path)
    assert same(tmp_path, theirs)


def test_files_between_which_nothing_decides_are_named(theirs, tmp_path):
    for variant in ("fp16", "bf16"):
        written(theirs, tmp_path, variant=variant)
    with pytest.raises(
        ModelError,
        match=r"model\.bf16\.safetensors, diffusion_pytorch_model\.fp16\.safetensors; give the file",
    ):
        resolve_model(tmp_path)
    assert same(tmp_path / "diffusion_pytorch_model.bf16.safetensors", theirs)


def test_weights_under_another_name_are_named(theirs, tmp_path):
    (written(theirs, tmp_path) / WEIGHTS).rename(tmp_path / "my_vae.safetensors")
    with pytest.raises(ModelError, match=r"it has my_vae\.safetensors: give one of these files itself"):
        resolve_model(tmp_path)


def sharded(theirs, folder):
    written(theirs, folder, max_shard_size="200KB")
    return folder / f"{WEIGHTS}.index.json"


def change_index(index, change):
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.update({"encoder.more": names["encoder.conv_in.bias"]}), "lack encoder.more"),
        (
            lambda names: names.pop("encoder.conv_in.bias"),
            "holds encoder.conv_in.bias, which .* expects in no shard",
        ),
        (
            lambda names: names.update({"encoder.conv_in.bias": "elsewhere.safetensors"}),
            "names elsewhere.safetensors, which is not",
        ),
        (lambda names: names.update({"encoder.conv_in.bias": "../x.safetensors"}), "no index of shards"),
        (lambda names: names.clear(), "no index of shards"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(change, message, theirs, tmp_path):
    change_index(sharded(theirs, tmp_path), change)
    with pytest.raises(ModelError, match=message) as caught:
        AutoencoderKL.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named_and_other_shards_have_another_fingerprint(theirs, tmp_path):
    sharded(theirs, tmp_path / "a")
    sharded(diffusers.AutoencoderKL(**SHAPE), tmp_path / "b")
    assert resolve_model(tmp_path / "a").fingerprint != resolve_model(tmp_path / "b").fingerprint
    shard = next((tmp_path / "a").glob("*-00002-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(
        ModelError, match=rf"names {re.escape(shard.name)}, which is not in its folder; download all shards"
    ):
        AutoencoderKL.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_prefixes_of_wrappers_are_left_out(prefix, theirs, tmp_path):
    written(theirs, tmp_path)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / WEIGHTS)
    assert same(tmp_path, theirs)
    inner = {
        key.replace("encoder.", f"encoder.{prefix}", 1): value for key, value in theirs.state_dict().items()
    }
    save_file(inner, tmp_path / WEIGHTS)
    assert same(tmp_path, theirs)


def test_a_name_with_and_without_a_wrapper_is_refused(theirs, tmp_path):
    save_file({**theirs.state_dict(), "module.quant_conv.bias": torch.zeros(8)}, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"holds quant_conv\.bias more than once"):
        read_tensors(tmp_path / "vae.safetensors")


def add_to_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_unknown_keys_of_a_config_are_null_or_refused(kind, theirs, tmp_path, capsys):
    if kind == "AutoencoderDC":
        widths = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
        model = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, **widths)
    else:
        model = theirs
    written(model, tmp_path)
    add_to_config(tmp_path, new_option=None, _new_note="x")
    load_any_model(tmp_path)
    assert f"{tmp_path / 'config.json'}: ignored new_option, unknown here and null" in capsys.readouterr().err
    add_to_config(tmp_path, new_option=False, _diffusers_version="9.9.9")
    with pytest.raises(
        ModelError, match=r"config\.json has new_option = false, .* diffusers 9\.9\.9\); update .* or delete"
    ) as caught:
        load_any_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_class_that_do_not_fit_are_named(tmp_path):
    model = diffusers.AutoencoderKLFlux2(**SHAPE, layers_per_block=1)
    written(model, tmp_path)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file({**state, "more.weight": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"unexpected more\.weight"):
        load_any_model(tmp_path)
    save_file({key: value for key, value in state.items() if key != "bn.running_var"}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"missing bn\.running_var"):
        load_any_model(tmp_path)


def test_the_config_of_this_diffusers_is_known():
    """A key that a newer diffusers adds shows here first."""
    known = set(inspect.signature(diffusers.AutoencoderKL.__init__).parameters) - {"self"}
    assert known <= set(AutoencoderKLConfig.model_fields)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "200KB"}, {"safe_serialization": False}, {"variant": "fp16"}]
)
def test_a_repository_on_the_hub_is_read_in_every_form_and_no_more_is_fetched(
    options, theirs, tmp_path, monkeypatch
):
    written(theirs, tmp_path / "hub/vae", **options)
    if options != {"variant": "fp16"}:
        written(
            theirs, tmp_path / "hub/vae", variant="bf16", safe_serialization=False
        )  # the last resort, here never needed

    def snapshot(name, patterns):
        for file in (tmp_path / "hub").rglob("*"):
            relative = file.relative_to(tmp_path / "hub").as_posix()
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in patterns):
                (tmp_path / "here" / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, tmp_path / "here" / relative)
        return tmp_path / "here"

    monkeypatch.setattr(pretrained, "snapshot", snapshot)
    assert same("someone/model", theirs)
    assert not list((tmp_path / "here").rglob("*bf16*"))
