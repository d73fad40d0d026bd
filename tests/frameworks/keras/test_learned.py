"""Training in few bits in Keras: gradients as PyTorch's and the papers' formulas say, artifacts, one's own loop."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

import slimline as sl  # noqa: E402
from slimline.basics.progress import Progress  # noqa: E402
from slimline.frameworks.keras.learned import LEARNED, LearnedRounding, on_grid, on_levels  # noqa: E402
from slimline.graph.edits import LearnRounding, Round, Unround  # noqa: E402
from slimline.graph.quantization import Quantization  # noqa: E402
from slimline.methods.adaround import exponent  # noqa: E402
from slimline.methods.formats import IntegerGrid, Levels, along  # noqa: E402
from slimline.methods.scales import learning_speeds, zero_learns  # noqa: E402
from slimline.model import Model  # noqa: E402
from slimline.runtimes.base import runtime  # noqa: E402
from slimline.steps.base import Context, perform  # noqa: E402
from slimline.steps.quantization_aware.step import QuantizationAwareTraining  # noqa: E402
from slimline.steps.quantization_aware.train import start  # noqa: E402
from tests import sparse_models as small  # noqa: E402

L = keras.layers
SHORT = {"epochs": 2, "batch_size": 48, "learning_rate": 3e-3, "refresh_batches": 2, "samples": 64}


@pytest.fixture(scope="module")
def data() -> sl.Data:
    return small.data("keras", samples=1200)


@pytest.fixture(scope="module")
def model(data: sl.Data) -> Model:
    """Trained for a moment; it ends in a softmax, and a scale of its batch norm is below zero."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential([
        keras.Input((8, 8, 1), name="x"),
        L.Conv2D(8, 3, strides=2, use_bias=False, name="conv"), L.BatchNormalization(momentum=0.8, name="norm"),
        L.ReLU(), L.Flatten(), L.Dense(10, activation="softmax", name="head"),
    ])  # fmt: skip
    net.get_layer("norm").gamma.assign([1, 1, -1, 1, 1, 1, 1, 1])
    train = data.split("train")
    net.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", jit_compile=False)
    net.fit(train.inputs[0], train.labels, batch_size=48, epochs=8, verbose=0)
    return sl.load(net, np.zeros((2, 8, 8, 1), np.float32))


def trained(model: Model, data: sl.Data, target="onnxruntime", checkpoint=None, tell=None, **fields):
    step = QuantizationAwareTraining(**{**SHORT, **fields})
    context = Context(model.uncompressed, data.check(model.inputs), target, checkpoint=checkpoint, tell=tell)
    done = perform(step, model, context)
    return done.model, done.record


def inputs(data: sl.Data) -> np.ndarray:
    return data.split("train").inputs[0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scales", [1, 5])
def test_gradients_are_those_of_lsq_and_of_torch(signed: bool, scales: int) -> None:
    low, high = (-4, 3) if signed else (0, 7)
    rng = np.random.default_rng(0)
    x, w = (rng.normal(scale=s, size=(40, 5)).astype(np.float32) for s in (2, 1))
    scale = np.linspace(0.4, 0.7, scales, dtype=np.float32).reshape((1, 5) if scales > 1 else ())
    zero = np.full(scale.shape, 0 if signed else 2, np.float32)
    own = [tf.constant(a) for a in (x, scale, zero)]
    with tf.GradientTape() as tape:
        tape.watch(own)
        y = on_grid(*own, low, high)
        loss = tf.reduce_sum(w * y)
    slopes = [g.numpy() for g in tape.gradient(loss, own)]
    u, n, p = x / scale, low - zero, high - zero
    inside = (u >= n) & (u <= p)
    by_scale = np.where(inside, np.rint(u) - u, np.where(u < n, n, p))  # equation 3 of Esser et al.
    expected = [w * inside, w * by_scale, -w * ~inside * scale]  # equation 6 of Bhalgat et al.
    for found, each in zip(slopes, expected, strict=True):
        total = each if found.shape == each.shape else each.sum(0, keepdims=True) if scales > 1 else each.sum()
        np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-5)
    torch = pytest.importorskip("torch")
    from slimline.frameworks.torch.learned import _Grid

    tensors = [torch.tensor(a, requires_grad=True) for a in (x, scale, zero)]
    rounded = _Grid.apply(*tensors, low, high)
    (torch.tensor(w) * rounded).sum().backward()
    np.testing.assert_array_equal(y.numpy(), rounded.detach().numpy())
    for found, tensor in zip(slopes, tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["affine", "levels", "narrow"])
