"""Layers that read signs: gradients by the papers' formulas, thresholds that change no answer, artifacts that agree."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits

import slimline as sl
from slimline.graph.edits import Round
from slimline.graph.matrix import matrices
from slimline.graph.quantization import Quantization
from slimline.methods.formats import Levels
from slimline.methods.scales import learning_speeds
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, perform
from slimline.steps.quantization_aware.signs import sign_formats, with_thresholds
from slimline.steps.quantization_aware.step import QuantizationAwareTraining

torch = pytest.importorskip("torch")
nn = torch.nn

ENDS = {name: {"weights": "int8", "activations": "uint8"} for name in ("stem.0", "head")}
FIELDS = {"weights": "binary", "activations": "binary", "overrides": ENDS, "batch_size": 64, "learning_rate": 3e-3}


class Binary(nn.Module):
    """A residual block with ReLUs, in whose branch signs are read, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 2, stride=2), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.down(torch.relu(x + self.branch(x))))


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


@pytest.fixture(scope="module")
def data(digits) -> sl.Data:
    x, y = digits
    own = {"train": (x[:1000], y[:1000]), "selection": (x[1000:1200], y[1000:1200]), "calibration": (x[:128],)}
    return sl.Data(**own, overlap="allow")


@pytest.fixture(scope="module")
def model(digits) -> sl.Model:
    torch.manual_seed(0)
    net, (x, y) = Binary().train(), map(torch.from_numpy, digits)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(60):
        rows = torch.arange(64) + 64 * (step % 15)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return sl.load(net.eval(), np.zeros((2, 1, 8, 8), np.float32))


def test_gradients_go_through_between_plus_and_minus_the_scale():
    from slimline.frameworks.torch.learned import LearnedRounding

    each = Levels.binary(np.asarray(0.5, np.float32))
    rounding = LearnedRounding(each, 6, ends=True)
    x = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.4, 0.6], requires_grad=True)
    slopes = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y = rounding(x)
    (y * slopes).sum().backward()
    np.testing.assert_array_equal(y.detach(), [-0.5, -0.5, -0.5, -0.5, 0.5, 0.5])
    np.testing.assert_array_equal(x.grad, [0, 2, 3, 4, 5, 0])
    signs = np.array([-1, -1, -1, -1, 1, 1])
    expected = 0.5 * float(signs @ slopes.numpy()) * learning_speeds(each, 6)
    np.testing.assert_allclose(rounding.log_step.grad, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def rounding():
    """What a network makes of an input that it only rounds, and the format."""
    each = Levels.binary(np.asarray(0.3, np.float32))
    same = nn.Linear(4, 4, bias=False)
    same.weight.data = torch.eye(4)
    net = sl.load(same, np.zeros((3, 4), np.float32))
    native = net.edit(Round(Quantization({net.graph.inputs[0]: each})))
    return each, lambda x: net.adapter.outputs(native, (x,))[0]


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=32, allow_subnormal=False)))
def test_the_network_rounds_as_the_format_says(rounding, x):
    each, rounded = rounding
    np.testing.assert_array_equal(rounded(x), each.round(x))


def test_thresholds_are_means_and_change_no_answer_within_the_edges():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval()
    x = np.random.default_rng(0).normal(size=(40, 2, 6, 6)).astype(np.float32) + 1
    model = sl.load(net, x[:2])
    changed = with_thresholds(model, matrices(model.graph), [(x[:24],), (x[24:],)])
    np.testing.assert_allclose(changed.predict(x), model.predict(x), rtol=1e-3, atol=1e-4)
    stored = changed.parameters()
    np.testing.assert_allclose(stored["0.threshold"], x.mean((0, 2, 3)), rtol=1e-5)
    reads = [layer.input for layer in matrices(changed.graph)]
    held = sign_formats(changed, reads, [(x,)])
    np.testing.assert_allclose(held[reads[0]].scale, np.abs(x - x.mean((0, 2, 3))[:, None, None]).mean(), rtol=1e-5)


