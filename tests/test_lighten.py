"""Lighter layers, in every framework: done as planned, never worse than the plain fit, trained, saved, and run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.matrix import matrices
from slimline.methods.activations import FUNCTIONS
from slimline.steps.base import handler_of
from slimline.steps.lighten.activations import activations
from slimline.steps.lighten.plan import LightPlan

torch = pytest.importorskip("torch")
nn = torch.nn

SIDE = 9
X = np.random.default_rng(0).normal(size=(24, 3, SIDE, SIDE)).astype(np.float32)
SEPARABLE = sl.Lighten(convolution="separable", activations={"silu": "hardswish", "gelu": "relu"}, undo=False)
GROUPED = sl.Lighten(convolution="grouped", groups=2, keep=("stem",), undo=False)


class Net(nn.Module):
    """Convolutions of every kind, normed or with a bias, and activations, one of them written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.SiLU()
        self.wide = nn.Conv2d(8, 12, (3, 5), padding="same", dilation=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.group = nn.Conv2d(12, 16, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.act(self.stem(x))
        x = self.norm(self.wide(x))
        x = nn.functional.gelu(self.group(x * torch.sigmoid(x)))
        x = torch.relu(self.point(torch.relu(self.deep(x))))
        return self.head(x.mean((2, 3)))


def torch_net() -> sl.Model:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    return sl.load(net, X[:2])


def keras_net() -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers, ops = keras.layers, keras.ops
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(8, 3, 2, "same", activation="silu", name="stem")(x)
    x = layers.Conv2D(12, (3, 5), padding="same", dilation_rate=(2, 1), use_bias=False, name="wide")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Conv2D(16, 3, padding="same", groups=2, name="group")(layers.Multiply()([x, ops.sigmoid(x)]))
    x = layers.Activation("gelu", name="act")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="deep")(x)
    x = layers.Conv2D(8, 1, activation="relu", name="point")(x)
    return sl.load(keras.Model(inputs, layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x))))


def onnx_net() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    body = (
        "a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, stem__weight, stem__bias) b = Sigmoid(a) c = Mul(a, b) "
        "d = Conv<pads = [2, 2, 2, 2], dilations = [2, 1]>(c, wide__weight) e = Sigmoid(d) f = Mul(d, e) "
        "g = Conv<group = 2, pads = [1, 1, 1, 1]>(f, group__weight, group__bias) h = Elu(g) "
        "i = Conv<group = 16>(h, deep__weight) j = Conv(i, point__weight) "
        "k = GlobalAveragePool(j) l = Flatten(k) y = Gemm(l, head__weight, head__bias)"
    )
    shapes = {
        "stem__weight": (8, 3, 3, 3), "stem__bias": (8,), "wide__weight": (12, 8, 3, 5), "group__weight": (16, 6, 3, 3),
        "group__bias": (16,), "deep__weight": (16, 1, 3, 3), "point__weight": (8, 16, 1, 1), "head__weight": (8, 5),
        "head__bias": (5,),
    }  # fmt: skip
    return sl.load(model(body, weights(**shapes), f"float[N,3,{SIDE},{SIDE}] x"), X[:2])


@cache
def net(framework: str) -> sl.Model:
    return {"torch": torch_net, "keras": keras_net, "onnx": onnx_net}[framework]()


def step_for(framework: str, step: sl.Lighten) -> sl.Lighten:
    """ONNX as of version 13 has no GELU."""
    if framework == "onnx" and step.activations:
        return step.model_copy(update={"activations": {"swish": "hardswish", "elu": "relu6"}})
    return step


def inputs(model: sl.Model) -> np.ndarray:
    return X.transpose(0, 2, 3, 1) if model.adapter.layout == "channels_last" else X


def data(model: sl.Model) -> sl.Data:
    return sl.Data(train=(inputs(model),), calibration=(inputs(model),), seed=1)


def same(a: sl.Model, b: sl.Model, x: np.ndarray) -> None:
    answer = b.predict(x)
    np.testing.assert_allclose(a.predict(x), answer, rtol=1e-4, atol=1e-5 * np.abs(answer).max())


