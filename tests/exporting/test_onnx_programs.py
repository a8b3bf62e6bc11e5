from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from latentae import AutoencoderKL, AutoencoderKLConfig
from latentae.errors import MissingDependencyError, ModelError
from latentae.exporting import programs
from latentae.exporting.programs import write_onnx
from latentae.models.presets import preset

FILES = {f"vae_{coder}/{name}" for coder in ("encoder", "decoder") for name in ("model.onnx", "config.json")}
NARROW = AutoencoderKLConfig(
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
    use_quant_conv=False,
)


pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def check_sizes(model: AutoencoderKL, folder: Path, run) -> None:
    f, z = model.config.downsampling, model.config.latent_channels
    for batch, height, width in [(1, 5, 2), (3, 2, 7), (65, 3, 2), (2, 1, 1), (1, 9, 16)]:
        images, latents = torch.randn(batch, 3, f * height, f * width), torch.randn(batch, z, height, width)
        with torch.no_grad():
            posterior, decoded = model.encode(images), model.decode(latents)
        mean, logvar = run(folder / "vae_encoder/model.onnx", images).chunk(2, dim=1)
        torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(logvar.clamp(-30, 20), posterior.logvar, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            run(folder / "vae_decoder/model.onnx", latents), decoded, rtol=0, atol=1e-4
        )


def test_onnxruntime_equals_the_model_at_unseen_sizes(onnx_export, onnx_run):
    check_sizes(*onnx_export, onnx_run)


@pytest.mark.slow
def test_a_model_without_attention_and_quantizing_convolutions_is_equal_too(onnx_run, tmp_path):
    config = preset(
        "kl-f4",
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        layers_per_block=1,
    )
    model = AutoencoderKL(config).eval()
    write_onnx(model, config, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == FILES
    check_sizes(model, tmp_path, onnx_run)


def test_files_hold_standard_operators_under_optimums_names(onnx_export):
    model, folder = onnx_export
    z = model.config.latent_channels
    for coder, (given, made) in {
        "encoder": (
            ("sample", 3, "height", "width"),
            ("latent_parameters", 2 * z, "latent_height", "latent_width"),
        ),
        "decoder": (("latent_sample", z, "latent_height", "latent_width"), ("sample", 3, "height", "width")),
    }.items():
        proto = onnx.load(folder / f"vae_{coder}/model.onnx")
        onnx.checker.check_model(proto, full_check=True)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
        assert {node.domain for node in proto.graph.node} == {""}
        assert not proto.functions
        for values, (name, channels, height, width) in (
            (proto.graph.input, given),
            (proto.graph.output, made),
        ):
            assert [value.name for value in values] == [name]
            dims = [dim.dim_param or dim.dim_value for dim in values[0].type.tensor_type.shape.dim]
            assert dims == ["batch_size", channels, height, width]


def test_config_json_is_diffusers_and_no_file_names_this_machine(onnx_export):
    model, folder = onnx_export
    config = model.config.model_copy(update={"scaling_factor": 0.5, "shift_factor": 0.1})
    here = str(Path(programs.__file__).parents[2]).encode()
    for coder in ("encoder", "decoder"):
        assert AutoencoderKLConfig.from_json(folder / f"vae_{coder}/config.json") == config
        content = (folder / f"vae_{coder}/model.onnx").read_bytes()
        assert here not in content
        assert b".py" not in content


def test_it_is_quiet_and_leaves_the_model_as_it_was(tmp_path, onnx_run, capfd, caplog):
    """Also a bf16 model in training mode gives fp32 files."""
    model = AutoencoderKL(NARROW).bfloat16().train()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, logger="latentae"), caplog.at_level(logging.WARNING):
        write_onnx(model, model.config, tmp_path)
    output = capfd.readouterr()
    assert not output.out
    assert not output.err
    assert not caplog.records
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])
    images = torch.randn(1, 3, 4, 5)
    with torch.no_grad():
        expected = model.float().eval().encode(images).mean
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == FILES
    found = onnx_run(tmp_path / "vae_encoder/model.onnx", images)
    torch.testing.assert_close(found.chunk(2, dim=1)[0], expected, rtol=0, atol=1e-4)


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    class Off(onnxruntime.InferenceSession):
        def run(self, names, inputs):
            return [value + 0.01 for value in super().run(names, inputs)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    with pytest.raises(
        ModelError, match=r"model\.onnx: ONNX Runtime's output is off by 0\.0.*, allowed is 0\.0001"
    ):
        write_onnx(AutoencoderKL(NARROW), NARROW, tmp_path)


def test_missing_onnx_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a)
    )
    with pytest.raises(
        MissingDependencyError, match=r"need onnxscript, not installed here; pip install 'latentae\[export\]'"
    ):
        write_onnx(AutoencoderKL(NARROW), NARROW, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_coder_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LARGEST_BYTES", 1000)
    with pytest.raises(
        ModelError, match=r"the encoder has .* GB of weights, .* external data is not supported"
    ):
        write_onnx(AutoencoderKL(NARROW), NARROW, tmp_path)
    assert not any(tmp_path.iterdir())
