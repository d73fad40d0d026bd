import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter, adapter_for
from slimline.frameworks.torch.native import set_training
from slimline.graph.units import Units
from tests.zoo_torch import ZOO, conv_bn

TORCH = adapter("torch")
X = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
IMAGES = ZOO["plain"][1]()


class Function(nn.Module):
    """A linear layer, then any function of its output."""

    def __init__(self, function, width=8):
        super().__init__()
        self.fc, self.function = nn.Linear(8, width), function

    def forward(self, x):
        return self.function(self.fc(x))


def graph_of(module, *inputs):
    native, example = TORCH.load(module, inputs)
    return TORCH.read(native, example)


def node(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def test_capturing_leaves_the_users_module_as_it_was():
    module = nn.Sequential(conv_bn(3, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1024, 2)).train()
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    native, _ = TORCH.load(module, IMAGES)
    native.train()(torch.from_numpy(IMAGES[0])).sum().backward()
    with torch.no_grad():
        for p in native.parameters():
            p.zero_()
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert list(native.state_dict()) == list(before)


@pytest.mark.parametrize("name", ["resnet", "bert", "swin", "unet"])
def test_the_captured_model_predicts_what_the_users_does_at_any_batch_size(name):
    factory, example = ZOO[name]
    module = factory()
    native, _ = TORCH.load(module, tuple(x[:1] for x in example()))
    for rows in (1, 3):
        inputs = tuple(np.resize(x, (rows, *x.shape[1:])) for x in example())
        expected = module(*map(torch.from_numpy, inputs)).detach().numpy()
        np.testing.assert_allclose(TORCH.outputs(native, inputs)[0], expected, rtol=1e-5, atol=1e-6)


def test_training_flags_switch_batch_norm_and_dropout():
    native, _ = TORCH.load(nn.Sequential(conv_bn(3, 4), nn.Dropout(0.5)), IMAGES)
    x = torch.from_numpy(IMAGES[0])
    norm = "0.1.running_mean"
    before = native.state_dict()[norm].clone()
    first, second = native(x), native(x)
    assert torch.equal(first, second) and torch.equal(before, native.state_dict()[norm])
    native.train()
    first, second = native(x), native(x)
    assert not torch.equal(first, second) and not torch.equal(before, native.state_dict()[norm])
    set_training(native, False)
    assert not native.training and torch.equal(native(x), native(x))
    copied = copy.deepcopy(native).train()
    assert copied.training and not native.training


def test_reading_a_model_in_training_does_not_move_its_statistics():
    native, example = TORCH.load(conv_bn(3, 4), IMAGES)
    native.train()
    before = {k: v.clone() for k, v in native.state_dict().items()}
    TORCH.read(native, example)
    assert all(torch.equal(before[k], v) for k, v in native.state_dict().items())
    assert native.training


def test_layers_parameters_and_activations_have_the_users_names():
    native, example = TORCH.load(ZOO["resnet"][0](), IMAGES)
    graph = TORCH.read(native, example)
    first = node(graph, "conv2d")
    assert (first.layer, first.kind, first.target) == ("0.0", "conv", "aten.conv2d")
    assert first.inputs == (graph.inputs[0], "0.0.weight", None)
    assert graph.values["conv2d"].shape == (2, 10, 16, 16)
    assert str(first.attributes["equation"]) == "b i . ., o i . ., o -> b o . ."
    assert graph.trainable == {k for k, _ in ZOO["resnet"][0]().named_parameters()}
    assert set(graph.parameters) == set(ZOO["resnet"][0]().state_dict())
    functions = [n.attributes["function"] for n in graph.nodes if n.kind == "elementwise"]
    assert functions.count("relu") == 7 and functions.count("add") == 3


@pytest.mark.parametrize(
    ("function", "kinds", "named"),
    [
        (F.relu6, ["elementwise"], "relu6"),
        (lambda x: x.clamp(min=0), ["elementwise"], "relu"),
        (lambda x: x.clamp(-1, 1), ["elementwise"], "clip"),
        (lambda x: x.mul_(2), ["elementwise"], "mul"),
        (lambda x: torch.stack([x, x], 1), ["reshape", "reshape", "concat"], None),
        (lambda x: x.view(-1, 2, 4).unbind(1)[1], ["reshape", "select", "select"], None),
        (lambda x: F.glu(x, 1), ["slice", "slice", "elementwise"], "glu"),
        (lambda x: x.tensor_split(3, 1)[0], ["split"], None),
        (lambda x: x[:, torch.tensor([3, 0, 7])], ["slice", "take"], None),
        (lambda x: x.roll(1, 1), ["pool"], "other"),
        (lambda x: x.cumsum(1), ["pool"], "other"),
        (lambda x: x.max(1)[0], ["reduce"], "max"),
        (lambda x: x.sort(1)[0], ["pool"], "other"),
        (lambda x: x.renorm(2, 0, 1.0), ["unknown"], None),
        (lambda x: x.norm(dim=1, keepdim=True), ["reduce"], "norm"),
        (lambda x: x.repeat(1, 3), ["expand"], None),
    ],
)
def test_operators_become_neutral_ones(function, kinds, named):
    graph = graph_of(Function(function), X)
    found = [n for n in graph.nodes if n.kind != "linear" and n.attributes.get("reason") != "a constant"]
    assert [n.kind for n in found] == kinds
    if named:
        assert found[-1].attributes["function"] == named


def test_what_has_no_rule_is_frozen_with_operator_and_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = Function(lambda x: x.renorm(2, 0, 1.0)), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.fc(x))

    units = Units(graph_of(Net(), X))
    assert units.units == ()
    assert units.frozen[0].reason == "aten.renorm in fc: slimline has no rule for it"