CASES = [(framework, step) for framework in ("torch", "keras", "onnx") for step in (SEPARABLE, GROUPED)]


@pytest.mark.parametrize(("framework", "step"), CASES, ids=[f"{f}-{s.convolution}" for f, s in CASES])
def test_a_plan_is_what_is_done(framework: str, step: sl.Lighten, tmp_path: Path) -> None:
    model = net(framework)
    step, x = step_for(framework, step), inputs(model)
    plan = sl.plan(model, step, data(model))
    assert isinstance(plan, LightPlan)
    small = plan.apply(model)
    same(small, plan.mask(model), x)
    assert (small.graph.size, cost.macs(small.graph)) == (plan.parameters, plan.macs)
    assert plan.parameters < model.graph.size and plan.macs < cost.macs(model.graph)
    parts = [part for each in plan.replacements for part in each.parts]
    assert parts and set(parts) <= {m.layer for m in matrices(small.graph)}
    reasons = set(plan.dense.values())
    assert "it is depthwise already" in reasons
    assert ("its kernel looks at one position alone" in reasons) == (step.convolution == "separable")
    left = [a.function for a in activations(small.graph)]
    assert not {"silu", "gelu", "elu"} & set(left) or not step.activations
    record = json.loads(plan.to_json())
    assert [row["layer"] for row in record["layers"]] == [r.name for r in plan.replacements]
    assert len(record["functions"]) == (3 if step.activations else 0)
    assert all(row["error"] > 0 for row in record["functions"]) and "loses" in str(plan)

    if step.convolution == "grouped" and framework != "onnx":
        return  # what is written is no other than of the separable one
    again = sl.load(small.save(tmp_path / f"model{model.adapter.suffix}"))
    same(again, small, x)
    assert sl.export(again, again.usual_target, tmp_path).is_file()  # gated: it answers as the model does


def errors(model: sl.Model, small: sl.Model) -> float:
    answer = model.predict(inputs(model))
    return float(np.square(small.predict(inputs(model)) - answer).mean() / np.square(answer - answer.mean(0)).mean())


@pytest.mark.parametrize("step", [SEPARABLE, GROUPED], ids=["separable", "grouped"])
def test_data_makes_it_lose_less(step: sl.Lighten) -> None:
    model = net("torch")
    step = step.model_copy(update={"activations": {}})
    fitted = errors(model, sl.apply(model, step, data(model)))
    plain = errors(model, sl.apply(model, step.model_copy(update={"criterion": "weight"})))
    assert fitted < 0.9 * plain


def test_the_error_is_that_of_the_layers_outputs() -> None:
    """One layer alone, whose mean its bias makes up for."""
    model = net("torch")
    step = SEPARABLE.model_copy(update={"activations": {}, "layers": ("stem",), "compensate": False, "damping": 1e-9})
    plan = sl.plan(model, step, data(model))
    small, outputs = plan.mask(model), {}
    (matrix,) = (m for m in matrices(model.graph) if m.layer == "stem")
    for key, each in (("before", model), ("after", small)):
        each.adapter.observe(
            each.native, [(X,)], [matrix.output], lambda _, array, key=key: outputs.update({key: np.array(array)})
        )
    before = outputs["before"] - outputs["before"].mean((0, 2, 3), keepdims=True)
    lost = np.square(outputs["after"] - outputs["before"]).sum() / np.square(before).sum()
    assert plan.replacements[0].error == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_a_function_is_what_numpy_says(framework: str, function: str) -> None:
    model = net(framework)
    from slimline.graph.edits import Compute

    first = activations(model.graph)[0]
    seen: dict[str, np.ndarray] = {}

    def see(name: str, array: np.ndarray) -> None:
        seen[name] = np.array(array)

    other = sl.Model(model.adapter, model.edit(Compute({first.value: (function, first.input)})), model.example)
    after = next(a for a in activations(other.graph) if a.input == first.input)
    other.adapter.observe(other.native, [(inputs(model),)], [after.input, after.value], see)
    assert after.function == function
    np.testing.assert_allclose(seen[after.value], FUNCTIONS[function](seen[after.input]), atol=1e-6)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_parts_are_trained_and_quantized(framework: str) -> None:
    """Quantized in torch, where that is quick."""
    model = net(framework)
    light = sl.apply(model, SEPARABLE, data(model))
    steps = [sl.Distillation(epochs=2, learning_rate=1e-2, batch_size=8), sl.StaticQuantization(undo=False)]
    trained = sl.apply(light, steps[0], data(model))
    names = [
        n for n in trained.graph.trainable if n.rpartition("/")[0].endswith((".0", ".1")) or ".0." in n or ".1." in n
    ]
    old, new = light.parameters(), trained.parameters()
    assert len(names) >= 7 and all((old[name] != new[name]).any() for name in names)
    if framework == "torch":
        done = sl.apply(trained, steps[1], data(model))
        assert done.quantization is not None
        assert {"stem.0", "stem.1"} <= {*done.quantization.layers, *done.quantization.float_layers}


