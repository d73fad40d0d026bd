"""What must change in an operation's config and arguments when positions go: sizes, groups, indices.

Weights are sliced by `rewrite`; here are the numbers that count positions. A class without an entry has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras.src.applications import convnext
from keras.src.layers.rnn.conv_lstm import ConvLSTM
from keras.src.ops import core
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call, input_name, is_constant
from slimline.frameworks.keras.rules_index import expanded_key, slice_starts, take_indices
from slimline.frameworks.keras.rules_recurrent import RECURRENT, cells_of
from slimline.frameworks.keras.weight import Weight
from slimline.graph.removal import Removal

L = keras.layers
Retained = tuple[Any, ...]


class Sizes:
    """What a plan leaves of the tensors around the calls of one model.

    Parameters
    ----------
    names : per `KerasTensor` (by id) the name of its value.
    parameters : per variable (by id) its name.
    """

    def __init__(self, plan: Removal, names: Mapping[int, str], parameters: Mapping[int, str]) -> None:
        self.plan, self.names, self.parameters = plan, names, parameters

    def weight(self, variable: Any) -> tuple[int, ...]:
        """The shape that a layer's variable will have."""
        return self.plan.shape(self.parameters[id(variable)])

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """The shape that an activation will have."""
        return self.plan.shape(self.names[id(tensor)])

    def before(self, tensor: Any) -> tuple[int, ...]:
        """The shape that an activation has."""
        return self.plan.graph.values[self.names[id(tensor)]].shape

    def retained(self, tensor: Any) -> Retained:
        """Per dimension of an activation the positions that stay, None where all do."""
        return self.plan.retained(self.names[id(tensor)])


Config = Callable[[Call, Sizes], dict[str, Any]]


def _conv(call: Call, sizes: Sizes) -> dict[str, Any]:
    layer = call.operation
    groups = sizes.plan.axis_size(call.name, "g") if layer.groups > 1 else 1
    return {"filters": sizes.weight(layer.kernel)[-1], "groups": groups}


def _einsum_dense(call: Call, sizes: Sizes) -> dict[str, Any]:
    before = call.operation.get_config()["output_shape"]
    declared = (before,) if isinstance(before, int) else tuple(before)
    after = sizes.shape(call.outputs[0])[-len(declared) :]
    return {"output_shape": tuple(None if w is None else n for w, n in zip(declared, after, strict=True))}


def _recurrent(call: Call, sizes: Sizes) -> dict[str, Any]:
    """The width of a layer with one cell, or of the cells in its config."""
    layer = call.operation
    widths = [sizes.weight(cell.recurrent_kernel)[-2] for cell in cells_of(layer)]
    if type(layer) is not L.RNN:
        return {"filters" if isinstance(layer, ConvLSTM) else "units": widths[0]}
    changes = unbuilt(layer)
    cell = changes["cell"]
    configs = cell["config"]["cells"] if type(layer.cell) is L.StackedRNNCells else [cell]
    for each, width in zip(configs, widths, strict=True):
        each["config"]["filters" if "filters" in each["config"] else "units"] = width
    return changes


def unbuilt(layer: Any) -> dict[str, Any]:
    """What to change in a recurrent layer's config so that a copy may read an input of another width."""
    if type(layer) is not L.RNN:
        return {}
    cell = copy.deepcopy(layer.get_config()["cell"])
    for config in (cell, *cell["config"].get("cells", ())):
        config.pop("build_config", None)  # it holds the shape of the input
    return {"cell": cell}


def _group_norm(call: Call, sizes: Sizes) -> dict[str, Any]:
    return {"groups": -1 if call.operation.groups == -1 else sizes.plan.axis_size(call.name, "g")}


def _counted(field: str, batch: bool) -> Config:
    """A config's shape: numbers that count positions are replaced, -1 and None stay."""

    def change(call: Call, sizes: Sizes) -> dict[str, Any]:
        before = getattr(call.operation, field)
        declared = [before] if isinstance(before, int) else list(before)
        after = sizes.shape(call.outputs[0])[0 if batch else 1 :]
        return {field: tuple(w if w in (-1, None) else n for w, n in zip(declared, after, strict=True))}

    return change


def _split(call: Call, sizes: Sizes) -> dict[str, Any]:
    axis = call.operation.axis
    ends = np.cumsum([sizes.shape(t)[axis] for t in call.outputs])
    return {"indices_or_sections": tuple(int(n) for n in ends[:-1])}


def _pad(call: Call, sizes: Sizes) -> dict[str, Any]:
    """Padding is a position like any other: what stays of it is counted."""
    retained = sizes.retained(call.outputs[0])
    before = sizes.before(call.inputs[0])
    widths = list(call.operation.pad_width)
    widths = widths * len(before) if len(widths) == 1 else widths
    changed = []
    for (left, right), size, index in zip(widths, before, retained, strict=True):
        if index is not None:
            left, right = int((index < left).sum()), int((index >= left + size).sum())
        changed.append((left, right))
    return {"pad_width": tuple(changed)}


def _block(call: Call, sizes: Sizes) -> dict[str, Any]:
    """The sizes of a block."""
    after = sizes.shape(call.outputs[0])
    return {"shape": tuple(w if w == -1 else n for w, n in zip(call.operation.shape, after, strict=True))}


