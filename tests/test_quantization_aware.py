"""Training in few bits: gradients by the papers' formulas, formats as of the other quantization steps, artifacts."""

from __future__ import annotations

import math

import numpy as np
import pytest

import slimline as sl
from slimline.basics.progress import Progress
from slimline.graph.edits import LearnRounding, Round, Unround
from slimline.graph.quantization import Quantization
from slimline.methods.formats import IntegerGrid, Levels, along
from slimline.methods.scales import learning_speeds
from slimline.model import Model
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, perform
from slimline.steps.quantization_aware.step import QuantizationAwareTraining
from slimline.steps.quantization_aware.train import start
from tests import sparse_models as small

torch = pytest.importorskip("torch")
nn = torch.nn

SHORT = {"epochs": 2, "batch_size": 48, "learning_rate": 3e-3, "refresh_batches": 2, "samples": 64}


def images(samples=240):
    return small.data("torch", samples=samples)


@pytest.fixture(scope="module")
def data() -> sl.Data:
    return images()


@pytest.fixture(scope="module")
def model() -> sl.Model:
    """Trained for a moment, with batch-norm statistics of its own and a scale below zero."""
    torch.manual_seed(0)
    net = small.torch_net().train()
    split = images(600).split("train")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for (x,), y in split.batches(48):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimizer.step()
    with torch.no_grad():
        net[1].weight[2] *= -1
    return sl.load(net.eval(), np.zeros((2, 1, 8, 8), np.float32))


def trained(model: Model, data: sl.Data, checkpoint=None, tell=None, **fields) -> tuple[Model, dict]:
    step = QuantizationAwareTraining(**{**SHORT, **fields})
    origin = model.uncompressed
    context = Context(origin, data.check(model.inputs), "onnxruntime", checkpoint=checkpoint, tell=tell)
    done = perform(step, model, context)
    return done.model, done.record


def inputs(data: sl.Data) -> np.ndarray:
    return np.concatenate([x for (x,), _ in data.split("certification").batches(64)])


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_lsq(signed):
    from slimline.frameworks.torch.learned import _Grid

    low, high = (-4, 3) if signed else (0, 7)
    zero = torch.tensor([0.0 if signed else 2.0], requires_grad=True)
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(scale=2, size=200), dtype=torch.float32, requires_grad=True)
    scale = torch.tensor([0.4], requires_grad=True)
    weight = torch.tensor(rng.normal(size=200), dtype=torch.float32)
    (weight * _Grid.apply(x, scale, zero, low, high)).sum().backward()
    u, w, n, p = x.detach().numpy() / 0.4, weight.numpy(), low - zero.item(), high - zero.item()
    inside = (u >= n) & (u <= p)
    np.testing.assert_allclose(x.grad, w * inside)
    by_scale = np.where(inside, np.rint(u) - u, np.where(u < n, n, p))  # equation 3 of Esser et al.
    np.testing.assert_allclose(scale.grad, (w * by_scale).sum(), rtol=1e-4)
    np.testing.assert_allclose(zero.grad, -(w * ~inside * 0.4).sum(), rtol=1e-4)  # equation 6 of Bhalgat et al.


def grids(model: Model, bits: int = 4) -> Quantization:
    stored = model.parameters()
    weights = {
        "0.weight": IntegerGrid(np.full((8, 1, 1, 1), 0.1, np.float32), along(0, 4), bits, True, True),
        "7.weight": Levels(np.float32(0.07), (), np.array([-1, 0, 1], np.float32)),
        "9.weight": IntegerGrid(np.full((10, 3), 0.05, np.float32), (1, 4), bits, True),
    }
    assert weights.keys() <= stored.keys()
    value = next(n for n in model.graph.nodes if n.attributes.get("function") == "relu").outputs[0]
    grid = IntegerGrid(np.float32(0.3), (), bits, False, zero_point=np.asarray(3, np.int32))
    return Quantization({value: grid, model.graph.inputs[0]: grid}, weights)


