"""Weighted layers as matrices: the one picture of a layer that all post-training methods share.

Convolution, linear layer, depthwise, grouped and transposed convolution, einsum: each is ``Y = X Wᵀ`` per group, with
`W` of shape ``(groups, outputs, inputs)`` and the rows of `X` all places where the weight is applied. An input is an
axis that is contracted, or a position of the kernel: channels x kernel, the kernel varying fastest. (Of a transposed
convolution the kernel's positions are outputs.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from slimline.graph.equation import Window
from slimline.graph.ir import Graph, Node

Array = np.ndarray[Any, np.dtype[Any]]
Terms = tuple[tuple[str, int], ...]
"""Axes, each with its size; a kernel's dimensions are called ``.0``, ``.1``, …"""
NOTHING: Mapping[str, Array] = MappingProxyType({})


@dataclass(frozen=True)
class LayerMatrix:
    """One layer's weight as `W`, and its input as rows of `X`.

    Attributes
    ----------
    layer : the user's name.
    node : the operator's name.
    input, output : names of the activations.
    weight, bias : names of the parameters; the bias may be None.
    groups, outputs, inputs : the axes of `W`, outermost first.
    carried : axes that it neither contracts nor makes: it is applied at each of their positions.
    """

    layer: str
    node: str
    input: str
    output: str
    weight: str
    bias: str | None
    groups: Terms
    outputs: Terms
    inputs: Terms
    carried: Terms
    _stored: Terms
    _dims: tuple[tuple[str, ...], ...]
    _window: Window | None
    _output_dims: tuple[tuple[str, ...], ...]
    _bias: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, outputs, inputs)``."""
        return _size(self.groups), _size(self.outputs), _size(self.inputs)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel's dimensions."""
        return tuple(n for name, n in self._stored if name.startswith("."))

    @property
    def window(self) -> Window | None:
        """Where a convolution looks; None for other layers, and for transposed ones."""
        return self._window

    @property
    def reading(self) -> tuple[object, ...]:
        """Equal of layers whose rows of `X` are the same."""
        return self.input, self.groups, self.inputs, self.carried, self._dims, self._window

    @property
    def letters(self) -> tuple[str, str, str, str]:
        """Of an einsum the letters of its input, weight, output and bias, one for each dimension."""
        dims = (self._dims, ((name,) for name, _ in self._stored), self._output_dims, ((name,) for name in self._bias))
        read, stored, made, bias = ("".join(name for (name,) in each) for each in dims)
        return read, stored, made, bias

    def places(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the output's `shape` the sizes of the dimensions over which a convolution moves."""
        return tuple(n for n, dim in zip(shape, self._output_dims, strict=True) if dim[0].startswith("@"))

    def matrix(self, weight: Array) -> Array:
        """A tensor of the weight's layout as ``(groups, outputs, inputs)``."""
        return weight.reshape([n for _, n in self._stored]).transpose(self._order()).reshape(self.shape)

    def tensor(self, matrix: Array, shape: Sequence[int]) -> Array:
        """A matrix ``(groups, outputs, inputs)`` in the weight's layout and `shape`: the inverse of `matrix`."""
        sizes = [n for _, n in (*self.groups, *self.outputs, *self.inputs)]
        return np.ascontiguousarray(matrix.reshape(sizes).transpose(np.argsort(self._order())).reshape(shape))

    def kernel_of(self, matrix: Array) -> Array:
        """A matrix ``(1, outputs, columns)`` in the layout of a recurrent layer's weight, whose inputs they replace."""
        sizes = [*(n for _, n in self.outputs), matrix.shape[2]]
        return np.ascontiguousarray(matrix.reshape(sizes).transpose(np.argsort(self._order())))

    def part(self, shape: Sequence[int]) -> LayerMatrix | None:
        """The layer with fewer outputs, whose weight is of `shape`; None where the weight's dimensions are not its own
        axes, or another one is shorter."""
        if len(shape) != len(self._stored):
            return None
        sizes = dict(zip((name for name, _ in self._stored), shape, strict=True))
        shorter = {name for name, n in self._stored if sizes[name] != n}
        if shorter - {name for name, _ in self.outputs}:
            return None
        outputs = tuple((name, sizes[name]) for name, _ in self.outputs)
        return replace(self, outputs=outputs, _stored=tuple(sizes.items()))

    def has_own_bias(self, shape: Sequence[int]) -> bool:
        """Whether a bias of this shape is one number for every output."""
        groups, outputs, _ = self.shape
        return math.prod(shape) == groups * outputs and self._vector_order() is not None

    def vector(self, bias: Array) -> Array | None:
        """A bias as ``(groups, outputs)``; None where it is not one number for every output."""
        order = self._vector_order()
        if order is None:
            return None
        sizes = dict((*self.groups, *self.outputs))
        groups, outputs, _ = self.shape
        return bias.reshape([sizes[name] for name in self._bias]).transpose(order).reshape(groups, outputs)

    def as_bias(self, vector: Array, shape: Sequence[int]) -> Array:
        """Numbers ``(groups, outputs)`` in the layout and `shape` of a bias: the inverse of `vector`."""
        order = self._vector_order()
        if order is None:
            raise ValueError(f"the bias of {self.layer} is not one number for every output")
        sizes = [n for _, n in (*self.groups, *self.outputs)]
        return np.ascontiguousarray(vector.reshape(sizes).transpose(np.argsort(order)).reshape(shape))

    def per_output(self, vector: Array) -> Array | None:
        """Numbers for every channel of the output as ``(groups, outputs, 1)``; None where the channels are no whole
        dimensions, or not as many."""
        spread = self._spread(vector, self._output_dims, self.outputs)
        return None if spread is None else spread[:, :, None]

    def per_input(self, vector: Array) -> Array | None:
        """Numbers for every channel of the input as ``(groups, 1, inputs)``; None as of `per_output`."""
        spread = self._spread(vector, self._dims, self.inputs)
        return None if spread is None else spread[:, None]

    @property
    def channel_axes(self) -> tuple[int, ...] | None:
        """The dimensions of the input that hold its channels, ascending; None where they hold something else too."""
        return self._channels(self._dims, self.inputs)

    @property
    def output_axes(self) -> tuple[int, ...] | None:
        """The dimensions of the output that hold its channels, as `channel_axes`."""
        return self._channels(self._output_dims, self.outputs)

    def _channels(self, dims: Sequence[tuple[str, ...]], inner: Terms) -> tuple[int, ...] | None:
        channels = {name for name, _ in (*self.groups, *inner) if not name.startswith(".")}
        held = tuple(d for d, dim in enumerate(dims) if channels.intersection(dim))
        return held if held and {name for d in held for name in dims[d]} == channels else None

    def _spread(self, vector: Array, dims: Sequence[tuple[str, ...]], inner: Terms) -> Array | None:
        axes = self._channels(dims, inner)
        if axes is None:
            return None
        terms, names = (*self.groups, *inner), [name for axis in axes for name in dims[axis]]
        sizes, channels = dict(terms), set(names)
        if math.prod(sizes[name] for name in names) != vector.size:
            return None
        order = [names.index(name) for name, _ in terms if name in channels]
        array = vector.reshape([sizes[name] for name in names]).transpose(order)
        array = array.reshape([n if name in channels else 1 for name, n in terms])
        return np.broadcast_to(array, [n for _, n in terms]).reshape(_size(self.groups), _size(inner))

    def _vector_order(self) -> list[int] | None:
        order = [name for name, _ in (*self.groups, *self.outputs)]
        return [self._bias.index(name) for name in order] if sorted(order) == sorted(self._bias) else None

    def _order(self) -> list[int]:
        places = [name for name, _ in self._stored]
        return [places.index(name) for name, _ in (*self.groups, *self.outputs, *self.inputs)]

    def rows(self, x: Array, limit: int | None = None, positions: Mapping[str, Array] = NOTHING) -> Array:
        """The input activation as ``(groups, rows, inputs)``; of more than `limit` rows, that many spread evenly.

        `positions` names of `carried` axes the positions that are wanted, where that is not all.
        """
        unfolded = x if self._window is None else self._unfold(x)
        kernel = tuple((name,) for name, _ in self.inputs if name.startswith("."))
        return self._flat(unfolded, (*self._dims, *kernel), self.inputs, limit, positions)

    def results(self, y: Array, limit: int | None = None, positions: Mapping[str, Array] = NOTHING) -> Array:
        """An activation of the output's shape as ``(groups, rows, outputs)``, the rows those of `rows`.

        Not of a transposed convolution with a kernel, whose outputs belong to several rows.
        """
        return self._flat(y, self._output_dims, self.outputs, limit, positions)

    @property
    def one_to_one(self) -> bool:
        """Whether every number of the output belongs to one row, so that `results` is there."""
        return bool(self._output_dims) and not any(name.startswith(".") for name, _ in self.outputs)

    def _flat(
        self,
        array: Array,
        dims: Sequence[tuple[str, ...]],
        inner: Terms,
        limit: int | None,
        positions: Mapping[str, Array],
    ) -> Array:
        sizes = dict((*self.groups, *inner))
        names: list[str] = []
        shape: list[int] = []
        for d, dim in enumerate(dims):
            names += dim
            shape += [array.shape[d]] if len(dim) == 1 else [sizes[name] for name in dim]
        places = [name for dim in self._dims for name in dim if name in names and name not in sizes]
        last = [name for name, _ in (*self.groups, *inner)]
        moved = array.reshape(shape).transpose([names.index(n) for n in (*places, *last)])
        for i, name in enumerate(places):
            moved = moved.take(positions[name], axis=i) if name in positions else moved
        lead = moved.shape[: len(places)]
        count = math.prod(lead)
        if limit is not None and count > limit:
            picked = np.linspace(0, count - 1, limit).astype(np.int64)
            moved = moved[np.unravel_index(picked, lead)]
            count = limit
        return moved.reshape(count, _size(self.groups), _size(inner)).swapaxes(0, 1)

    def _unfold(self, x: Array) -> Array:
        """A view in which the kernel's dimensions follow those of `x`, and spatial ones count places."""
        assert self._window is not None
        dims = [d for d, dim in enumerate(self._dims) if dim[0].startswith("@")]
        zeros = self._window.zeros([x.shape[d] for d in dims], self.kernel)
        widths = [(0, 0)] * x.ndim
        for d, around in zip(dims, zeros, strict=True):
            widths[d] = around
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self._window.dilation, strict=True)]
        view = sliding_window_view(np.pad(x, widths), reach, tuple(dims))
        cut: list[slice] = [slice(None)] * view.ndim
        for i, d in enumerate(dims):
            cut[d] = slice(None, None, self._window.stride[i])
            cut[x.ndim + i] = slice(None, None, self._window.dilation[i])
        return view[tuple(cut)]


