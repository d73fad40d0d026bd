"""Networks in parts: what crosses from one to the other, and where they may not be divided."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.graph.blocks import blocks
from slimline.graph.edits import Extract
from slimline.graph.segments import innermost, segments

torch = pytest.importorskip("torch")
nn = torch.nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Net(nn.Module):
    """A residual block, a long skip around it, norms that cannot be folded, a size of the batch, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.next = nn.Conv2d(1, 4, 3, padding=1), Residual(4), nn.Conv2d(4, 4, 1)
        self.norm, self.drop, self.head = nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Linear(8 * 36, 5)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        z = torch.cat([self.next(self.block(y)), y], 1)
        return self.head(self.drop(torch.relu(self.norm(z)).reshape(x.shape[0], -1)))


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_mean.uniform_(-1, 1)
    net.norm.running_var.uniform_(0.5, 2)
    return sl.load(net, np.zeros((2, 1, 6, 6), np.float32))


WEIGHTS = ("stem.weight", "block.first.weight", "block.second.weight", "next.weight", "head.weight")


def test_parts_begin_at_layers_but_not_within_blocks(model) -> None:
    every = segments(model.graph, WEIGHTS, innermost(blocks(model.graph)))
    assert [each.layers for each in every] == [("stem",), ("block.first", "block.second"), ("next",), ("head",)]
    singles = segments(model.graph, WEIGHTS)
    assert [each.layers for each in singles] == [("stem",), ("block.first",), ("block.second",), ("next",), ("head",)]
    assert [each.layers for each in segments(model.graph, WEIGHTS[2:4])] == [("block.second",), ("next",)]
    assert len(singles[2].inputs) == 2  # the branch, and what it is added to
    assert every[-1].outputs == model.graph.outputs


def test_norms_in_front_of_a_branch_are_in_its_part() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    net = sl.load(nn.Sequential(layer, nn.Linear(16, 4)).eval(), np.zeros((2, 6, 16), np.float32))
    names = [name for name in net.parameters() if name.endswith("weight") and "norm" not in name]
    every = segments(net.graph, names, innermost(blocks(net.graph)))
    assert [each.layers for each in every] == [("0.self_attn",), ("0.linear1", "0.linear2"), ("1",)]
    assert len(every[1].inputs) == 1  # what is normalised and what is added to are one value


@pytest.mark.parametrize("pruned", [False, True])
def test_parts_one_behind_the_other_are_the_network(model, pruned) -> None:
    if pruned:  # whose graph notes no shapes
        model = sl.apply(model, sl.ChannelPruning(ratio=0.25, layers=("next", "stem")))
    x = np.random.default_rng(0).normal(size=(7, 1, 6, 6)).astype(np.float32)
    values = {model.graph.inputs[0]: x}
    for each in segments(model.graph, WEIGHTS):
        native = model.edit(Extract(each.inputs, each.outputs))
        answers = model.adapter.outputs(native.train(), tuple(values[name] for name in each.inputs))
        assert model.adapter.output_names(native) == each.outputs
        values |= dict(zip(each.outputs, answers, strict=True))
        assert all(n in model.parameters() for n in dict(native.named_parameters()))
    np.testing.assert_allclose(values[model.graph.outputs[0]], model.predict(x), atol=1e-5)


def test_a_weight_is_in_one_part_and_the_batch_comes_first() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.relu(self.same(torch.relu(self.other(self.same(x)))))
            return self.last(x.reshape(-1, 4)).reshape(x.shape)

    net = sl.load(Twice().eval(), np.zeros((2, 3, 4), np.float32))
    names = ("same.weight", "other.weight", "last.weight")
    assert [each.layers for each in segments(net.graph, names)] == [("same", "other", "last")]
