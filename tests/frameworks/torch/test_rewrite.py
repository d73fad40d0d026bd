"""apply == mask, on every family of the zoo; and apply == slicing by hand."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.graph.edits import PutTensors
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning
from tests.zoo_torch import ZOO

TORCH = adapter("torch")


@functools.cache
def captured(name: str) -> Model:
    factory, example = ZOO[name]
    return Model(TORCH, *TORCH.load(factory(), example()))


def batch(model: Model, rows: int = 5) -> tuple[np.ndarray, ...]:
    """Inputs of another batch size than the one the model was captured with."""
    rng = np.random.default_rng(1)
    made = []
    for x in model.example:
        values = (
            rng.standard_normal((rows, *x.shape[1:])) if x.dtype == np.float32 else np.resize(x, (rows, *x.shape[1:]))
        )
        made.append(values.astype(x.dtype))
    return tuple(made)


def removing(model: Model, **units: tuple[int, ...]) -> Plan:
    return Plan(Units(model.graph), units)


def close(left: np.ndarray, right: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(left - right).max() <= tolerance * np.abs(right).max()


@pytest.mark.parametrize("factors", ["largest", "all"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", ZOO)
def test_removing_computes_what_masking_computes(name, ratio, factors):
    model = captured(name)
    found = plan(model, ChannelPruning(ratio=ratio, factors=factors))
    inputs = batch(model)
    small, masked = found.apply(model), found.mask(model)
    before, removed, zeroed = (m.predict(*inputs) for m in (model, small, masked))
    close(removed, zeroed)
    assert np.abs(before - zeroed).max() > 1e-3 * np.abs(before).max()  # something was really cut
    assert small.graph.size == found.parameters < model.graph.size
    assert sorted(small.parameters()) == sorted(model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_a_pruned_model_saves_loads_equal_and_trains(name, tmp_path):
    model = captured(name)
    small = plan(model, ChannelPruning(ratio=0.5, factors="all")).apply(model)
    small.save(tmp_path / "small.pt2")
    native, example, metadata = TORCH.open(tmp_path / "small.pt2", False)
    inputs = batch(model)
    np.testing.assert_array_equal(TORCH.outputs(native, inputs)[0], small.predict(*inputs))
    np.testing.assert_array_equal(example[0], model.example[0])
    assert metadata["history"][0]["step"] == "prune"
    assert TORCH.read(native, example) == small.graph
    trained = copy.deepcopy(native).train()
    output = trained(*map(torch.from_numpy, inputs))
    output.square().mean().backward()
    without = [k for k, p in trained.named_parameters() if p.grad is None]
    assert without == []
    with torch.no_grad():
        for p in trained.parameters():
            p -= 0.1 * p.grad
    assert not np.array_equal(TORCH.outputs(trained.eval(), inputs)[0], small.predict(*inputs))


def test_pruning_twice_is_pruning(tmp_path):
    model = captured("swin")
    step = ChannelPruning(ratio=0.3, factors="all")
    once = plan(model, step).apply(model)
    found = plan(once, step)
    assert found.parameters < once.graph.size < model.graph.size
    inputs = batch(model)
    close(found.apply(once).predict(*inputs), found.mask(once).predict(*inputs))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(F.softmax(self.norm(self.a(x)), -1))


def test_removed_positions_are_those_of_a_network_sliced_by_hand():
    torch.manual_seed(0)
    module = Normed().eval()
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    model = Model(TORCH, *TORCH.load(module, (x,)))
    found = removing(model, a=(1, 4, 5))
    stay = [0, 2, 3, 6, 7]
    with torch.no_grad():
        y = torch.from_numpy(x) @ module.a.weight[stay].T + module.a.bias[stay]
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        y = torch.softmax(y * module.norm.weight[stay] + module.norm.bias[stay], -1)
        expected = (y @ module.b.weight[:, stay].T + module.b.bias).numpy()
    close(found.apply(model).predict(x), expected, 1e-5)
    close(found.mask(model).predict(x), expected, 1e-5)
    weight = found.mask(model).parameters()["a.weight"]
    assert not weight[[1, 4, 5]].any() and weight[stay].all()


def test_attention_keeps_the_scale_it_was_trained_with():
    model = captured("vit")
    small = plan(model, ChannelPruning(ratio=0.5, factors="all")).apply(model)
    scales = [n.kwargs["scale"] for n in small.native.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert scales == [pytest.approx(6**-0.5)] * 2


def test_a_slice_of_nothing_stays_a_slice():
    """As rotary embeddings have it that turn all of a head: an empty list of positions could not be saved."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(torch.cat([x[:, :12].tanh(), x[:, 12:]], -1))

    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    model = Model(TORCH, *TORCH.load(Turned().eval(), (x,)))
    plan = removing(model, first=(0, 1, 5))
    small = plan.apply(model)
    close(small.predict(x), plan.mask(model).predict(x))
    assert all(tensor.size for tensor in small.parameters().values())


def test_the_model_that_is_given_stays_as_it_was():
    model = captured("mobilenet_v3")
    before, code = model.parameters(), model.native.code
    found = plan(model, ChannelPruning(ratio=0.5))
    found.apply(model), found.mask(model)
    after = model.parameters()
    assert model.native.code == code
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_replace_puts_tensors_in_under_every_tied_name():
    model = captured("tied_lm")
    new = np.full(model.parameters()["embed.weight"].shape, 0.5, np.float32)
    native = model.edit(PutTensors({"embed.weight": new}))
    assert native.head.weight is native.embed.weight
    assert (TORCH.parameters(native)["embed.weight"] == 0.5).all()
    assert not (model.parameters()["embed.weight"] == 0.5).any()
    with pytest.raises(SlimlineError, match=r"embed\.weight has shape"):
        model.edit(PutTensors({"embed.weight": new[:-1]}))
    with pytest.raises(SlimlineError, match="no tensor 'nothing'"):
        model.edit(PutTensors({"nothing": new}))
