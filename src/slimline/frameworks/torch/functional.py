"""Writes in place become new values: in a functional graph every node has one content, whoever reads it, and when.

A write to a tensor that shares memory with others changes all of them. Which do is seen where the graph runs without
numbers (`torch._subclasses.FakeTensor`), so that operators which only sometimes copy, such as ``reshape``, are known
for what they do. A write makes a new content of the view, and from it one of everything that this is a view of
(`slimline.frameworks.torch.views.put_back`); other views are taken anew where they are read later. Operators keep
their names, and composite ones stay whole.
"""

from __future__ import annotations

import logging
import operator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch.operators import add_constant, aten, layer, packet, writes
from slimline.frameworks.torch.views import View, put_back, same, shared

log = logging.getLogger(__name__)

_LAYOUT = ("unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_")
"""Operators in place that change how a tensor is looked at, and none of its numbers."""

_RESIZE = ("resize_", "resize_as_", "set_", "as_strided_")

_NAMES = {
    "__iand__": "bitwise_and", "__ior__": "bitwise_or", "__ixor__": "bitwise_xor",
    "__ilshift__": "__lshift__", "__irshift__": "__rshift__", "_index_put_impl_": "index_put",
    "normal_": "normal_functional",
}  # fmt: skip
"""Functional names of operators in place where they are not the same without the underscore."""

_SYMBOLIC = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu", "aten.pad", "aten.constant_pad_nd")
"""Operators that run on sizes that are symbols with Python's dispatcher alone (padding where it cuts)."""

_SKIPPED = ("detach", "dropout", "feature_dropout", "alpha_dropout")
"""Views of all of a tensor that are more than its numbers."""


def functionalise(native: fx.GraphModule) -> None:
    """Replace, in place, every operator that writes into a tensor by one that makes a new one.

    What is written into an input or a stored tensor lasts for one call: a model is a function of its inputs.

    Raises
    ------
    SlimlineError : a write that has no functional form, naming operator and layer.
    """
    for path, module in list(native.named_modules()):
        if isinstance(module, fx.GraphModule) and any(map(writes, module.graph.nodes)):
            _Rewriter(module, inner=bool(path)).run()
            module.graph.lint()
            module.recompile()


