"""Batch-norm folding and fake quantization of a GraphModule.

Fake quantization rounds a float tensor to its format, so that the float model computes what the artifact will
(Jacob et al. 2018, arXiv:1712.05877). On integer grids it lowers to QuantizeLinear/DequantizeLinear pairs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.edit import refuse_unread
from slimline.frameworks.torch.native import shapes_of, sharing
from slimline.frameworks.torch.operators import argument
from slimline.frameworks.torch.rounding import Rounder, is_dynamic, round_dynamically
from slimline.graph.quantization import Quantization
from slimline.methods.dynamic import GRIDS, DynamicGrid, read_together
from slimline.methods.formats import FloatFormat, Format
from slimline.runtimes.forms.onnx_graph import FLOAT_ENDS

_aten = torch.ops.aten
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_FAKE_QUANTIZE = {"fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"}
_PER_TENSOR = _aten.fake_quantize_per_tensor_affine.default
_PER_CHANNEL = _aten.fake_quantize_per_channel_affine.default
_HOPS = 3
"""From a value to the last of the operators that round it, at most."""
_DEPTH = 6
"""Operators on the way from a value to what `round_dynamically` makes of it."""
_TURNS = {"t", "transpose", "permute", "numpy_T", "mT"}
_CONVOLUTIONS = {"conv1d", "conv2d"}
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", *_CONVOLUTIONS}
"""Operators that have what is multiplied by a weight right before it."""
_FOLDS = {"conv1d", "conv2d", "conv3d", "linear", *_TRANSPOSED}


def fold(native: fx.GraphModule, example: tuple[Any, ...]) -> fx.GraphModule:
    """A copy in which every eval-mode batch norm that alone reads a convolution or linear layer is folded into it.

    Weights keep their names; a layer that had no bias gains one; the batch norm's tensors disappear.
    """
    folded = sharing(native)
    norms = [n for n in folded.graph.nodes if _packet(n) == "batch_norm" and n.args[5] is False and _foldable(n)]
    linear = {norm.args[0].name for norm in norms if _packet(norm.args[0]) == "linear"}
    # A batch norm works on dimension 1, which is that of a linear layer's outputs in matrices alone.
    rows = {name for name, shape in shapes_of(native, linear, example).items() if len(shape) == 2}
    for norm in norms:
        if norm.args[0].name not in linear - rows:
            _fold_one(folded, norm)
    _drop_unread(folded)
    folded.recompile()
    return folded


def quantize(native: fx.GraphModule, quantization: Quantization) -> fx.GraphModule:
    """A copy that rounds the named activations after they are computed and the named weights where they are read.

    Parameters keep their names and float values. The arrays of a format become buffers: those of a per-channel weight
    ``NAME`` are called ``NAME_scale`` (float32) and ``NAME_zero_point`` (int32).
    """
    simulated = sharing(native)
    graph = simulated.graph
    nodes = {node.name: node for node in graph.nodes}
    missing = [name for name in quantization.activations if name not in nodes]
    if missing:
        raise SlimlineError(
            f"The model computes no value called {missing[0]!r}: quantize the model that was calibrated."
        )
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for name, each in quantization.activations.items():
        node = nodes[name]
        # After the nodes that store numbers and before all that computes, or right behind what made the value.
        with graph.inserting_before(first if node.op == "placeholder" else node.next):
            _round(simulated, node, each, name)
    for node in nodes.values():
        if node.op == "get_attr" and node.target in quantization.weights:
            with graph.inserting_before(first):
                _round(simulated, node, quantization.weights[str(node.target)], str(node.target))
    _round_inputs(simulated, quantization.dynamic, quantization.dynamic_grid)
    simulated.recompile()
    return simulated


def _round_inputs(module: fx.GraphModule, weights: Collection[str], grid: DynamicGrid) -> None:
    """Let products with these weights read what they multiply rounded to the grid of its own range."""
    rounded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
    read = products(module, weights)
    refuse_unread(read)
    for product, position in [each for uses in read.values() for each in uses]:
        x = product.args[position]
        assert isinstance(x, fx.Node)
        axes = _axes(product, x, grid)
        if (x, axes) not in rounded:
            with module.graph.inserting_before(min((product, *x.users), key=list(module.graph.nodes).index)):
                rounded[x, axes] = round_dynamically(x, axes)
        product.update_arg(position, rounded[x, axes])


def _axes(product: fx.Node, x: fx.Node, grid: DynamicGrid) -> tuple[int, ...]:
    """The dimensions over which what a product reads shares a grid; none where that is all of it."""
    if grid == GRIDS[0]:
        return ()
    rank = x.meta["val"].ndim
    if _packet(product) not in _CONVOLUTIONS:
        return read_together(rank, rank - 1)
    weight: Any = product.args[1]
    return read_together(rank, 1, weight.meta["val"].shape[2:], argument(product, "stride") or ())


def products(module: fx.GraphModule, weights: Collection[str]) -> dict[str, list[tuple[fx.Node, int]]]:
    """By weight, the products with it and the position of what they multiply by it."""
    uses: dict[str, list[tuple[fx.Node, int]]] = {name: [] for name in weights}
    for node in module.graph.nodes:
        if node.op != "get_attr" or node.target not in uses:
            continue
        turned = [node]
        for each in turned:
            for user in each.users:
                if _packet(user) in _TURNS:
                    turned.append(user)
                elif _packet(user) in _PRODUCTS and (position := user.args.index(each)):
                    uses[str(node.target)].append((user, position - 1))
    return uses


def unrounded(node: Any) -> Any:
    """What `node` was made of by `round_dynamically`, if it was."""
    for _ in range(_DEPTH):
        node = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return node


def fuse_floats(native: fx.GraphModule) -> fx.GraphModule:
    """A copy in which rounding to float8 numbers, which `Rounder` writes out, is one operator of fake quantization with
    the ends of `FLOAT_ENDS`: what the exporter carries on as it is, and what would compute something else here."""
    if not any(_float_type(node) for node in native.graph.nodes):
        return native
    module = sharing(native)
    for node in list(module.graph.nodes):
        limited = node.args[0] if (dtype := _float_type(node)) else None
        units = limited.args[0] if isinstance(limited, fx.Node) and limited.args else None
        source, scale = units.args if isinstance(units, fx.Node) and _packet(units) == "div" else (None, None)
        if dtype is None or not isinstance(source, fx.Node) or not isinstance(scale, fx.Node) or scale.op != "get_attr":
            continue
        steps, ends = _tensor(module, scale).numpy(), FLOAT_ENDS[dtype]
        each = FloatFormat(steps, tuple(None if n == 1 else 1 for n in steps.shape), dtype)
        operators = _rounding(module, source, each)
        last = next((n for n in operators if not operators & set(n.users)), None)
        if last is None or (each.axis is None and not each.per_tensor):
            continue
        with module.graph.inserting_before(last):
            if each.axis is None:
                fused = module.graph.call_function(_PER_TENSOR, (source, steps.item(), 0, *ends))
            else:
                name = str(scale.target)
                line = _store(module, f"{name}s", torch.tensor(steps.ravel()), scale)
                zeros = _store(module, f"{name}_zeros", torch.zeros(steps.size, dtype=torch.int32), scale)
                fused = module.graph.call_function(_PER_CHANNEL, (source, line, zeros, each.axis, *ends))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        for operator in [n for n in reversed(module.graph.nodes) if n in operators]:
            module.graph.erase_node(operator)
    _drop_unread(module)
    module.recompile()
    return module


def _float_type(node: fx.Node) -> str | None:
    """The type of `FLOAT_ENDS` that an operator casts to."""
    dtype = str(node.args[1]).removeprefix("torch.") if _packet(node) == "to" and len(node.args) > 1 else ""
    return dtype if dtype in FLOAT_ENDS else None


def is_rounded(node: Any, product: fx.Node, grid: DynamicGrid) -> bool:
    """Whether `node`, which a product reads, is what `round_dynamically` makes of another."""
    source = unrounded(node)
    if not isinstance(node, fx.Node) or not isinstance(source, fx.Node):
        return False
    placeholder = fx.Graph().placeholder("x")
    return _alike(round_dynamically(placeholder, _axes(product, source, grid)), node, placeholder, source)


def _end(rounding: fx.Node) -> fx.Node:
    """What `round_dynamically` made, of its operator that rounds; of somebody else's, what comes last of the like."""
    for operator in ("add", "clamp", "sub", "mul"):
        users = list(rounding.users)
        if len(users) != 1 or _packet(users[0]) != operator:
            break
        rounding = users[0]
    return rounding


