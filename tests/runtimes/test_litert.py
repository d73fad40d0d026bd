"""The LiteRT target, against Keras, against the simulation, and against LiteRT's own reference kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

import flatbuffers
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.graph.edits import FoldNorms
from slimline.model import Model
from slimline.model.lowering import write
from slimline.runtimes.litert import Session, runtime
from slimline.steps.quantization.calibration import calibrate
from slimline.steps.quantization.step import StaticQuantization

KERAS = adapter("keras")  # sets what must be set before keras is imported

import keras  # noqa: E402
from keras import layers as L  # noqa: E402


def _norm(x: Any, function: str | None = None) -> Any:
    x = L.BatchNormalization(momentum=0.8)(x)
    return L.Activation(function)(x) if function else x


def residual() -> keras.Model:
    """Basic blocks with a strided, padded and projected one."""
    x = i = keras.Input((8, 8, 1), name="image")
    x = _norm(L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x), "relu")
    for width, stride in ((8, 1), (16, 2)):
        y = _norm(L.Conv2D(width, 3, stride, use_bias=False)(L.ZeroPadding2D(1)(x)), "relu")
        y = _norm(L.Conv2D(width, 3, padding="same", use_bias=False)(y))
        x = x if stride == 1 else _norm(L.Conv2D(width, 1, stride, use_bias=False)(x))
        x = L.ReLU()(L.Add()([x, y]))
    return keras.Model(i, L.Dense(10, name="head")(L.GlobalAveragePooling2D()(x)))


def inverted(function: str = "relu6", gate: str | None = None, widths: tuple[int, ...] = (16, 24)) -> keras.Model:
    """MobileNet's blocks, with squeeze-excite where there is a `gate`."""
    x = i = keras.Input((8, 8, 1))
    x = _norm(L.Conv2D(16, 3, padding="same", use_bias=False)(x), function)
    for stride, width in enumerate(widths, 1):
        y = _norm(L.Conv2D(32, 1, use_bias=False)(x), function)
        y = _norm(L.DepthwiseConv2D(3, stride, padding="same", use_bias=False)(y), function)
        if gate:
            s = L.Reshape((1, 1, 32))(L.GlobalAveragePooling2D()(y))
            y = L.Multiply()([y, L.Conv2D(32, 1, activation=gate)(L.Conv2D(8, 1, activation="relu")(s))])
        y = _norm(L.Conv2D(width, 1, use_bias=False)(y))
        x = L.Add()([x, y]) if x.shape == y.shape else y
    return keras.Model(i, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def perceptron() -> keras.Model:
    """Dense layers, one with batch norm, and probabilities."""
    i = keras.Input((8, 8, 1))
    x = _norm(L.Dense(48, use_bias=False)(L.Dense(64, activation="relu")(L.Flatten()(i))), "relu")
    return keras.Model(i, L.Dense(10, activation="softmax")(x))


def preactivation() -> keras.Model:
    """Batch norm that no convolution can take in, dense connections and average pooling."""
    x = i = keras.Input((8, 8, 1))
    x = L.Conv2D(8, 3, padding="same")(x)
    x = L.Concatenate()([x, L.Conv2D(8, 3, padding="same")(_norm(x, "relu"))])
    x = L.AveragePooling2D(2)(L.Conv2D(8, 1)(_norm(x, "relu")))
    return keras.Model(i, L.Dense(10)(L.Flatten()(x)))


NETS: dict[str, Callable[[], keras.Model]] = {
    "residual": residual,
    "inverted": inverted,
    "hard_silu": lambda: inverted("hard_silu", "hard_sigmoid", (16,)),
    "silu": lambda: inverted("silu", "sigmoid", (16,)),
    "perceptron": perceptron,
    "preactivation": preactivation,
}

IMAGES = (load_digits().images[..., None] / 16.0).astype(np.float32)
LABELS = load_digits().target
HELD = IMAGES[1297:]


@dataclass(frozen=True)
class Case:
    name: str
    model: Model
    quantized: Model
    float_path: Path
    integer_path: Path


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A network trained for a few epochs, calibrated on real digits, and both artifacts."""
    keras.utils.set_random_seed(0)
    net = NETS[request.param]()
    logits = request.param != "perceptron"
    net.compile(keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=logits))
    net.fit(IMAGES[:1280], LABELS[:1280], batch_size=64, epochs=4, verbose=0)
    model = Model(KERAS, *KERAS.load(net, (IMAGES[:4],)))
    quantized = calibrate(model, StaticQuantization(), [(IMAGES[:256],)], "litert")
    folder = tmp_path_factory.mktemp(request.param)
    case = Case(request.param, model, quantized, folder / "float.tflite", folder / "int8.tflite")
    write(runtime, model, case.float_path)
    write(runtime, quantized, case.integer_path)
    return case


def test_float_artifact_is_the_model(case: Case) -> None:
    np.testing.assert_allclose(runtime.load(case.float_path).run((HELD,)), case.model.predict(HELD), atol=1e-4)


def test_every_operator_is_integer(case: Case) -> None:
    assert set(runtime.integer_layers(case.float_path).values()) == {"float"}
    assert set(runtime.integer_layers(case.integer_path).values()) == {"integer"}


@pytest.mark.parametrize("reference", [False, True], ids=["xnnpack", "reference"])
def test_integer_artifact_is_the_simulation(case: Case, reference: bool) -> None:
    wanted = case.quantized.predict(HELD)
    got = Session(case.integer_path, reference=reference).run((HELD,))
    *_, output = case.quantized.quantization.activations.values()  # in topological order
    assert np.abs(got - wanted).mean() <= float(output.scale)
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= 0.99


def test_rounding_costs_little_accuracy(case: Case) -> None:
    right = [(p.argmax(1) == LABELS[1297:]).mean() for p in (case.model.predict(HELD), case.quantized.predict(HELD))]
    assert right[0] > 0.5
    assert right[1] >= right[0] - 0.02


@pytest.mark.parametrize("case", ["residual"], indirect=True)
def test_weights_in_the_file_are_the_grids_integers(case: Case) -> None:
    """The converter rounds nothing anew: its integers are those of `methods.ranges.quantize`."""
    from ai_edge_litert.interpreter import Interpreter

    folded = case.model.edit(FoldNorms())
    kernel = KERAS.parameters(folded)["stem/kernel"]
    wanted = case.quantized.quantization.weights["stem/kernel"].encode(kernel).transpose(3, 0, 1, 2)
    interpreter = Interpreter(str(case.integer_path))
    stored = [
        interpreter.get_tensor(t["index"])
        for t in interpreter.get_tensor_details()
        if tuple(t["shape"]) == wanted.shape and t["dtype"] == np.int8 and not t["name"]
    ]
    assert any(np.array_equal(array, wanted) for array in stored)


def test_lowering_is_reproducible(case: Case, tmp_path: Path) -> None:
    write(runtime, case.quantized, tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == case.integer_path.read_bytes()


@pytest.mark.parametrize("case", ["residual"], indirect=True)
def test_another_process_writes_the_same_bytes(case: Case, tmp_path: Path) -> None:
    case.quantized.save(tmp_path / "model.keras")
    program = """
import sys
from pathlib import Path
from slimline.frameworks.base import adapter
from slimline.graph.quantization import Quantization
from slimline.model import Model
from slimline.model.lowering import write
from slimline.runtimes.litert import runtime
keras = adapter("keras")
native, example, notes = keras.open(Path(sys.argv[1]), False)
model = Model(keras, native, example, (), Quantization.from_notes(notes["quantization"]))
write(runtime, model, Path(sys.argv[2]))
"""
    paths = [str(tmp_path / "model.keras"), str(tmp_path / "other.tflite")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert (tmp_path / "other.tflite").read_bytes() == case.integer_path.read_bytes()
    assert "XNNPACK" not in done.stderr and "Saved artifact" not in done.stdout


def test_any_batch_size(case: Case) -> None:
    session = runtime.load(case.integer_path)
    whole = session.run((HELD,))
    for size in (1, 32, 7, 1):
        np.testing.assert_array_equal(session.run((HELD[:size],)), whole[:size])


def test_files_hold_the_users_names_and_no_others(case: Case) -> None:
    data = case.integer_path.read_bytes()
    assert not any(name in data for name in (b"functional", b"FakeQuant", b"MLIR", b"min_runtime"))
    if case.name == "residual":
        assert runtime.input_specs(case.integer_path) == [("image", (None, 8, 8, 1), "float32")]
        assert {"stem", "head"} <= set(runtime.integer_layers(case.integer_path))
        numbers = sum(a.size for a in KERAS.parameters(case.model.edit(FoldNorms())).values())
        assert len(data) < 1.5 * numbers + 4000


def test_reshapes_need_no_shape_arithmetic(case: Case) -> None:
    operators = {o["op_name"] for o in Interpreter(str(case.integer_path))._get_ops_details()}
    assert not operators & {"SHAPE", "STRIDED_SLICE", "PACK"}


def test_two_inputs_keep_their_order(tmp_path: Path) -> None:
    a, b = keras.Input((3,), name="zebra"), keras.Input((5,), name="ant")
    net = keras.Model([a, b], L.Dense(2)(L.Concatenate()([L.Dense(4)(a), L.Dense(4)(b)])))
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32))
    model = Model(KERAS, *KERAS.load(net, inputs))
    write(runtime, model, tmp_path / "two.tflite")
    assert [name for name, _, _ in runtime.input_specs(tmp_path / "two.tflite")] == ["zebra", "ant"]
    np.testing.assert_allclose(runtime.load(tmp_path / "two.tflite").run(inputs), model.predict(*inputs), atol=1e-5)
    signed = Interpreter(str(tmp_path / "two.tflite"))
    (name,) = model.output_names
    assert signed.get_signature_list() == {"serving_default": {"inputs": ["ant", "zebra"], "outputs": [name]}}
    answer = signed.get_signature_runner("serving_default")(zebra=inputs[0], ant=inputs[1])
    np.testing.assert_allclose(answer[name], model.predict(*inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("wrap", "steps"),
    [
        (lambda x: L.LSTM(6)(L.LSTM(6, return_sequences=True)(x)), (9, 5)),
        (lambda x: L.Bidirectional(L.GRU(6))(x), (9, 5)),
        (lambda x: L.GlobalAveragePooling2D()(L.ConvLSTM2D(4, 3)(x)), (3, 6, 6, 2)),
        (lambda x: L.LSTM(6)(L.Embedding(30, 5, mask_zero=True)(x)), (9,)),
    ],
    ids=["stacked", "both ways", "images", "masked"],
)
def test_recurrent_layers_at_any_batch(wrap: Callable[[Any], Any], steps: tuple[int, ...], tmp_path: Path) -> None:
    words = len(steps) == 1
    i = keras.Input(steps, dtype="int32" if words else "float32")
    net = keras.Model(i, L.Dense(3)(wrap(i)))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 30, (7, *steps)).astype(np.int32) if words else rng.normal(size=(7, *steps)).astype(np.float32)
    model = Model(KERAS, *KERAS.load(net, (x[:2],)))
    write(runtime, model, tmp_path / "loop.tflite")
    session = runtime.load(tmp_path / "loop.tflite")
    for batch in (7, 1):
        np.testing.assert_allclose(session.run((x[:batch],)), net.predict(x[:batch], verbose=0), atol=1e-5)
    assert not any(layer.unroll for layer in model.native.layers if isinstance(layer, L.RNN))


def test_kept_layers_stay_float(tmp_path: Path) -> None:
    model = Model(KERAS, *KERAS.load(residual(), (IMAGES[:4],)))
    quantized = calibrate(model, StaticQuantization(keep=("head",)), [(IMAGES[:64],)], "litert")
    write(runtime, quantized, tmp_path / "mixed.tflite")
    found = runtime.integer_layers(tmp_path / "mixed.tflite")
    assert found["head"] == "float" and found["stem"] == "integer"
    got = runtime.load(tmp_path / "mixed.tflite").run((HELD,))
    np.testing.assert_allclose(got, quantized.predict(HELD), atol=np.ptp(got) / 50)


def test_bad_files_and_inputs(tmp_path: Path) -> None:
    (tmp_path / "text.tflite").write_text("not a model at all")
    with pytest.raises(SlimlineError, match="no LiteRT model"):
        runtime.load(tmp_path / "text.tflite")
    with pytest.raises(SlimlineError, match="cannot be read"):
        runtime.load(tmp_path / "missing.tflite")
    model = Model(KERAS, *KERAS.load(residual(), (IMAGES[:4],)))
    write(runtime, model, tmp_path / "good.tflite")
    (tmp_path / "cut.tflite").write_bytes((tmp_path / "good.tflite").read_bytes()[:2000])
    with pytest.raises(SlimlineError, match="damaged"):
        runtime.load(tmp_path / "cut.tflite")
    session = runtime.load(tmp_path / "good.tflite")
    with pytest.raises(SlimlineError, match=r"\(any, 8, 8, 1\), not \(2, 9, 8, 1\)"):
        session.run((np.zeros((2, 9, 8, 1), np.float32),))
    with pytest.raises(SlimlineError, match="takes 1 inputs"):
        session.run(())
    content = schema.ModelT.InitFromPackedBuf((tmp_path / "good.tflite").read_bytes(), 0)
    content.subgraphs[0].operators[0].inputs = [10_000]
    builder = flatbuffers.Builder(0)
    builder.Finish(content.Pack(builder), b"TFL3")
    inconsistent = tmp_path / "inconsistent.tflite"  # which LiteRT opens, and only then finds out
    inconsistent.write_bytes(builder.Output())
    for use in (runtime.integer_layers, lambda path: runtime.load(path).run((IMAGES[:2],))):
        with pytest.raises(SlimlineError, match=r"cannot run .*inconsistent\.tflite: export the model again"):
            use(inconsistent)