def test_formats_that_learn_begin_as_those_that_do_not_and_can_be_undone(model):
    held = grids(model)
    x = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
    learning = model.edit(LearnRounding(held))
    rounded = model.edit(Round(held))
    np.testing.assert_allclose(
        model.adapter.outputs(learning, (x,))[0], model.adapter.outputs(rounded, (x,))[0], atol=1e-5
    )
    assert model.adapter.learned(learning, held) == held
    fixed = model.edit(LearnRounding(held, fixed=frozenset((*held.activations, *held.weights))))
    assert not [name for name, _ in fixed.named_parameters() if "learned" in name]
    plain = model.adapter.edit(rounded, (Unround(held),), model.example)
    np.testing.assert_array_equal(model.adapter.outputs(plain, (x,))[0], model.predict(x))
    assert model.adapter.parameters(plain).keys() == model.parameters().keys()
    assert not model.adapter.format_mismatches(plain, Quantization())


def test_scales_of_a_pruned_network_learn_by_how_many_numbers_they_round(model):
    """Its graph notes no shapes."""
    from slimline.frameworks.torch.learned import LearnedRounding

    pruned = sl.apply(model, sl.ChannelPruning(ratio=0.25))
    value = next(n for n in pruned.graph.nodes if n.attributes.get("function") == "relu").outputs[0]
    grids = IntegerGrid(np.float32(0.3), (), 4, False), IntegerGrid(np.float32(0.05), (), 4, True, True)
    learning = pruned.edit(LearnRounding(Quantization({value: grids[0]}, {"9.weight": grids[1]})))
    speeds = [m.speed.numpy() for m in learning.modules() if isinstance(m, LearnedRounding)]
    sizes = pruned.graph.values[value].shape[1:], pruned.parameters()["9.weight"].shape
    for each, shape, speed in zip(grids, sizes, speeds, strict=True):
        np.testing.assert_allclose(speed, learning_speeds(each, math.prod(shape)))


@pytest.fixture(scope="module")
def tiny(data) -> sl.Model:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10))
    return sl.load(net.eval(), np.zeros((2, 1, 8, 8), np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "int4", "activations": "uint4", "delay": 1, "fold_norms": 1, "optimizer": "sgd"},
        {"weights": "int2", "activations": "int3", "observer": "minmax"},
        {"weights": "binary", "overrides": {"0": {"weights": "int8"}}},
        {"weights": "pow2", "scales": "calibrated"},
        {"weights": "int4", "activations": "uint4", "scales": "clipping"},
    ],
    ids=["w4a4", "w2a3", "binary", "pow2", "clipping"],
)
def test_the_artifact_computes_what_was_trained(tiny, data, fields, tmp_path):
    found, record = trained(tiny, data, **fields)
    path = sl.export(found, "onnxruntime", tmp_path)
    x = inputs(data)
    outputs, expected = runtime("onnxruntime").load(path).run((x,)), found.predict(x)
    assert np.mean(np.abs(outputs - expected).max(1) < 1e-4 * np.abs(expected).max()) >= 0.95
    assert set(runtime("onnxruntime").integer_layers(path).values()) == {"integer"}
    assert set(record["integer_layers"]) == {"0", "4"}
    assert found.adapter.format_mismatches(found.native, found.quantization) == []
    reloaded = sl.load(found.save(tmp_path / "model.pt2"))
    np.testing.assert_array_equal(reloaded.predict(x), expected)
    assert reloaded.quantization == found.quantization
    weight = found.quantization.weights["4.weight"].round(found.parameters()["4.weight"])
    if fields["weights"] == "binary":
        np.testing.assert_array_equal(np.abs(weight), np.abs(weight[:, :1]).repeat(54, 1))


@pytest.mark.parametrize("fields", [{"weights": "ternary", "activations": "float32"}, {"weights": "int5"}])
def test_scales_take_in_what_folding_does(model, data, fields):
    step = QuantizationAwareTraining(**{**SHORT, **fields})
    state = start(step, model, Context(model, data.check(model.inputs), "onnxruntime")).calibrated()
    assert state.norms  # one of whose scales is below zero
    x = inputs(data)
    learning, folded = (s.site.model.edit(s.learning()) for s in (state, state.folded()))
    one, other = (model.adapter.outputs(native, (x,))[0] for native in (learning, folded))
    assert np.mean(np.abs(one - other).max(1) < 1e-3 * np.abs(one).max()) > 0.95  # rounding may fall on either side
    assert len(folded.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)) == 0