def _alike(expected: Any, actual: Any, placeholder: fx.Node, source: fx.Node) -> bool:
    if not isinstance(expected, fx.Node) or not isinstance(actual, fx.Node):
        return type(expected) is type(actual) and bool(expected == actual)
    if expected is placeholder:
        return actual is source
    same = expected.target == actual.target and len(expected.args) == len(actual.args) and not actual.kwargs
    pairs = zip(expected.args, actual.args, strict=False)
    return same and all(_alike(one, other, placeholder, source) for one, other in pairs)


def _round(module: fx.GraphModule, node: fx.Node, each: Format, name: str) -> None:
    """Let all readers of `node` read it rounded; arrays become buffers called after it."""
    readers = [user for user in node.users if not _is_guard(user)]

    def store(part: str, array: Any) -> fx.Node:
        return _store(module, f"{name}_{part}", torch.tensor(array), node)

    rounded = Rounder(node, store, node.op != "get_attr").round(each)
    for user in readers:
        user.replace_input_with(node, rounded)


def format_mismatches(native: fx.GraphModule, quantization: Quantization) -> list[str]:
    """The values and parameters that `native` rounds otherwise than `quantization` says."""
    rounders: set[fx.Node] = set()
    different: dict[str, None] = {}
    unseen = {*quantization.activations, *quantization.weights}
    for node in native.graph.nodes:
        read = node.op == "get_attr"
        name = str(node.target if read else node.name)
        each = (quantization.weights if read else quantization.activations).get(name)
        if each is not None:
            operators = _rounding(native, node, each)
            if not operators or any(user not in operators and not _reads_no_number(user) for user in node.users):
                different[name] = None
            rounders |= operators
            unseen.discard(name)
    for node in native.graph.nodes:
        if _packet(node) in _FAKE_QUANTIZE and node not in rounders and not is_dynamic(node):
            source = node.args[0]
            different[str(source.target if source.op == "get_attr" else source.name)] = None
    read = products(native, quantization.dynamic)
    for name, uses in read.items():
        grid = quantization.dynamic_grid
        if not uses or not all(is_rounded(product.args[position], product, grid) for product, position in uses):
            different[name] = None
    known = {product for uses in read.values() for product, _ in uses}
    for node in native.graph.nodes:
        if is_dynamic(node) and not set(_end(node).users) <= known:
            different[node.name] = None
    return [*different, *sorted(unseen - different.keys())]


