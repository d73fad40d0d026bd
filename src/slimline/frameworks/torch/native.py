"""The torch adapter's native model: an exported graph module that can still be trained, copied and exported."""

from __future__ import annotations

import copy
import logging
import re
import unittest.mock as mock
import warnings
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

import slimline.frameworks.torch.shapes  # noqa: F401  (registers shape functions)
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch.functional import functionalise
from slimline.frameworks.torch.inline import inline
from slimline.frameworks.torch.operators import add_constant as add_constant
from slimline.frameworks.torch.operators import argument as argument
from slimline.frameworks.torch.operators import aten as aten
from slimline.frameworks.torch.operators import packet as packet
from slimline.frameworks.torch.operators import set_argument as set_argument
from slimline.frameworks.torch.whole import whole

# Operators that behave differently in training, and the argument that says so.
_FLAGS = {
    "aten.batch_norm": "training",
    "aten.dropout": "train",
    "aten.dropout_": "train",
    "aten.feature_dropout": "train",
    "aten.feature_dropout_": "train",
    "aten.alpha_dropout": "train",
    "aten.alpha_dropout_": "train",
    "aten.rrelu": "training",
    "aten.rrelu_": "training",
    "aten.lstm": "train",
    "aten.gru": "train",
    "aten.rnn_tanh": "train",
    "aten.rnn_relu": "train",
}

# Checks that export leaves in the graph: they state sizes and dtypes that surgery changes.
_CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range_for_size")


log = logging.getLogger(__name__)

Free = Literal["none", "batch", "sizes"]
"""Sizes of inputs that a captured model takes as they come: none, the batch, or every one that it does not fix."""


class Native(fx.GraphModule):
    """A graph of aten operators with its parameters under the user's own names.

    ``native(*inputs)`` takes the tensors of the user's ``forward`` and answers in its structure.
    `train` and `eval` flip the flags of batch norms and dropouts in the graph. Constants are buffers that
    are not part of the state dict. `copy.deepcopy` gives an independent copy.
    """

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size it takes, or None where any goes."""
        size: int | None = self.meta.get("fixed_batch")
        return size

    @property
    def free(self) -> Free:
        """Which sizes of its inputs may change."""
        return "none" if self.fixed_batch is not None else self.meta.get("free", "batch")

    def train(self, mode: bool = True) -> Native:
        """Switch to training or inference."""
        for module in self.modules():
            module.training = mode
            if isinstance(module, fx.GraphModule) and _flip(module.graph, mode):
                module.recompile()
        return self

    def eval(self) -> Native:
        """Switch to inference."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Native:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates what it pickles itself
            result = super().__deepcopy__(memo)
        assert isinstance(result, Native)  # fx rebuilds the same class
        for name in transient(self):
            owner, _, leaf = name.rpartition(".")
            result.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
        return result


def sharing(native: fx.GraphModule) -> Native:
    """A copy of the graph over the same tensors, for changes that put new tensors in place of some.

    It costs no memory for weights. Whoever writes into a tensor needs `copy.deepcopy` instead.
    """
    held: dict[int, Any] = {id(t): t for t in (*native.parameters(), *native.buffers())}
    return cast(Native, copy.deepcopy(native, held))


def set_training(native: fx.GraphModule, training: bool) -> None:
    """Switch a graph module, in place, to training or inference: flags of batch norms, dropouts and RNNs."""
    Native.train(native, training)  # type: ignore[arg-type]


def free_views(native: fx.GraphModule) -> None:
    """Let views take any memory layout, as reshape does: ``view`` refuses a tensor that another kernel, or channels
    last, lays out in another way."""
    for view in native.graph.find_nodes(op="call_function", target=aten.view.default):
        view.target = aten.reshape.default
    native.recompile()