def _size(terms: Terms) -> int:
    return math.prod(n for _, n in terms)


def matrices(graph: Graph) -> tuple[LayerMatrix, ...]:
    """Every convolution, linear layer and einsum with a stored weight, in graph order.

    A weight that several operators read appears once for each of them.
    """
    stored = set(graph.parameters)
    layers = []
    for node in graph.nodes:
        if node.kind in ("conv", "linear", "einsum") and len(node.inputs) > 1 and node.inputs[1] in stored:
            layer = _matrix(graph, node)
            if layer is not None:
                layers.append(layer)
    return tuple(layers)


def tables(graph: Graph) -> tuple[LayerMatrix, ...]:
    """Every embedding that looks single rows up in a stored table, in graph order.

    A table ``(rows, width)`` is read as `W`, ``(1, width, rows)``, of a linear layer whose inputs are one-hot. These
    are never written out: `rows` and `results` are not for it, and its input is the numbers of the rows.
    """
    stored, layers = set(graph.parameters), list[LayerMatrix]()
    for node in graph.nodes:
        indices, table = node.inputs if node.kind == "embedding" else (None, None)
        if indices is None or table not in stored:
            continue
        dims, weights = node.attributes["equation"].inputs
        if (".",) in dims:  # rows are added up
            continue
        rows, width = graph.values[table].shape
        (row,), (place,) = weights
        layers.append(
            LayerMatrix(
                layer=node.layer or node.name,
                node=node.name,
                input=indices,
                output=node.outputs[0],
                weight=table,
                bias=None,
                groups=(),
                outputs=((place, width),),
                inputs=((row, rows),),
                carried=tuple((dim[0], n) for dim, n in zip(dims, graph.values[indices].shape, strict=True)),
                _stored=((row, rows), (place, width)),
                _dims=dims,
                _window=None,
                _output_dims=node.attributes["equation"].outputs[0],
                _bias=(),
            )
        )
    return tuple(layers)


