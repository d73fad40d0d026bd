"""Distances of inner values, beside the formulas that their authors published, in float64."""

import array_api_compat.torch as torch_xp
import numpy as np
import pytest
import scipy.special
import torch
from torch.nn import functional as F

from slimline.methods import features as f


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


S, T = random(5, 6, 3), random(5, 6, 4, seed=1)


def published_attention(x):
    """``at`` of szagoruyko/attention-transfer, for ``(batch, positions, channels)``."""
    return F.normalize(torch.tensor(x).pow(2).mean(-1))


def test_attention_transfer():
    expected = (published_attention(S) - published_attention(T)).pow(2).mean().item()
    assert f.attention(np, S, T) == pytest.approx(expected)
    assert f.attention(np, S, 3 * S) == pytest.approx(0, abs=1e-12)


def test_similarity_preserving():
    """``Similarity`` of HobbitLong/RepDistiller."""
    grams = [F.normalize(torch.tensor(x).flatten(1) @ torch.tensor(x).flatten(1).T) for x in (S, T)]
    assert f.similarity(np, S, T) == pytest.approx(((grams[1] - grams[0]) ** 2).sum().item() / 5**2)


def published_rkd(student, teacher):
    """``RKDLoss`` of HobbitLong/RepDistiller, weights 1 and 2."""

    def pdist(e):
        square = e.pow(2).sum(1)
        res = (square[:, None] + square[None] - 2 * e @ e.T).clamp(min=1e-12).sqrt()
        res[range(len(e)), range(len(e))] = 0
        return res / res[res > 0].mean()

    def angle(e):
        normed = F.normalize(e[None] - e[:, None], p=2, dim=2)
        return torch.bmm(normed, normed.transpose(1, 2)).view(-1)

    s, t = (torch.tensor(x).flatten(1) for x in (student, teacher))
    return (F.smooth_l1_loss(pdist(s), pdist(t)) + 2 * F.smooth_l1_loss(angle(s), angle(t))).item()


def test_relational():
    assert f.relational(np, S, T) == pytest.approx(published_rkd(S, T))
    assert f.relational(np, S, 2 * S + 1) == pytest.approx(0, abs=1e-9)  # neither scale nor shift counts


def test_contrast_is_the_cross_entropy_of_clip():
    w, b, to, shift = random(3, 8, seed=2), random(8, seed=3), random(4, 8, seed=4), random(8, seed=5)
    own, other = (F.normalize(torch.tensor(x.mean(1) @ m + v)) for x, m, v in ((S, w, b), (T, to, shift)))
    logits, labels = own @ other.T / 0.07, torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert f.contrast(np, S, T, w, b, to, shift) == pytest.approx(expected.item())
    eye = np.eye(3)
    assert f.contrast(np, S, S, eye, 0, eye, 0) < f.contrast(np, S, S[::-1], eye, 0, eye, 0)


def test_flow_and_hint():
    def matrix(a, b):
        return np.einsum("bpm,bpn->bmn", a, b) / 6

    s, t = (S, random(5, 6, 2, seed=2)), (random(5, 6, 3, seed=3), random(5, 6, 2, seed=4))
    assert f.flow(np, s, t) == pytest.approx(((matrix(*s) - matrix(*t)) ** 2).mean())
    w, b = random(3, 4, seed=5), random(4, seed=6)
    assert f.hint(np, S, T, w, b) == pytest.approx(np.mean((np.einsum("bpc,cd->bpd", S, w) + b - T) ** 2))
    w, b = f.projection(3, 3, 0)
    assert f.hint(np, S, S, w, b) == 0
    w, b = f.projection(300, 400, 0)
    assert (random(1000, 300) @ w).var() == pytest.approx(1, rel=0.05) and not b.any()


def test_attention_distributions_and_relations():
    q, k = random(2, 4, 5, 3), random(2, 4, 5, 3, seed=1)
    own = f.attention_map(np, q, k)
    expected = scipy.special.softmax(np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(3), -1)
    assert own == pytest.approx(expected)
    other = f.attention_map(np, k, q)
    assert f.maps(np, own, other) == pytest.approx(scipy.special.rel_entr(other, own).sum(-1).mean())
    fewer = f.attention_map(np, q[:, :2], k[:, :2])
    assert f.maps(np, fewer, other) == pytest.approx(
        scipy.special.rel_entr(other.mean(1), fewer.mean(1)).sum(-1).mean()
    )

    def relation(x, heads):
        x = x.swapaxes(1, 2).reshape(2, 5, heads, -1).swapaxes(1, 2)
        return scipy.special.softmax(np.einsum("bhid,bhjd->bhij", x, x) / np.sqrt(x.shape[-1]), -1)

    wide = random(2, 2, 5, 16, seed=3)  # the student has 4 heads of 3, which are read as 2 of 6
    assert f.relation(np, q, wide) == pytest.approx(
        scipy.special.rel_entr(relation(wide, 2), relation(q, 2)).sum(-1).mean()
    )


SIZES, OWN, OTHER = ((8, 6), (4, 3), (2, 2)), (3, 5, 4), (6, 2, 7)


def levels(channels, seed, sizes=SIZES):
    return [random(5, *size, c, seed=seed + i) for i, (size, c) in enumerate(zip(sizes, channels, strict=True))]


