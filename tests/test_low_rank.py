"""Layers as products, in every framework: exact at full rank, done as planned, and with less lost where data help."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.cli import main
from slimline.evidence.grams import collect_pair
from slimline.graph import cost
from slimline.graph.edits import PutTensors
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.search.ladder import ladder
from slimline.steps.base import Context, perform
from slimline.steps.low_rank.plan import LowRankPlan
from slimline.steps.low_rank.step import METHODS
from slimline.steps.replacing import UNPAID

torch = pytest.importorskip("torch")
nn = torch.nn

from tests.digit_models import digits  # noqa: E402

SIDE = 9
X = np.random.default_rng(0).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)


class Kinds(nn.Module):
    """Convolutions of every kind: strided, dilated, grouped, depthwise, normed; a linear layer over places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.wide = nn.Conv2d(12, 14, (3, 5), padding="same", dilation=(2, 1))
        self.group = nn.Conv2d(14, 16, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.mix = nn.Linear(16, 20)
        self.up = nn.ConvTranspose2d(20, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        x = torch.relu(self.deep(torch.relu(self.norm(self.group(x)))))
        x = torch.relu(self.mix(x.movedim(1, 3))).movedim(3, 1)
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def torch_kinds() -> sl.Model:
    torch.manual_seed(0)
    net = Kinds().eval()
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    return sl.load(net, X[:2])


def keras_kinds() -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(12, 3, 2, "same", activation="relu", name="stem")(x)
    x = layers.Conv2D(14, (3, 5), padding="same", dilation_rate=(2, 1), activation="relu", name="wide")(x)
    x = layers.Conv2D(16, 3, padding="same", groups=2, use_bias=False, name="group")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(5, padding="same", activation="relu", name="deep")(x)
    x = layers.Dense(20, activation="relu", name="mix")(x)
    x = layers.Conv2DTranspose(6, 2, activation="relu", name="up")(x)
    return sl.load(keras.Model(inputs, layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x))))


def onnx_kinds() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    body = (
        "a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, stem__weight, stem__bias) b = Relu(a) "
        "c = Conv<pads = [2, 2, 2, 2], dilations = [2, 1]>(b, wide__weight) d = Relu(c) "
        "e = GlobalAveragePool(d) f = Flatten(e) g = MatMul(f, mix__weight) h = Add(g, mix__bias) i = Relu(h) "
        "y = Gemm(i, head__weight, head__bias)"
    )
    shapes = {
        "stem__weight": (12, 3, 3, 3), "stem__bias": (12,), "wide__weight": (14, 12, 3, 5), "mix__weight": (14, 20),
        "mix__bias": (20,), "head__weight": (20, 5), "head__bias": (5,),
    }  # fmt: skip
    return sl.load(model(body, weights(**shapes), f"float[N,3,{SIDE},{SIDE}] x"), X[:2])


CASES = [
    *(("torch", method, "output") for method in METHODS),
    ("torch", "svd", "weight"),
    ("torch", "spatial", "weight"),
    ("keras", "spatial", "weight"),
    ("keras", "tucker", "output"),
    ("torch", "cp", "output"),
    ("keras", "cp", "output"),
    ("onnx", "cp", "weight"),
    ("onnx", "input", "output"),
    ("onnx", "tucker", "weight"),
]
"""In every framework the methods are the same parts."""


@cache
def kinds(framework: str) -> sl.Model:
    return {"torch": torch_kinds, "keras": keras_kinds, "onnx": onnx_kinds}[framework]()


def inputs(model: sl.Model) -> np.ndarray:
    return X.transpose(0, 2, 3, 1) if model.adapter.layout == "channels_last" else X


def data(model: sl.Model) -> sl.Data:
    return sl.Data(calibration=(inputs(model),))


def same(a: sl.Model, b: sl.Model, x: np.ndarray) -> None:
    answer = b.predict(x)
    np.testing.assert_allclose(a.predict(x), answer, rtol=1e-4, atol=1e-5 * np.abs(answer).max())