def test_a_layer_that_learns_is_the_module_of_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from slimline.frameworks.torch.learned import LearnedRounding as Reference

    scale = np.array([[0.3, 0.5, 0.2]], np.float32)
    each = {
        "affine": IntegerGrid(np.float32(0.3), (), 4, False, zero_point=np.asarray(5, np.int32)),
        "levels": Levels(scale, along(1, 2), np.array([-1, 0, 1], np.float32)),
        "narrow": IntegerGrid(scale, along(1, 2), 4, True, True),
    }[kind]
    x = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32)
    reference = Reference(each, 64)
    layer = LearnedRounding(format=each, count=64, steps=each.scale.size, moves=zero_learns(each))
    assert layer(x).numpy() == pytest.approx(reference(torch.tensor(x)).detach().numpy(), abs=1e-6)
    assert layer.learned() == each == reference.format()
    names = ["log_step", *(["shift"] if kind == "affine" else [])]
    for name in names:
        moved = np.linspace(0.1, -0.2, each.scale.size).astype(np.float32)
        getattr(layer, name).assign(moved)
        getattr(reference, name).data = torch.tensor(moved)
    (reference(torch.tensor(x)) ** 2).sum().backward()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 2)
    slopes = tape.gradient(loss, [getattr(layer, name).value for name in names])
    for name, slope in zip(names, slopes, strict=True):
        np.testing.assert_allclose(slope.numpy(), getattr(reference, name).grad.numpy(), rtol=1e-4)
    found, expected = layer.learned(), reference.format()
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
    assert kind == "levels" or (found.zero == expected.zero).all()
    assert learning_speeds(each, 64).shape == (each.scale.size,)