def recurrences(graph: Graph) -> tuple[tuple[LayerMatrix, ...], ...]:
    """Of every recurrent layer that reads vectors the weights by which it does, in graph order: one, or both of two
    directions that keep theirs apart.

    A weight is read as `W`, ``(1, outputs, inputs)``, whose outputs go on into the gates: `results` is not for it.
    """
    stored = set(graph.parameters)
    layers = []
    for node in graph.nodes:
        if node.kind != "recurrent" or node.inputs[0] in stored:
            continue
        dims = node.attributes["equation"].inputs
        kernels = [k for k in node.attributes["kernels"] if dims[0][-1] in dims[k]]
        if len(dims[0]) <= 3 and kernels and all(node.inputs[k] in stored for k in kernels):  # else it reads maps
            layers.append(tuple(_recurrence(graph, node, kernel) for kernel in kernels))
    return tuple(layers)


def _recurrence(graph: Graph, node: Node, kernel: int) -> LayerMatrix:
    """One of them: the operand of this number."""
    dims = node.attributes["equation"].inputs
    x, weight = node.inputs[0] or "", node.inputs[kernel] or ""
    (width,), shape = dims[0][-1], graph.values[x].shape
    stored = tuple(
        (width if dim == (width,) else f"row{d}", n)
        for d, (dim, n) in enumerate(zip(dims[kernel], graph.values[weight].shape, strict=True))
    )
    places = tuple((f"@{d}", n) for d, n in enumerate(shape[:-1]))
    return LayerMatrix(
        layer=node.layer or node.name,
        node=node.name,
        input=x,
        output=node.outputs[0],
        weight=weight,
        bias=None,
        groups=(),
        outputs=tuple(term for term in stored if term[0] != width),
        inputs=((width, shape[-1]),),
        carried=places,
        _stored=stored,
        _dims=(*((name,) for name, _ in places), (width,)),
        _window=None,
        _output_dims=(),
        _bias=(),
    )


