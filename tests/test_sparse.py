"""Zeros where they were asked for, in both frameworks; masks that survive what comes after."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.evidence.grams import collect
from slimline.graph.edits import PutTensors
from slimline.graph.matrix import matrices
from slimline.model.masks import sparsity
from slimline.recipe import Recipe, parse
from slimline.recipe.named_code import granted
from slimline.recipe.packed import PackedMask
from slimline.steps.sparse.prune import sparsify
from tests import sparse_models as small

EXACT = {"criterion": "obs", "compensate": True}


@pytest.fixture(scope="module", params=["torch", "keras"])
def framework(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return request.param


@pytest.fixture(scope="module")
def model(framework):
    return small.load(framework)


@pytest.fixture(scope="module")
def data(framework):
    return small.data(framework)


def zeros(model):
    """By layer name the part of its weight that is zero."""
    stored = model.parameters()
    return {layer.layer: float((stored[layer.weight] == 0).mean()) for layer in matrices(model.graph)}


def part(model):
    stored = model.parameters()
    weights = [stored[layer.weight] for layer in matrices(model.graph)]
    return sum((w == 0).sum() for w in weights) / sum(w.size for w in weights)


@pytest.mark.parametrize("criterion", ["random", "l1", "l3", "taylor", "movement", "wanda", "obs"])
def test_every_layer_loses_its_lowest(model, data, criterion):
    found = sl.apply(model, sl.SparsePruning(amount=0.5, criterion=criterion), data)
    assert zeros(found) == pytest.approx(dict.fromkeys(zeros(model), 0.5), abs=0.01)
    assert all((found.parameters()[n] == 0).tolist() == (~m).tolist() for n, m in found.masks.items())
    assert part(model) == 0
    assert found.history[-1]["step"] == "SparsePruning"


def test_wanda_is_weight_times_norm(model, data):
    found = sl.apply(model, sl.SparsePruning(amount=0.5, criterion="wanda", scope="row", refresh=False), data)
    layers = matrices(model.graph)
    grams = collect(model, layers, [data.split("calibration").inputs])
    for layer in layers:
        w = layer.matrix(model.parameters()[layer.weight])
        score = np.abs(w) * np.sqrt(np.diagonal(grams[layer.node].second, axis1=1, axis2=2))[:, None]
        keep = layer.matrix(found.masks[layer.weight])
        assert ((~keep).sum(2) == round(0.5 * w.shape[2])).all()
        agree = np.where(keep, score, np.inf).min(2) >= np.where(keep, 0, score).max(2) * (1 - 1e-5)
        assert agree.all()


@pytest.mark.parametrize("scope", ["global", "erk", "sensitivity"])
@pytest.mark.parametrize("fields", [{"criterion": "wanda"}, EXACT], ids=["wanda", "obs"])
def test_densities_differ_and_sum_up(model, data, scope, fields):
    found = sl.apply(model, sl.SparsePruning(amount=0.6, scope=scope, **fields), data)
    assert part(found) == pytest.approx(0.6, abs=0.005)
    assert len({round(v, 2) for v in zeros(found).values()}) > 1


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "1x4", "4x1", "row"])
@pytest.mark.parametrize("fields", [{}, EXACT, {**EXACT, "exact": 0}], ids=["l1", "obs", "blocks"])
def test_patterns_lie_along_the_inputs(model, data, pattern, fields):
    amount = None if ":" in pattern else 0.5
    layers = ("3", "7")
    found = sl.apply(model, sl.SparsePruning(amount=amount, pattern=pattern, layers=layers, **fields), data)
    for layer in matrices(model.graph):
        w = layer.matrix(found.parameters()[layer.weight])
        if layer.layer not in layers:
            assert (w != 0).all()
            continue
        g, o, i = w.shape
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            assert ((w != 0).reshape(-1, m).sum(1) == n).all()
        else:
            a, b = (1, i) if pattern == "row" else map(int, pattern.split("x"))
            cells = (w != 0).reshape(g, o // a, a, i // b, b).sum((2, 4))
            assert set(np.unique(cells)) == {0, a * b}
            assert (cells == 0).mean() == pytest.approx(0.5)


def test_the_frameworks_agree(data):
    pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    models = {f: small.load(f) for f in ("torch", "keras")}
    weight = rng.normal(size=(12, 256)).astype(np.float32)
    for step in (sl.SparsePruning(pattern="2:4", layers=("7",)), sl.SparsePruning(amount=0.3, layers=("7",))):
        found = {}
        for name, model in models.items():
            (layer,) = (m for m in matrices(model.graph) if m.layer == "7")
            tensor = layer.tensor(weight[None], model.parameters()[layer.weight].shape)
            model = model.edited((PutTensors({layer.weight: tensor}),), {"step": "set"})
            found[name] = layer.matrix(sl.apply(model, step).masks[layer.weight])
        np.testing.assert_array_equal(found["torch"], found["keras"])


def test_updates_lower_the_error_of_the_output(model, data):
    errors = {}
    for name, fields in {"l1": {"criterion": "wanda"}, "obs": EXACT, "blocks": {**EXACT, "exact": 0}}.items():
        step = sl.SparsePruning(amount=0.6, sequential=False, refresh=False, **fields)
        found = sparsify(model, step, data).layers
        errors[name] = sum(layer["error"] for layer in found.values())
    assert errors["obs"] < errors["blocks"] < errors["l1"]


def test_the_old_name_of_compensate_is_read():
    recipe = parse("steps: [{step: SparsePruning, amount: 0.5, criterion: obs, update: true}]", "old.yaml")
    assert recipe.steps == (sl.SparsePruning(amount=0.5, **EXACT),)
    assert "compensate: true" in recipe.dump()
    assert "update" not in recipe.dump()


def test_the_reported_error_is_measured(model, data):
    step = sl.SparsePruning(amount=0.5, refresh=False, layers=("9",), **EXACT)
    found = sparsify(model, step, data)
    (layer,) = (m for m in matrices(model.graph) if m.layer == "9")
    gram = collect(model, [layer], [data.split("calibration").inputs])[layer.node].second
    old, new = (layer.matrix(m.parameters()[layer.weight]).astype(float) for m in (model, found.model))
    error, energy = (np.trace(w[0] @ gram[0] @ w[0].T) for w in (old - new, old))
    assert found.layers["9"]["error"] == pytest.approx(error / energy, rel=0.02)


def test_amounts_may_be_numbers(model):
    found = sl.apply(model, sl.SparsePruning(amount=17, scope="global"))
    assert sum((~m).sum() for m in found.masks.values()) == 17
    found = sl.apply(model, sl.SparsePruning(amount=5, layers=("7", "9")))
    assert [int((~m).sum()) for m in found.masks.values()] == [5, 5]


def test_everything_under_a_threshold_goes(model):
    found = sl.apply(model, sl.SparsePruning(criterion="threshold", threshold=0.1))
    for name, mask in found.masks.items():
        np.testing.assert_array_equal(mask, np.abs(model.parameters()[name]) >= np.float32(0.1))


def my_score(weight, gradient, gram):
    """Large weights go."""
    assert gradient is None or gradient.shape == weight.shape
    return -np.abs(weight)


def test_a_callable_scores(model, data):
    found = sl.apply(model, sl.SparsePruning(amount=0.5, criterion=my_score, layers=("7",)), data)
    (name,) = found.masks
    w = np.abs(model.parameters()[name])
    assert w[found.masks[name]].max() <= w[~found.masks[name]].min()
    named = sl.SparsePruning(amount=0.5, criterion="tests.test_sparse:my_score", layers=("7",))
    with granted([named], "tests.test_sparse:my_score"):
        again = sl.apply(model, named, data)
    np.testing.assert_array_equal(again.masks[name], found.masks[name])
    assert found.history[-1]["criterion"] == "tests.test_sparse:my_score"


def test_ones_own_masks_are_taken(model, tmp_path):
    from safetensors.numpy import save_file

    (layer,) = (m for m in matrices(model.graph) if m.layer == "7")
    mask = np.random.default_rng(0).random(model.parameters()[layer.weight].shape) < 0.3
    step = sl.SparsePruning(masks={layer.weight: mask})
    np.testing.assert_array_equal(sl.apply(model, step).masks[layer.weight], mask)
    recipe = Recipe(steps=(step,))
    assert parse(recipe.dump()) == recipe
    save_file({layer.weight: mask.astype(np.uint8)}, tmp_path / "masks.safetensors")
    again = sl.apply(model, sl.SparsePruning(masks=str(tmp_path / "masks.safetensors")))
    np.testing.assert_array_equal(again.parameters()[layer.weight] != 0, mask)


def test_masks_add_up(model, data):
    first = sl.apply(model, sl.SparsePruning(amount=0.5, criterion="random"))
    second = sl.apply(first, sl.SparsePruning(amount=0.7, **EXACT), data)
    for name, mask in first.masks.items():
        assert not (second.masks[name] & ~mask).any()
    assert part(second) == pytest.approx(0.7, abs=0.01)


def test_masks_survive_files_and_finalize_drops_them(model, tmp_path):
    found = sl.apply(model, sl.SparsePruning(amount=0.5))
    path = found.save(tmp_path / f"model{model.adapter.suffix}")
    loaded = sl.load(path)
    assert set(loaded.masks) == set(found.masks)
    for name, mask in found.masks.items():
        np.testing.assert_array_equal(loaded.masks[name], mask)
    assert path.read_bytes() == found.save(tmp_path / f"again{model.adapter.suffix}").read_bytes()
    packed = {name: PackedMask.of(mask).model_dump(mode="json") for name, mask in found.masks.items()}
    older = tmp_path / f"older{model.adapter.suffix}"
    model.adapter.save(found.native, older, found.example, {"history": [], "masks": packed})
    assert path.stat().st_size < older.stat().st_size + 2000
    np.testing.assert_equal(dict(sl.load(older).masks), dict(found.masks))
    final = sl.finalize(loaded)
    assert not final.masks
    assert zeros(final) == zeros(found)


def test_masks_survive_channel_pruning(model):
    found = sl.apply(model, [sl.SparsePruning(amount=0.5), sl.ChannelPruning(ratio=0.5)])
    assert found.graph.size < 0.7 * model.graph.size
    for name, mask in found.masks.items():
        assert found.parameters()[name].shape == mask.shape
        assert not found.parameters()[name][~mask].any()
        assert 0.1 < mask.mean() < 0.99


def test_masks_survive_training(model, data):
    step = sl.Distillation(epochs=1, batch_size=40, learning_rate=1e-2)
    for optimizer in ("adamw", "sgd"):
        recovery = step.model_copy(update={"optimizer": optimizer})
        found = sl.apply(model, [sl.SparsePruning(amount=0.5, criterion="random"), recovery], data)
        moved = 0.0
        for name, mask in found.masks.items():
            assert not found.parameters()[name][~mask].any()
            moved += np.abs(found.parameters()[name] - model.parameters()[name])[mask].sum()
        assert moved > 0


def test_zeros_are_in_the_artifact(model, data, framework, tmp_path):
    steps = [sl.SparsePruning(amount=0.6), sl.StaticQuantization(undo=False, samples=64, batch_size=32)]
    float_model = sl.apply(model, steps[:1])
    target = "onnxruntime" if framework == "torch" else "litert"
    if framework == "keras":
        pytest.importorskip("ai_edge_litert")
    integer = sl.apply(float_model, steps[1], data)
    for name, made in {"float": float_model, "int8": integer}.items():
        path = sl.export(made, target, tmp_path / name)
        stored = _onnx(path) if framework == "torch" else _tflite(path)
        weights = [w for w in stored if w.ndim > 1 and w.size in {m.size for m in float_model.masks.values()}]
        assert len(weights) >= len(float_model.masks)
        pruned = sorted(float((w == 0).mean()) for w in weights)[-len(float_model.masks) :]
        assert min(pruned) >= 0.59


def _onnx(path):
    import onnx
    from onnx import numpy_helper

    return [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


def _tflite(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    found = []
    for detail in interpreter.get_tensor_details():
        try:
            found.append(interpreter.get_tensor(detail["index"]))
        except ValueError:  # an activation of a delegate has no data
            continue
    return found


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"amount": 1.5}, "amount"),
        ({"amount": -1}, "amount"),
        ({}, "needs an amount"),
        ({"amount": 0.5, "pattern": "4:2"}, "no sparsity"),
        ({"amount": 0.3, "pattern": "2:4"}, "prunes 0.5 of the weights"),
        ({"amount": 0.5, "criterion": "magnitude"}, "There is no criterion"),
        ({"amount": 0.5, "criterion": "threshold"}, "takes a threshold"),
        ({"amount": 0.5, "compensate": True}, "only with criterion='obs'"),
        ({"amount": 0.5, "criterion": "wanda", "schedule": "polynomial"}, "while training"),
        ({"amount": 0.5, "regrow": 0.3}, "no regrow"),
        ({"amount": 0.5, "scope": "row", "pattern": "4x1"}, "another scope"),
        ({"amount": 0.5, "schedule": "constant", "begin": 0.5, "end": 0.4}, "before it begins"),
        ({"amount": 3, "schedule": "constant"}, "as a part"),
        ({"amount": 1.5}, "^amount of SparsePruning is 1.5 but must be less than or equal to 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, sentence):
    with pytest.raises(sl.SlimlineError, match=sentence):
        sl.SparsePruning(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"amount": 10**9, "scope": "global"}, "cannot go"),
        ({"amount": 0.5, "layers": ("nothing",)}, "There is no layer"),
        ({"pattern": "2:4", "layers": ("0",)}, "9 inputs .* do not divide"),
        ({"pattern": "5:7"}, "Nothing can be pruned"),
        ({"amount": 0.5, "criterion": lambda w, g, h: w[0]}, "returned shape"),
        ({"amount": 0.5, "criterion": lambda w, g, h: w * np.nan}, "NaN"),
        ({"amount": 0.5, "criterion": "tests.test_sparse:nothing"}, "is the name of code"),
        ({"masks": {"nothing": np.ones(3)}}, "There is no weight"),
        ({"masks": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, fields, sentence):
    with pytest.raises(sl.SlimlineError, match=sentence):
        sl.apply(model, sl.SparsePruning(**fields))


@pytest.mark.parametrize("criterion", ["wanda", "obs", "taylor"])
def test_data_are_asked_for(model, criterion):
    with pytest.raises(sl.SlimlineError, match="needs data"):
        sl.apply(model, sl.SparsePruning(amount=0.5, criterion=criterion))


def test_gradients_need_labels_or_a_loss(model, framework):
    unlabelled = small.data(framework, labels=False)
    with pytest.raises(sl.SlimlineError, match="no labels of the outputs"):
        sl.apply(model, sl.SparsePruning(amount=0.5, criterion="taylor"), unlabelled)
    found = sl.apply(model, sl.SparsePruning(amount=0.5, criterion="taylor", loss="norm"), unlabelled)
    assert part(found) == pytest.approx(0.5, abs=0.01)


def test_layers_that_do_not_fit_are_named(model):
    found = sparsify(model, sl.SparsePruning(pattern="2:4"))
    assert [r["what"] for r in found.refused] == ["0"]
    assert found.layers["7"]["sparsity"] == 0.5


def test_order_is_checked(model, data):
    quantized = sl.StaticQuantization(undo=False, samples=32, batch_size=32)
    with pytest.raises(sl.SlimlineError, match="cannot follow"):
        sl.apply(model, [quantized, sl.SparsePruning(amount=0.5)], data)
    with pytest.raises(sl.SlimlineError, match="let a Distillation step follow"):
        sl.apply(model, sl.SparsePruning(amount=0.5, schedule="polynomial"), data)


def test_packed_masks_unpack():
    mask = np.random.default_rng(0).random((3, 5, 7)) < 0.5
    np.testing.assert_array_equal(PackedMask.of(mask).array(), mask)


def test_sparsity_is_counted(model):
    found = sparsity(sl.apply(model, sl.SparsePruning(amount=1.0, layers=("9",))))
    assert sorted(found.values())[-1] == 1.0


def test_recurrent_layers_are_named_as_left_alone():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = torch.nn.LSTM(4, 6, batch_first=True), torch.nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    model = sl.load(Net().eval(), np.zeros((2, 5, 4), np.float32))
    found = sparsify(model, sl.SparsePruning(amount=0.5))
    assert list(found.model.masks) == ["head.weight"]
    assert found.refused == [{"what": "cells", "reason": "single weights of a recurrent layer have no rule"}]