def test_decay_pulls_clipping_values_in(tiny, data):
    fields = {"scales": "clipping", "activations": "uint4", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.5}
    step = QuantizationAwareTraining(observer="minmax", batch_size=64, samples=64, **fields)
    state = start(step, tiny, Context(tiny, data.check(tiny.inputs), "onnxruntime")).calibrated()
    native, value = tiny.edit(state.learning()), tiny.graph.inputs[0]  # of which nothing lies beyond its grid
    trainer = tiny.adapter.trainer(native, tiny.native, step, 0, 1)
    trainer.step(next(data.split("calibration").batches(64)), 0.02)
    before, after = state.formats, tiny.adapter.learned(trainer.native(), state.formats)
    np.testing.assert_allclose(after.activations[value].scale, before.activations[value].scale * 0.99, rtol=1e-5)
    assert all((after.activations[name].zero == each.zero).all() for name, each in before.activations.items())


def test_training_repairs_few_bits(model, data):
    x, labels = inputs(data), np.concatenate([y for _, y in data.split("certification").batches(64)])

    def loss(found: Model) -> float:
        logits = torch.from_numpy(found.predict(x))
        return float(nn.functional.cross_entropy(logits, torch.from_numpy(labels)))

    fields = {"weights": "ternary", "activations": "float32"}
    before, after = trained(model, data, epochs=0, **fields)[0], trained(model, data, epochs=4, **fields)[0]
    assert loss(after) < 0.7 * loss(before)
    assert after.quantization.stored
    for name, each in after.quantization.weights.items():
        assert isinstance(each, Levels) and each.codebook.size == 3
        np.testing.assert_array_equal(each.round(after.parameters()[name]), after.parameters()[name])


def test_zeros_stay_and_steps_compose(model, data):
    steps = [
        sl.ChannelPruning(ratio=0.25),
        sl.SparsePruning(amount=0.5),
        QuantizationAwareTraining(weights="int5", **SHORT),
    ]
    small_ = sl.apply(model, steps, data)
    assert [entry["step"] for entry in small_.history] == [step.step for step in steps]
    for name, mask in small_.masks.items():
        assert not small_.quantization.weights[name].round(small_.parameters()[name])[~mask].any()
    with pytest.raises(sl.SlimlineError, match="Levels without a zero"):
        sl.apply(model, [*steps[:2], QuantizationAwareTraining(weights="binary", **SHORT)], data)


def test_it_goes_on_from_static_grids(model, data):
    static = sl.apply(model, sl.StaticQuantization(undo=False, keep=("9",)), data)
    again, _ = trained(static, data, epochs=0, keep=("9",))
    assert again.quantization.activations == static.quantization.activations
    assert again.quantization.layers == static.quantization.layers
    x = inputs(data)
    np.testing.assert_allclose(again.predict(x), static.predict(x), atol=0.05 * np.abs(static.predict(x)).max())
    moved, _ = trained(static, data, epochs=1, keep=("9",))
    assert moved.quantization.activations != static.quantization.activations
    with pytest.raises(sl.SlimlineError, match="cannot follow WeightQuantization"):
        sl.apply(sl.apply(model, sl.WeightQuantization()), QuantizationAwareTraining(**SHORT), data)
    with pytest.raises(sl.SlimlineError, match="Distillation cannot follow"):
        sl.apply(moved, sl.Distillation(epochs=1), data)