def test_a_dimension_that_training_fixed_is_kept_as_the_only_batch():
    native, example = TORCH.load(Function(lambda x: x.view(4, 2, 4).mean(1)), (np.resize(X, (4, 8)),))
    assert native.fixed_batch == 4 and len(example[0]) == 4
    assert TORCH.outputs(native, example)[0].shape == (4, 4)
    with pytest.raises(SlimlineError, match="batches of exactly 4, not 2"):
        TORCH.outputs(native, (X,))[0]


def test_bad_input_is_one_sentence():
    def branch(x):
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(SlimlineError, match="needs example_inputs"):
        TORCH.load(nn.Linear(8, 2), None)
    with pytest.raises(SlimlineError, match="cannot capture Function"):
        TORCH.load(Function(branch), (X,))
    with pytest.raises(SlimlineError, match="cannot capture Linear"):
        TORCH.load(nn.Linear(8, 2), (X[:, :5],))
    with pytest.raises(SlimlineError, match="example inputs are empty"):
        TORCH.load(nn.Linear(8, 2), (X[:0],))
    broken = nn.Linear(8, 2)
    nn.init.constant_(broken.bias, float("nan"))
    with pytest.raises(SlimlineError, match=r"NaN or infinity \(first in bias\)"):
        TORCH.load(broken, (X,))
    native, _ = TORCH.load(nn.Linear(8, 2), (X,))
    with pytest.raises(SlimlineError, match=r"cannot take inputs float32\(2, 5\)"):
        TORCH.outputs(native, (X[:, :5],))[0]


def test_a_bound_that_was_never_set_may_be_infinite():
    class Clipped(nn.Module):
        def __init__(self, bound):
            super().__init__()
            self.fc, self.last = nn.Linear(8, 12), nn.Linear(12, 2)
            if isinstance(bound, nn.Parameter):
                self.bound = bound
            else:
                self.register_buffer("bound", bound)

        def forward(self, x):
            return self.last(self.fc(x).clamp(max=self.bound))

    infinite = torch.tensor(float("inf"))
    model = sl.load(Clipped(infinite), X)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5))
    np.testing.assert_allclose(plan.apply(model).predict(X), plan.mask(model).predict(X), atol=1e-5)
    for module in (Clipped(infinite.expand(12).clone()), Clipped(nn.Parameter(infinite))):
        with pytest.raises(SlimlineError, match="NaN or infinity"):
            sl.load(module, X)


def test_rows_that_a_layer_only_passes_on_are_no_axes_of_its_weights():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rows = nn.Linear(8, 12), nn.Linear(2, 12)
            self.last = nn.Linear(12, 2)
            self.register_buffer("places", torch.linspace(0, 1, 10).reshape(5, 2))
            self.register_buffer("which", torch.tensor([0, 3, 3, 1]))

        def forward(self, x):
            return self.last(self.first(x) * self.rows(self.places)[self.which].sum(0))

    units = Units(graph_of(Table(), X))
    assert [u.size for u in units.units] == [12, 2]
    assert [f.name for f in units.frozen] == ["last (o)"]


def test_an_exported_program_is_a_source():
    module = Function(torch.tanh)
    program = torch.export.export(module, (torch.from_numpy(X),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert adapter_for(program) is TORCH
    native, example = TORCH.load(program, None)
    assert native.fixed_batch is None and example[0].shape == (2, 8)
    expected = module(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_array_equal(TORCH.outputs(native, (X,))[0], expected)
    assert native.fc.weight is not module.fc.weight


def test_a_parameter_called_like_an_input_is_another_value():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.linear = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(3, 8))

        def forward(self, x):
            return F.linear(x * self.x, self.linear)

    graph = graph_of(Net(), X)
    names = [*graph.inputs, *graph.parameters, *(o for n in graph.nodes for o in n.outputs)]
    assert len(set(names)) == len(names)
    assert {"x", "linear"} == set(graph.parameters)


def test_heads_that_are_only_used_in_training_are_no_part_of_the_captured_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.aux = nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    native, _ = TORCH.load(Net().train(), (X,))
    assert list(native.state_dict()) == ["fc.weight", "fc.bias"]


def test_a_forward_that_takes_any_number_of_inputs_keeps_a_free_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, *xs):
            return self.fc(sum(xs))

    native, _ = TORCH.load(Net(), (X, X))
    assert native.fixed_batch is None
    assert TORCH.outputs(native, (X[[0, 1, 0]], X[[1, 1, 0]]))[0].shape == (3, 2)


def test_outputs_of_a_class_become_a_dict():
    from collections import namedtuple

    pair = namedtuple("pair", "a b")
    native, example = TORCH.load(Function(lambda x: pair(x, x.sum())), (X,))
    outputs = native(torch.from_numpy(X))
    assert type(outputs) is dict and outputs["a"].shape == (2, 8)
    assert len(TORCH.read(native, example).outputs) == 2