def test_a_network_of_signs_learns_and_its_artifact_agrees(model, data, digits, tmp_path):
    small = sl.apply(model, QuantizationAwareTraining(**FIELDS, epochs=3, samples=128), data)
    x, y = digits[0][1200:], digits[1][1200:]
    assert np.mean(small.predict(x).argmax(1) == y) > 0.75
    formats = small.quantization.activations
    signs = {name: each for name, each in formats.items() if isinstance(each, Levels)}
    assert len(signs) == 2
    assert all(each.is_sign for each in signs.values())
    assert all(each.bits == 8 for name, each in formats.items() if name not in signs)
    stored = small.parameters()
    assert stored["branch.0.threshold"].shape == (16,)
    assert stored["down.0.threshold"].shape == (16,)
    weight = small.quantization.weights["branch.0.weight"].round(stored["branch.0.weight"])
    assert all(np.unique(np.abs(row)).size == 1 for row in weight)
    path = sl.export(small, "onnxruntime", tmp_path)
    outputs = runtime("onnxruntime").load(path).run((x,))
    np.testing.assert_allclose(outputs, small.predict(x), atol=1e-3 * np.abs(outputs).max())
    ran = runtime("onnxruntime").integer_layers(path)
    assert all(ran[layer] == "integer" for layer in ("stem.0", "branch.0", "down.0", "head"))
    again = sl.load(small.save(tmp_path / "model.pt2"))
    np.testing.assert_array_equal(again.predict(x), small.predict(x))
    assert again.quantization == small.quantization


def test_litert_picks_one_of_two_codes(model, data, digits, tmp_path):
    step = QuantizationAwareTraining(**{**FIELDS, "weights": "int8"}, epochs=0, samples=128)
    small = sl.apply(model, step, data, target="litert")
    path = sl.export(small, "litert", tmp_path)
    outputs, expected = runtime("litert").load(path).run((digits[0][:300],)), small.predict(digits[0][:300])
    assert np.mean(outputs.argmax(1) == expected.argmax(1)) >= 0.99
    ran = runtime("litert").integer_layers(path)
    assert all(ran[layer] == "integer" for layer in ("stem.0", "branch.0", "down.0", "head"))


def test_parts_with_signs_are_reconstructed(model, data):
    fields = {**FIELDS, "overrides": {**ENDS, "branch.*": {"activations": "uint8"}}, "reconstruct": "layer"}
    own = {"weights": "int4", "epochs": 8, "samples": 128, "drop": 0.0, "batch_size": 32}
    step = QuantizationAwareTraining(**fields | own)
    done = perform(step, model, Context(model, data.check(model.inputs), "onnxruntime"))
    parts = {part["layers"][0]: part for part in done.record["parts"]}
    assert parts["down.0"]["error_after"] < 0.9 * parts["down.0"]["error"]
    assert sum(isinstance(each, Levels) for each in done.model.quantization.activations.values()) == 1


def test_files_are_not_trained_and_say_what_to_do():
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [[make.make_tensor_value_info(name, kind, ("batch", 4))] for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = make.make_graph([make.make_node("MatMul", ["x", "w"], ["y"])], "file", *ends, [weight])
    file = sl.load(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=10))
    for fields in ({"activations": "binary"}, {"reconstruct": "layer", "rounding": "adaround"}):
        with pytest.raises(sl.SlimlineError, match=r"use StaticQuantization or .* that this one was exported from\.$"):
            sl.apply(file, QuantizationAwareTraining(**fields))


def test_refusals(model, data):
    for target in ("openvino", "executorch", "tensorrt", "coreml"):
        said = f"{target} cannot write activations as 2 levels.*; choose the target litert or onnxruntime, which can"
        with pytest.raises(sl.SlimlineError, match=said):
            sl.apply(model, QuantizationAwareTraining(activations="binary"), data, target=target)
    with pytest.raises(sl.SlimlineError, match="give one type of 2 bits"):
        QuantizationAwareTraining(activations="uint4", overrides={"head": {"activations": "uint8"}})
    with pytest.raises(sl.SlimlineError, match="give one type of 2 bits"):
        QuantizationAwareTraining(activations="float32", overrides={"head": {"activations": "binary"}})
    own = QuantizationAwareTraining(overrides={"head": {"activations": "binary"}})
    assert own.has_signs
    assert own.grid_type is None
    assert QuantizationAwareTraining(activations="binary", overrides=ENDS).grid_type == "uint8"
    with pytest.raises(sl.SlimlineError, match="layer for overrides"):
        sl.apply(model, QuantizationAwareTraining(overrides={"nothing": {"activations": "binary"}}), data)