def test_on_digits_data_save_most_of_the_accuracy() -> None:
    from sklearn.datasets import load_digits

    from tests.digit_models import NETS, digits, fitted

    x, y = digits(), load_digits().target
    torch.manual_seed(0)
    module = NETS["residual"]()
    for _ in range(3):
        module = fitted(module.train)
    model = sl.load(module, x[:2])
    samples = sl.Data(train=(x[:1024], y[:1024]), test=(x[1024:], y[1024:]), seed=1)

    def accuracy(each: sl.Model) -> float:
        return float((each.predict(x[1024:]).argmax(1) == y[1024:]).mean())

    plain, fit = (
        sl.apply(model, sl.Lighten(convolution="separable", criterion=c, undo=False), samples)
        for c in ("weight", "output")
    )
    assert fit.graph.size < 0.4 * model.graph.size
    assert accuracy(plain) + 0.3 < accuracy(fit) < accuracy(model)


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_any_part_of_a_plan_can_be_left_out(framework: str) -> None:
    """What it leaves out has its old name, and what reads it too."""
    model = net(framework)
    plan = sl.plan(model, step_for(framework, SEPARABLE), data(model))
    assert isinstance(plan, LightPlan)
    assert len(plan.swaps) > 1 and len(plan.replacements) > 1
    for name in plan.names:
        less = plan.without([name])
        assert name not in less.names and len(less.names) == len(plan.names) - 1
        same(less.apply(model), less.mask(model), inputs(model))


def test_it_composes_with_pruning_and_itself() -> None:
    model = net("torch")
    fewer = sl.ChannelPruning(ratio=0.25, criterion="l2")
    only = SEPARABLE.model_copy(update={"activations": {}, "layers": ("stem", "wide")})
    for steps in ([fewer, only], [only, fewer], [only, sl.LowRank(ratio=0.3, undo=False)]):
        assert sl.apply(model, steps, data(model)).graph.size < 0.9 * model.graph.size


