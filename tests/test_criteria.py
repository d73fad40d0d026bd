"""Every criterion of structured pruning against its formula, computed beside slimline; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.graph.units import Units
from slimline.recipe.named_code import granted
from slimline.steps.channels.criteria import scores

torch = pytest.importorskip("torch")
nn = torch.nn
F = nn.functional


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    with torch.no_grad():
        net[1].weight.normal_()
        net[1].running_mean.normal_()
    return net


X = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 5, 40)


@pytest.fixture(scope="module")
def model():
    return sl.load(network(), X[:2])


@pytest.fixture(scope="module")
def data():
    return sl.Data(calibration=(X, Y), test=(X, Y), overlap="allow")


def found(model, data, criterion, **fields):
    units = Units(model.graph)
    step = sl.ChannelPruning(ratio=0.5, criterion=criterion, **fields)
    return dict(zip([u.name for u in units.units], scores(units, units.units, model, step, data, 0), strict=True))


def test_batch_norm_scale(model, data):
    given = found(model, data, "batch_norm")
    np.testing.assert_allclose(given["0"], np.abs(model.parameters()["1.weight"]), rtol=1e-6)
    assert given["3"] is None


def test_units_without_a_batch_norm_are_left_alone_and_noted(model):
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="batch_norm"))
    assert set(plan.removed) == {"0"}
    assert "3 was left alone" in plan.notes[0]


def test_geometric_median(model, data):
    given = found(model, data, "geometric_median")
    w = model.parameters()["3.weight"].reshape(8, -1).astype(np.float64)
    expected = [sum(np.linalg.norm(a - b) for b in w) for a in w]
    np.testing.assert_allclose(given["3"], expected, rtol=1e-6)


def test_feature_rank(model, data):
    given = found(model, data, "feature_rank", samples=40)
    with torch.no_grad():
        maps = network()[:3](torch.from_numpy(X)).numpy()
    expected = [np.mean([np.linalg.matrix_rank(m) for m in maps[:, c]]) for c in range(6)]
    np.testing.assert_allclose(given["0"], expected)


def single_gradients():
    net = network()
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(net(torch.from_numpy(x[None])), torch.tensor([y]))
        values = dict(net.named_parameters())
        yield values, dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


def slices(values, function):
    parts = (("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1))
    return sum(
        np.moveaxis(function(n).detach().numpy(), dim, 0).reshape(values[n].shape[dim], -1).sum(1) for n, dim in parts
    )


def test_fisher_is_the_mean_square_of_the_derivative_by_a_gate(model, data):
    given = found(model, data, "fisher", samples=40)["3"]
    # A gate on each channel of the second convolution, before its ReLU, and one on what the head reads of it.
    net = network()
    total = np.zeros(8)
    for x, y in zip(X, Y, strict=True):
        gate = torch.ones(8, requires_grad=True)
        bias = net[3].bias[:, None, None]
        before = net[3](net[:3](torch.from_numpy(x[None]))) - bias
        hidden = torch.relu(before * gate[:, None, None] + bias)
        out = net[7](hidden.mean((2, 3)) * gate)
        loss = F.cross_entropy(out, torch.tensor([y]))
        total += torch.autograd.grad(loss, gate)[0].detach().numpy() ** 2
    np.testing.assert_allclose(given, total / len(X), rtol=1e-3)


def test_obd_is_half_the_squared_weight_times_the_squared_gradient(model, data):
    given = found(model, data, "obd", samples=40)["0"]
    total = 0.0
    for p, g in single_gradients():
        total = total + slices(p, lambda n, p=p, g=g: 0.5 * p[n] ** 2 * g[n] ** 2)
    np.testing.assert_allclose(given, total / len(X), rtol=1e-3)


def test_obs_prefers_what_the_others_can_make_up_for(data):
    net = network()
    with torch.no_grad():
        for part in (net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
            part[4] = part[1]
        net[3].weight[:, [1, 4]] *= 10
    given = found(sl.load(net, X[:2]), data, "obs")["0"]
    # The first of two that are equal costs what the damping costs, the second all that both gave.
    assert min(given[1], given[4]) < 0.01 * max(given[1], given[4])
    assert max(given[1], given[4]) == given.max()


def tenfold(weight, gradient, gram):
    assert weight.shape == gradient.shape
    assert gram.shape == (weight.shape[0], weight.shape[2], weight.shape[2])
    return np.abs(weight * gradient).sum(axis=2)


def magnitude(weight):
    return np.abs(weight).sum(axis=(0, 2))


def short(weight):
    return np.zeros(3)


def undefined(weight):
    return np.full(weight.shape[:2], np.nan)


def test_a_function_gets_matrices_and_gives_one_score_per_output(model, data):
    given = found(model, data, magnitude)
    np.testing.assert_allclose(given["0"], np.abs(model.parameters()["0.weight"]).sum((1, 2, 3)), rtol=1e-6)
    assert (found(model, data, tenfold)["3"] > 0).all()


def test_a_function_is_named_in_the_recipe_and_found_again(model, data):
    step = sl.ChannelPruning(ratio=0.5, criterion=magnitude)
    named = step.model_dump(mode="json")["criterion"]
    assert named == "tests.test_criteria:magnitude"
    again = sl.ChannelPruning(ratio=0.5, criterion=named)
    with granted([again], named):
        assert sl.plan(model, again, data).removed == sl.plan(model, step, data).removed


@pytest.mark.parametrize(
    ("fields", "labels", "sentence"),
    [
        ({"criterion": short}, True, r"short gave scores of shape \(3,\) for 0: it must give \(1, 6\)"),
        ({"criterion": undefined}, True, "undefined gave NaN or infinity for 0"),
        ({"criterion": "taylor"}, False, "needs the gradient of a loss, and there are no labels of the outputs"),
        ({"criterion": "fisher"}, False, "needs the gradient of a loss"),
        ({"criterion": "no.module:here"}, True, "name of code, which is not imported here"),
    ],
)
def test_what_gives_no_scores_is_refused(model, fields, labels, sentence):
    data = sl.Data(calibration=(X, Y) if labels else X, test=(X, Y))
    with pytest.raises(sl.SlimlineError, match=sentence):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, **fields), data)


def test_unknown_criteria_and_missing_data_are_refused(model):
    with pytest.raises(sl.SlimlineError, match="did you mean 'taylor'"):
        sl.ChannelPruning(ratio=0.5, criterion="tailor")
    for criterion in ("obs", "feature_rank", "fisher"):
        with pytest.raises(sl.SlimlineError, match="needs data"):
            sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion=criterion))


def test_a_loss_takes_the_place_of_labels(model):
    data = sl.Data(calibration=X, test=(X, Y))
    assert sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="taylor", loss="norm"), data).removed["0"]


@pytest.mark.parametrize("criterion", ["batch_norm", "geometric_median", "feature_rank", "fisher", "obd", "obs"])
def test_keras_gives_the_same_plan(criterion):
    keras = pytest.importorskip("keras")
    net = network()
    L = keras.layers
    twin = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(6, 3, padding="same", name="a"),
            L.BatchNormalization(epsilon=1e-5, name="n"),
            L.ReLU(),
            L.Conv2D(8, 3, padding="same", name="b"),
            L.ReLU(),
            L.GlobalAveragePooling2D(),
            L.Dense(5, name="c"),
        ]
    )
    state = {n: t.numpy() for n, t in net.state_dict().items()}
    twin.get_layer("a").set_weights([state["0.weight"].transpose(2, 3, 1, 0), state["0.bias"]])
    twin.get_layer("n").set_weights([state[f"1.{n}"] for n in ("weight", "bias", "running_mean", "running_var")])
    twin.get_layer("b").set_weights([state["3.weight"].transpose(2, 3, 1, 0), state["3.bias"]])
    twin.get_layer("c").set_weights([state["7.weight"].T, state["7.bias"]])
    step = sl.ChannelPruning(ratio=0.5, criterion=criterion, samples=16)
    a = sl.plan(sl.load(net, X[:2]), step, sl.Data(calibration=(X, Y), test=(X, Y)))
    moved = np.moveaxis(X, 1, -1)
    b = sl.plan(sl.load(twin), step, sl.Data(calibration=(moved, Y), test=(moved, Y)))
    assert list(a.removed.values()) == list(b.removed.values())


def test_a_function_without_a_name_serves_apply_and_no_run(model, data, tmp_path):
    step = sl.ChannelPruning(ratio=0.5, criterion=lambda weight: -np.abs(weight).sum(axis=2))
    small = sl.apply(model, step)
    assert small.history[-1]["criterion"].endswith("<lambda>")
    norms = np.abs(model.parameters()["0.weight"]).sum((1, 2, 3))
    assert sl.plan(model, step).removed["0"] == tuple(sorted(np.argsort(-norms)[:3].tolist()))
    with pytest.raises(sl.SlimlineError, match="a run that goes on later could not import"):
        sl.compress(model, data, recipe=step, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