def tensors(native: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor under its name; of tied ones only the first name."""
    return {**dict(native.named_parameters()), **dict(native.named_buffers())}


def ties(native: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the first name."""
    first = {id(p): name for name, p in native.named_parameters()}
    every = native.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def transient(native: nn.Module) -> list[str]:
    """Names of the buffers that are not part of the state dict."""
    return [
        f"{path}.{leaf}" if path else leaf
        for path, module in native.named_modules()
        for leaf in sorted(module._non_persistent_buffers_set)
    ]


def set_tensors(native: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Put values in place of stored tensors, by name, under all the names these are tied to."""
    aliases: dict[str, list[str]] = {}
    for alias, first in ties(native).items():
        aliases.setdefault(first, []).append(alias)
    for name, value in values:
        fresh: nn.Parameter | None = None
        for full in (name, *aliases.get(name, ())):
            owner, _, leaf = full.rpartition(".")
            module = native.get_submodule(owner)
            if leaf in module._parameters:
                if fresh is None:  # what the user froze stays so
                    learns = module._parameters[leaf].requires_grad  # type: ignore[union-attr]
                    fresh = nn.Parameter(value, requires_grad=learns and value.is_floating_point())
                module._parameters[leaf] = fresh
            else:
                module._buffers[leaf] = value


def to_tensors(arrays: Sequence[Array]) -> tuple[Tensor, ...]:
    """Arrays as tensors; the memory is shared where that can be done."""
    return tuple(torch.from_numpy(np.require(a, requirements=["C", "W"])) for a in arrays)


class _Reached(Exception):
    """All values whose shapes are asked for were computed."""


def shapes_of(native: fx.GraphModule, names: Set[str], example: Sequence[Array]) -> dict[str, tuple[int, ...]]:
    """By name the shapes of values, in a run on `example` that ends with the last of them: edited graphs note none."""
    reached: dict[str, tuple[int, ...]] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                reached[n.name] = tuple(value.shape)
                if len(reached) == len(names):
                    raise _Reached
            return value

    run = Run(native)
    run.extra_traceback = False  # it would print what is no error
    if names:
        with torch.no_grad(), suppress(_Reached):
            run.run(*to_tensors(example))
    return reached


def input_shapes(native: Native, example: Sequence[Array]) -> list[tuple[int | None, ...]]:
    """The shapes of the inputs, with None for every size that may change."""
    if native.free == "sizes":
        return list(native.meta["shapes"])
    batch = len(example[0]) if native.free == "batch" and example[0].ndim else -1
    return [(None, *x.shape[1:]) if x.ndim and len(x) == batch else x.shape for x in example]


def program_shapes(program: torch.export.ExportedProgram) -> list[tuple[int | None, ...]]:
    """The shapes of a program's inputs: None where a size may change."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in inputs]
    return [
        tuple(int(size) if is_concrete_int(size) else None for size in value.shape)
        for value in values
        if isinstance(value, Tensor)
    ]


def export(native: Native, example: Sequence[Array]) -> torch.export.ExportedProgram:
    """The model as a program in inference mode, with the free sizes that it has.

    For `save`, and for every converter that takes an exported program. Names of the state dict stay.
    """
    if native.training:
        native = sharing(native).eval()
    program = trace(native, to_tensors(example), native.free, native.meta["shapes"])
    if native.free == "sizes":
        _warn_of_fixed(native, program)
    return program


def _warn_of_fixed(native: Native, program: torch.export.ExportedProgram) -> None:
    """Say which sizes were free until steps changed the network."""
    for name, before, after in zip(
        program.graph_signature.user_inputs, native.meta["shapes"], program_shapes(program), strict=True
    ):
        fixed = [str(axis) for axis, size in enumerate(before) if size is None and after[axis] is not None]
        if fixed:
            log.warning(
                "Input %s was free along the dimensions %s, and is fixed there at its example's sizes, %s.",
                name,
                ", ".join(fixed),
                after,
            )


def trace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    free: Free,
    known: Sequence[tuple[int | None, ...]] = (),
    largest_batch: int | None = None,
) -> torch.export.ExportedProgram:
    """`torch.export` of a module; every input as long as the first has a free ``batch``, or all ``sizes`` are free that
    the module leaves so and that are not 1; where shapes of the inputs are `known`, of those that are None there. With
    `largest_batch` the batch alone is free, up to that."""
    batch = inputs[0].shape[0] if inputs and inputs[0].dim() else -1
    shapes: Any = None
    if free != "none":
        shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # by tensor, for any signature
        for i, x in enumerate(inputs):
            if free == "sizes" and largest_batch is None:
                axes = [axis for axis in range(x.dim()) if not known or known[i][axis] is None]
                shapes[x] = dict.fromkeys(axes, torch.export.Dim.AUTO)
            elif x.dim() and x.shape[0] == batch:
                size: Any = torch.export.Dim.AUTO if free == "sizes" else torch.export.Dim.DYNAMIC
                shapes[x] = {0: size if largest_batch is None else size(max=max(largest_batch, len(x)))}
    # Without grad nn.Transformer takes a fused path with no axes; with a mask it asks the data whether that is causal,
    # which export cannot answer, and which only ever was a hint.
    hint = mock.patch.object(
        transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True
    )

    def run(gradients: bool) -> torch.export.ExportedProgram:
        with torch.set_grad_enabled(gradients):
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)

    with hint, whole(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The tensor attributes? .* assigned during export"
        )  # RNNs do; torch undoes it
        try:
            return run(True)
        except RuntimeError as reason:
            if re.search("in-?place", str(reason)) is None:
                raise
            return run(False)  # writes that autograd refuses, and that a functional graph does not have