def carried_out(plan: LowRankPlan, model: sl.Model, x: np.ndarray) -> sl.Model:
    """The model that the plan makes, which is what the plan says."""
    small = plan.apply(model)
    same(small, plan.mask(model), x)
    assert (small.graph.size, cost.macs(small.graph)) == (plan.parameters, plan.macs)
    return small


@pytest.mark.parametrize(("framework", "method", "criterion"), CASES)
def test_a_plan_is_what_is_done(framework: str, method: Any, criterion: Any) -> None:
    model = kinds(framework)
    plan = sl.plan(model, sl.LowRank(ratio=0.4, scope="local", method=method, criterion=criterion), data(model))
    assert isinstance(plan, LowRankPlan)
    small = carried_out(plan, model, inputs(model))
    parts = [part for product in plan.products for part in product.parts]
    assert parts and set(parts) <= {m.layer for m in matrices(small.graph)}
    if framework != "onnx":
        assert plan.dense["up"] == "it is a transposed convolution"
        assert {p.name: len(p.parts) for p in plan.products}["wide"] == {"tucker": 3, "cp": 4}.get(method, 2)
    assert all(0 < p.error < 1 for p in plan.products)
    record = json.loads(plan.to_json())
    assert [row["layer"] for row in record["layers"]] == [p.name for p in plan.products]
    assert "loses" in str(plan)