def test_what_loses_least_goes_first_and_what_loses_too_much_stays() -> None:
    model = net("torch")
    step = SEPARABLE.model_copy(update={"activations": {}})
    everything = {r.name: r for r in sl.plan(model, step, data(model)).replacements}
    assert set(everything) == {"stem", "wide", "group"}
    half = sl.plan(model, step.model_copy(update={"ratio": 0.4}), data(model))
    assert 0 < len(half.replacements) < 3
    assert "the other layers lose less for the same budget" in half.dense.values()
    limit = sorted(r.error for r in everything.values())[1]
    some = sl.plan(model, step.model_copy(update={"error": limit}), data(model))
    assert len(some.replacements) == 2 and any("it would lose" in reason for reason in some.dense.values())
    two = sl.plan(model, step.model_copy(update={"multiplier": 2}), data(model))
    assert all(r.error < everything[r.name].error for r in two.replacements)
    same(two.apply(model), two.mask(model), X)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "changes nothing"),
    ({"convolution": "grouped"}, "takes groups with"),
    ({"convolution": "separable", "groups": 2}, "takes groups with"),
    ({"convolution": "grouped", "groups": 5}, "5 groups do not divide"),
    ({"convolution": "grouped", "groups": 2, "multiplier": 2}, "multiplier with"),
    ({"convolution": "separable", "layers": ("deep",)}, "depthwise already"),
    ({"convolution": "separable", "layers": ("point",)}, "one position alone"),
    ({"convolution": "separable", "layers": ("nowhere",)}, "nowhere"),
    ({"convolution": "separable", "keep": ("*",)}, "Nothing can be made lighter"),
    ({"convolution": "separable", "multiplier": 40}, "are more than its kernel"),
    ({"convolution": "separable"}, "needs data"),
    ({"convolution": "separable", "criterion": "weight", "compensate": True}, "compensates from activations"),
    ({"activations": {"mish": "relu"}}, "mish"),
    ({"activations": {"relu": "relu"}}, "by itself"),
    ({"activations": {"silu": "softplus"}}, "softplus"),
    ({"activations": {"silu": "relu"}, "ratio": 0.5}, "ratio is of convolutions"),
    ({"resolution": 3, "convolution": "separable"}, "a step of its own"),
    ({"resolution": 2}, "take a divisor of 9"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused_in_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimlineError, match=message):
        sl.apply(net("torch"), sl.Lighten(**fields))


def test_activations_alone_need_no_data() -> None:
    model = net("torch")
    small = sl.apply(model, sl.Lighten(activations={"silu": "hardswish"}, layers=("act",), undo=False))
    assert sorted(a.function for a in activations(small.graph)) == ["gelu", "hardswish", "relu", "relu", "silu"]
    with pytest.raises(SlimlineError, match="needs data"):
        sl.apply(model, sl.Lighten(activations={"silu": "hardswish"}, error=0.1))


def test_groups_may_fit_only_once_it_is_pruned() -> None:
    torch.manual_seed(0)
    model = sl.load(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 6, 3)).eval(), X[:2, [0, 1, 2, 0]])
    step = sl.Lighten(convolution="grouped", groups=4, undo=False)
    with pytest.raises(SlimlineError, match="4 groups do not divide"):
        handler_of(step).check(step, model, [])
    handler_of(step).check(step, model, [sl.ChannelPruning(ratio=0.3)])


def test_the_recipes_name_of_the_field_is_taken() -> None:
    assert sl.Lighten.model_validate({"kind": "separable"}) == sl.Lighten(convolution="separable")


