"""Models as graphs of their own: torch.export with the ops in it, and ONNX of the reference path, run by onnxruntime."""

import importlib.util
import warnings

import pytest
import torch

from tests.support.small_models import autoencoder, classifier, clip, error

VIDEOMAE = dict(class_token=False, separable_position=False, position="sincos", key_bias=False, layer_scale=0.1)
MODELS = {
    "encoder": lambda: autoencoder(depth=1).encoder,
    "classifier": lambda: classifier(depth=1, pooling="first", **VIDEOMAE),
}
BATCH = {0: torch.export.Dim("batch")}


@pytest.mark.parametrize("name, backend", [("encoder", "ops"), ("classifier", "ops"), ("classifier", "reference")])
def test_exported_programs_compute_the_same_for_any_batch(name, backend, tmp_path):
    model = MODELS[name]().eval()
    model.backend = backend
    program = torch.export.export(model, (clip(model.config),), dynamic_shapes={"video": BATCH})
    ops = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("stmae.")}
    assert bool(ops) == (backend == "ops"), ops  # the reference's graph needs this library nowhere
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3):
        video = clip(model.config, batch, seed=batch)
        assert error(loaded(video), model(video)) < 1e-5


def test_the_exported_encoder_takes_visible_tokens():
    model = autoencoder(depth=1).eval()
    keep, _ = model.sample_mask(3)
    dims = {"video": BATCH, "keep": {**BATCH, 1: torch.export.Dim("kept", min=2, max=model.config.num_tokens)}}
    program = torch.export.export(model.encoder, (clip(model.config, 3),), {"keep": keep}, dynamic_shapes=dims)
    for kept in (2, keep.shape[1]):
        video, some = clip(model.config, 3, seed=kept), keep[:, :kept]
        assert error(program.module()(video, keep=some), model.encoder(video, keep=some)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_onnx_computes_the_same_for_any_batch(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    import onnxruntime

    model = MODELS[name]().eval()
    model.backend = "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        program = torch.onnx.export(model, (clip(model.config),), dynamo=True, dynamic_shapes={"video": BATCH}, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        video = clip(model.config, batch, seed=batch)
        (out,) = session.run(None, {"video": video.numpy()})
        assert error(torch.from_numpy(out), model(video).detach()) < 1e-5