def constant_slot(graph: Graph, layer: LayerMatrix, readers: Mapping[str, Sequence[Node]]) -> tuple[str | None, bool]:
    """The parameter that can take a constant added to a layer's output, and whether it takes it with a minus.

    Its bias; without one, the mean of a batch norm that alone reads the output; else None. `readers` are the graph's
    `consumers`.
    """
    if layer.bias is not None:
        own = layer.bias in graph.learning and len(readers[layer.bias]) == 1
        stored = layer.vector(np.zeros(graph.values[layer.bias].shape)) if own else None
        return (None if stored is None else layer.bias), False
    follow = readers[layer.output]
    if len(follow) == 1 and follow[0].kind == "batch_norm" and layer.one_to_one:
        mean = follow[0].inputs[3]
        if mean is not None and len(readers[mean]) == 1:
            return mean, True
    return None, False


def _matrix(graph: Graph, node: Node) -> LayerMatrix | None:
    equation = node.attributes["equation"]
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or x in graph.parameters:
        return None
    dims, weights, outs = equation.inputs[0], equation.inputs[1], equation.outputs[0]
    sizes = _sizes(
        [(dims, graph.values[x].shape), (weights, graph.values[weight].shape), (outs, _shape(graph, node))],
        equation.sizes,
    )
    output_axes = {name for dim in outs for name in dim}
    input_axes = {name for dim in dims for name in dim}
    kernel = iter(f".{i}" for i in range(len(weights)))
    stored: list[tuple[str, int]] = []
    for dim, n in zip(weights, graph.values[weight].shape, strict=True):
        stored += [(next(kernel), n)] if dim == (".",) else [(name, sizes[name]) for name in dim if name != "1"]
    dots = tuple(t for t in stored if t[0].startswith("."))
    plain = [t for t in stored if not t[0].startswith(".")]
    if any(name not in output_axes and name not in input_axes for name, _ in plain):
        return None
    groups = tuple(t for t in plain if t[0] in input_axes and t[0] in output_axes)
    inputs = tuple(t for t in plain if t[0] in input_axes and t[0] not in output_axes)
    outputs = tuple(t for t in plain if t[0] not in input_axes)
    transposed = node.attributes.get("transposed", False)
    window = node.attributes.get("window")
    if dots and not transposed and window is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    spatial = iter(f"@{d}" for d, dim in enumerate(dims) if dim == (".",))
    return LayerMatrix(
        layer=node.layer or node.name,
        node=node.name,
        input=x,
        output=node.outputs[0],
        weight=weight,
        bias=bias,
        groups=groups,
        outputs=(*outputs, *dots) if transposed else outputs,
        inputs=inputs if transposed else (*inputs, *dots),
        carried=tuple(
            (n, sizes[n]) for dim in dims for n in dim if n in output_axes and n in sizes and n not in dict(plain)
        ),
        _stored=tuple(stored),
        _dims=tuple((f"@{d}",) if dim == (".",) else dim for d, dim in enumerate(dims)),
        _window=window,
        _output_dims=tuple((next(spatial),) if dim == (".",) else dim for dim in outs),
        _bias=tuple(name for dim in equation.inputs[2] for name in dim if name != "1")
        if len(equation.inputs) > 2
        else (),
    )


def _shape(graph: Graph, node: Node) -> tuple[int, ...]:
    return graph.values[node.outputs[0]].shape


def _sizes(tensors: Sequence[tuple[Any, tuple[int, ...]]], known: Any) -> dict[str, int]:
    """The size of every axis, from dimensions of which all axes but one are known."""
    sizes = dict(known)
    for _ in range(2):
        for dims, shape in tensors:
            for dim, n in zip(dims, shape, strict=True):
                unknown = [name for name in dim if name not in sizes]
                if len(unknown) == 1 and unknown[0] not in (".", "1"):
                    sizes[unknown[0]] = n // math.prod(sizes[name] for name in dim if name in sizes)
    return sizes