def from_program(
    program: torch.export.ExportedProgram, fixed_batch: int | None, shared: bool = False, free: Free = "batch"
) -> Native:
    """A native model with its own copy of the program's weights, or the very same if `shared`, in inference mode."""
    source = program.module(check_guards=False)
    inline(source)
    graph = source.graph
    _drop_checks(graph)
    _plain_outputs(graph)
    constants = _share_tied(source, graph)
    native = Native(source, graph, "Model")
    native.meta = {"fixed_batch": fixed_batch, "free": free, "shapes": program_shapes(program)}
    if not shared:  # a file has none of them, and names that were tied are tied again later
        drop_unread(native)
    _own(native, {*constants, *transient(source)}, shared)
    functionalise(native)
    _rename(native)
    native.eval()
    native.recompile()
    return native


def _flip(graph: fx.Graph, mode: bool) -> bool:
    """Set the training flags of a graph; whether any changed."""
    changed = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = packet(node)
        flag = _FLAGS.get(name)
        if name == "aten.instance_norm" and argument(node, "running_mean") is not None:
            flag = "use_input_stats"
        if name == "aten.batch_norm" and argument(node, "running_mean") is None:
            flag = None  # it has only its input's statistics
        if flag is not None and argument(node, flag) != mode:
            set_argument(node, flag, mode)
            changed = True
    return changed


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if (guard or (node.op == "call_function" and packet(node) in _CHECKS)) and not node.users:
            graph.erase_node(node)


def drop_unread(native: fx.GraphModule) -> None:
    """Forget the parameters that the captured function does not read, such as heads that are only used in training,
    and the buffers of modules that have no others left. A name that is tied to one that is read stays."""
    readers = [n for n in native.graph.nodes if n.op == "get_attr"]
    read = {id(_attribute(native, str(n.target))) for n in readers if n.users}
    for node in readers:
        if not node.users and id(_attribute(native, str(node.target))) not in read:
            native.graph.erase_node(node)
    for module in native.modules():
        held = {name: id(p) in read for name, p in module._parameters.items() if p is not None}
        for name in [name for name, used in held.items() if not used]:
            del module._parameters[name]
        if held and not any(held.values()):
            for name in [name for name, b in module._buffers.items() if b is not None and id(b) not in read]:
                del module._buffers[name]