def test_a_stopped_training_ends_as_an_undisturbed_one_to_the_bit(model, data, tmp_path):
    fields = {"weights": "int3", "activations": "uint4", "delay": 1}

    def stops(at: int):
        left = [at]

        def progress(now: Progress) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return progress

    for at in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            trained(model, data, tmp_path, stops(at), **fields)
    resumed, record = trained(model, data, tmp_path, **fields)
    whole, expected = trained(model, data, **fields)
    assert record == expected
    assert resumed.quantization == whole.quantization
    for name, array in whole.parameters().items():
        np.testing.assert_array_equal(resumed.parameters()[name], array)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"delay": 9}, "within the 2 epochs"),
        ({"delay": 1, "activations": "float32"}, "leave it out"),
        ({"scales": "clipping", "activations": "float32"}, "clipping' is of activations"),
        ({"weights": (1.0, 1.0)}, "A codebook holds"),
        ({"overrides": {"0": {}}}, "says nothing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(sl.SlimlineError, match=sentence):
        QuantizationAwareTraining(**{**SHORT, **fields})


def test_what_a_target_cannot_hold_is_refused_before_training(model, data):
    for fields, sentence in (
        ({"weights": (-0.3, 0.1, 1.0)}, "onnxruntime cannot write weights as 3 levels"),
        ({"layers": ("nothing",)}, "finds no layer"),
    ):
        with pytest.raises(sl.SlimlineError, match=sentence):
            trained(model, data, **fields)
    step = QuantizationAwareTraining(weights="int4", **SHORT)
    with pytest.raises(sl.SlimlineError, match="litert cannot write weights as int4"):
        sl.apply(model, step, data, target="litert")


def test_a_loop_of_the_users_own(model, data):
    step = QuantizationAwareTraining(weights="int4", activations="uint4", samples=64)
    prepared = sl.prepare(model, step, data)
    before, net = sl.convert(prepared), prepared.native.train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for (x,), y in data.split("train").batches(48):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    found, x = sl.convert(prepared), inputs(data)
    assert before.quantization.weights != found.quantization.weights
    assert found.history[-1]["step"] == "QuantizationAwareTraining"
    expected = model.adapter.outputs(net.eval(), (x,))[0]
    assert np.mean(found.predict(x).argmax(1) == expected.argmax(1)) >= 0.9
    assert not found.adapter.format_mismatches(found.native, found.quantization)
    for wrong, sentence in (
        (sl.SparsePruning(amount=0.5), "prepares nothing"),
        (step.model_copy(update={"delay": 1}), "delay"),
    ):
        with pytest.raises(sl.SlimlineError, match=sentence):
            sl.prepare(sl.apply(model, sl.SparsePruning(amount=0.1)), wrong, data)
    with pytest.raises(sl.SlimlineError, match=r"not what slimline.prepare gave"):
        sl.convert(net)


@pytest.mark.parametrize(("dtype", "most"), [("binary", 1.0), ("ternary", 1.6), ((-2, -1, 0, 1), 2.0)])
def test_archives_hold_levels_packed(dtype, most, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 128, bias=False)).eval()
    plain = sl.load(net, np.zeros((2, 256), np.float32))
    packed = [
        sl.pack(sl.apply(plain, sl.WeightQuantization(dtype=kind)), tmp_path / f"{number}.slim").packed_bytes
        for number, kind in enumerate((dtype, "fp16"))
    ]
    empty = packed[1] - 2 * 256 * 128  # of which a random mantissa leaves nothing out
    assert packed[0] <= 256 * 128 * most / 8 + 128 * 4 + 8000
    assert empty < 8000
    found = sl.load(tmp_path / "0.slim")
    np.testing.assert_array_equal(
        found.predict(np.ones((1, 256), np.float32)),
        sl.apply(plain, sl.WeightQuantization(dtype=dtype)).predict(np.ones((1, 256), np.float32)),
    )


@pytest.mark.slow
def test_a_run_trains_measures_and_reports(tiny, data, tmp_path, no_clock):
    step = QuantizationAwareTraining(weights="ternary", activations="uint4", **{**SHORT, "epochs": 1})
    run = sl.compress(tiny, data, recipe=[step], output=tmp_path / "run", batch_sizes=(1,), progress=False)
    assert {name: each.bits for name, each in run.model.quantization.weights.items()} == {"0.weight": 2, "4.weight": 2}
    assert run.artifact.is_file()


