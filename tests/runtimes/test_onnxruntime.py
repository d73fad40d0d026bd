"""The ONNX Runtime target, against torch, against the simulation, and against what the runtime really executes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from slimline.basics.errors import SlimlineError  # noqa: E402
from slimline.frameworks.base import adapter  # noqa: E402
from slimline.graph.edits import FoldNorms  # noqa: E402
from slimline.model import Model  # noqa: E402
from slimline.model.lowering import write  # noqa: E402
from slimline.runtimes.onnxruntime import runtime  # noqa: E402
from slimline.steps.quantization.calibration import calibrate  # noqa: E402
from slimline.steps.quantization.step import StaticQuantization  # noqa: E402
from slimline.zoo.torch import ResidualCNN  # noqa: E402
from tests.digit_models import NETS, Recurrent, digits, fitted  # noqa: E402


@pytest.fixture(scope="module", params=NETS)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """A network, its quantized model, and both artifacts."""
    torch.manual_seed(0)
    module = fitted(NETS[request.param])
    x = digits()
    torch_adapter = adapter("torch")
    native, example = torch_adapter.load(module, (x[:2],))
    model = Model(torch_adapter, native, example)
    before = {name: array.copy() for name, array in model.parameters().items()}
    batches = ((x[i : i + 64],) for i in range(0, 256, 64))
    quantized = calibrate(model, StaticQuantization(), batches, "onnxruntime")
    folder = tmp_path_factory.mktemp(request.param)
    write(runtime, model, folder / "float.onnx")
    write(runtime, quantized, folder / "integer.onnx")
    yield {
        "name": request.param,
        "module": module,
        "model": model,
        "before": before,
        "quantized": quantized,
        "float": folder / "float.onnx",
        "integer": folder / "integer.onnx",
        "x": x[1024:1424],
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_at_any_batch(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Recurrent(kind).eval()
    x = np.random.default_rng(0).normal(size=(7, 6, 5)).astype(np.float32)
    model = Model(adapter("torch"), *adapter("torch").load(module, (x[:2],)))
    write(runtime, model, tmp_path / "loop.onnx")
    session = runtime.load(tmp_path / "loop.onnx")
    for batch in (7, 1):
        with torch.no_grad():
            wish = module(torch.from_numpy(x[:batch])).numpy()
        np.testing.assert_allclose(session.run((x[:batch],)), wish, atol=1e-5)


def test_float_artifact_is_the_users_module_at_any_batch(lowered: dict) -> None:
    session = runtime.load(lowered["float"])
    for batch in (1, 7, 400):
        x = lowered["x"][:batch]
        with torch.no_grad():
            wish = lowered["module"](torch.from_numpy(x)).numpy()
        assert np.abs(session.run((x,)) - wish).max() <= 1e-4 * np.abs(wish).max()


def test_integer_artifact_is_the_simulation(lowered: dict) -> None:
    x = lowered["x"]
    got = runtime.load(lowered["integer"]).run((x,))
    wish = lowered["quantized"].predict(x)
    assert (got.argmax(1) == wish.argmax(1)).mean() >= 0.99
    # Ties in rounding may fall to either side: a few steps of the last grids, seldom, and nothing on average.
    assert np.abs(got - wish).max() <= 0.05 * np.abs(wish).max()
    assert np.abs(got - wish).mean() <= 0.005 * np.abs(wish).max()


def test_the_simulation_is_close_to_the_float_model_but_not_the_same(lowered: dict) -> None:
    x = lowered["x"]
    wish, got = lowered["model"].predict(x), lowered["quantized"].predict(x)
    assert 0 < np.abs(got - wish).mean() <= 0.03 * np.abs(wish).max()
    assert (got.argmax(1) == wish.argmax(1)).mean() >= 0.97


def test_the_model_given_is_untouched_and_names_stay(lowered: dict) -> None:
    now = lowered["model"].parameters()
    assert all(np.array_equal(now[name], array) for name, array in lowered["before"].items())
    weights = {name for name in lowered["before"] if name in lowered["quantized"].quantization.weights}
    assert weights and weights <= set(lowered["quantized"].parameters())
    assert lowered["quantized"].history[-1]["step"] == "StaticQuantization"
    assert lowered["model"].quantization is None


def test_the_runtime_executes_integer_kernels(lowered: dict) -> None:
    layers = runtime.integer_layers(lowered["integer"])
    in_float = {name for name, kind in layers.items() if kind == "float"}
    # Hard-swish, which ONNX Runtime writes as its own HardSigmoid and Mul, and GELU have no integer kernel.
    assert in_float <= {"HardSigmoid", "Mul", "4/Gelu"}, f"float kernels: {in_float}"
    assert set(lowered["quantized"].quantization.layers) <= set(layers)
    assert set(runtime.integer_layers(lowered["float"]).values()) == {"float"}


def test_activations_are_unsigned_and_weights_are_signed_bytes(lowered: dict) -> None:
    graph = onnx.load(lowered["integer"]).graph
    stored = {t.name: t.data_type for t in graph.initializer}
    assert not graph.value_info and not any(node.doc_string or node.metadata_props for node in graph.node)
    rounds = [stored[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert rounds and set(rounds) == {onnx.TensorProto.UINT8}
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) <= 96  # scales only; no weight is left in float


def test_the_same_model_gives_the_same_bytes(lowered: dict, tmp_path: Path) -> None:
    write(runtime, lowered["quantized"], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == lowered["integer"].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]  # no temporary file stays


@pytest.mark.parametrize("lowered", ["residual"], indirect=True)
def test_the_simulation_trains_and_survives_saving(lowered: dict, tmp_path: Path) -> None:
    quantized, x = lowered["quantized"], lowered["x"]
    path = quantized.save(tmp_path / "q.pt2")
    native, _, _ = quantized.adapter.open(path, False)
    assert np.array_equal(quantized.adapter.outputs(native, (x,))[0], quantized.predict(x))
    native(torch.from_numpy(x)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in native.parameters())
    code = (
        "import sys; from pathlib import Path; from slimline.frameworks.base import adapter; "
        "from slimline.model import Model; from slimline.model.lowering import write; "
        "from slimline.runtimes.onnxruntime import runtime; "
        "from slimline.graph.quantization import Quantization; a = adapter('torch'); "
        "native, example, _ = a.open(Path(sys.argv[1]), False); "
        "write(runtime, Model(a, native, example, (), Quantization()), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path), str(tmp_path / "other.onnx")], check=True)
    assert (tmp_path / "other.onnx").read_bytes() == lowered["integer"].read_bytes()


def test_profile_and_input_specs(lowered: dict) -> None:
    assert runtime.input_specs(lowered["integer"])[0][1:] == ((None, 1, 8, 8), "float32")
    times = runtime.profile(lowered["integer"], (lowered["x"][:8],), runs=3)
    assert any("QLinearConv" in name or "QGemm" in name for name in times)
    assert all(t > 0 for t in times.values())


def _model(module: nn.Module, x: np.ndarray) -> Model:
    torch_adapter = adapter("torch")
    native, example = torch_adapter.load(module.eval(), (x,))
    return Model(torch_adapter, native, example)


def test_fold_is_exact_for_every_kind_of_layer() -> None:
    torch.manual_seed(1)
    nets = {
        "transposed": nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)),
        "grouped transposed": nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
        "plain norm": nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(True)),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)),
    }
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    for name, net in nets.items():
        norm = next(m for m in net if hasattr(m, "running_var"))
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, -1, 1)
        model = _model(net, x)
        folded = model.edit(FoldNorms())
        assert np.allclose(model.adapter.outputs(folded, (x,))[0], model.predict(x), atol=1e-5), name
        assert not any("running" in n for n in model.adapter.parameters(folded)), name


def test_bias_of_a_channel_without_weight_does_not_overflow(tmp_path: Path) -> None:
    """A dead channel keeps its bias: int32 on the grid of its own weights could not hold it."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    with torch.no_grad():
        net[0].weight[1] *= 1e-9
        net[0].bias[1] = 0.7
    x = np.random.default_rng(0).uniform(size=(16, 1, 8, 8)).astype(np.float32)
    quantized = calibrate(_model(net, x), StaticQuantization(observer="minmax"), [(x,)], "onnxruntime")
    write(runtime, quantized, tmp_path / "q.onnx")
    with torch.no_grad():
        wish = net(torch.from_numpy(x)).numpy()
    assert np.abs(runtime.load(tmp_path / "q.onnx").run((x,)) - wish).max() < 0.03 * np.abs(wish).max()