def unround(native: fx.GraphModule, quantization: Quantization) -> fx.GraphModule:
    """A copy that reads as they are the numbers that `quantize` lets it read rounded."""
    plain = sharing(native)
    for node in list(plain.graph.nodes):
        read = node.op == "get_attr"
        name = str(node.target if read else node.name)
        each = (quantization.weights if read else quantization.activations).get(name)
        operators = set() if each is None else _rounding(plain, node, each)
        for reader, operator in [(user, each) for each in operators for user in each.users if user not in operators]:
            reader.replace_input_with(operator, node)
        for operator in [n for n in reversed(plain.graph.nodes) if n in operators]:
            plain.graph.erase_node(operator)
    _drop_unread(plain)
    plain.recompile()
    return plain


def _reads_no_number(node: fx.Node) -> bool:
    return _is_guard(node) or _packet(node) == "sym_size"


def _rounding(module: fx.GraphModule, source: fx.Node, each: Format) -> set[fx.Node]:
    """All operators behind `source` that do together what `Rounder` would put there."""
    scratch = fx.Graph()
    placeholder = scratch.placeholder("x")
    placeholder.meta = dict(source.meta)
    arrays: dict[fx.Node, Tensor] = {}

    def store(part: str, array: Any) -> fx.Node:
        read = scratch.get_attr(part)
        arrays[read] = torch.tensor(array)
        return read

    def same(expected: Any, actual: Any, into: set[fx.Node]) -> bool:
        if not isinstance(expected, fx.Node) or not isinstance(actual, fx.Node):
            return type(expected) is type(actual) and bool(expected == actual)
        if expected is placeholder:
            return actual is source
        if expected in arrays:
            return actual.op == "get_attr" and _equal(_tensor(module, actual), arrays[expected])
        into.add(actual)
        pairs = zip(expected.args, actual.args, strict=False)
        alike = expected.target == actual.target and len(expected.args) == len(actual.args) and not actual.kwargs
        return alike and all(same(one, other, into) for one, other in pairs)

    last = Rounder(placeholder, store, source.op != "get_attr").round(each)
    operators: set[fx.Node] = set()
    near = {source}
    for _ in range(_HOPS):
        near |= {user for node in near for user in node.users}
    for node in near:
        held: set[fx.Node] = set()
        if same(last, node, held):
            operators |= held
    return operators


