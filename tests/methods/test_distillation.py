from typing import get_args

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
from slimline.methods.outputs import Output

CLASSES = Output("classes", axis=1)
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
    for kind in get_args(d.Kind):
        expected = d.loss(np, kind, s, t, y, CLASSES)
        student = torch.tensor(s, requires_grad=True)
        loss = d.loss(torch_xp, kind, student, torch.tensor(t), torch.tensor(y), CLASSES)
        loss.backward()
        variable = tf.Variable(s)
        with tf.GradientTape() as tape:
            value = d.loss(keras.ops, kind, variable, tf.constant(t), tf.constant(y), CLASSES)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert tape.gradient(value, variable).numpy() == pytest.approx(student.grad.numpy(), abs=1e-6)


def test_alpha_weighs_the_two_parts_and_a_missing_part_leaves_its_weight_to_the_other():
    s, t, y = random(4, 6), random(4, 6, seed=1), np.array([0, 5, 2, 2])
    soft, hard = d.kl(np, s, t, 2.0), d.cross_entropy(np, s, y)
    assert d.loss(np, "kl", s, t, y, CLASSES, temperature=2.0, alpha=0.3) == pytest.approx(0.3 * soft + 0.7 * hard)
    assert d.loss(np, "kl", s, t, None, CLASSES, temperature=2.0, alpha=0.3) == pytest.approx(soft)
    assert d.loss(np, "kl", s, None, y, CLASSES, temperature=2.0, alpha=0.3) == pytest.approx(hard)
    assert d.loss(np, "kl", s, None, None, CLASSES) is None
    for kind in ("kl", "mse"):
        real = d.loss(np, kind, s, t, t + 1, Output("regression", scale=4.0), alpha=0.5)
        assert real == pytest.approx((0.5 * ((s - t) ** 2).mean() + 0.5 * ((s - t - 1) ** 2).mean()) / 4)
    with pytest.raises(SlimlineError, match="give a teacher or labels"):
        d.joint(np, "kl", [CLASSES], [s], None, [None])


@given(arrays(np.float64, (3, 4), elements=st.floats(-9, 9)), arrays(np.float64, (3, 4), elements=st.floats(-9, 9)))
def test_independent_labels_cost_what_torch_says(s, t):
    y = (t > 0).astype(np.float64)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(s), torch.tensor(y))
    assert d.binary_cross_entropy(np, s, y) == pytest.approx(oracle.item(), abs=1e-9)
    p, q = (np.stack([1 - x, x], -1) for x in (scipy.special.expit(t / 2), scipy.special.expit(s / 2)))
    found = d.loss(np, "kl", s, t, None, Output("multilabel"), temperature=2.0)
    assert found == pytest.approx(4 * scipy.stats.entropy(p, q, axis=-1).mean(), abs=1e-9)


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 7), -1), ((2, 7, 3, 4), 1)])
def test_ignored_positions_do_not_count(shape, axis):
    z = random(*shape)
    y = np.random.default_rng(2).integers(0, 7, np.delete(shape, axis))
    y.reshape(-1)[::3] = -100
    oracle = torch.nn.functional.cross_entropy(torch.tensor(np.moveaxis(z, axis, 1).copy()), torch.tensor(y))
    student = torch.tensor(z, requires_grad=True)
    found = d.cross_entropy(torch_xp, student, torch.tensor(y), axis, -100)
    assert found.item() == pytest.approx(oracle.item())
    found.backward()
    assert (student.grad.sum(axis).abs() < 1e-12).all()
    assert not np.moveaxis(student.grad.numpy(), axis, -1)[y == -100].any()
    assert d.cross_entropy(np, z, np.full_like(y, -100), axis, -100) == 0


def test_every_output_counts_by_its_weight_in_every_namespace():
    keras = pytest.importorskip("slimline.frameworks.keras") and pytest.importorskip("keras")
    s, t = ([random(4, n, seed=seed) for n in (6, 2, 3)] for seed in (0, 1))
    y = [np.array([0, 5, 2, 2]), None, (random(4, 3, seed=2) > 0).astype(float)]
    outputs = [
        Output("classes", axis=1, labelled=True),
        Output("features", scale=2.5, weight=3.0),
        Output("multilabel", labelled=True, weight=0.5),
    ]
    parts = [
        0.9 * d.kl(np, s[0], t[0], 4.0) + 0.1 * d.cross_entropy(np, s[0], y[0]),
        3.0 * ((s[1] - t[1]) ** 2).mean() / 2.5,
        0.5 * (0.9 * d.loss(np, "kl", s[2], t[2], None, outputs[2]) + 0.1 * d.binary_cross_entropy(np, s[2], y[2])),
    ]
    assert d.joint(np, "kl", outputs, s, t, y) == pytest.approx(sum(parts))
    tensors = [[None if x is None else torch.tensor(x) for x in each] for each in (s, t, y)]
    assert d.joint(torch_xp, "kl", outputs, *tensors).item() == pytest.approx(sum(parts))
    tensors = [[None if x is None else keras.ops.convert_to_tensor(x) for x in each] for each in (s, t, y)]
    assert float(d.joint(keras.ops, "kl", outputs, *tensors)) == pytest.approx(sum(parts), rel=1e-5)