def published_review(students, teachers, weights):
    """``ABF`` and ``hcl`` of dvlab-research/ReviewKD."""

    def conv(x, weight, kernel):
        w = torch.tensor(np.asarray(weight, np.float64)).reshape(kernel, kernel, x.shape[1], -1).permute(3, 2, 0, 1)
        return F.conv2d(x, w, padding=kernel // 2)

    def norm(x, learned, name):
        scale, shift = (
            torch.tensor(np.asarray(learned[f"{name}_{which}"], np.float64)) for which in ("scale", "shift")
        )
        return F.batch_norm(x, None, None, scale, shift, training=True)

    def hcl(fs, ft):
        loss, weight, total = F.mse_loss(fs, ft), 1.0, 1.0
        for size in (4, 2, 1):
            if size < min(fs.shape[2:]):
                weight /= 2
                loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(fs, size), F.adaptive_avg_pool2d(ft, size))
                total += weight
        return loss / total

    total, y = 0.0, None
    for s, t, learned in list(zip(students, teachers, weights, strict=True))[::-1]:
        s, t = (torch.tensor(x).permute(0, 3, 1, 2) for x in (s, t))
        x = norm(conv(s, learned["enter"], 1), learned, "enter")
        if y is not None:
            y = F.interpolate(y, x.shape[2:], mode="nearest")
            bias = torch.tensor(learned["fuse_bias"].astype(float))[:, None, None]
            z = torch.sigmoid(conv(torch.cat([x, y], 1), learned["fuse"], 1) + bias)
            x = x * z[:, :1] + y * z[:, 1:]
        x = y = F.interpolate(x, t.shape[2:], mode="nearest")
        total = total + hcl(norm(conv(x, learned["leave"], 3), learned, "leave"), t)
    return total.item()


def test_review():
    weights = f.reviewing(OWN, OTHER, 2, 0)
    for index, level in enumerate(weights):
        for name in level:
            level[name] = level[name] + 0.1 * random(*level[name].shape, seed=index)
    assert "fuse" not in weights[-1]
    for sizes in (SIZES, ((4, 4), (4, 3), (5, 3))):  # the teacher's sizes may be others
        students, teachers = levels(OWN, 0), levels(OTHER, 9, sizes)
        assert f.review(np, students, teachers, weights) == pytest.approx(published_review(students, teachers, weights))
    grids = levels(OWN, 0)
    assert f.contexts(np, grids[0], grids[0]) == 0
    wide = f.reviewing((300, 400), (300, 500), 1, 0)
    out = f.convolved(np, random(20, 30, 400), wide[0]["leave"])
    assert out.var() == pytest.approx(1, rel=0.1)  # zeros beyond the sides take a part


CASES = {
    "attention": (f.attention, S, T),
    "similarity": (f.similarity, S, T),
    "rkd": (f.relational, S, T),
    "hint": (lambda xp, s, t: f.hint(xp, s, t, t[0, :3] * 0 + 0.3, t[0, 0]), S, T),
    "crd": (lambda xp, s, t: f.contrast(xp, s, t, t[0, :3] * 0 + 0.3, t[0, 0], t[1, :4] + 0.5, t[1, 0]), S, T),
    "review": (lambda xp, s, t: f.review(
        xp, [s, s[:, :2, :3]], [t, t[:, ::2, ::2]],
        [{"enter": t[0, :3, 0, :1] + 0.3, "enter_scale": t[0, 0, 0, :1], "enter_shift": t[0, 0, 1, :1],
          "leave": xp.reshape(t[:2, :3, :3], (-1, 1))[:9, :1] * t[:1, 0, 0], "leave_scale": t[0, 0, 0],
          "leave_shift": t[0, 1, 1], "fuse": t[0, :2, 0, :2], "fuse_bias": t[0, 0, 0, :2]},
         {"enter": t[0, :3, 1, :1] + 0.3, "enter_scale": t[0, 0, 0, :1], "enter_shift": t[0, 0, 1, :1],
          "leave": xp.reshape(t[:2, :3, :3], (-1, 1))[:9, :1] * t[:1, 1, 0], "leave_scale": t[0, 0, 0],
          "leave_shift": t[0, 1, 1]}]), random(4, 5, 4, 3), random(4, 5, 6, 4, seed=1)),
    "maps": (lambda xp, s, t: f.maps(xp, f.attention_map(xp, s, s), f.attention_map(xp, t, t)),
             random(2, 2, 3, 4), random(2, 4, 3, 5, seed=1)),
    "relations": (f.relation, random(2, 2, 3, 4), random(2, 4, 3, 6, seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_namespace_gives_the_same_value_and_gradient(name):
    keras = pytest.importorskip("slimline.frameworks.keras") and pytest.importorskip("keras")
    tf = pytest.importorskip("tensorflow")
    distance, s, t = CASES[name]
    student = torch.tensor(s, requires_grad=True)
    loss = distance(torch_xp, student, torch.tensor(t))
    loss.backward()
    assert loss.item() == pytest.approx(distance(np, s, t))
    variable = tf.constant(s)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        value = distance(keras.ops, variable, tf.constant(t))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert np.asarray(tape.gradient(value, variable)) == pytest.approx(student.grad.numpy(), abs=1e-6)


@pytest.mark.parametrize("name", ["attention", "similarity", "rkd"])
def test_equal_samples_and_zeros_have_finite_gradients(name):
    distance, s, t = CASES[name]
    for x in (np.zeros_like(s), np.repeat(s[:1], 5, 0)):
        student = torch.tensor(x, requires_grad=True)
        distance(torch_xp, student, torch.tensor(t)).backward()
        assert torch.isfinite(student.grad).all()