def _store(module: fx.GraphModule, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
    """A buffer `name` (with ``_`` behind it where the module has another of that name) and the node that reads it; its
    fake tensor, if any, lives where that of `like` does."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    while hasattr(owner, leaf) and not _equal(owner._buffers.get(leaf), tensor):
        leaf += "_"
    owner.register_buffer(leaf, tensor)
    read = module.graph.get_attr(f"{parent}.{leaf}".lstrip("."))
    fake = like.meta.get("val")
    if fake is not None:
        read.meta["val"] = fake.fake_mode.from_tensor(tensor)
    return read


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _packet(node: fx.Node) -> str:
    """Name of an aten operator without its overload, such as ``conv2d``; empty for anything else."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._schema.name).partition("::")[2]
    return ""


def _is_guard(node: fx.Node) -> bool:
    return node.op == "call_module"


def _foldable(norm: fx.Node) -> bool:
    source = norm.args[0]
    if not isinstance(source, fx.Node) or _packet(source) not in _FOLDS or len(source.users) != 1:
        return False
    stored = [*source.args[1:3], *norm.args[1:5]]
    return all(n is None or (isinstance(n, fx.Node) and n.op == "get_attr" and len(n.users) == 1) for n in stored)


def _fold_one(module: fx.GraphModule, norm: fx.Node) -> None:
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    gamma, beta, mean, var = (None if n is None else _tensor(module, n).double() for n in norm.args[1:5])
    assert mean is not None and var is not None
    weight_node = source.args[1]
    bias_node = source.args[2] if len(source.args) > 2 else None
    assert isinstance(weight_node, fx.Node)
    weight = _tensor(module, weight_node)
    factor = torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    if gamma is not None:
        factor = factor * gamma
    bias = -mean if bias_node is None else _tensor(module, bias_node).double() - mean
    bias = bias * factor
    if beta is not None:
        bias = bias + beta
    if _packet(source) in _TRANSPOSED:
        groups = len(factor) // weight.shape[1]
        spread = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (weight.double().reshape(groups, -1, *weight.shape[1:]) * spread).reshape(weight.shape)
    else:
        scaled = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    _put(module, str(weight_node.target), scaled.to(weight.dtype))
    if isinstance(bias_node, fx.Node):
        _put(module, str(bias_node.target), bias.to(weight.dtype))
    else:
        parent = str(weight_node.target).rpartition(".")[0]
        taken = getattr(module.get_submodule(parent), "bias", None) is not None
        name = f"{parent}.{'folded_bias' if taken else 'bias'}".lstrip(".")
        _put(module, name, bias.to(weight.dtype))
        with module.graph.inserting_before(source):
            read = module.graph.get_attr(name)
        read.meta["val"] = norm.args[3].meta.get("val")  # type: ignore[union-attr]
        source.args = (*source.args[:2], read, *source.args[3:])
    norm.replace_all_uses_with(source)
    module.graph.erase_node(norm)


def _tensor(module: fx.GraphModule, node: Any) -> Tensor:
    parent, _, leaf = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor.detach()


def _put(module: fx.GraphModule, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(tensor))


def _drop_unread(module: fx.GraphModule) -> None:
    """Remove tensors that no operator reads, and submodules that have nothing left."""
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]:
        name = str(node.target)
        module.graph.erase_node(node)
        if any(n.op == "get_attr" and n.target == name for n in module.graph.nodes):
            continue
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
    for name, child in reversed(list(module.named_modules())):
        bare = not list(child.children()) and not child._parameters and not child._buffers
        if name and type(child) is nn.Module and bare:
            parent, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(parent), leaf)
