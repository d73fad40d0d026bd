"""Placement on graphs written by hand, where the right answer is known."""

from __future__ import annotations

import pytest

from slimline.graph import ops
from slimline.graph.ir import Graph, Node, Value
from slimline.graph.placement import place
from slimline.runtimes.base import runtime

ORT, LITERT = runtime("onnxruntime").policy, runtime("litert").policy


class Net:
    """Builds small graphs: each method adds an operator and answers the name of its result."""

    def __init__(self) -> None:
        self.values = {"x": Value("x", (2, 8, 4, 4))}
        self.nodes: list[Node] = []
        self.stored: list[str] = []

    def add(
        self, name: str, kind: str, inputs: tuple[str | None, ...], attributes: dict, shape: tuple, layer: str
    ) -> str:
        self.values[name] = Value(name, shape)
        self.nodes.append(Node(name, kind, inputs, (name,), attributes, layer or name))
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        self.values[name] = Value(name, shape)
        if name not in self.stored:
            self.stored.append(name)
        return name

    def conv(self, name: str, x: str, layer: str = "", weight: str | None = None, **options: bool) -> str:
        inputs = (x, self.weight(weight or f"{name}.weight", (8, 8, 3, 3)), self.weight(f"{name}.bias", (8,)))
        return self.add(name, "conv", inputs, ops.conv(2, **options), (2, 8, 4, 4), layer)

    def linear(self, name: str, x: str) -> str:
        inputs = (x, self.weight(f"{name}.weight", (5, 8)), self.weight(f"{name}.bias", (5,)))
        return self.add(name, "linear", inputs, ops.linear(2), (2, 5), "")

    def norm(self, name: str, x: str) -> str:
        stored = tuple(self.weight(f"{name}.{n}", (8,)) for n in ("weight", "bias", "mean", "var"))
        return self.add(name, "batch_norm", (x, *stored), ops.batch_norm(4), (2, 8, 4, 4), "")

    def map(self, name: str, function: str, *inputs: str, layer: str = "") -> str:
        shapes = [self.values[i].shape for i in inputs]
        return self.add(name, "elementwise", inputs, ops.elementwise(shapes, function), shapes[0], layer)

    def concat(self, name: str, *inputs: str) -> str:
        return self.add(name, "concat", inputs, ops.concat(1), (2, 8 * len(inputs), 4, 4), "")

    def maxpool(self, name: str, x: str) -> str:
        return self.add(name, "pool", (x,), ops.pool(4, (2, 3), "max"), (2, 8, 2, 2), "")

    def mean(self, name: str, x: str) -> str:
        return self.add(name, "reduce", (x,), ops.reduce(4, (2, 3), False, "mean"), (2, 8), "")

    def graph(self, *outputs: str) -> Graph:
        return Graph(tuple(self.nodes), self.values, tuple(self.stored), frozenset(self.stored), ("x",), outputs, 2)


def residual() -> Graph:
    """stem, bn, relu; a block of two convolutions with an identity; mean; head."""
    net = Net()
    stem = net.map("relu", "relu", net.norm("bn", net.conv("stem", "x")))
    inner = net.map("relu1", "relu", net.conv("conv1", stem))
    total = net.map("sum", "add", net.conv("conv2", inner), stem, layer="block")
    return net.graph(net.linear("head", net.mean("mean", net.map("relu2", "relu", total, layer="block"))))


def test_residual_network_is_integer_from_end_to_end() -> None:
    placement = place(residual(), policy=ORT)
    # After norm and activation, not before; the sum only after its relu; the logits not at all.
    assert placement.activations == ("x", "relu", "relu1", "conv2", "relu2", "mean")
    assert placement.layers == ("stem", "conv1", "conv2", "head")
    assert placement.weights == {"stem.weight": 0, "conv1.weight": 0, "conv2.weight": 0, "head.weight": 0}
    assert placement.biases["conv2.weight"] == ("relu1", "conv2.bias")
    assert placement.owners["relu2"] == "block"
    assert placement.owners["x"] == "stem"


def test_litert_rounds_the_outputs_and_takes_linear_weights_by_output() -> None:
    placement = place(residual(), policy=LITERT)
    assert placement.activations == ("x", "relu", "relu1", "conv2", "relu2", "mean", "head")
    assert placement.weights["head.weight"] == placement.weights["stem.weight"] == 0


@pytest.mark.parametrize(
    ("text", "shape", "axes"),
    [
        ("bchw,kc->bkhw", (8, 8), (0, 0)),
        ("bchw,hcwk->bk", (4, 8, 4, 8), (3, 3)),
        ("bchw,hck->bkhw", (4, 8, 8), (2, None)),  # a matrix for each row of the image
        ("bchw,ck->bkh", (8, 8), (1, None)),  # what is read is summed as well
        ("bchw,cnk->bnkh", (8, 2, 4), (None, None)),  # no single axis names the outputs
    ],
)
def test_scales_of_einsums(text: str, shape: tuple[int, ...], axes: tuple[int | None, int | None]) -> None:
    net = Net()
    net.weight("w", shape)
    net.add("e", "einsum", ("x", "w"), ops.einsum(text, weights=True), (2, 8, 4, 4), "")
    assert tuple(place(net.graph("e"), policy=policy).weights["w"] for policy in (ORT, LITERT)) == axes