def test_both_sides_of_zero_learn_by_the_formula_of_ttq():
    from slimline.frameworks.torch.learned import LearnedRounding

    each = Levels(np.float32(0.5), (), np.array([-1, 0, 1], np.float32))
    rng = np.random.default_rng(6)
    x, w = (rng.normal(size=400).astype(np.float32) for _ in range(2))
    module = LearnedRounding(each, 400, skews=True)
    np.testing.assert_array_equal(module(torch.tensor(x)).detach(), each.round(x))
    module.log_skew.data = torch.tensor([np.log(0.6)], dtype=torch.float32)
    found = module.format()
    np.testing.assert_allclose(found.codebook, [-0.6, 0, 1], rtol=1e-6)
    tensor = torch.tensor(x, requires_grad=True)
    rounded = module(tensor)
    np.testing.assert_allclose(rounded.detach(), found.round(x), rtol=1e-6)
    (torch.tensor(w) * rounded).sum().backward()
    below, above = x < -0.3 / 2, x > 0.5 / 2
    speed = 1 / (np.sqrt(400) * 0.5**2)  # of Esser et al., times what a factor's logarithm is worth
    np.testing.assert_allclose(
        module.log_skew.grad, speed * -0.3 * w[below].sum(), rtol=1e-4
    )  # equation 7 of Zhu et al.
    by_scale = 0.5 * w[above].sum() - 0.3 * w[below].sum()
    np.testing.assert_allclose(module.log_step.grad, speed * by_scale, rtol=1e-4)
    np.testing.assert_array_equal(tensor.grad, w)


def test_ternary_weights_with_two_scales_take_no_more_in_an_archive(tmp_path):
    plain = sl.load(nn.Sequential(nn.Linear(256, 128, bias=False)).eval(), np.zeros((2, 256), np.float32))
    step = QuantizationAwareTraining(weights="ttq", activations="float32")
    prepared = sl.prepare(plain, step, sl.Data(train=(np.random.default_rng(0).normal(size=(64, 256)).astype("f4"),)))
    skew = next(p for name, p in prepared.native.named_parameters() if name.endswith("log_skew"))
    skew.data += 0.3
    learned = sl.convert(prepared)
    np.testing.assert_allclose(learned.quantization.weights["0.weight"].codebook, [-np.exp(0.3), 0, 1], rtol=1e-6)
    assert sl.pack(learned, tmp_path / "small.slim").packed_bytes <= 256 * 128 * 1.6 / 8 + 128 * 4 + 8000
    x = np.ones((1, 256), np.float32)
    np.testing.assert_array_equal(sl.load(tmp_path / "small.slim").predict(x), learned.predict(x))


def test_ternary_weights_with_two_scales_are_stored_and_run(model, data, tmp_path):
    sparse = sl.apply(model, sl.SparsePruning(amount=0.3), data)
    fields = {"weights": "ttq", "activations": "float32", "epochs": 3}
    apart, record = trained(sparse, data, **fields)
    assert apart.quantization.stored and record["layers"]["9"]["format"].startswith("3 levels")
    for name, each in apart.quantization.weights.items():
        weight = apart.parameters()[name]
        assert each.codebook[0] not in (-1, 0) and list(each.codebook[1:]) == [0, 1]
        assert not weight[~sparse.masks[name]].any()
        np.testing.assert_array_equal(each.round(weight), weight)
    x = inputs(data)
    outputs = runtime("onnxruntime").load(sl.export(apart, "onnxruntime", tmp_path)).run((x,))
    np.testing.assert_allclose(outputs, apart.predict(x), atol=1e-4 * np.abs(outputs).max())
    sl.pack(apart, tmp_path / "small.slim")
    np.testing.assert_array_equal(sl.load(tmp_path / "small.slim").predict(x), apart.predict(x))
    with pytest.raises(sl.SlimlineError, match="onnxruntime cannot write weights as 3 levels"):
        trained(model, data, weights="ttq", activations="uint8")
