"""The exchange form of exported programs, see `slimline.runtimes.forms.exported_program`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.base import Array
from slimline.frameworks.torch.fakequant import fold, is_rounded, products, unrounded
from slimline.frameworks.torch.native import Native, sharing, to_tensors, trace
from slimline.frameworks.torch.operators import argument, packet
from slimline.methods.dynamic import HIGH, LOW, DynamicGrid
from slimline.methods.formats import Format, IntegerGrid, along
from slimline.runtimes.forms import PLAIN
from slimline.runtimes.forms.exported_program import LARGEST_BATCH

_aten = torch.ops.aten
_TENSOR = _aten.fake_quantize_per_tensor_affine.default
_CHANNEL = _aten.fake_quantize_per_channel_affine.default
_ROWS: DynamicGrid = "int8_per_row"
_MOVES = {
    f"aten.{name}"
    for name in (
        "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select",
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "contiguous", "dropout", "expand", "narrow",
        "index_select", "roll", "flip", "repeat", "swapaxes", "movedim", "pixel_shuffle", "pixel_unshuffle", "clone",
        "channel_shuffle", "upsample_nearest2d", "identity", "alias", "detach", "feature_dropout", "numpy_T", "t",
    )
}  # fmt: skip
_SPLITS = {f"aten.{name}" for name in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")}


def to_program(
    native: Native, example: tuple[Array, ...], integer: bool, weights: Mapping[str, Format] = PLAIN
) -> torch.export.ExportedProgram:
    """The program; batch norms are folded unless it is `integer`. The same model gives the same program.

    Parameters
    ----------
    weights : formats of those that are stored as integers, while what is multiplied by them is rounded as it runs.

    Raises
    ------
    SlimlineError : a model that torch cannot export with a free batch up to `LARGEST_BATCH`.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = _pairs(native) if integer else sharing(fold(native, example))
        _round_as_it_runs(module, weights)
        _stride_pools(module.graph)
        try:
            return trace(module.eval(), to_tensors(example), native.free, largest_batch=LARGEST_BATCH)
        except (RuntimeError, ValueError, TypeError) as error:
            raise SlimlineError(
                f"The model cannot be written as an exported program ({first_line(error)[:200]}): "
                "express that part of it by common operators."
            ) from error


def _round_as_it_runs(module: Native, weights: Mapping[str, Format]) -> None:
    """Hold weights as integers whose products round what they multiply by them, by the operators of torch's own
    quantization; others stay as they are."""
    read = products(module, weights)
    rounding = [
        (n, *each) for n, uses in read.items() for each in uses if is_rounded(each[0].args[each[1]], each[0], _ROWS)
    ]
    if not rounding:
        return
    import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    ops: Any = torch.ops.quantized_decomposed
    graph, dynamic = module.graph, {name for name, _, _ in rounding}
    for _, product, position in rounding:
        source, like = unrounded(product.args[position]), cast(fx.Node, product.args[position])
        with graph.inserting_before(product):
            grid = graph.call_function(ops.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
            numbers = [graph.call_function(operator.getitem, (grid, i)) for i in range(2)]
            args: tuple[Any, ...] = (*numbers, LOW, HIGH, torch.int8)
            codes = graph.call_function(ops.quantize_per_token.default, (source, *args))
            real = graph.call_function(ops.dequantize_per_token.default, (codes, *args, torch.float32))
        real.meta = dict(like.meta)
        product.update_arg(position, real)
    for node in [each for each in graph.nodes if each.op == "get_attr" and each.target in dynamic]:
        for user in list(node.users):  # each reads integers of its own: backends take them into the reader
            with graph.inserting_before(user):
                user.replace_input_with(node, _codes(module, node, weights[str(node.target)]))
    graph.eliminate_dead_code()
    module.recompile()


def _codes(module: Native, node: fx.Node, each: Format) -> fx.Node:
    """The integers of a stored weight, and what dequantizes them: ``(outputs, inputs)``, with a scale per output or per
    block of inputs."""
    assert isinstance(each, IntegerGrid)
    ops: Any = torch.ops.quantized_decomposed
    graph, name = module.graph, str(node.target)
    read = _store(module, f"{name}_integers", torch.from_numpy(each.encode(_tensor(module, name).numpy())))
    flat = each.scale if each.axis is None else each.scale.ravel()
    scale = _store(module, f"{name}_scale", torch.from_numpy(flat.copy()))
    zero = _store(module, f"{name}_zero_point", torch.zeros(flat.shape, dtype=torch.int64))
    low = -(1 << (each.bits - 1))
    args: tuple[Any, ...]
    if each.axis is None:
        args = (read, scale, zero, low, -low - 1, torch.int8, each.blocks[1], torch.float32)
        real = graph.call_function(ops.dequantize_per_channel_group.default, args)
    else:
        args = (read, scale, zero, each.axis, low, -low - 1, torch.int8)
        real = graph.call_function(ops.dequantize_per_channel.default, args)
    real.meta = dict(node.meta)
    return real


def _stride_pools(graph: fx.Graph) -> None:
    """Write out strides that are left to be the kernel's size: not every converter knows that they may be."""
    for node in graph.nodes:
        if packet(node).startswith(("aten.max_pool", "aten.avg_pool")) and not argument(node, "stride"):
            kernel = argument(node, "kernel_size")
            node.args = (node.args[0], kernel, kernel, *node.args[3:])
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "stride"}