def _plain_outputs(graph: fx.Graph) -> None:
    """Answer in dicts and tuples where the user's structure has classes that another process may not know."""
    codegen: Any = graph._codegen
    info = codegen.pytree_info
    leaves = iter(range(info.out_spec.num_leaves))

    def plain(part: pytree.TreeSpec) -> Any:
        if part.is_leaf():
            return next(leaves)
        children = [plain(child) for child in part.children()]
        if part.type in (tuple, list):
            return part.type(children)
        names = _fields(part)
        return dict(zip(names, children, strict=True)) if names else tuple(children)

    codegen.pytree_info = info._replace(out_spec=pytree.tree_structure(plain(info.out_spec)))


def _fields(part: pytree.TreeSpec) -> Sequence[Any]:
    """Names of the children of a dict, a named tuple, a dataclass or an ordered class such as transformers'; none of
    others."""
    names = part.context
    if isinstance(names, type):  # a named tuple's class
        names = getattr(names, "_fields", ())
    elif (
        isinstance(names, list | tuple) and names and isinstance(names[0], list | tuple)
    ):  # a dataclass's, and those None
        names = names[0]
    whole = isinstance(names, list | tuple) and len(names) == part.num_children
    return tuple(names) if whole and len(set(map(str, names))) == len(names) else ()


def output_names(native: fx.GraphModule) -> tuple[str, ...]:
    """Names of the tensors that the model answers with: keys and positions of its structure, joined by dots."""
    codegen: Any = native.graph._codegen
    (output,) = native.graph.find_nodes(op="output")
    nodes = iter(pytree.tree_leaves(output.args[0]))
    names: list[str] = []

    def visit(part: pytree.TreeSpec, path: str) -> None:
        if part.is_leaf():
            if isinstance(next(nodes), fx.Node):
                names.append(path or "0")
            return
        keys = _fields(part) or range(part.num_children)
        for key, child in zip(keys, part.children(), strict=True):
            visit(child, f"{path}.{key}" if path else str(key))

    visit(codegen.pytree_info.out_spec, "")
    return tuple(names)


def _share_tied(source: nn.Module, graph: fx.Graph) -> list[str]:
    """Let every reader of a tied parameter read its first name; the names of all plain constants."""
    first = ties(source)
    readers = {node.target: node for node in graph.nodes if node.op == "get_attr"}
    for name, node in readers.items():
        if name in first and first[name] in readers:
            node.replace_all_uses_with(readers[first[name]])
    stored = {
        *dict(source.named_parameters(remove_duplicate=False)),
        *dict(source.named_buffers(remove_duplicate=False)),
    }
    return [n for n, node in readers.items() if n not in stored and isinstance(_attribute(source, n), Tensor)]


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _own(native: Native, constants: set[str], shared: bool) -> None:
    """Copy every tensor unless `shared`; make constants buffers outside the state dict."""

    def own(tensor: Tensor) -> Tensor:
        held = tensor.detach()
        return held.contiguous() if shared else held.clone(memory_format=torch.contiguous_format)

    set_tensors(native, ((name, own(tensor)) for name, tensor in tensors(native).items()))
    for name in constants:
        value = _attribute(native, name)
        owner, _, leaf = name.rpartition(".")
        module = native.get_submodule(owner)
        if leaf not in module._buffers:
            delattr(module, leaf)
            value = value.detach().clone()
        module.register_buffer(leaf, value, persistent=False)


def _rename(native: Native) -> None:
    """Give an activation that is called like a stored tensor another name: names are unique in the neutral graph."""
    stored = set(tensors(native))
    for node in native.graph.nodes:
        if node.op not in ("get_attr", "output") and node.name in stored:
            node._rename(f"{node.name}_value")


def check_batch(native: fx.GraphModule, inputs: Sequence[Array]) -> None:
    """Refuse, in one sentence, a batch that the model cannot take."""
    fixed = native.meta.get("fixed_batch")
    if fixed is not None and len(inputs[0]) != fixed:
        raise SlimlineError(
            f"The model was captured for batches of exactly {fixed}, not {len(inputs[0])}: "
            "give batches of that size, or write its forward without the batch size as a number."
        )