CONFIGS: Mapping[type, Config] = {
    **dict.fromkeys((L.Conv1D, L.Conv2D, L.Conv3D), _conv),
    **dict.fromkeys(
        (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose),
        lambda call, sizes: {"filters": sizes.weight(call.operation.kernel)[-2]},
    ),
    **dict.fromkeys(
        (L.DepthwiseConv1D, L.DepthwiseConv2D),
        lambda call, sizes: {"depth_multiplier": sizes.weight(call.operation.kernel)[-1]},
    ),
    L.Dense: lambda call, sizes: {"units": sizes.weight(call.operation.kernel)[-1]},
    L.EinsumDense: _einsum_dense,
    convnext.LayerScale: lambda call, sizes: {"projection_dim": sizes.weight(call.operation.gamma)[0]},
    L.Embedding: lambda call, sizes: {"output_dim": sizes.weight(call.operation.embeddings)[-1]},
    **dict.fromkeys(RECURRENT, _recurrent),
    Weight: lambda call, sizes: {"shape": sizes.weight(call.operation.value)},
    L.GroupNormalization: _group_norm,
    L.RepeatVector: lambda call, sizes: {"n": sizes.shape(call.outputs[0])[1]},
    L.Reshape: _counted("target_shape", batch=False),
    numpy_ops.Reshape: _counted("newshape", batch=True),
    numpy_ops.BroadcastTo: _counted("shape", batch=True),
    numpy_ops.Split: _split,
    numpy_ops.Pad: _pad,
    core.Slice: _block,
}


def config(call: Call, sizes: Sizes) -> dict[str, Any]:
    """The entries of an operation's config that change."""
    if type(call.operation) not in CONFIGS:
        return {}
    changes = CONFIGS[type(call.operation)](call, sizes)
    # An initialiser that holds an array has the old shape; the weights are given afterwards anyway.
    for field, value in call.operation.get_config().items() if call.is_layer else ():
        if field.endswith("_initializer") and isinstance(value, dict) and value.get("class_name") == "Constant":
            changes[field] = "zeros"
    return changes


def arguments(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sizes
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call on pruned tensors: constants sliced, indices counted anew."""
    operation = call.operation
    if isinstance(operation, numpy_ops.GetItem):
        return _getitem(call, args, sizes), {}
    if isinstance(operation, core.Slice):
        return (args[0], _starts(call, sizes)), {}
    if isinstance(operation, numpy_ops.Take) and not isinstance(take_indices(call), keras.KerasTensor):
        return (args[0], _renumbered(np.asarray(take_indices(call)), call, operation.axis, sizes)), {}
    constant_names = iter(call.constants)

    def sliced(argument: Any) -> Any:
        if not is_constant(argument):
            return argument
        name = next(constant_names)
        return take(call.constants[name], sizes.plan.retained(name))

    return keras.tree.map_structure(sliced, (args, kwargs))  # type: ignore[no-any-return]


def take(array: np.ndarray, retained: Retained) -> np.ndarray:
    """The part of an array that stays."""
    for axis, index in enumerate(retained):
        if index is not None:
            array = np.take(array, index, axis)
    return array


def zero(array: np.ndarray, retained: Retained) -> np.ndarray:
    """The array with zeros where positions go."""
    array = array.copy()
    for axis, index in enumerate(retained):
        if index is not None:
            gone = np.setdiff1d(np.arange(array.shape[axis]), index)
            array[(slice(None),) * axis + (gone,)] = 0
    return array


def _renumbered(indices: np.ndarray, call: Call, axis: int, sizes: Sizes) -> np.ndarray:
    """Old positions of an axis as positions among those that stay; those of the output that go are left out."""
    shape = sizes.before(call.inputs[0])
    axis %= len(shape)
    indices = indices % shape[axis]
    before, after = sizes.retained(call.inputs[0])[axis], None
    if indices.ndim:
        after = sizes.retained(call.outputs[0])[axis]
    if after is not None:
        indices = indices[after]
    return indices if before is None else np.searchsorted(before, indices)


def _getitem(call: Call, args: tuple[Any, ...], sizes: Sizes) -> tuple[Any, ...]:
    source, output = call.inputs[0], call.outputs[0]
    shape, before, after = sizes.before(source), sizes.retained(source), sizes.retained(output)
    x = args[0]
    key: list[Any] = []
    axis = result_axis = moved = 0
    for subscript in expanded_key(call.args[1], len(shape)):
        index = before[axis] if subscript is not None else None
        if index is None:
            key.append(subscript)
        elif isinstance(subscript, int):
            key.append(int(np.searchsorted(index, subscript % shape[axis])))
        else:
            old = np.arange(shape[axis])[subscript]
            old = old if after[result_axis] is None else old[after[result_axis]]
            new = np.searchsorted(index, old)
            if np.array_equal(new, np.arange(new[0], new[0] + len(new))):
                key.append(slice(int(new[0]), int(new[0]) + len(new)))
            else:  # a stride no longer meets what it met
                name = f"{call.operation.name}.take{moved}"
                x, moved = numpy_ops.Take(axis=axis, name=name)(x, new), moved + 1
                key.append(slice(None))
        axis += subscript is not None
        result_axis += not isinstance(subscript, int)
    return x, tuple(key)


def _starts(call: Call, sizes: Sizes) -> tuple[int, ...]:
    """Where a block begins among what stays."""
    retained = sizes.retained(call.inputs[0])
    starts = slice_starts(call)
    return tuple(
        n if index is None else int(np.searchsorted(index, n)) for n, index in zip(starts, retained, strict=True)
    )


def value_names(model_calls: list[Call], model: keras.Model) -> dict[int, str]:
    """Per `KerasTensor` (by id) the name of its value in the graph."""
    names = {id(t): name for call in model_calls for t, name in zip(call.outputs, call.names, strict=True)}
    return {**names, **{id(t): input_name(t) for t in model.inputs}}
