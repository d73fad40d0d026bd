import keras
import numpy as np
import pytest
import tensorflow as tf

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.frameworks.keras.fusednorm import fused
from slimline.frameworks.keras.train import KerasTrainer, gradients
from slimline.steps.distillation.step import Distillation

L = keras.layers
X = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype(np.float32)
Y = np.arange(64) % 10


def net(width, activation=None, dropout=0.3):
    conv = {"padding": "same", "use_bias": False}
    x = inputs = keras.Input((8, 8, 1))
    norm = L.BatchNormalization(momentum=0.9, name="shared")
    for i in range(2):
        x = L.ReLU()(L.BatchNormalization(name=f"bn{i}")(L.Conv2D(width, 3, **conv)(x)))
    x = L.Add()([norm(x), norm(L.Conv2D(width, 1, **conv)(x))])
    x = L.Dropout(dropout)(L.GlobalAveragePooling2D()(x))
    x = L.BatchNormalization(name="flat", scale=False)(x)
    model = keras.Model(inputs, L.Dense(10, activation=activation, name="head")(x))
    rng = np.random.default_rng(1)
    for v in model.weights:
        if v.name in ("gamma", "beta", "moving_mean", "moving_variance"):
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    return adapter("keras").load(model, (X[:2],))[0]


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def batch(n=64):
    return ((X[:n],), Y[:n])


def test_fused_copies_compute_the_same():
    model = net(6, dropout=0.0)
    copy = fused(model)
    assert copy(X).numpy() == pytest.approx(model(X).numpy(), abs=1e-5)
    assert copy(X, training=True).numpy() == pytest.approx(model(X, training=True).numpy(), abs=1e-4)
    assert [v.name for v in copy.variables] == [v.name for v in model.variables]
    for a, b in zip(copy.variables, model.variables, strict=True):
        # The unbiased variance of 64 × 64 numbers differs by one part in 4,095.
        assert a.numpy() == pytest.approx(b.numpy(), rel=1e-3, abs=1e-5)


def test_refreshed_statistics_are_the_mean_over_the_batches():
    model = net(6, dropout=0.0)
    trainer = KerasTrainer(model, None, Distillation(), 0, 1)
    trainer.refresh([((X[:32],), None), ((X[32:],), None)])
    found = {v.path: v.numpy() for v in trainer.native().variables}
    conv = model.layers[1].kernel
    parts = [tf.nn.conv2d(x, conv, 1, "SAME").numpy().reshape(-1, 6) for x in (X[:32], X[32:])]
    assert found["bn0/moving_mean"] == pytest.approx(np.mean([p.mean(0) for p in parts], 0), abs=1e-5)
    assert found["bn0/moving_variance"] == pytest.approx(np.mean([p.var(0, ddof=1) for p in parts], 0), rel=1e-4)
    assert (model.get_layer("bn0").moving_mean.numpy() != found["bn0/moving_mean"]).all()


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "float32"), ("sgd", "bfloat16")])
def test_steps_lower_the_loss_and_continue_exactly_from_a_state(optimizer, precision):
    student, teacher = net(6), net(12, "softmax")
    step = Distillation(optimizer=optimizer, precision=precision)
    trainer = KerasTrainer(student, teacher, step, 3, 10)
    losses = [trainer.step(batch(64 - i), 2e-2) for i in range(6)]
    state = trainer.state()
    more = [trainer.step(batch(), 1e-2) for _ in range(2)]
    other = KerasTrainer(student, teacher, step, 99, 10)
    other.restore(state)
    assert [other.step(batch(), 1e-2) for _ in range(2)] == more
    assert more[-1] < losses[0]
    assert {k: v.tobytes() for k, v in other.state().items()} == {k: v.tobytes() for k, v in trainer.state().items()}
    assert other.native()(X).numpy() == pytest.approx(trainer.outputs((X,))[0], abs=1e-5)
    assert not tf.config.optimizer.get_experimental_options().get("auto_mixed_precision_onednn_bfloat16", False)


def test_sgd_is_torchs_formula():
    model = net(4, dropout=0.0)
    step = Distillation(optimizer="sgd", momentum=0.9, weight_decay=0.1)
    trainer = KerasTrainer(model, None, step, 0, 1)
    head, bias = (v.numpy() for v in model.get_layer("head").weights)
    with tf.GradientTape() as tape:
        logits = model(X, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits))
    kernel, shift = (g.numpy() for g in tape.gradient(loss, model.get_layer("head").trainable_variables))
    assert trainer.step(batch(), 0.5) == pytest.approx(float(loss), abs=1e-4)
    found = trainer.native().get_layer("head").weights
    # The first Nesterov step goes 1 + momentum times along the gradient; only the kernel is decayed.
    assert found[0].numpy() == pytest.approx(head - 0.5 * 1.9 * (kernel + 0.1 * head), abs=1e-4)
    assert found[1].numpy() == pytest.approx(bias - 0.5 * 1.9 * shift, abs=1e-4)


def test_gradients_are_the_tapes():
    model = net(4, "softmax")
    found = gradients(model, [batch(32), ((X[32:],), Y[32:])], "cross_entropy")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y, model(X, training=False)))
    expected = tape.gradient(loss, model.trainable_variables)
    assert list(found) == [v.path for v in model.trainable_variables]
    for a, b in zip(found.values(), expected, strict=True):
        assert a == pytest.approx(b.numpy(), abs=1e-5)
    bias = gradients(model, [((X,), None)], "norm")["head/bias"]
    with tf.GradientTape() as tape:
        norm = tf.reduce_sum(model(X, training=False) ** 2) / 2 / 64
    assert bias == pytest.approx(tape.gradient(norm, model.get_layer("head").bias.value).numpy(), abs=1e-6)
    with pytest.raises(SlimlineError, match="needs labels"):
        gradients(model, [((X,), None)], "cross_entropy")
    with pytest.raises(SlimlineError, match="at least one batch"):
        gradients(model, [], "norm")
