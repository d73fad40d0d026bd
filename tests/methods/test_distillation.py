import array_api_compat.torch as torch_xp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimline.basics.errors import SlimlineError
from slimline.methods import distillation as d

LOGITS = arrays(np.float64, (3, 5), elements=st.floats(-20, 20))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


@pytest.mark.parametrize(("shape", "axis"), [((4, 7), -1), ((2, 5, 7), -1), ((2, 7, 3, 4), 1)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_torchs_and_scipys(shape, axis, temperature):
    s, t = random(*shape), random(*shape, seed=1)
    found = d.kl(np, s, t, temperature, axis)
    p, q = scipy.special.softmax(t / temperature, axis), scipy.special.softmax(s / temperature, axis)
    assert found == pytest.approx(temperature**2 * scipy.stats.entropy(p, q, axis=axis).mean())
    logs = [torch.log_softmax(torch.tensor(x) / temperature, axis) for x in (s, t)]
    oracle = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(axis).mean() * temperature**2
    assert found == pytest.approx(oracle.item())


@given(LOGITS, LOGITS, st.floats(0.5, 8))
def test_kl_is_never_negative_and_zero_only_for_equal_distributions(s, t, temperature):
    found = d.kl(np, s, t, temperature)
    assert found >= -1e-9
    assert d.kl(np, s, s + 3.0, temperature) == pytest.approx(0, abs=1e-9)
    apart = np.abs(scipy.special.softmax(s / temperature, -1) - scipy.special.softmax(t / temperature, -1)).max()
    assert apart < 1e-3 or found > 1e-8


def test_kl_takes_logits_of_any_size():
    s, t = np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]])
    assert d.kl(np, s, t) == pytest.approx(2e4)


@given(LOGITS, st.floats(0.1, 10), st.floats(-10, 10))
def test_standard_logits_forget_shift_and_scale(z, scale, shift):
    assume((z.std(-1) > 1e-2).all())
    found = d.logit_standard(np, z)
    assert found == pytest.approx(scipy.stats.zscore(z, axis=-1), abs=1e-8)
    assert d.logit_standard(np, scale * z + shift) == pytest.approx(found, abs=1e-6)


def test_constant_logits_standardise_to_zero_with_a_finite_gradient():
    z = torch.full((2, 4), 3.0, requires_grad=True)
    out = d.logit_standard(torch_xp, z)
    assert out.tolist() == [[0.0] * 4] * 2
    d.kl(torch_xp, out, torch.tensor(random(2, 4)).float()).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("shape", "axis"), [((6, 7), -1), ((2, 5, 7), -1), ((2, 7, 3, 4), 1)])
def test_cross_entropy_is_torchs(shape, axis):
    z = random(*shape)
    y = np.random.default_rng(2).integers(0, 7, np.delete(shape, axis))
    oracle = torch.nn.functional.cross_entropy(torch.tensor(np.moveaxis(z, axis, 1).copy()), torch.tensor(y))
    assert d.cross_entropy(np, z, y, axis) == pytest.approx(oracle.item())


def test_uniform_logits_cost_the_logarithm_of_the_classes():
    assert d.cross_entropy(np, np.zeros((3, 10)), np.array([0, 4, 9])) == pytest.approx(np.log(10))


def test_every_namespace_gives_the_same_value_and_gradient():
    keras = pytest.importorskip("slimline.frameworks.keras") and pytest.importorskip("keras")
    tf = pytest.importorskip("tensorflow")
    s, t, y = random(4, 6).astype("f"), random(4, 6, seed=1).astype("f"), np.array([0, 5, 2, 2])
    for kind in ("kl", "logit-standard", "mse"):
        expected = d.loss(np, kind, s, t, y)
        student = torch.tensor(s, requires_grad=True)
        loss = d.loss(torch_xp, kind, student, torch.tensor(t), torch.tensor(y))
        loss.backward()
        variable = tf.Variable(s)
        with tf.GradientTape() as tape:
            value = d.loss(keras.ops, kind, variable, tf.constant(t), tf.constant(y))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert tape.gradient(value, variable).numpy() == pytest.approx(student.grad.numpy(), abs=1e-6)


def test_alpha_weighs_the_two_parts_and_a_missing_part_leaves_its_weight_to_the_other():
    s, t, y = random(4, 6), random(4, 6, seed=1), np.array([0, 5, 2, 2])
    soft, hard = d.kl(np, s, t, 2.0), d.cross_entropy(np, s, y)
    assert d.loss(np, "kl", s, t, y, temperature=2.0, alpha=0.3) == pytest.approx(0.3 * soft + 0.7 * hard)
    assert d.loss(np, "kl", s, t, None, temperature=2.0, alpha=0.3) == pytest.approx(soft)
    assert d.loss(np, "kl", s, None, y, temperature=2.0, alpha=0.3) == pytest.approx(hard)
    real = d.loss(np, "mse", s, t, t + 1, alpha=0.5, regression=True)
    assert real == pytest.approx(0.5 * ((s - t) ** 2).mean() + 0.5 * ((s - t - 1) ** 2).mean())
    with pytest.raises(SlimlineError, match="give a teacher or labels"):
        d.loss(np, "kl", s, None, None)


@pytest.mark.parametrize(
    ("outputs", "labels", "first", "axis"),
    [
        ((8, 10), (8,), True, -1),
        ((8, 10, 4, 5), (8, 4, 5), False, 1),
        ((8, 4, 5, 10), (8, 4, 5), True, -1),
        ((8, 6, 10), (8, 6), True, -1),
        ((8, 10, 4, 5), None, True, 1),
        ((8, 4, 5, 10), None, False, -1),
        ((8, 6, 10), None, True, -1),
        ((8, 4, 4, 4), (8, 4, 4), True, 1),
    ],
)
def test_the_axis_of_classes(outputs, labels, first, axis):
    assert d.class_axis(outputs, labels, first) == axis


def test_labels_that_fit_no_axis_are_refused():
    with pytest.raises(SlimlineError, match=r"\(8, 3\) do not fit outputs of shape \(8, 10\)"):
        d.class_axis((8, 10), (8, 3), True)