def test_a_layer_left_in_float_takes_its_needless_grids_with_it() -> None:
    placement = place(residual(), keep=("conv1", "conv2", "block"), policy=ORT)
    assert placement.layers == ("stem", "head")
    # The stem answers in integers; nothing between it and the mean before the head does.
    assert placement.activations == ("x", "relu", "mean")


def test_only_the_layers_asked_for() -> None:
    placement = place(residual(), layers=("head",), policy=ORT)
    assert placement.layers == ("head",)
    assert placement.activations == ("mean",)
    assert place(residual(), layers=("nothing",), policy=ORT).activations == ()


def test_activation_without_integer_kernel_is_rounded_on_both_sides() -> None:
    net = Net()
    graph = net.graph(net.conv("b", net.map("swish", "silu", net.conv("a", "x"))))
    assert place(graph, policy=ORT).activations == ("x", "a", "swish", "b")


def test_linear_layers_may_answer_in_float() -> None:
    net = Net()
    net.values["x"] = Value("x", (2, 8))
    net.linear("a", "x")
    net.values["a"] = Value("a", (2, 8))
    graph = net.graph(net.linear("b", net.map("gelu", "gelu", "a")))
    assert place(graph, policy=ORT).activations == ("x", "gelu")


def test_moving_operators_take_the_grid_of_their_input() -> None:
    net = Net()
    pooled = net.maxpool("pool", net.map("relu", "relu", net.conv("a", "x")))
    assert place(net.graph(net.conv("b", pooled)), policy=ORT).activations == ("x", "relu", "b")


def test_concat_has_its_own_grid_or_shares_one() -> None:
    net = Net()
    a, b = net.conv("a", "x"), net.map("relu", "relu", net.conv("b", "x"))
    graph = net.graph(net.conv("c", net.concat("cat", a, net.maxpool("pool", b))))
    own = place(graph, policy=ORT)
    assert own.activations == ("x", "a", "relu", "cat", "c")
    assert set(own.groups.values()) == set(own.activations)
    shared = place(graph, policy=LITERT).groups
    assert shared["relu"] == shared["cat"] == shared["a"] == "a"
    assert shared["x"] == "x"


def test_an_activation_read_twice_is_not_fused_away() -> None:
    net = Net()
    a = net.conv("a", "x")
    total = net.map("sum", "add", net.conv("b", net.map("relu", "relu", a)), a)
    placement = place(net.graph(net.conv("c", total)), policy=ORT)
    assert placement.activations == ("x", "a", "relu", "b", "sum", "c")


def test_sums_with_numbers_or_stored_tensors_stay_float_on_onnxruntime() -> None:
    net = Net()
    shifted = net.map("plus3", "add", net.conv("a", "x"))
    moved = net.map("plus", "add", shifted, net.weight("offset", (2, 8, 4, 4)))
    placement = place(net.graph(net.conv("c", moved)), policy=ORT)
    assert "offset" not in placement.activations
    assert "plus3" not in placement.activations


def test_layers_that_cannot_be_integer_are_named_with_the_reason() -> None:
    net = Net()
    up = net.conv("up", "x", transposed=True)
    net.conv("tied", up)
    net.add("lookup", "embedding", ("x", "tied.weight"), ops.embedding(1), (2, 8, 4, 4), "")
    placement = place(net.graph("tied", "lookup"), policy=ORT)
    assert placement.layers == ()
    assert "transposed" in placement.refused["up"]
    assert "shared" in placement.refused["tied"]
    assert place(net.graph("tied", "lookup"), policy=LITERT).layers == ("up",)


def test_a_weight_shared_by_two_integer_layers_is_fine_unless_one_stays_float() -> None:
    net = Net()
    graph = net.graph(net.conv("b", net.conv("a", "x", weight="w"), weight="w"))
    assert place(graph, policy=ORT).weights == {"w": 0}
    assert place(graph, keep=("b",), policy=ORT).layers == ()


def test_weight_axes_of_grouped_depthwise_and_transposed_kernels() -> None:
    def axis(shape: tuple[int, ...], policy: str = "litert", **options: object) -> int | None:
        net = Net()
        net.weight("w", shape)
        net.add("c", "conv", ("x", "w", None), ops.conv(2, **options), (2, 8, 4, 4), "")  # type: ignore[arg-type]
        return place(net.graph("c"), policy=runtime(policy).policy).weights["w"]

    assert axis((8, 8, 3, 3)) == 0
    assert axis((8, 4, 3, 3), groups=2) == 0
    assert axis((8, 8, 2, 2), transposed=True) is None  # the converter takes one scale only
    assert axis((3, 3, 8, 8), channels_last=True) == 3
    assert axis((3, 3, 8, 1), channels_last=True, depthwise=True) == 2
    assert axis((3, 3, 8, 2), channels_last=True, depthwise=True) is None


def test_integers_are_never_rounded() -> None:
    net = Net()
    net.values["x"] = Value("x", (2, 8, 4, 4), "int64")
    assert place(net.graph(net.conv("a", "x")), policy=ORT).activations == ()