@pytest.mark.parametrize(("zero", "signed"), [(0, False), (5, False), (0, True)])
def test_clipping_values_learn_by_the_formula_of_pact_as_in_torch(zero: int, signed: bool) -> None:
    torch = pytest.importorskip("torch")
    from slimline.frameworks.torch.learned import LearnedRounding as Reference

    each = IntegerGrid(np.float32(0.2), (), 4, signed, zero_point=np.asarray(zero, np.int32))
    rng = np.random.default_rng(4)
    x, w = (rng.normal(scale=s, size=300).astype(np.float32) for s in (2, 1))
    top, bottom = (each.high - zero) * 0.2, (each.low - zero) * 0.2  # of what is clipped at both ends
    reference = Reference(each, 300, clips=True)
    layer = LearnedRounding(format=each, count=300, clips=True)
    tensor = torch.tensor(x, requires_grad=True)
    (torch.tensor(w) * reference(tensor)).sum().backward()
    own = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(own)
        y = layer(own)
        loss = tf.reduce_sum(w * y)
    by_clip, by_x = tape.gradient(loss, [layer.clip.value, own])
    np.testing.assert_array_equal(y.numpy(), each.round(x))
    expected = (
        top * w[x > top + 1e-6].sum() + bottom * w[x < bottom - 1e-6].sum()
    )  # equation 3 of Choi et al., times it
    np.testing.assert_allclose(by_clip.numpy().item(), expected, rtol=1e-4)
    np.testing.assert_allclose(by_clip.numpy(), reference.clip.grad.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(by_x.numpy(), w * ((x >= bottom - 1e-6) & (x <= top + 1e-6)))
    np.testing.assert_array_equal(by_x.numpy(), tensor.grad.numpy())
    assert [name for name, _ in reference.named_parameters()] == [
        "clip"
    ] and reference.clip.ndim == layer.clip.ndim == 2
    layer.clip.assign([[1.5]])
    reference.clip.data = torch.tensor([[1.5]])
    assert layer.learned() == reference.format()
    np.testing.assert_allclose(layer.learned().scale, 0.3, rtol=1e-6)


def test_levels_let_gradients_through() -> None:
    each = Levels(np.float32(0.5), (), np.array([-2, -1, 0, 1], np.float32))
    x, w = np.random.default_rng(2).normal(size=(2, 30)).astype(np.float32)
    own = [tf.constant(x), tf.constant(0.5)]
    with tf.GradientTape() as tape:
        tape.watch(own)
        y = on_levels(*own, each)
        loss = tf.reduce_sum(w * y)
    np.testing.assert_array_equal(y.numpy(), each.round(x))
    by_x, by_scale = tape.gradient(loss, own)
    np.testing.assert_array_equal(by_x.numpy(), w)
    np.testing.assert_allclose(by_scale.numpy(), (w * y.numpy() / 0.5).sum(), rtol=1e-5)


def test_both_sides_of_zero_learn_as_in_pytorch() -> None:
    torch = pytest.importorskip("torch")
    from slimline.frameworks.torch.learned import LearnedRounding as InTorch

    rng = np.random.default_rng(6)
    scale = np.array([[0.5, 0.2, 0.9]], np.float32)
    each, x, w = Levels.ternary(scale, along(1, 2)), *(rng.normal(size=(40, 3)).astype(np.float32) for _ in range(2))
    layer = LEARNED[L.Dense](3, format=each, count=120, steps=3, skews=True)
    layer.build((None, 40))
    module = InTorch(each, 120, skews=True)
    assert layer.learned() == module.format() == each
    layer.log_skew.assign([np.log(0.6)])
    layer.log_step.assign([0.1, -0.2, 0.3])
    module.log_skew.data, module.log_step.data = torch.tensor([np.log(0.6)]).float(), torch.tensor([0.1, -0.2, 0.3])
    tensor, own = torch.tensor(x, requires_grad=True), tf.Variable(x)
    (module(tensor) * torch.tensor(w)).sum().backward()
    with tf.GradientTape() as tape:
        y = layer.on_grid(own)
        loss = tf.reduce_sum(w * y)
    numbers = [own, layer.log_step.value, layer.log_skew.value]
    gradients = [g.numpy() for g in tape.gradient(loss, numbers)]
    np.testing.assert_allclose(y.numpy(), module(tensor).detach(), rtol=1e-6)
    for one, other in zip(gradients, (tensor, module.log_step, module.log_skew), strict=True):
        np.testing.assert_allclose(one, other.grad.numpy(), rtol=1e-4)
    found, expected = layer.learned(), module.format()
    np.testing.assert_allclose(found.codebook, expected.codebook, rtol=1e-6)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)


def test_ternary_weights_with_two_scales_are_trained_stored_and_run(model, data, unseen, tmp_path) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.3))
    found, _ = trained(sparse, data, weights="ttq", activations="float32", epochs=3)
    books = [each.codebook for each in found.quantization.weights.values()]
    assert len(books) == 2 and any(abs(book[0] + book[2]) > 1e-4 for book in books)
    for name, mask in sparse.masks.items():
        assert not found.parameters()[name][~mask].any()
    path = sl.export(found, "onnxruntime", tmp_path)
    x, y = unseen
    np.testing.assert_allclose(runtime("onnxruntime").load(path).run((x,)), found.predict(x), atol=1e-4)
    assert np.mean(found.predict(x).argmax(1) == y) > 0.7
    again = sl.load(found.save(tmp_path / "model.keras"))
    np.testing.assert_array_equal(again.predict(x), found.predict(x))