@pytest.mark.parametrize(("framework", "method", "criterion"), CASES)
def test_at_full_rank_nothing_changes(
    framework: str, method: Any, criterion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimline.steps.low_rank import plan as module

    monkeypatch.setattr(module, "_smaller", lambda split, rank: rank == split.most)  # it would pay at no other
    monkeypatch.setattr(module.Split, "ranks", full(module.Split.ranks))
    model = kinds(framework)
    keep = () if framework == "onnx" else ("up",)
    step = sl.LowRank(energy=1 - 1e-6, method=method, criterion=criterion, damping=1e-6, keep=keep, compensate=False)
    plan = sl.plan(model, step, data(model))
    assert not plan.dense
    same(carried_out(plan, model, inputs(model)), model, inputs(model))


def full(ranks: Any) -> Any:
    """All channels of the inputs too, where all of the outputs' stay."""

    def ranks_of(split: Any, rank: int) -> tuple[int, ...]:
        return (split.layer.channels, rank) if split.method == "tucker" else ranks(split, rank)

    return ranks_of


@pytest.mark.parametrize(
    ("framework", "method"),
    [*(("torch", method) for method in (*METHODS, "cp")), ("keras", "spatial"), ("keras", "cp"), ("onnx", "tucker")],
)
def test_factors_are_merged_back(framework: str, method: Any) -> None:
    model = kinds(framework)
    chosen = ("stem", "wide", "mix")
    low = sl.apply(model, sl.LowRank(ratio=0.4, scope="local", method=method, layers=chosen, undo=False), data(model))
    with pytest.raises(sl.SlimlineError, match="Nothing can be merged"):
        sl.plan(low, sl.MergeLayers(layers=("stem.*", "wide.*")))  # it would be heavier
    merge = sl.MergeLayers(heavier=True, layers=("stem.*", "wide.*", "mix.*"))
    back = sl.apply(low, merge)
    same(back, low, inputs(model))
    assert (back.graph.size, cost.macs(back.graph)) == (model.graph.size, cost.macs(model.graph))
    assert sl.plan(low, merge).macs > cost.macs(low.graph)


def energy(model: sl.Model, small: sl.Model, x: np.ndarray) -> float:
    """The part of the variance of the answers that is lost."""
    answer = model.predict(x)
    return float(np.square(answer - small.predict(x)).sum() / np.square(answer - answer.mean(0)).sum())


class Small(nn.Sequential):
    """Three convolutions and two linear layers on digits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
            nn.Conv2d(12, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def small() -> sl.Model:
    torch.manual_seed(0)
    module = Small()
    x, y = torch.from_numpy(digits()[:1024]), torch.from_numpy(load_digits().target[:1024]).long()
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sl.load(module.eval(), digits()[:2])


def samples() -> sl.Data:
    x, y = digits(), load_digits().target
    return sl.Data(train=(x[:1024], y[:1024]), calibration=(x[:512],), test=(x[1024:], y[1024:]), seed=0)


def accuracy(model: sl.Model) -> float:
    return float((model.predict(digits()[1024:]).argmax(1) == load_digits().target[1024:]).mean())


def test_the_planned_error_is_that_of_the_layer(small: sl.Model) -> None:
    """Of the first linear layer, on the calibration samples and up to the damping."""
    matrix = next(m for m in matrices(small.graph) if m.layer == "8")
    plan = sl.plan(small, sl.LowRank(rank=6, layers=("8",), damping=1e-9), samples())
    seen: list[np.ndarray] = []
    small.adapter.observe(small.native, [(digits()[:512],)], [matrix.input], lambda _, x: seen.append(np.array(x)))
    x = seen[0].astype(np.float64)
    before, after = (x @ w["8.weight"].T + w["8.bias"] for w in (small.parameters(), plan.mask(small).parameters()))
    lost = np.square(before - after).sum() / np.square(before - before.mean(0)).sum()
    assert plan.products[0].error == pytest.approx(lost, rel=1e-3)
    assert (before - after).mean(0) == pytest.approx(0, abs=1e-5)  # the bias makes up for the mean


def test_with_data_less_is_lost_than_without(small: sl.Model) -> None:
    test = digits()[1024:]
    goal: dict[str, Any] = {"ratio": 0.5, "scope": "local"}
    plain = sl.apply(small, sl.LowRank(undo=False, criterion="weight", **goal))
    aware = sl.apply(small, sl.LowRank(undo=False, compensate=False, **goal), samples())
    mended = sl.apply(small, sl.LowRank(undo=False, **goal), samples())
    lost = [energy(small, each, test) for each in (plain, aware, mended)]
    scores = [accuracy(each) for each in (small, plain, aware, mended)]
    assert lost[2] < lost[1] / 1.5 < lost[0] / 3
    # Half of all weights, without training: 94 % fall to 16 % without data, 54 % with, 69 % where layers make up for
    # those before them.
    assert scores[1] < 0.35 < 0.45 < scores[2] < scores[3] < scores[0]
    assert scores[3] > 0.6


def test_energy_and_error_say_the_same_and_hold(small: sl.Model) -> None:
    first = sl.plan(small, sl.LowRank(energy=0.9), samples())
    second = sl.plan(small, sl.LowRank(error=0.1), samples())
    assert first.to_json() == second.to_json()
    assert first.products and all(p.error <= 0.1 for p in first.products)
    fours = sl.plan(small, sl.LowRank(energy=0.9, round_to=4), samples())
    assert fours.products and all(p.ranks[0] % 4 == 0 for p in fours.products)
    for p in first.products:  # one rank less would be too few
        fewer = sl.LowRank(rank=max(p.ranks[0] - 1, 1), layers=(p.name,))
        assert p.ranks == (1,) or sl.plan(small, fewer, samples()).products[0].error > 0.1


def test_a_budget_over_all_layers_is_met_and_better_than_the_same_ratio_in_each(small: sl.Model) -> None:
    together = sl.plan(small, sl.LowRank(ratio=0.5), samples())
    apart = sl.plan(small, sl.LowRank(ratio=0.5, scope="local"), samples())
    auto = sl.plan(small, sl.LowRank(ratio=0.5, method="auto"), samples())

    def retained(plan: LowRankPlan) -> float:
        return math.prod(1 - p.error for p in plan.products)

    weights = sum(math.prod(m.shape) for m in matrices(small.graph))
    assert small.graph.size - together.parameters >= 0.5 * weights
    assert small.graph.size - auto.parameters >= 0.5 * weights
    assert retained(auto) >= retained(together) > retained(apart)
    smaller = sl.plan(small, sl.LowRank(target_parameters=0.6), samples())
    assert carried_out(smaller, small, digits()[:4]).graph.size <= 0.6 * small.graph.size
    lighter = sl.plan(small, sl.LowRank(target_macs=0.6), samples())
    assert lighter.macs <= 0.6 * cost.macs(small.graph)


def test_ranks_that_stand_out_from_noise(small: sl.Model) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 5)) @ rng.normal(size=(5, 256)) + 0.3 * rng.normal(size=(24, 256))
    native = small.edit(PutTensors({"8.weight": weight.astype(np.float32)}))
    model = sl.Model(small.adapter, native, small.example)
    plan = sl.plan(model, sl.LowRank(rank="evbmf", criterion="weight", layers=("8",)))
    assert plan.products[0].ranks == (5,)


def test_a_ratio_out_of_reach_takes_the_lowest_ranks_and_says_so(small: sl.Model) -> None:
    plan = sl.plan(small, sl.LowRank(ratio=0.99, criterion="weight"))
    assert all(p.ranks == (1,) for p in plan.products)
    assert "can go" in plan.notes[0]


def test_only_products_that_pay_stay(small: sl.Model, layer_clock: Any) -> None:
    step = sl.LowRank(ratio=0.5, scope="local")
    plan = sl.plan(small, step, samples())
    names = [product.name for product in plan.products]
    assert len(names) > 2
    heavy, light = dict.fromkeys(names, 4.0), dict.fromkeys(names, 1.0)
    layer_clock(heavy, {**light, names[1]: 4.5})
    done = perform(step, small, Context(None, samples(), "onnxruntime"))
    assert [row["layer"] for row in done.record["plan"]["layers"]] == [n for n in names if n != names[1]]
    assert {"what": names[1], "reason": UNPAID} in done.record["refused"]
    same = sl.plan(small, step.model_copy(update={"keep": (names[1],)}), samples()).apply(small)
    np.testing.assert_array_equal(done.model.predict(digits()), same.predict(digits()))  # fitted without that one

    layer_clock(heavy, dict.fromkeys(names, 4.1))
    done = perform(step, small, Context(None, samples(), "onnxruntime"))
    assert not done.record["plan"]["layers"]
    reasons = {r["what"]: r["reason"] for r in done.record["refused"]}
    assert all("not measurably faster on onnxruntime" in reasons[name] for name in names)
    np.testing.assert_array_equal(done.model.predict(digits()), small.predict(digits()))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "takes one of"),
    ({"rank": 2, "energy": 0.5}, "not rank and energy"),
    ({"rank": 500}, "is more than its matrix can have"),
    ({"rank": 15, "layers": ("5",)}, "no fewer parameters"),
    ({"target_parameters": 0.001}, "cannot bring the model to 0.001"),
    ({"rank": 2, "layers": ("nowhere",)}, "nowhere"),
    ({"rank": 2, "keep": ("*",)}, "Nothing can be factorised"),
    ({"rank": 2, "criterion": "weight", "compensate": True}, "compensates from activations"),
    ({"energy": 0.9}, "needs data"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused_in_a_sentence(small: sl.Model, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimlineError, match=message):
        sl.apply(small, sl.LowRank(undo=False, **fields))


def test_shared_layers_stay_with_the_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.head = nn.Linear(16, 16), nn.Linear(16, 12)

        def forward(self, x: Any) -> Any:
            return self.head(self.both(self.both(x).relu()))

    torch.manual_seed(0)
    model = sl.load(Twice().eval(), np.ones((2, 5, 16), np.float32))
    plan = sl.plan(model, sl.LowRank(ratio=0.3, scope="local", criterion="weight"))
    assert [p.name for p in plan.products] == ["head"]
    assert plan.dense["both"] == "it shares its weights with other layers"


def test_it_composes_with_pruning_before_and_after(small: sl.Model, tmp_path: Path) -> None:
    for steps in (
        [sl.ChannelPruning(ratio=0.25), sl.LowRank(ratio=0.4, undo=False)],
        [sl.LowRank(ratio=0.4, undo=False), sl.ChannelPruning(ratio=0.25)],
        [sl.SparsePruning(amount=0.5), sl.LowRank(ratio=0.4, layers=("8",), undo=False)],
    ):
        both = sl.apply(small, steps, samples())
        assert both.graph.size < 0.7 * small.graph.size or steps[0].kind == "sparse"
        assert set(both.masks) <= set(both.graph.parameters)
    again = sl.load(both.save(tmp_path / "both.pt2"))
    same(again, both, digits()[:8])


RECIPE = """
fit: true
steps:
  - {step: LowRank, ratio: 0.5, round_to: 2, samples: 128, undo: false}
  - {step: Distillation, epochs: 6, batch_size: 128, refresh_batches: 1}
  - {step: StaticQuantization, undo: false, samples: 64}
budget: {max_macs: 0.6, max_drop: 0.9}
batch_sizes: [1]
"""


def parts_of(record: dict[str, Any]) -> set[str]:
    return {part for row in record["plan"]["layers"] for part in row["parts"]}


def test_a_recipe_is_rehearsed_from_the_command_line(
    small: sl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    small.save(tmp_path / "small.pt2")
    np.savez(tmp_path / "d.npz", x_train=digits()[:512], y_train=load_digits().target[:512])
    words = [str(tmp_path / "small.pt2"), "--data", str(tmp_path / "d.npz"), "--recipe", str(tmp_path / "recipe.yaml")]
    monkeypatch.setattr("sys.argv", ["slimline", "plan", *words, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    low, _, rounded = json.loads(capsys.readouterr().out)["steps"]
    assert low["after"]["macs"] < low["before"]["macs"] and low["after"]["parameters"] < low["before"]["parameters"]
    assert any("loses" in line for line in low["lines"])
    assert parts_of(low["details"]) and "8.0" in json.dumps(rounded)


def test_after_it_come_training_and_quantization(small: sl.Model) -> None:
    steps = sl.Recipe.model_validate(yaml.safe_load(RECIPE)).steps
    rung = ladder(sl.Recipe(steps=steps, fit=True))[2 + 15]  # half of the weights go
    assert [getattr(step, "ratio", None) for step in rung.recipe.steps] == [0.5, None, None]
    done = sl.apply(small, rung.recipe.steps, samples())
    plan = sl.plan(small, rung.recipe.steps[0], samples())
    assert done.quantization is not None
    assert parts_of({"plan": plan.summary()}) <= {*done.quantization.layers, *done.quantization.float_layers}
    assert accuracy(small) - accuracy(done) < 0.05


@pytest.mark.slow
def test_a_recipe_is_fitted_trained_quantized_and_proved(small: sl.Model, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = sl.compress(small, samples(), recipe=tmp_path / "recipe.yaml", output=tmp_path / "run", progress=False)
    assert run.report.compressed.macs <= 0.6 * run.report.original.macs
    quantization = run.model.quantization
    parts = parts_of(run.report.steps[0])
    assert parts and quantization is not None
    assert parts <= {*quantization.layers, *quantization.float_layers}
    # 5.3 points on a processor with AMX, where sums have another order.
    assert run.report.original.accuracy - run.report.compressed.accuracy < 0.08


def test_layers_that_read_the_same_see_their_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.head = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(self.left(x)) * self.right(x))

    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    model, data = sl.load(Fork().eval(), (x[:2],)), sl.Data(calibration=(x,))
    seen: list[str] = []

    def counted(model: Any, current: Any, layer: Any, *more: Any) -> Any:
        seen.append(layer.layer)
        return collect_pair(model, current, layer, *more)

    monkeypatch.setattr("slimline.steps.layer_fit.collect_pair", counted)
    once = sl.plan(model, sl.LowRank(rank=3), data)
    assert seen == ["stem", "left", "head"]
    monkeypatch.setattr(LayerMatrix, "reading", property(lambda self: object()))
    each = sl.plan(model, sl.LowRank(rank=3), data)
    assert seen[3:] == ["stem", "left", "right", "head"]
    for a, b in zip(once.products, each.products, strict=True):
        for name in a.tensors:
            np.testing.assert_allclose(a.tensors[name], b.tensors[name], rtol=1e-6, atol=1e-7)