def _pairs(native: Native) -> Native:
    """A copy that rounds by pairs on int8, and holds its weights as integers."""
    import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    module = sharing(native)
    for node in list(module.graph.nodes):
        if node.target not in (_TENSOR, _CHANNEL):
            continue
        with module.graph.inserting_after(node):
            stored = getattr(node.args[0], "op", "") == "get_attr"
            real = _weight(module, node) if stored else _activation(module.graph, node)
        node.replace_all_uses_with(real)
        module.graph.erase_node(node)
    _pool_means(module.graph)
    _carry(module.graph)
    _part(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _activation(graph: fx.Graph, node: fx.Node) -> fx.Node:
    args: Any = node.args
    x, scale, zero, low, high = args
    shift = 128 if high > 127 else 0  # uint8: the same levels, counted from -128
    return _pair(graph, node, (x, scale, zero - shift, low - shift, high - shift))


def _pair(graph: fx.Graph, like: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    ops: Any = torch.ops.quantized_decomposed
    rounded = graph.call_function(ops.quantize_per_tensor.default, (*args, torch.int8))
    with graph.inserting_after(rounded):
        real = graph.call_function(ops.dequantize_per_tensor.default, (rounded, *args[1:], torch.int8))
    rounded.meta = real.meta = dict(like.meta)
    return real


def _weight(module: Native, node: fx.Node) -> fx.Node:
    """The integers of a stored weight, and what dequantizes them."""
    ops: Any = torch.ops.quantized_decomposed
    graph, operands = module.graph, cast(tuple[Any, ...], node.args)
    name = str(operands[0].target)
    weight = _tensor(module, name)
    args: tuple[Any, ...]
    if node.target is _TENSOR:
        _, scale, zero, low, high = operands
        grid = IntegerGrid.between(low, high, np.asarray(scale, np.float32), (), np.asarray(zero, np.int32))
        read = _store(module, f"{name}_integers", torch.from_numpy(grid.encode(weight.numpy())))
        args = (read, scale, zero, low, high, torch.int8)
        with graph.inserting_after(read):
            real = graph.call_function(ops.dequantize_per_tensor.default, args)
    else:
        _, scales, zeros, axis, low, high = operands
        blocks = along(axis, weight.ndim)
        each = _tensor(module, str(scales.target)).numpy().reshape([1 if b is None else -1 for b in blocks])
        grid = IntegerGrid.between(low, high, each, blocks)
        read = _store(module, f"{name}_integers", torch.from_numpy(grid.encode(weight.numpy())))
        args = (read, scales, zeros, axis, low, high, torch.int8)
        with graph.inserting_after(read):
            real = graph.call_function(ops.dequantize_per_channel.default, args)
    real.meta = dict(node.meta)
    return real


def _store(module: Native, name: str, tensor: torch.Tensor) -> fx.Node:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent).register_buffer(leaf, tensor)
    return module.graph.get_attr(name)


def _tensor(module: Native, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor.detach().cpu()


def _pool_means(graph: fx.Graph) -> None:
    """Write a rounded mean over all spatial dimensions as one that keeps them, which has an integer kernel."""
    quantizer = torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in graph.find_nodes(op="call_function", target=_aten.mean.dim):
        operands: Any = node.args
        x, axes, *keep = operands
        rank, users = x.meta["val"].ndim, list(node.users)
        rounded = len(users) == 1 and users[0].target is quantizer
        if any(keep) or node.kwargs or not rounded or sorted(a % rank for a in axes) != list(range(2, rank)):
            continue
        with graph.inserting_before(node):
            pool = graph.call_function(_aten.mean.dim, (x, axes, True))
            real = _pair(graph, node, (pool, *users[0].args[1:5]))
        with graph.inserting_after(real):
            flat = graph.call_function(_aten.flatten.using_ints, (real, 1))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)


def _carry(graph: fx.Graph) -> None:
    """Round again after operators that only move numbers, so that what reads them reads a grid."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    quantizer = torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in list(graph.nodes):
        source = _moved(node)
        readers = [user for user in node.users if user.op != "output" and user.target is not quantizer]
        if getattr(source, "target", None) is not dequantize or source.args[0].op == "get_attr" or not readers:
            continue
        with graph.inserting_after(node):
            real = _pair(graph, node, (node, *source.args[1:5]))
        node.replace_all_uses_with(real, delete_user_cb=readers.__contains__)


def _part(graph: fx.Graph) -> None:
    """Give every reader of a rounded value its own dequantization, as torch's flow does: backends take it into the
    reader, and would leave others without it."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in graph.find_nodes(op="call_function", target=dequantize):
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                own = graph.node_copy(node)
            user.replace_input_with(node, own)


def _moved(node: fx.Node) -> Any:
    """What an operator only moves, padding with zeros included; None where it does something else."""
    args: Any = node.args
    if node.target is operator.getitem and packet(args[0]) in _SPLITS:
        return args[0].args[0]
    if packet(node) in ("aten.pad", "aten.constant_pad_nd"):
        value = argument(node, "value")
        return args[0] if value is None or value == 0 else None
    return args[0] if packet(node) in _MOVES else None