KERNELS = {
    "line": (lambda: L.Conv1D(4, 3, name="k"), (9, 4)),
    "volume": (lambda: L.Conv3D(4, 2, name="k"), (3, 3, 3, 2)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, name="k"), (5, 5, 4)),
    "depthwise line": (lambda: L.DepthwiseConv1D(3, name="k"), (9, 4)),
    "transposed": (lambda: L.Conv2DTranspose(4, 2, strides=2, name="k"), (5, 5, 4)),
    "dense": (lambda: L.Dense(4, name="k"), (3, 4)),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (3, 4), name="k"), (3, 4)),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_every_kernel_learns_as_it_is_rounded(kind: str) -> None:
    make, shape = KERNELS[kind]
    keras.utils.set_random_seed(0)
    i = keras.Input(shape, name="x")
    model = sl.load(keras.Model(i, make()(i)))
    name = next(n for n in model.parameters() if n.startswith("k/") and not n.endswith("bias"))
    kernel = model.parameters()[name]
    axis = 2 if kind in ("depthwise", "transposed") else kernel.ndim - 1
    scale = np.full(kernel.shape[axis], 0.13, np.float32).reshape([-1 if d == axis else 1 for d in range(kernel.ndim)])
    grid = IntegerGrid(np.float32(0.2), (), 4, False, zero_point=np.asarray(7, np.int32))
    held = Quantization({"x": grid, "k": grid}, {name: IntegerGrid(scale, along(axis, kernel.ndim), 4, True, True)})
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    learning, rounded = model.edit(LearnRounding(held)), model.edit(Round(held))
    near = np.abs(model.adapter.outputs(learning, (x,))[0] - model.adapter.outputs(rounded, (x,))[0])
    assert (near > 1e-5).mean() < 0.02  # sums may fall on either side of a tie
    assert model.adapter.learned(learning, held) == held
    fixed = model.edit(LearnRounding(held, fixed=frozenset((*held.activations, *held.weights))))
    assert len(fixed.trainable_variables) == len(model.native.trainable_variables)
    assert {n.kind for n in model.adapter.read(learning, model.example).nodes} >= {"elementwise"}
    plain = model.adapter.edit(rounded, (Unround(held),), model.example)
    np.testing.assert_array_equal(model.adapter.outputs(plain, (x,))[0], model.predict(x))
    assert not model.adapter.format_mismatches(plain, Quantization())


def test_int8_trained_is_int8_run(model: Model, data: sl.Data, tmp_path) -> None:
    found, record = trained(model, data, "litert", overrides={"head": {"observer": "minmax"}})
    path = sl.export(found, "litert", tmp_path)
    x = inputs(data)
    outputs, expected = runtime("litert").load(path).run((x,)), found.predict(x)
    assert np.mean(outputs.argmax(1) == expected.argmax(1)) >= 0.995
    assert np.mean(np.abs(outputs - expected).max(1) <= 1 / 256) >= 0.99  # a step of the probabilities' grid
    assert set(runtime("litert").integer_layers(path).values()) == {"integer"}
    assert set(record["integer_layers"]) == {"conv", "head"}
    assert found.adapter.format_mismatches(found.native, found.quantization) == []
    reloaded = sl.load(found.save(tmp_path / "model.keras"))
    np.testing.assert_array_equal(reloaded.predict(x), expected)
    assert reloaded.quantization == found.quantization


@pytest.fixture(scope="module")
def unseen() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x[1240:, :, None] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[1240:]


def test_decay_pulls_clipping_values_in(model, data) -> None:
    fields = {"scales": "clipping", "activations": "uint4", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.5}
    step = QuantizationAwareTraining(observer="minmax", batch_size=64, samples=64, **fields)
    state = start(step, model, Context(model, data.check(model.inputs), "onnxruntime")).calibrated()
    native, value = model.edit(state.learning()), model.graph.inputs[0]  # of which nothing lies beyond its grid
    trainer = model.adapter.trainer(native, model.native, step, 0, 1)
    trainer.step(next(data.split("calibration").batches(64)), 0.02)
    before, after = state.formats, model.adapter.learned(trainer.native(), state.formats)
    np.testing.assert_allclose(after.activations[value].scale, before.activations[value].scale * 0.99, rtol=1e-5)
    assert all((after.activations[name].zero == each.zero).all() for name, each in before.activations.items())


