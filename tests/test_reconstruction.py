"""Training by parts, without labels: it beats rounding, artifacts compute what it gives, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import slimline as sl
from slimline.basics.progress import Progress
from slimline.graph.edits import LearnRounding
from slimline.graph.quantization import Quantization
from slimline.methods.adaround import exponent, towards
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, perform

torch = pytest.importorskip("torch")
nn = torch.nn

BLOCK = {"reconstruct": "block", "weights": "int4", "samples": 256, "epochs": 10, "learning_rate": 1e-3}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.branch = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


@pytest.fixture(scope="module")
def model(images) -> sl.Model:
    x, y = map(torch.from_numpy, images)
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*stem, Residual(8), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(64, 10)).train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(150):
        rows = torch.arange(64) + 64 * (step % 18)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return sl.load(net.eval(), np.zeros((2, 1, 8, 8), np.float32))


@pytest.fixture(scope="module")
def data(images) -> sl.Data:
    return sl.Data(calibration=(images[0][:256],))


@pytest.fixture(scope="module")
def everything(images) -> sl.Data:
    """With what training of the whole network reads, as the labels."""
    x, y = images
    return sl.Data(
        train=(x[:200], y[:200]), selection=(x[200:300], y[200:300]), calibration=(x[:256],), overlap="allow"
    )


def error(model: sl.Model, other: sl.Model, x: np.ndarray) -> float:
    expected = model.predict(x)
    return float(np.mean((other.predict(x) - expected) ** 2) / np.var(expected))


@pytest.mark.parametrize("activations", ["uint4", "uint8"])
def test_it_beats_rounding_where_it_has_not_looked(model, data, everything, images, activations, tmp_path) -> None:
    x = images[0][1200:]
    step = sl.QuantizationAwareTraining(activations=activations, drop=0.5 if activations == "uint4" else 0.0, **BLOCK)
    learned = sl.apply(model, step, data)
    nearest = sl.apply(model, step.model_copy(update={"epochs": 0, "reconstruct": None}), everything)
    assert error(model, learned, x) < 0.6 * error(model, nearest, x)
    if activations == "uint8":
        static = sl.StaticQuantization(weights="int4", rounding="gptq", propagate=False, undo=False)
        assert error(model, learned, x) < 0.75 * error(model, sl.apply(model, static, data), x)
    path = sl.export(learned, "onnxruntime", tmp_path)
    outputs, expected = runtime("onnxruntime").load(path).run((x,)), learned.predict(x)
    assert np.mean(outputs.argmax(1) == expected.argmax(1)) >= 0.995
    assert np.mean(np.abs(outputs - expected).max(1) < 1e-4 * np.abs(expected).max()) >= 0.95
    assert set(runtime("onnxruntime").integer_layers(path).values()) == {"integer"}
    assert not learned.adapter.format_mismatches(learned.native, learned.quantization)


def done(model: sl.Model, data: sl.Data, checkpoint=None, tell=None, **fields):
    step = sl.QuantizationAwareTraining(**{**BLOCK, "activations": "uint4", "epochs": 2, **fields})
    result = perform(
        step, model, Context(None, data.check(model.inputs), "onnxruntime", 0, checkpoint=checkpoint, tell=tell)
    )
    return result.model, result.record


def test_parts_are_reported_and_blocks_are_whole(model, data) -> None:
    record = done(model, data)[1]
    assert [part["layers"] for part in record["parts"]] == [["0"], ["3.branch.0", "3.branch.3"], ["4"], ["7"]]
    assert all(part["error_after"] <= part["error"] for part in record["parts"])
    assert any(part["error_after"] < 0.95 * part["error"] for part in record["parts"])
    singles = done(model, data, reconstruct="layer", activations="float32", epochs=1)
    assert [len(part["layers"]) for part in singles[1]["parts"]] == [1] * 5
    assert singles[0].quantization.stored


def test_stopped_in_the_middle_it_ends_with_the_same_bits(model, data, tmp_path) -> None:
    left = [2 * 8 + 5]  # in the second part

    def stops(now: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(model, data, tmp_path, stops)
    told: list[Progress] = []
    resumed, record = done(model, data, tmp_path, told.append)
    assert len(told) == 3 * 2 * 8  # the first part was kept
    whole, expected = done(model, data)
    assert record == expected and resumed.quantization == whole.quantization
    for name, array in whole.parameters().items():
        np.testing.assert_array_equal(resumed.parameters()[name], array)


def test_zeros_stay_and_so_do_the_grids_of_a_step_before(model, data) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.6))
    static = sl.apply(sparse, sl.StaticQuantization(weights="int4", undo=False), data)
    fields = {"scales": "calibrated", "learning_rate": 1e-2, "activations": None}
    learned, start = (done(static, data, **fields, epochs=epochs)[0] for epochs in (2, 0))
    assert learned.quantization.activations == static.quantization.activations
    moved = []
    for name, mask in sparse.masks.items():
        each = learned.quantization.weights[name]
        np.testing.assert_array_equal(each.scale, static.quantization.weights[name].scale)
        rounded, before = (each.round(m.parameters()[name]) for m in (learned, start))
        assert not rounded[~mask].any()
        moved.append((rounded != before).any())
    assert any(moved)


def test_some_numbers_are_not_rounded_while_it_trains(model) -> None:
    grid = IntegerGrid(np.float32(0.5), (), 4, False, zero_point=np.asarray(3, np.int32))
    edit = LearnRounding(Quantization({model.graph.inputs[0]: grid}), drop=0.25)
    module = next(m for m in model.edit(edit).modules() if type(m).__name__ == "LearnedRounding")
    x = torch.rand(20000) + 0.01
    assert not module.training
    same = (module.train()(x) == x).float().mean()
    assert 0.22 < float(same) < 0.28
    assert torch.equal(module.eval()(x), torch.from_numpy(grid.round(x.numpy())))


def test_weights_move_between_two_codes_by_the_formula_of_adaround() -> None:
    from slimline.frameworks.torch.learned import LearnedRounding

    grid = IntegerGrid(np.asarray(0.5, np.float32), (), 4, True)
    rounding = LearnedRounding(grid, 5, fixed=True, soft=((5,), 0.3, 10))
    x = torch.tensor([0.7, -0.7, 0.0, 9.0, 0.1])
    np.testing.assert_allclose(rounding.between(x, hard=False)[:3].detach(), x[:3], atol=1e-6)  # it sets out from them
    for turn, power in ((1, None), (9, exponent(0.9))):
        rounding.turn.fill_(turn)
        rounding.moves.grad = None
        with torch.no_grad():
            rounding.moves.copy_(torch.tensor([1e-3, -5e-4, 1.0, 1.0, 2e-4]))
        (rounding.between(x, hard=False) * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
        moves = rounding.moves.detach().clone().requires_grad_()
        part = torch.tensor([0.4, 0.6, 0.01, 0.99, 0.2])  # above the codes 1, -2, 0, 7 and 0
        soft = ((1000 * moves - (1.2 / (part + 0.1) - 1).log()).sigmoid() * 1.2 - 0.1).clamp(0, 1)
        free = torch.tensor([True, True, False, False, True])  # zero stays, and 9 is beyond the grid
        loss = (torch.where(free, soft, 0) * 0.5 * torch.tensor([1.0, 2, 3, 4, 5])).sum()
        if power is not None:
            loss = loss + 0.3 * (1 - (2 * soft[free] - 1).abs() ** power).sum()
        loss.backward()
        np.testing.assert_allclose(rounding.moves.grad[free], moves.grad[free], rtol=1e-4, atol=1e-7)
    hard = rounding.eval()(x)
    np.testing.assert_array_equal(hard, [1.0, -1.0, 0.0, 3.5, 0.0])


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.lists(st.integers(-9, 9), min_size=4, max_size=4)
)
def test_weights_set_out_on_the_side_of_another_rounding(weights, codes) -> None:
    grid = IntegerGrid(np.asarray(0.25, np.float32), (), 4, True)
    x, other = np.array(weights, np.float32), np.array(codes, np.float32) / 4
    moved = towards(grid, x, other)
    np.testing.assert_array_equal(moved[x == 0], 0)
    low = np.clip(np.floor(x * 4), grid.low, grid.high)
    free = (x != 0) & (low < grid.high)
    nearer = np.clip(other * 4, low, low + 1)
    np.testing.assert_array_equal(grid.encode(moved)[free], nearer[free])


def test_adaround_turns_weights_to_one_of_two_codes(model, data) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.5))
    fields = {"rounding": "adaround", "weights": "int2", "activations": "uint8", "drop": 0.0, "learning_rate": 3e-4}
    learned, record = done(sparse, data, **fields, epochs=20)
    start, _ = done(sparse, data, **fields, epochs=0)
    assert all(part["error_after"] <= part["error"] for part in record["parts"])
    assert any(part["error_after"] < 0.95 * part["error"] for part in record["parts"])
    turned = []
    for name, mask in sparse.masks.items():
        each = learned.quantization.weights[name]
        codes, before = (each.encode(m.parameters()[name]).astype(int) for m in (learned, start))
        assert not codes[~mask].any()
        first = name == "0.weight"  # what later parts set out from makes up for errors of earlier ones
        if first:
            np.testing.assert_array_equal(each.scale, start.quantization.weights[name].scale)
            assert np.abs(codes - before).max() <= 1
        turned.append((codes != before).any())
        np.testing.assert_allclose(each.round(learned.parameters()[name]), learned.parameters()[name], atol=1e-6)
    assert any(turned)


def test_refusals(model, data) -> None:
    with pytest.raises(sl.SlimlineError, match="is of reconstruct"):
        sl.QuantizationAwareTraining(rounding="adaround")
    with pytest.raises(sl.SlimlineError, match="leave them out with reconstruct"):
        sl.QuantizationAwareTraining(reconstruct="block", delay=1)
    step = sl.QuantizationAwareTraining(**BLOCK)
    assert step.needs == ("calibration",) and (step.epochs, step.batch_size) == (10, 32)
    assert sl.QuantizationAwareTraining(**step.model_dump()) == step
    with pytest.raises(sl.SlimlineError, match="leave it out, or use"):
        sl.prepare(model, step, data)
    with pytest.raises(sl.SlimlineError, match="needs data"):
        perform(step, model, Context(None, None, "onnxruntime"))
    with pytest.raises(sl.SlimlineError, match="lower learning_rate"):
        done(model, data, learning_rate=1e30, epochs=3)
    unknown = replace(model, history=({"step": "ChannelPruning"},))  # as of a file: what it was made of is not known
    sl.apply(unknown, step.model_copy(update={"epochs": 0}), data)