def test_only_what_pays_stays(layer_clock: Any) -> None:
    model = net("torch")
    step = SEPARABLE.model_copy(update={"undo": True, "layers": ("stem", "wide", "group", "act")})
    step = step.model_copy(update={"activations": {"silu": "hardswish"}})
    layer_clock(
        {"stem": 1.0, "act": 1.0, "wide": 4.0, "group": 4.0}, {"stem": 1.0, "act": 1.5, "wide": 1.0, "group": 1.0}
    )
    small = sl.apply(model, step, data(model))
    layers = {m.layer for m in matrices(small.graph)}
    assert {"stem", "wide.0", "wide.1", "group.0"} <= layers and "silu" in {
        a.function for a in activations(small.graph)
    }
    expected = sl.plan(model, step.model_copy(update={"layers": ("wide", "group"), "activations": {}}), data(model))
    same(small, expected.apply(model), X)

    layer_clock(
        dict.fromkeys(("stem", "act", "wide", "group"), 1.0), dict.fromkeys(("stem", "act", "wide", "group"), 1.0)
    )
    unchanged = sl.apply(model, step, data(model))
    same(unchanged, model, X)
    assert unchanged.graph.size == model.graph.size


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_the_network_makes_its_image_smaller(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer_clock: Any
) -> None:
    """It answers as the network of the smaller image does on means of squares."""
    reference = net(framework)
    x = np.random.default_rng(1).normal(size=(8, 3, 2 * SIDE, 2 * SIDE)).astype(np.float32)
    means = x.reshape(8, 3, SIDE, 2, SIDE, 2).mean((3, 5))
    monkeypatch.setitem(globals(), "SIDE", 2 * SIDE)
    monkeypatch.setitem(globals(), "X", x)
    model = {"torch": torch_net, "keras": keras_net, "onnx": onnx_net}[framework]()
    if framework == "keras":
        x, means = x.transpose(0, 2, 3, 1), means.transpose(0, 2, 3, 1)
    step = sl.Lighten(resolution=2)
    plan = sl.plan(model, step)
    small = plan.apply(model)
    np.testing.assert_allclose(small.predict(x), reference.predict(means), rtol=1e-4, atol=1e-5)
    assert plan.macs == cost.macs(small.graph) == cost.macs(reference.graph) < cost.macs(model.graph)
    assert json.loads(plan.to_json())["inputs"][0]["divided_by"] == 2 and "divided by 2" in str(plan)
    again = sl.load(small.save(tmp_path / f"small{small.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(x), small.predict(x), rtol=1e-4, atol=1e-6)

    (name,) = plan.names
    layer_clock({name: 4.0}, {name: 1.0})
    samples = sl.Data(train=(x,), calibration=(x,))
    paid = sl.apply(model, step, samples)
    assert cost.macs(paid.graph) == plan.macs
    sl.export(paid, "onnxruntime", tmp_path / "artifact")
    if framework == "torch":
        trained = sl.apply(paid, sl.Distillation(epochs=1), samples, teacher=model)
        assert cost.macs(trained.graph) == plan.macs and not np.allclose(trained.predict(x), small.predict(x))
    layer_clock({name: 1.0}, {name: 1.0})
    assert cost.macs(sl.apply(model, step, samples).graph) == cost.macs(model.graph)


def test_networks_of_one_size_of_image_are_refused() -> None:
    torch.manual_seed(0)
    x = np.zeros((2, 1, 8, 8), np.float32)
    fixed = sl.load(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)).eval(), (x,))
    with pytest.raises(SlimlineError, match="does not run on images"):
        sl.plan(fixed, sl.Lighten(resolution=2))
    dense = sl.load(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1)).eval(), (x,))
    with pytest.raises(SlimlineError, match="depends on the size"):
        handler_of(sl.Lighten(resolution=2)).check(sl.Lighten(resolution=2), dense, [])
    table = sl.load(nn.Sequential(nn.Linear(4, 3)).eval(), (np.zeros((2, 4), np.float32),))
    with pytest.raises(SlimlineError, match="models that read one image"):
        sl.plan(table, sl.Lighten(resolution=2))


RECIPE = """
fit: true
steps:
  - {step: Lighten, convolution: separable, ratio: 0.5, activations: {silu: hardswish}, samples: 64}
  - {step: Distillation, epochs: 1, batch_size: 128, refresh_batches: 1}
  - {step: StaticQuantization, undo: false, samples: 64}
budget: {max_macs: 0.7, max_drop: 1.0}
batch_sizes: [4]
"""


@pytest.mark.slow
def test_a_recipe_is_fitted_timed_trained_quantized_and_proved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 48, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(
        *body, nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    )
    from sklearn.datasets import load_digits

    from tests.digit_models import digits

    samples = sl.Data(
        train=(digits()[:1024], load_digits().target[:1024]), test=(digits()[1024:], load_digits().target[1024:])
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model = sl.load(module.eval(), digits()[:2])
    run = sl.compress(model, samples, recipe=tmp_path / "recipe.yaml", output=tmp_path / "run", progress=False)
    assert run.report.compressed.macs <= 0.7 * run.report.original.macs
    lighter = run.report.steps[0]
    assert lighter["plan"]["layers"] and lighter["undoing"]["artifacts"] >= 2
    assert (run.path / "report.html").is_file()
