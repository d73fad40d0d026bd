"""Pruning in `keras.Model.fit`."""

from __future__ import annotations

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import slimline as sl  # noqa: E402
from slimline.frameworks.keras.loop import axes  # noqa: E402
from slimline.graph.matrix import matrices  # noqa: E402
from tests import sparse_models as small  # noqa: E402

L = keras.layers


@pytest.mark.parametrize(
    "fields",
    [{"schedule": "polynomial", "scope": "global"}, {"schedule": "constant", "regrow": 0.3, "begin": 1, "end": 9}],
)
def test_fit_prunes_in_place(fields):
    model = small.keras_net()
    x, y = small.data("keras").split("train").inputs[0][:120], np.arange(120) % 10
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = sl.PruningCallback(sl.SparsePruning(amount=0.75, frequency=2, **fields), batch=(x[:32], y[:32]))
    model.fit(x, y, batch_size=20, epochs=2, verbose=0, callbacks=[callback])
    assert callback.sparsity == pytest.approx(0.75, abs=0.01)
    assert len(callback.masks) == 4
    kernels = {v.path: np.array(v) for v in model.trainable_variables}
    for name, mask in callback.masks.items():
        assert not kernels[name][~mask].any()
        assert (kernels[name][mask] != 0).mean() > 0.5


def test_gradients_need_a_batch():
    model = small.keras_net()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    step = sl.SparsePruning(amount=0.5, schedule="constant", criterion="taylor")
    with pytest.raises(sl.SlimlineError, match="needs batch"):
        model.fit(np.zeros((8, 8, 8, 1)), np.zeros(8), verbose=0, callbacks=[sl.PruningCallback(step)])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Dense(4), (6,)),
        (L.Conv2D(6, 3, groups=2), (8, 8, 4)),
        (L.Conv1D(6, 3), (8, 4)),
        (L.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4)),
        (L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3)), (4, 5)),
        (L.Conv2DTranspose(6, 2), (8, 8, 4)),
    ],
)
def test_axes_of_layers_are_those_of_the_graph(layer, shape):
    model = sl.load(keras.Sequential([keras.Input(shape), layer]))
    (found,) = matrices(model.graph)
    weight = np.random.default_rng(0).normal(size=model.parameters()[found.weight].shape)
    _, own = axes(layer)
    assert own.shape == found.shape
    np.testing.assert_array_equal(own.matrix(weight), found.matrix(weight))
    np.testing.assert_array_equal(own.tensor(own.matrix(weight), weight.shape), weight)