def test_known_ranges_are_not_observed_again() -> None:
    torch.manual_seed(0)
    x = digits()[:64]
    model = _model(ResidualCNN((8, 16), 1), x)
    known: dict = {}
    step, exclude = StaticQuantization(observer="minmax"), {"stem": "slow"}
    calibrate(model, step, [(x,)], "onnxruntime", known=known)
    assert len(known) > 4
    found = calibrate(model, step, [(x,)], "onnxruntime", exclude, known)
    assert found.quantization == calibrate(model, step, [(x,)], "onnxruntime", exclude).quantization
    assert calibrate(model, step, [], "onnxruntime", exclude, known).quantization == found.quantization


def test_excluded_layers_stay_float_with_their_reason(tmp_path: Path) -> None:
    x = digits()[:64]
    model = _model(ResidualCNN((8, 8), 1), x)
    exclude = {"stages.0.0.conv1": "slower in integers"}
    quantized = calibrate(model, StaticQuantization(keep=("head",)), [(x,)], "onnxruntime", exclude)
    assert quantized.quantization is not None
    assert quantized.quantization.float_layers == exclude
    write(runtime, quantized, tmp_path / "q.onnx")
    layers = runtime.integer_layers(tmp_path / "q.onnx")
    assert layers["stages.0.0.conv1"] == layers["head"] == "float"
    assert layers["stages.0.0.conv2"] == "integer"


def test_calibration_refuses_what_cannot_work() -> None:
    x = digits()[:8]
    model = _model(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), x)
    step = StaticQuantization()
    with pytest.raises(SlimlineError, match="no calibration batch"):
        calibrate(model, step, [], "onnxruntime")
    with pytest.raises(SlimlineError, match="NaN or infinity in value"):
        calibrate(model, step, [(np.full_like(x, np.nan),)], "onnxruntime")
    with pytest.raises(SlimlineError, match="no layer to quantize"):
        calibrate(model, StaticQuantization(layers=("encoder.*",)), [(x,)], "onnxruntime")
    with pytest.raises(SlimlineError, match="quantized already"):
        calibrate(calibrate(model, step, [(x,)], "onnxruntime"), step, [(x,)], "onnxruntime")


def test_files_that_are_no_onnx_are_refused_in_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for path in (broken, tmp_path / "missing.onnx"):
        with pytest.raises(SlimlineError) as refused:
            runtime.load(path)
        assert path.name in str(refused.value) and "\n" not in str(refused.value)


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    model = _model(Odd(), np.ones((2, 3), np.float32))
    with pytest.raises(SlimlineError, match="bessel_j0"):
        write(runtime, model, tmp_path / "odd.onnx")
    assert not list(tmp_path.iterdir())