def test_training_beats_rounding_to_the_same_formats(model, data, unseen, tmp_path) -> None:
    (x, y), fields = unseen, {"weights": "ternary", "activations": "uint4"}
    rounded, found = (trained(model, data, **fields, epochs=n)[0] for n in (0, 6))
    scores = [float(np.mean(each.predict(x).argmax(1) == y)) for each in (rounded, found)]
    assert scores[0] <= 0.84 < 0.855 <= scores[1]
    assert [f.describe() for f in found.quantization.weights.values()] == [
        f.describe() for f in rounded.quantization.weights.values()
    ]
    path = sl.export(found, "onnxruntime", tmp_path)
    outputs = runtime("onnxruntime").load(path).run((x,))
    assert np.mean(outputs.argmax(1) == found.predict(x).argmax(1)) >= 0.995
    kinds = runtime("onnxruntime").integer_layers(path)
    assert {kinds["conv"], kinds["head"]} == {"integer"}


def test_a_stopped_training_ends_as_an_undisturbed_one_to_the_bit(model, tmp_path) -> None:
    data = small.data("keras", samples=120)
    fields = {"weights": "int3", "activations": "uint4", "delay": 1}
    left = [2 * (len(data.split("train")) // 48) - 3]  # in the second phase

    def stops(now: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(model, data, checkpoint=tmp_path, tell=stops, **fields)
    resumed, record = trained(model, data, checkpoint=tmp_path, **fields)
    whole, expected = trained(model, data, **fields)
    assert record == expected
    files = [each.save(tmp_path / f"{name}.keras") for name, each in (("one", resumed), ("other", whole))]
    assert files[0].read_bytes() == files[1].read_bytes()
    artifacts = [sl.export(each, "onnxruntime", tmp_path / str(i)) for i, each in enumerate((resumed, whole))]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def test_zeros_stay_and_it_goes_on_from_static_grids(model, data) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.8))
    static = sl.apply(sparse, sl.StaticQuantization(undo=False, keep=("head",)), data, target="litert")
    again, _ = trained(static, data, "litert", epochs=0, keep=("head",))
    assert again.quantization.activations == static.quantization.activations
    x = inputs(data)
    np.testing.assert_allclose(again.predict(x), static.predict(x), atol=0.02)
    moved, record = trained(static, data, "litert", epochs=3, keep=("head",), learning_rate=5e-3)
    assert record["best_epochs"] > [0]
    assert moved.quantization.activations != static.quantization.activations
    for name, mask in moved.masks.items():
        assert not moved.parameters()[name][~mask].any()
        assert (
            name == "head/kernel" or not moved.quantization.weights[name].round(moved.parameters()[name])[~mask].any()
        )


def test_what_cannot_be_trained_is_refused_before(model, data) -> None:
    for fields, target, sentence in (
        ({"weights": "ternary", "activations": "float32"}, "litert", "litert cannot store weights as 3 levels"),
        ({"weights": "int4"}, "litert", "litert cannot write weights as int4"),
        ({"weights": "ttq"}, "onnxruntime", "onnxruntime cannot write weights as 3 levels"),
        ({"layers": ("nothing",)}, "litert", "finds no layer"),
    ):
        with pytest.raises(sl.SlimlineError, match=sentence):
            trained(model, data, target, **fields)


def compiled(net: keras.Model) -> keras.Model:
    net.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", jit_compile=False)
    return net


def test_fit_trains_what_prepare_gives(model, data) -> None:
    step = QuantizationAwareTraining(weights="int4", activations="uint4", samples=64)
    prepared = sl.prepare(model, step, data, target="onnxruntime")
    before, kernel = sl.convert(prepared), model.parameters()["conv/kernel"]
    net, train = compiled(prepared.native), data.split("train")
    net.fit(train.inputs[0], train.labels, batch_size=48, epochs=1, verbose=0)
    found, x = sl.convert(prepared), inputs(data)
    assert before.quantization.weights != found.quantization.weights
    assert before.quantization.activations != found.quantization.activations
    assert found.history[-1]["step"] == "QuantizationAwareTraining"
    assert np.mean(found.predict(x).argmax(1) == net.predict(x, verbose=0).argmax(1)) >= 0.98
    np.testing.assert_array_equal(model.parameters()["conv/kernel"], kernel)
    assert not found.adapter.format_mismatches(found.native, found.quantization)


def test_a_callback_begins_and_stops_what_the_step_says(model, data, tmp_path, recwarn) -> None:
    step = QuantizationAwareTraining(weights="int4", activations="uint4", samples=64, delay=1, fold_norms=2, epochs=3)
    sparse = sl.apply(model, sl.SparsePruning(amount=0.5, layers=("head",)))
    prepared = sl.prepare(sparse, step, data, target="onnxruntime")
    net, train, seen = compiled(prepared.native), data.split("train"), []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            grids = [layer for layer in net.layers if isinstance(layer, LearnedRounding)]
            norm = net.get_layer("norm")
            seen.append((all(g.waits for g in grids), [np.array(v) for v in (norm.moving_mean, norm.gamma)]))
            steps.append([float(g.log_step[0]) for g in grids])

    steps: list[list[float]] = []
    callbacks = [sl.QuantizationCallback(prepared), Look()]
    options = {"batch_size": 48, "verbose": 0, "callbacks": callbacks}
    net.fit(
        train.inputs[0], train.labels, epochs=3, validation_data=(train.inputs[0][:48], train.labels[:48]), **options
    )
    assert [waits for waits, _ in seen] == [True, False, False]
    assert not any(steps[0]) and all(steps[1])
    norms = [norm for _, norm in seen]
    assert not np.array_equal(norms[0], norms[1])
    np.testing.assert_array_equal(norms[1], norms[2])
    found, x = sl.convert(prepared), inputs(data)
    assert np.mean(found.predict(x).argmax(1) == net.predict(x, verbose=0).argmax(1)) >= 0.98
    for weights in (net.get_layer("head").kernel, found.parameters()["head/kernel"]):
        assert not np.array(weights)[~sparse.masks["head/kernel"]].any()
    assert not [each for each in recwarn if "Gradients do not exist" in str(each.message)]
    net.save(tmp_path / "loop.keras")
    again = keras.saving.load_model(tmp_path / "loop.keras")
    np.testing.assert_array_equal(again(x[:8]).numpy(), net(x[:8]).numpy())
    with pytest.raises(sl.SlimlineError, match=r"not what slimline.prepare makes"):
        sl.QuantizationCallback(net)
    with pytest.raises(sl.SlimlineError, match="needs data"):
        sl.prepare(model, step, target="onnxruntime")


def test_parts_learn_without_labels_and_stopped_ones_go_on(model, data, unseen, tmp_path) -> None:
    i = keras.Input((8, 8, 1), name="x")
    keras.utils.set_random_seed(0)
    y = L.ReLU(name="act")(L.Conv2D(6, 3, strides=2, padding="same", name="first")(i))
    y = L.ReLU(name="end")(L.Add(name="sum")([y, L.Conv2D(6, 3, padding="same", name="second")(y)]))
    y = L.Dropout(0.5, name="drop")(L.Flatten(name="flat")(L.BatchNormalization(name="norm")(y)))
    net = keras.Model(i, L.Dense(10, name="head")(y))
    net.get_layer("norm").moving_variance.assign(np.linspace(0.5, 2, 6))
    floating = sl.load(net)
    fields = {"reconstruct": "block", "weights": "int4", "activations": "uint4", "samples": 128, "epochs": 2}
    fields |= {"batch_size": 32, "learning_rate": 1e-2}
    calibration = sl.Data(calibration=(inputs(data)[:128],))

    def done(checkpoint=None, tell=None, **others):
        step = QuantizationAwareTraining(**{**fields, **others})
        context = Context(None, calibration.check(floating.inputs), "onnxruntime", checkpoint=checkpoint, tell=tell)
        result = perform(step, floating, context)
        return result.model, result.record

    left = [2 * 4 + 3]  # in the second part

    def stops(now: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(tmp_path, stops)
    resumed, record = done(tmp_path)
    whole, expected = done()
    assert record == expected
    assert [part["layers"] for part in record["parts"]] == [["first"], ["second"], ["head"]]
    for name, array in whole.parameters().items():
        np.testing.assert_array_equal(resumed.parameters()[name], array)
    x = unseen[0]
    nearest = sl.apply(floating, sl.StaticQuantization(weights="int4", undo=False), calibration, target="onnxruntime")
    pair = (nearest, done(activations="uint8")[0])
    before, after = (np.mean((each.predict(x) - floating.predict(x)) ** 2) for each in pair)
    assert after < 0.6 * before
    path = sl.export(whole, "onnxruntime", tmp_path / "artifact")
    outputs = runtime("onnxruntime").load(path).run((x,))
    assert np.mean(outputs.argmax(1) == whole.predict(x).argmax(1)) >= 0.99


def test_weights_move_between_two_codes_by_the_formula_of_adaround() -> None:
    grid = IntegerGrid(np.float32(0.5), (), 4, True)
    layer = LEARNED[L.Dense](5, use_bias=False, format=grid, count=5, fixed=True, strength=0.3, turns=10)
    layer.build((None, 1))
    x, one = np.array([[0.7, -0.7, 0, 9, 0.1]], np.float32), np.ones((1, 1), np.float32)
    layer.kernel.assign(x)
    np.testing.assert_allclose(layer(one, training=True)[:, :3], x[:, :3], atol=1e-6)  # it sets out from them
    free, slopes = np.array([[True, True, False, False, True]]), np.arange(1.0, 6, dtype=np.float32)
    for turn, power in ((1, None), (9, exponent(0.9))):
        layer.turn.assign(turn)
        layer.logits.assign(np.array([[1e-3, -5e-4, 1, 1, 2e-4]]))
        own = [layer.logits.value, layer.kernel.value]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(one, training=True) * slopes)
        by_logit, by_kernel = tape.gradient(loss, own)
        part = np.array([[0.4, 0.6, 0.01, 0.99, 0.2]])  # above the codes 1, -2, 0, 7 and 0
        logit = 1000 * layer.logits.numpy().astype(np.float64) - np.log(1.2 / (part + 0.1) - 1)
        sigmoid = 1 / (1 + np.exp(-logit))
        away = 2 * (1.2 * sigmoid - 0.1) - 1
        steep = 0 if power is None else 0.3 * 2 * power * np.sign(away) * np.abs(away) ** (power - 1)
        expected = (0.5 * slopes - steep) * 1.2 * sigmoid * (1 - sigmoid) * 1000
        np.testing.assert_allclose(by_logit.numpy()[free], expected[free], rtol=1e-3)
        assert by_kernel is None and int(layer.turn) == turn + 1
    np.testing.assert_array_equal(layer(one), [[1, -1, 0, 3.5, 0]])
    assert int(layer.turn) == 10 and layer.learned() == grid
    again = type(layer).from_config(layer.get_config())
    assert (again.strength, again.turns) == (0.3, 10)
    with pytest.raises(ValueError, match="takes a strength"):
        LEARNED[L.Dense](5, format=grid, count=5, strength=-1.0)


def test_adaround_gives_the_codes_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(12, 6)).astype(np.float32)
    x = (rng.normal(size=(64, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    i = keras.Input((12,), name="x")
    net = keras.Model(i, L.Dense(6, use_bias=False, name="head")(i))
    net.get_layer("head").kernel.assign(kernel)
    twin = torch.nn.Sequential()
    twin.add_module("head", torch.nn.Linear(12, 6, bias=False))
    twin.head.weight.data = torch.tensor(kernel.T.copy())
    fields = {"weights": "int2", "activations": "float32", "rounding": "adaround", "drop": 0.0, "samples": 64}
    step = QuantizationAwareTraining(**fields, reconstruct="layer", epochs=40, learning_rate=1e-3)
    data = sl.Data(calibration=(x,))
    models = [sl.load(net), sl.load(twin, x[:2])]
    ours, reference = (perform(step, m, Context(None, data.check(m.inputs), "onnxruntime")) for m in models)
    (start,) = (
        perform(step.model_copy(update={"epochs": 0}), m, Context(None, data, "onnxruntime")) for m in models[:1]
    )
    weights = [m.model.parameters()[name] for m, name in ((ours, "head/kernel"), (start, "head/kernel"))]
    assert (weights[0] != weights[1]).any()
    assert np.mean(np.isclose(weights[0], reference.model.parameters()["head.weight"].T, atol=1e-5)) > 0.97
    errors = [m.record["parts"][0] for m in (ours, reference)]
    assert errors[0]["error_after"] < errors[0]["error"]
    np.testing.assert_allclose(*([e["error"], e["error_after"]] for e in errors), rtol=0.05)


def test_adaround_turns_kernels_of_every_part_and_goes_on_when_stopped(model, data, unseen, tmp_path) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.4))
    fields = {"reconstruct": "layer", "rounding": "adaround", "weights": "int2", "activations": "uint8", "drop": 0.0}
    step = QuantizationAwareTraining(**fields, samples=256, learning_rate=1e-3, epochs=15)
    calibration = sl.Data(calibration=(inputs(data)[:256],))

    def done(checkpoint=None, tell=None):
        context = Context(None, calibration.check(sparse.inputs), "onnxruntime", checkpoint=checkpoint, tell=tell)
        result = perform(step, sparse, context)
        return result.model, result.record

    left = [15 * 8 + 5]  # in the second part

    def stops(now: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(tmp_path, stops)
    learned, record = done(tmp_path)
    whole, expected = done()
    assert record == expected and len(record["parts"]) == 2
    assert all(part["error_after"] <= part["error"] for part in record["parts"])
    assert any(part["error_after"] < 0.95 * part["error"] for part in record["parts"])
    for name, array in whole.parameters().items():
        np.testing.assert_array_equal(learned.parameters()[name], array)
    for name, mask in sparse.masks.items():
        each, kernel = learned.quantization.weights[name], learned.parameters()[name]
        assert not kernel[~mask].any()
        np.testing.assert_allclose(each.round(kernel), kernel, atol=1e-6)
    path, (x, _) = sl.export(learned, "onnxruntime", tmp_path / "learned.onnx"), unseen
    outputs = runtime("onnxruntime").load(path).run((x,))
    assert np.mean(outputs.argmax(1) == learned.predict(x).argmax(1)) >= 0.99


def test_weights_alone_go_to_litert_and_by_onnx(model, data, unseen, tmp_path) -> None:
    step = QuantizationAwareTraining(weights="int8", activations="float32", epochs=1)
    small = sl.apply(model, step, data, target="litert")
    assert small.quantization.weights and not small.quantization.activations
    path = sl.export(small, "litert", tmp_path / "small.tflite")
    assert path.stat().st_size < 0.6 * sl.export(model, "litert", tmp_path / "whole.tflite").stat().st_size
    answers = small.predict(unseen[0])
    np.testing.assert_allclose(runtime("litert").load(path).run((unseen[0],)), answers, atol=1e-4)
    assert np.abs(answers - model.predict(unseen[0])).max() > 1e-3  # it has learned
    coded = sl.export(small, "openvino", tmp_path / "small.xml")
    np.testing.assert_allclose(runtime("openvino").load(coded).run((unseen[0],)), answers, atol=0.02)
    # All of that is OpenVINO's own rounding of what such layers read.
    openvino = pytest.importorskip("openvino")
    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    unrounded = openvino.Core().compile_model(str(coded), "CPU", settings)([unseen[0]])[0]
    np.testing.assert_allclose(unrounded, answers, atol=1e-5)


def test_a_layer_of_several_places_is_not_divided() -> None:
    i, shared = keras.Input((8,), name="x"), L.ReLU(name="same")
    net = keras.Model(i, L.Dense(2, name="c")(shared(L.Dense(8, name="b")(shared(L.Dense(8, name="a")(i))))))
    step = QuantizationAwareTraining(reconstruct="layer", epochs=1, samples=8)
    data = sl.Data(calibration=(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32),))
    with pytest.raises(sl.SlimlineError, match="give each place a layer of its own"):
        sl.apply(sl.load(net), step, data, target="onnxruntime")