def published_dkd(s, t, y, temperature, beta):
    """``dkd_loss`` of the authors' repository (megvii-research/mdistiller), with alpha=1."""
    s, t, y = torch.tensor(s), torch.tensor(t), torch.tensor(y)
    mask = torch.nn.functional.one_hot(y, s.shape[1])

    def both(z):
        p = (z / temperature).softmax(1)
        return torch.stack([(p * mask).sum(1), (p * (1 - mask)).sum(1)], 1)

    kl_div, n = torch.nn.functional.kl_div, len(y)
    target = kl_div(both(s).log(), both(t), reduction="sum") * temperature**2 / n
    rest_s = (s / temperature - 1000.0 * mask).log_softmax(1)
    rest_t = (t / temperature - 1000.0 * mask).softmax(1)
    return (target + beta * kl_div(rest_s, rest_t, reduction="sum") * temperature**2 / n).item()


@given(LOGITS, LOGITS, st.floats(1, 8), st.floats(0, 10))
def test_decoupled_is_the_published_loss(s, t, temperature, beta):
    y = np.array([0, 4, 2])
    value = d.decoupled(np, s, t, y, temperature, beta)
    assert value == pytest.approx(published_dkd(s, t, y, temperature, beta), rel=1e-6, abs=1e-6)
    assert d.decoupled(np, s, t, None, temperature, beta) == pytest.approx(
        d.decoupled(np, s, t, t.argmax(1), temperature, beta)
    )
    # With the teacher's doubt as weight the two parts are the whole divergence (eq. 7 of the paper).
    one = s[:1], t[:1], y[:1], temperature
    target = d.decoupled(np, *one, 0.0)
    doubt = 1 - scipy.special.softmax(t[0] / temperature)[y[0]]
    whole = target + doubt * (d.decoupled(np, *one, 1.0) - target)
    assert whole == pytest.approx(d.kl(np, s[:1], t[:1], temperature), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (6, 7)])
def test_decoupled_takes_dense_outputs_and_ignores_labels(shape):
    s, t = random(*shape), random(*shape, seed=1)
    y = np.random.default_rng(2).integers(0, 7, np.delete(shape, 1))
    flat = [np.moveaxis(x, 1, -1).reshape(-1, 7) for x in (s, t)]
    assert d.decoupled(np, s, t, y, 2.0, axis=1) == pytest.approx(published_dkd(*flat, y.ravel(), 2.0, 8.0))
    ignored = np.where(t.argmax(1) == y, -100, y)
    assert d.decoupled(np, s, t, ignored, 2.0, axis=1, ignore=-100) == pytest.approx(
        d.decoupled(np, s, t, y, 2.0, axis=1)
    )


@given(LOGITS, LOGITS, st.floats(0.5, 8))
def test_correlation_is_the_published_loss(s, t, temperature):
    """``DIST`` of the authors' repository (hunto/DIST_KD), with beta=gamma=1."""

    def relation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = ((torch.tensor(x) / temperature).softmax(1) for x in (s, t))
    # The authors add 1e-8 to the product of norms, which tells where both are small.
    assume(min(x.std(0).min() for x in (p, q)) > 1e-2 and min(x.std(1).min() for x in (p, q)) > 1e-2)
    expected = temperature**2 * (relation(p, q) + relation(p.T, q.T))
    assert d.correlation(np, s, t, temperature) == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
    assert d.correlation(np, s, s + 1, temperature) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", ["dkd", "dist"])
def test_extreme_logits_have_finite_gradients(kind):
    student = torch.full((3, 4), 0.0, requires_grad=True)
    teacher = torch.tensor([[0.0] * 4, [1e4, -1e4, 0, 0], [0.0] * 4])
    loss = d.loss(torch_xp, kind, student, teacher, torch.tensor([0, 1, 2]), CLASSES)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_several_teachers_answer_with_the_mean_of_their_probabilities():
    every = [random(4, 5, seed=i) for i in range(3)]
    stands = d.mean_teacher(np, every, CLASSES, 2.0)
    mean = np.mean([scipy.special.softmax(x / 2.0, -1) for x in every], axis=0)
    assert scipy.special.softmax(stands / 2.0, -1) == pytest.approx(mean)
    stands = d.mean_teacher(np, every, Output("multilabel"), 2.0)
    assert scipy.special.expit(stands / 2.0) == pytest.approx(np.mean([scipy.special.expit(x / 2) for x in every], 0))
    for raw in (d.mean_teacher(np, every, CLASSES, raw=True), d.mean_teacher(np, every, Output("regression"))):
        assert raw == pytest.approx(np.mean(every, 0))
    assert d.mean_teacher(np, every[:1], CLASSES) is every[0]