class _Fakes(fx.Interpreter):
    """Runs a graph without numbers; keeps of every node where its tensors lay in memory when it had run."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.values: dict[fx.Node, Any] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input in memory of its own."""
        value = next(self.args_iter)
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return value

    def fetch_attr(self, target: str) -> Any:
        """A stored tensor without its numbers."""
        fake = partial(self.mode.from_tensor, static_shapes=True)
        return pytree.tree_map_only(Tensor, fake, super().fetch_attr(target))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; an operator that changes the layout of its argument leaves what was kept of it as it was."""
        # Some operators run on sizes that are symbols only with Python's dispatcher, where others would copy what they
        # else show.
        try:
            with enable_python_dispatcher() if packet(n) in _SYMBOLIC else nullcontext():
                result = super().run_node(n)
        except RuntimeError as reason:
            if "SymIntArrayRef expected" not in str(reason):
                raise
            with enable_python_dispatcher():
                result = super().run_node(n)
        self.values[n] = pytree.tree_map_only(Tensor, Tensor.detach, result)
        return result


class _Rewriter:
    """One graph on its way to a functional one; `inner` where it is a block of another.

    Attributes
    ----------
    views : of every node that gives a tensor, which one; operators in place give the one that they write into.
    owners : of every memory, the tensor that owns it.
    lists : of every operator that gives a list, the tensors that it reads.
    values : of every node its shapes.
    """

    def __init__(self, module: fx.GraphModule, inner: bool) -> None:
        self.module, self.graph, self.inner = module, module.graph, inner
        self.inputs = [n.meta.get("val") for n in self.graph.find_nodes(op="placeholder")]
        modes = [x.fake_mode for x in pytree.tree_leaves(self.inputs) if isinstance(x, FakeTensor)]
        self.mode: FakeTensorMode = modes[0] if modes else FakeTensorMode()
        self.views: dict[fx.Node, View] = {}
        self.owners: dict[int, View] = {}
        self.lists: dict[fx.Node, list[View]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.at: fx.Node

    def run(self) -> None:
        """Rewrite the graph."""
        idle = {node for node in self.graph.nodes if not node.users and not writes(node)}
        before, self.mode.allow_non_fake_inputs = self.mode.allow_non_fake_inputs, True
        try:
            with self.mode, torch.no_grad():
                fakes = _Fakes(self.module, self.mode)
                fakes.run(*self.inputs)
                self.values = fakes.values
                for node in list(self.graph.nodes):
                    self._visit(node)
        finally:
            self.mode.allow_non_fake_inputs = before
        self._tell()
        for node in reversed(self.graph.nodes):
            own = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
            if own and not node.users and node not in idle:
                self.graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        self.at = node
        read = {source: self.views[source] for source in node.all_input_nodes if source in self.views}
        with self.graph.inserting_before(node):
            contents = {source: self._read(view) for source, view in read.items()}
        for source, content in contents.items():
            if content is not source:
                node.replace_input_with(source, content)
        if writes(node):
            self._write(node, read, contents)
        else:
            self._register(node, list(read.values()))

    def _register(self, node: fx.Node, read: list[View]) -> None:
        value = self.values.get(node)
        if "val" not in node.meta:
            node.meta["val"] = value
        if isinstance(value, (list, tuple)):
            self.lists[node] = read
        elif isinstance(value, Tensor):
            if node.target is operator.getitem:
                read = self.lists.get(node.all_input_nodes[0], [])
            owner = self.owners.get(shared(value))
            parent = next((view for view in read if view.root is owner), owner)
            self.views[node] = view = View(node, parent, value)
            view.version = len(view.root.writes)
            if node.target is operator.getitem:
                view.parts = self.values[node.all_input_nodes[0]]
            self.owners.setdefault(shared(value), view)

    # -- what is read ------------------------------------------------------------------------

    def _read(self, view: View) -> fx.Node:
        """The node that holds what is in a view now."""
        missed = view.root.writes[view.version :]
        if missed and not all(view.apart(written) for written in missed):
            assert view.parent is not None  # what owns a memory misses no write to it
            view.content = self._again(view, self._read(view.parent))
        view.version = len(view.root.writes)
        return view.content

    def _again(self, view: View, content: fx.Node) -> fx.Node:
        """The same view of a parent that holds something else."""
        if view.alike and view.kind not in _SKIPPED:
            return content
        source = view.maker.args[0]
        if view.maker.target is operator.getitem and isinstance(source, fx.Node):
            return self._emit(operator.getitem, self._copy(source, view, content), view.maker.args[1])
        return self._copy(view.maker, view, content)

    def _copy(self, node: fx.Node, view: View, content: fx.Node) -> fx.Node:
        parent = view.parent
        assert parent is not None
        old = [n for n in node.all_input_nodes if self.views.get(n) is parent or n in parent.contents]
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: content if n in old else n)
        return self._emit(node.target, *args, **kwargs)

    # -- what is written ------------------------------------------------------------------------

    def _write(self, node: fx.Node, read: dict[fx.Node, View], contents: dict[fx.Node, fx.Node]) -> None:
        schema = node.target._schema  # type: ignore[union-attr]
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        by_content = {contents[source]: view for source, view in read.items()}
        places = [node.kwargs.get(n, node.args[0] if node.args else None) for n in written]
        view = by_content.get(places[0]) if len(places) == 1 and isinstance(places[0], fx.Node) else None
        if view is None or schema.name.partition("::")[2] in _RESIZE:
            raise self._refusal(node)
        if schema.name.partition("::")[2] in _LAYOUT:
            return self._lay_out(node, view)
        if schema.name == "aten::copy_":
            source = next((v for n, v in read.items() if contents[n] is node.args[1]), None)
            if source is not None and same(source.value, view.value):
                view.hold(contents[next(n for n, v in read.items() if v is source)])
                self.views[node] = view
                return None
        self.views[node] = view
        content = self._functional(node, view, written[0])
        with self.graph.inserting_before(node.next):
            return self._put(node, view, content)

    def _lay_out(self, node: fx.Node, view: View) -> None:
        """A tensor is looked at in another way from now on, by whoever has it."""
        node.target = _twin(node)
        fresh = View(node, view, self.values[node])
        fresh.version = len(view.root.writes)
        self.views.update({n: fresh for n, other in self.views.items() if other is view})
        self.views[node] = fresh

    def _put(self, node: fx.Node, view: View, content: fx.Node) -> None:
        """Let a view hold something else, and all that it is a view of."""
        held, new, below = [(view, content)], content, view
        while below.parent is not None:
            old = self._read(below.parent)
            back = put_back(below, old, new, view, self._emit)
            if back is None:
                raise self._refusal(node, f", a view made by {below.kind}")
            if below.kind == "detach" and self._trained(below.root):
                through = self._emit(aten.sub.Tensor, old, self._emit(aten.detach.default, old))
                back = self._emit(aten.add.Tensor, back, through)  # the data changes, gradients do not notice
            held.append((below.parent, back))
            new, below = back, below.parent
        view.root.writes.append(view)
        for other, holds in held:
            other.hold(holds)
            other.version = len(view.root.writes)

    def _trained(self, root: View) -> bool:
        if root.maker.op != "get_attr":
            return False
        owner, _, leaf = str(root.maker.target).rpartition(".")
        return isinstance(getattr(self.module.get_submodule(owner), leaf), nn.Parameter)

    def _functional(self, node: fx.Node, view: View, written: str) -> fx.Node:
        """Turn an operator in place into one that gives what it would have written; the node that holds it."""
        name, like = node.target._schema.name.partition("::")[2], node.args[0]  # type: ignore[union-attr]
        if name == "zero_":
            self._become(node, aten.zeros_like.default, like)
        elif name == "fill_" and not isinstance(node.args[1], fx.Node):
            self._become(node, aten.full_like.default, like, node.args[1])
        elif name in ("copy_", "fill_"):
            source = self._cast(node, node.args[1], view.value.dtype)  # type: ignore[arg-type]
            whole = str(self.values[source].shape) == str(view.value.shape)
            self._become(node, *((aten.alias.default, source) if whole else (aten.expand_as.default, source, like)))
        elif name in ("index_put_", "_index_put_impl_") and (mask := self._masked(node, view)) is not None:
            self._become(node, aten.where.self, mask, self._cast(node, node.args[2], view.value.dtype), like)  # type: ignore[arg-type]
        elif name == "fill_diagonal_":
            raise self._refusal(node)
        else:
            twin = _twin(node)
            if twin is None:
                raise self._refusal(node)
            kwargs = {k: v for k, v in node.kwargs.items() if k != written}
            self._become(node, twin, *node.args, **kwargs)
        with self.graph.inserting_before(node.next):
            return self._cast(node, node, view.value.dtype, after=True)

    def _become(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
        node.target, node.args, node.kwargs = target, args, kwargs
        self.values[node] = node.meta["val"] = self._fake(target, args, kwargs)

    def _cast(self, node: fx.Node, source: fx.Node, dtype: torch.dtype, after: bool = False) -> fx.Node:
        """A tensor in the type of the one that it is written into."""
        if self.values[source].dtype == dtype:
            return source
        with self.graph.inserting_before(node.next if after else node):
            return self._emit(aten.to.dtype, source, dtype)

    def _masked(self, node: fx.Node, view: View) -> fx.Node | None:
        """The mask of ``x[mask] = number``, of the rank of x."""
        indices: Any = node.args[1]
        value: Any = self.values.get(node.args[2])  # type: ignore[arg-type]
        more = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
        if more or len(indices) != 1 or not isinstance(value, Tensor) or value.dim():
            return None
        mask = indices[0]
        if self.values[mask].dtype != torch.bool:
            return None
        with self.graph.inserting_before(node):
            for _ in range(view.value.dim() - self.values[mask].dim()):
                mask = self._emit(aten.unsqueeze.default, mask, -1)
        return mask  # type: ignore[no-any-return]

    # -- new operators ------------------------------------------------------------------------------

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operator where the graph is being written; arrays among its arguments are stored."""

        def stored(array: Array) -> fx.Node:
            with unset_fake_temporarily():
                value = torch.from_numpy(array)
            read = self.graph.get_attr(add_constant(self.module, f"{self.at.name}_positions", value))
            read.meta["val"] = self.values[read] = self.mode.from_tensor(value, static_shapes=True)
            return read

        args = tuple(stored(a) if isinstance(a, np.ndarray) else a for a in args)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: self.at.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.at.meta}
        self.values[node] = node.meta["val"] = self._fake(target, args, kwargs)
        return node

    def _fake(self, target: Any, args: Any, kwargs: Any) -> Any:
        filled = fx.node.map_arg((tuple(args), dict(kwargs)), self.values.__getitem__)
        return target(*filled[0], **filled[1])

    # -- what the user is told ------------------------------------------------------------------------

    def _tell(self) -> None:
        for view in self.owners.values():
            if not view.writes:
                continue
            if self.inner and view.maker.op == "placeholder":
                raise self._refusal(view.writes[0].maker)
            if view.maker.op == "get_attr" and not str(view.maker.target).startswith("lifted_tensor"):
                log.warning("What the model writes into %s lasts for one call.", view.maker.target)

    def _refusal(self, node: fx.Node, why: str = "") -> SlimlineError:
        return SlimlineError(
            f"{packet(node)} in {layer(node) or 'the model'} writes into a tensor{why} in a way that has no functional "
            "form: write that part of the model without changing tensors in place."
        )


def _twin(node: fx.Node) -> Any:
    """The functional operator of one in place, None where torch has none."""
    schema = node.target._schema  # type: ignore[union-attr]
    space, _, name = schema.name.partition("::")
    arguments = [a for a in schema.arguments if not (a.kwarg_only and a.alias_info is not None)]
    wish = [a.name for a in arguments[1:]], [str(a.type) for a in arguments]
    packet = getattr(getattr(torch.ops, space), _NAMES.get(name, name.removesuffix("_")), None)
    for overload in packet.overloads() if packet is not None else ():
        other = getattr(packet, overload)
        parameters = other._schema.arguments
        if (
            not other._schema.is_mutable
            and ([a.name for a in parameters[1:]], [str(a.type) for a in parameters]) == wish
        ):
            return other
    return None
