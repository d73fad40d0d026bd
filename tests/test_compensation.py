"""Compensation after pruning, on layers of every kind: least squares in one layer, and a better network in all."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.steps.channels.compensation import compensate

torch = pytest.importorskip("torch")
nn = torch.nn

from tests.zoo_keras import SMALL  # noqa: E402
from tests.zoo_torch import ZOO  # noqa: E402


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.b(self.a(x)))
        return self.head(torch.relu(self.group(torch.relu(self.depth(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.out(y)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


def torch_model(kind):
    torch.manual_seed(0)
    module = (Residual() if kind == "residual" else Attention()).eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for p in (m.weight, m.running_var):
                nn.init.uniform_(p, 0.5, 1.5)
            for p in (m.bias, m.running_mean):
                nn.init.normal_(p)
    return sl.load(module, samples(kind)[:2])


def samples(kind, count=48):
    shape = (3, 8, 8) if kind == "residual" else (7, 6)
    rng = np.random.default_rng(0)
    # Correlated inputs, as data are: what goes can be told from what stays.
    return (rng.normal(size=(count, *shape)) + 2 * rng.normal(size=(count, shape[0], *(1,) * (len(shape) - 1)))).astype(
        np.float32
    )


def keras_model(kind):
    keras = pytest.importorskip("keras")
    L = keras.layers
    keras.utils.set_random_seed(0)
    if kind == "residual":
        x = inputs = keras.Input((8, 8, 3))
        x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(x)))
        y = L.ReLU()(L.BatchNormalization()(L.Conv2D(12, 3, padding="same", use_bias=False)(x)))
        x = L.ReLU()(L.Add()([x, L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(y))]))
        x = L.ReLU()(L.DepthwiseConv2D(3, padding="same")(x))
        x = L.ReLU()(L.Conv2D(8, 1, groups=2)(x))
        outputs = L.Dense(5)(L.GlobalAveragePooling2D()(x))
    else:
        inputs = keras.Input((7, 6))
        x = L.Dense(12)(inputs)
        y = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(3, 4)(y, y)])
        x = L.Add()([x, L.Dense(12)(L.Dense(20, activation="gelu")(x))])
        outputs = L.Dense(4)(L.GlobalAveragePooling1D()(x))
    return sl.load(keras.Model(inputs, outputs))


def made(framework, kind):
    x = samples(kind)
    if framework == "keras" and kind == "residual":
        return keras_model(kind), np.moveaxis(x, 1, -1)
    return (torch_model(kind) if framework == "torch" else keras_model(kind)), x


def drawn(example, count):
    """Other inputs like an example."""
    rng = np.random.default_rng(0)
    more = np.resize(example, (count, *example.shape[1:]))
    if example.dtype.kind == "f":
        return more + rng.normal(0, 0.5, more.shape).astype(example.dtype)
    return rng.integers(example.min(), example.max() + 1, more.shape).astype(example.dtype)


@pytest.mark.parametrize("framework, name", [*(("torch", n) for n in ZOO), *(("keras", n) for n in SMALL)])
def test_every_architecture_comes_nearer_to_what_it_gave(framework, name):
    if framework == "torch":
        make, example = ZOO[name]
        model = sl.load(make(), example())
    else:
        model = sl.load(SMALL[name]())
    x = tuple(drawn(part, 24) for part in model.example)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.4, criterion="l2"))
    pruned = plan.apply(model)
    repaired = compensate(model, pruned, [plan], [tuple(part[:12] for part in x), tuple(part[12:] for part in x)])
    wanted, before, after = (m.predict(*x) for m in (model, pruned, repaired))
    left = 0.9 if name == "tied_lm" else 0.7  # a head that is the embedding too cannot be solved anew
    assert np.square(after - wanted).mean() < left * np.square(before - wanted).mean()


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize("kind", ["residual", "attention"])
def test_the_outputs_come_nearer_to_those_before(framework, kind):
    model, x = made(framework, kind)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.3, criterion="l1"))
    pruned = plan.apply(model)
    repaired = compensate(model, pruned, [plan], [(x[:16],), (x[16:32],)])
    wanted, before, after = (m.predict(x[32:]) for m in (model, pruned, repaired))
    assert np.square(after - wanted).mean() < 0.4 * np.square(before - wanted).mean()
    assert {n: a.shape for n, a in repaired.parameters().items()} == {
        n: a.shape for n, a in pruned.parameters().items()
    }


def test_one_consumer_gets_the_least_squares_weight_and_bias():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    model = sl.load(module, x[:2])
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5))
    repaired = compensate(model, plan.apply(model), [plan], [(x,)], ridge=0)
    hidden = torch.relu(module[0](torch.from_numpy(x))).detach().numpy()
    kept = np.setdiff1d(np.arange(6), plan.removed["0"])
    rows = np.hstack([hidden[:, kept], np.ones((60, 1))])
    expected = np.linalg.lstsq(rows, model.predict(x), rcond=None)[0]
    stored = repaired.parameters()
    np.testing.assert_allclose(np.vstack([stored["2.weight"].T, stored["2.bias"]]), expected, atol=1e-4)


def test_positions_that_others_repeat_are_made_up_for_exactly():
    module = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        module[0].weight[3:] = 2 * module[0].weight[:3]
        module[0].bias[3:] = 2 * module[0].bias[:3]
        module[3].running_mean.normal_()
    x = np.random.default_rng(0).normal(size=(16, 2, 9, 9)).astype(np.float32)
    model = sl.load(module, x[:2])
    data = sl.Data(calibration=x, test=(x, np.arange(16) % 4))
    small = sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion="obs", keep=("2",)), data)
    assert small.parameters()["0.weight"].shape[0] == 3
    np.testing.assert_allclose(small.predict(x), model.predict(x), atol=2e-2)


def test_the_model_that_was_given_stays_and_compensation_needs_data():
    model, x = made("torch", "residual")
    before = {n: a.copy() for n, a in model.parameters().items()}
    sl.apply(
        model,
        sl.ChannelPruning(ratio=0.3, criterion="l1", compensate=True),
        sl.Data(calibration=x, test=(x, np.arange(48) % 5)),
    )
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(sl.SlimlineError, match="needs data"):
        sl.apply(model, sl.ChannelPruning(ratio=0.3, criterion="l1", compensate=True))


def test_several_rounds_repair_against_the_original():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    model = sl.load(module, x[:2])
    first = sl.plan(model, sl.ChannelPruning(ratio=0.5))
    once = compensate(model, first.apply(model), [first], [(x,)], ridge=0)
    second = sl.plan(once, sl.ChannelPruning(ratio=0.5))
    twice = compensate(model, second.apply(once), [first, second], [(x,)], ridge=0)
    kept = np.setdiff1d(np.arange(12), first.removed["0"])
    kept = np.delete(kept, second.removed["0"])
    hidden = torch.relu(module[0](torch.from_numpy(x))).detach().numpy()[:, kept]
    expected = np.linalg.lstsq(np.hstack([hidden, np.ones((60, 1))]), model.predict(x), rcond=None)[0]
    stored = twice.parameters()
    np.testing.assert_allclose(np.vstack([stored["2.weight"].T, stored["2.bias"]]), expected, atol=1e-4)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_rounds_of_a_step_repair_against_the_original(framework, monkeypatch):
    from slimline.steps.channels import rounds

    model, x = made(framework, "residual")
    seen = []

    def spy(dense, pruned, plans, batches):
        seen.append((dense, len(plans)))
        return compensate(dense, pruned, plans, batches)

    monkeypatch.setattr(rounds, "compensate", spy)
    step = sl.ChannelPruning(ratio=0.5, criterion="l1", compensate=True, schedule="uniform", rounds=3)
    small = sl.apply(model, step, sl.Data(calibration=x, test=(x, np.arange(48) % 5)))
    assert [(dense is model, count) for dense, count in seen] == [(True, 1), (True, 2), (True, 3)]
    assert np.isfinite(small.predict(x)).all()
