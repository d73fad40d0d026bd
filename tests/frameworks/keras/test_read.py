"""The neutral graph of Keras models, against what the models really compute."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.frameworks.keras import adapter
from slimline.frameworks.keras.functional import calls
from tests import zoo_keras

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip


@pytest.mark.parametrize("name", zoo_keras.SMALL)
def test_shapes_and_dtypes_are_those_of_the_running_model(name: str) -> None:
    native, example = adapter.load(zoo_keras.SMALL[name](), None)
    graph = adapter.read(native, example)
    found = [call for call in calls(native) if not call.is_input]
    tensors = [t for call in found for t in call.outputs]
    probe = keras.Model(native.inputs if len(example) > 1 else native.inputs[0], tensors)
    outputs = keras.tree.flatten(probe(list(example) if len(example) > 1 else example[0]))
    values = [v for call in found for v in call.names]
    assert [graph.values[v].shape for v in values] == [tuple(o.shape) for o in outputs]
    assert [graph.values[v].dtype for v in values] == [keras.backend.standardize_dtype(o.dtype) for o in outputs]


@pytest.mark.parametrize("name", zoo_keras.SMALL)
def test_graphs_are_whole_and_in_order(name: str) -> None:
    native, example = adapter.load(zoo_keras.SMALL[name](), None)
    graph = adapter.read(native, example)
    made = {*graph.inputs, *graph.parameters}
    for node in graph.nodes:
        assert set(filter(None, node.inputs)) <= made, node
        assert not set(node.outputs) & made
        made.update(node.outputs)
    assert set(graph.outputs) <= made
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    assert {n: a.shape for n, a in adapter.parameters(native).items()} == {
        n: graph.values[n].shape for n in graph.parameters
    }
    assert graph.size == sum(int(np.prod(v.shape)) for v in native.trainable_variables)


def test_every_layer_of_the_zoo_has_a_rule() -> None:
    for build in zoo_keras.SMALL.values():
        native, example = adapter.load(build(), None)
        assert not [n.label for n in adapter.read(native, example).nodes if n.kind == "unknown"]


def test_both_calls_of_a_shared_layer_read_the_same_weights() -> None:
    native, example = adapter.load(zoo_keras.shared(), None)
    nodes = {n.name: n for n in adapter.read(native, example).nodes}
    assert nodes["one"].inputs[1:] == nodes["one@1"].inputs[1:] == ("one/kernel", "one/bias")
    assert nodes["one"].inputs[0] != nodes["one@1"].inputs[0]
    assert nodes["one.activation@1"].layer == "one"


def equations(outputs: object, inputs: object) -> dict[str, str]:
    native, example = adapter.load(keras.Model(inputs, outputs), None)
    nodes = adapter.read(native, example).nodes
    return {n.name: str(n.attributes.get("equation", n.attributes)) for n in nodes}


def test_equations_of_convolutions() -> None:
    x = keras.Input((8, 8, 6))
    y = L.Conv2D(4, 3, groups=2, name="grouped")(x)
    z = L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise")(y)
    found = equations(L.Conv2DTranspose(5, 2, name="up")(z), x)
    assert found["grouped"] == "b . . (g i), . . i (g o), (g o) -> b . . (g o)"
    assert found["depthwise"] == "b . . g, . . g o, (g o) -> b . . (g o)"
    assert found["up"] == "b . . i, . . o i, o -> b . . o"


def test_equations_of_einsum_dense() -> None:
    x = keras.Input((5, 6))
    y = L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="e", name="heads")(x)
    z = L.EinsumDense("...de,def->...f", output_shape=7, name="mix")(y)
    found = equations(z, x)
    assert found["heads"] == "a b c, c d e, e -> a b d e"
    assert found["mix"] == "A B d e, d e f -> A B f"


def test_the_product_with_a_number_is_dense() -> None:
    """Keras says of it that it were sparse, which an einsum behind it cannot be traced with."""
    i = keras.Input((8, 16))
    y = L.EinsumDense("abc,cd->abd", (None, 16), name="einsum")(L.Dense(16, name="dense")(i) * 0.25)
    source = keras.Model(i, L.MultiHeadAttention(2, 8)(y * 0.5, y))
    native, example = adapter.load(source, None)
    x = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    np.testing.assert_allclose(adapter.outputs(native, (x,))[0], source(x), atol=1e-5)
    assert {"einsum", "dense"} <= {node.layer for node in adapter.read(native, example).nodes}


def test_indexing_becomes_slices_selections_and_new_axes() -> None:
    x = keras.Input((6, 8))
    native, example = adapter.load(keras.Model(x, x[:, 2, None, 1:7:2]), None)
    nodes = adapter.read(native, example).nodes
    assert [n.kind for n in nodes] == ["select", "slice", "reshape"]
    assert nodes[0].attributes == {"axis": 1, "index": 2}
    assert nodes[1].attributes == {"axis": 1, "start": 1, "stop": 7, "step": 2}


def test_what_has_no_rule_is_unknown_with_the_reason() -> None:
    x = keras.Input((6, 8))
    y = ops.linalg.inv(ops.matmul(x, ops.transpose(x, (0, 2, 1))) + 9 * np.eye(6, dtype="float32"))
    y = L.Lambda(lambda v: v * 2, name="code")(L.Dense(4, name="dense")(y))
    y = L.SimpleRNN(3, activation="softmax", name="rnn")(y)
    native, example = adapter.load(keras.Model(x, y), None)
    graph = adapter.read(native, example)
    unknown = {n.target: n for n in graph.nodes if n.kind == "unknown"}
    assert set(unknown) == {"Inv", "Lambda", "SimpleRNN"}
    assert "no rule" in unknown["Inv"].attributes["reason"]
    assert unknown["SimpleRNN"].inputs[1] == "rnn/simple_rnn_cell/kernel"


def test_a_subclass_of_a_known_layer_is_what_it_calls() -> None:
    class Doubled(L.Dense):  # type: ignore[misc]
        def call(self, x: object) -> object:
            return super().call(x) * 2

    x = keras.Input((6,))
    native, example = adapter.load(keras.Model(x, Doubled(3, name="doubled")(x)), None)
    graph = adapter.read(native, example)
    assert [n.kind for n in graph.nodes] == ["linear", "elementwise", "elementwise"]
    assert graph.nodes[0].inputs[1] == "doubled.kernel/value"
