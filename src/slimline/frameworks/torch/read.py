"""From the user's module to a native graph module, and from that to the neutral graph."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from slimline.basics.arrays import Example, in_order
from slimline.basics.errors import NoExample, SlimlineError, first_line
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array
from slimline.frameworks.torch import native as natives
from slimline.frameworks.torch import rules, rules_recurrent, rules_shape, rules_spatial  # noqa: F401  # they fill the registry
from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.device import to_cpu
from slimline.frameworks.torch.fold import fold
from slimline.frameworks.torch.native import Free, Native, set_training, to_tensors
from slimline.frameworks.torch.program import path
from slimline.frameworks.torch.prune import plain
from slimline.frameworks.torch.registry import constant, rule_for
from slimline.graph.ir import Graph, Node, Value

__all__ = ["load", "read", "set_training"]

log = logging.getLogger(__name__)


def load(
    source: nn.Module | torch.export.ExportedProgram, example: Example | None, dynamic: bool = False
) -> tuple[Native, tuple[Array, ...]]:
    """Capture a module, or take an exported program, as a native model with its own copy of the weights.

    Parameters
    ----------
    source : the user's module, which is left as it was, or a program of `torch.export`; on any device.
    example : inputs of `forward`, each ``(batch, …)``. A program brings its own.
    dynamic : whether a module's sizes beside the batch stay free where it allows that. A program says so itself.

    Returns
    -------
    The native model in inference mode (parameters frozen where the user's are, state-dict names the user's own) and
    example inputs of two rows, or of the only batch size it takes.

    Raises
    ------
    SlimlineError : no example, not-a-number in the weights, or a module that `torch.export` cannot capture.
    """
    if example is not None:
        example = in_order(example, _input_names(source), "The example")
    if isinstance(source, Native):
        return copy.deepcopy(source).eval(), _need(example)
    source = to_cpu(source)
    if isinstance(source, nn.Module):
        source = plain(source)
    finite(source.state_dict if isinstance(source, torch.export.ExportedProgram) else source.state_dict())
    if isinstance(source, torch.export.ExportedProgram):
        return _from_program(source, example)
    example = _need(example)
    modes = {module: module.training for module in source.modules()}
    source.eval()
    try:
        if not dynamic:
            return capture(source, example)
        native, example = capture(source, example, ("sizes", "batch"))
        if native.free != "sizes" or all(None not in shape[1:] for shape in natives.input_shapes(native, example)):
            raise SlimlineError(
                f"{type(source).__name__} leaves no size of its inputs free but the batch: load it without dynamic, or "
                "write its forward without sizes as numbers; sizes of 1 in the example are taken for fixed."
            )
        return native, example
    finally:
        for module, mode in modes.items():
            module.training = mode


def _input_names(source: nn.Module | torch.export.ExportedProgram) -> list[str]:
    if isinstance(source, torch.export.ExportedProgram):
        return [str(name) for name in source.graph_signature.user_inputs]
    if isinstance(source, fx.GraphModule):
        return [str(node.target) for node in source.graph.find_nodes(op="placeholder")]
    return list(inspect.signature(source.forward).parameters)


def _need(example: tuple[Array, ...] | None) -> tuple[Array, ...]:
    if not example:
        raise NoExample("A torch module needs example_inputs, for instance one batch of its data: pass them to load.")
    if any(x.ndim and len(x) == 0 for x in example):
        raise SlimlineError("The example inputs are empty: give at least one sample.")
    return tuple(example)


def finite(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        # A mask that attention adds holds minus infinity, and a bound that was never set is one infinite number.
        if bool(value.isnan().any()) or (value.dim() and bool(value.isposinf().any())):
            raise SlimlineError(f"The weights hold NaN or infinity (first in {name}): load a sound checkpoint.")


def _two_rows(example: tuple[Array, ...]) -> tuple[Array, ...]:
    """Two samples of each batched input: export takes a size of 1 for a constant."""
    batch = len(example[0]) if example[0].ndim else -1
    return tuple(np.resize(x, (2, *x.shape[1:])) if x.ndim and len(x) == batch else x for x in example)


def capture(
    module: nn.Module, example: tuple[Array, ...], frees: tuple[Free, ...] = ("batch",)
) -> tuple[Native, tuple[Array, ...]]:
    """Export a module in inference mode, with the first of `frees` that it takes, or else for its example's sizes."""
    native, inputs = _captured(module, example, frees)
    fold(native)
    return native, inputs


def _captured(
    module: nn.Module, example: tuple[Array, ...], frees: tuple[Free, ...]
) -> tuple[Native, tuple[Array, ...]]:
    _check_names(module)
    two = _two_rows(example)
    for free in frees:
        try:
            program = natives.trace(module, to_tensors(two), free)
        except Exception as reason:  # torch.export raises many types; fixed sizes are tried before it is an error
            log.info("no free %s: %s", free, first_line(reason))
        else:
            return natives.from_program(program, None, free=free), two
    try:
        program = natives.trace(module, to_tensors(example), "none")
    except Exception as reason:
        raise SlimlineError(
            f"torch.export cannot capture {type(module).__name__} ({first_line(reason)}): check the example inputs, "
            "or give the part of the model without control flow on data."
        ) from reason
    log.warning("%s only takes batches of %d, as its example.", type(module).__name__, len(example[0]))
    return natives.from_program(program, len(example[0])), example


def _check_names(module: nn.Module) -> None:
    """Refuse names that the source which torch writes for a graph cannot hold, and no file could."""
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, _ in every:
        try:
            path(name)
        except Malformed as reason:
            raise SlimlineError(
                f"The weight {name[:80]!r} has a name that torch cannot write into a graph: rename its module "
                "without quotes, backslashes, control characters and Python's own words."
            ) from reason


def _from_program(
    program: torch.export.ExportedProgram, example: tuple[Array, ...] | None
) -> tuple[Native, tuple[Array, ...]]:
    shapes = natives.program_shapes(program)
    if example is None:
        stored = program.example_inputs
        if stored is None or stored[1] or not all(isinstance(x, Tensor) for x in stored[0]):
            raise NoExample("The exported program holds no example inputs: pass example_inputs to load.")
        example = tuple(x.detach().cpu().numpy() for x in stored[0])
    fixed = shapes[0][0] if shapes[0] else 0
    others = any(None in shape[1:] for shape in shapes)
    example = _need(example)
    native = natives.from_program(program, fixed, free="sizes" if others else "batch")
    return native, _two_rows(example) if fixed is None else example


def read(native: fx.GraphModule, example: tuple[Array, ...]) -> Graph:
    """The neutral graph of a native model.

    Shapes are those of one run on `example`. An activation is called like its fx node, a stored tensor by
    its state-dict name. Arithmetic on sizes is folded. Operators made of several neutral ones give nodes
    ``NAME/0``, ``NAME/1``, … and a last one called NAME.
    """
    if native.training:
        native = copy.deepcopy(native)
        set_training(native, False)
    recorder = _Recorder(native)
    try:
        with torch.no_grad():
            recorder.run(*to_tensors(example))
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError, NotImplementedError) as reason:
        raise SlimlineError(
            f"The model does not run on its example inputs ({first_line(reason)}): give inputs that fit it."
        ) from reason
    stored = natives.tensors(native)
    reader = _Reader(recorder, stored)
    for node in native.graph.nodes:
        reader.visit(node)
    outputs: list[str] = []
    fx.node.map_arg(native.graph.output_node().args, lambda n: outputs.append(reader.names[n]))
    inputs = tuple(n.name for n in native.graph.nodes if n.op == "placeholder" and n.name in reader.values)
    return Graph(
        nodes=tuple(reader.nodes),
        values=reader.values,
        parameters=tuple(stored),
        trainable=frozenset(name for name, p in native.named_parameters() if p.is_floating_point()),
        frozen=frozenset(n for n, p in native.named_parameters() if p.is_floating_point() and not p.requires_grad),
        inputs=inputs,
        outputs=tuple(dict.fromkeys(outputs)),
        batch=len(example[0]) if example[0].ndim else 1,
    )


class _Recorder(fx.Interpreter):
    """Runs the graph once and keeps the shape of every tensor, every number, and small constants of integers."""

    def __init__(self, native: fx.GraphModule) -> None:
        super().__init__(native)
        self.results: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Array] = {}
        self._trained = {id(p) for p in native.parameters()}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n] = _outline(result)
        if isinstance(result, Tensor) and not result.is_floating_point() and self._constant(n, result):
            self.constants[n] = result.detach().cpu().numpy().copy()
        return result

    def _constant(self, node: fx.Node, result: Tensor) -> bool:
        if node.op == "get_attr":
            return id(result) not in self._trained
        return node.op == "call_function" and all(n in self.constants for n in node.all_input_nodes)


def _outline(result: Any) -> Any:
    """A tensor's shape and dtype as a `Value` without a name; lists of them; numbers as they are."""
    if isinstance(result, Tensor):
        return Value("", tuple(result.shape), str(result.dtype).removeprefix("torch."))
    if isinstance(result, (list, tuple)):
        return [_outline(r) for r in result]
    return result


class _Reader:
    """Builds the neutral graph node by node.

    Attributes
    ----------
    names : of the value that each fx node stands for.
    """

    def __init__(self, recorder: _Recorder, stored: Mapping[str, Tensor]) -> None:
        self.recorder = recorder
        self.nodes: list[Node] = []
        self.names: dict[fx.Node, str] = {}
        self.values = {
            name: Value(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in stored.items()
        }

    def visit(self, node: fx.Node) -> None:
        """Translate one fx node."""
        result = self.recorder.results.get(node)
        if node.op == "get_attr":
            if str(node.target) in self.values:
                self.names[node] = str(node.target)
        elif node.op == "placeholder":
            if isinstance(result, Value):
                self._add(node, node.name, result)
        elif node.op in ("call_function", "call_module") and node not in self.names:
            outputs = self._outputs(node, result)
            if outputs:
                call = Call(node, self.recorder.results, self.recorder.constants, self.names, self.values, outputs)
                rule = constant if node in self.recorder.constants else rule_for(node)
                rule(call)
                self.nodes += call.emitted

    def _outputs(self, node: fx.Node, result: Any) -> tuple[str, ...]:
        """Names of the tensors that a node gives; those of a list are called like the `getitem` that takes them."""
        if isinstance(result, Value):
            self._add(node, node.name, result)
            return (node.name,)
        if not isinstance(result, list):
            return ()
        taken: dict[Any, list[fx.Node]] = {}
        for user in node.users:
            if natives.packet(user) == "getitem":
                taken.setdefault(user.args[1], []).append(user)
        names = []
        for index, value in enumerate(result):
            if isinstance(value, Value):
                users = taken.get(index, [])
                name = users[0].name if users else f"{node.name}.{index}"
                self.values[name] = Value(name, value.shape, value.dtype)
                self.names.update(dict.fromkeys(users, name))
                names.append(name)
        return tuple(names)

    def _add(self, node: fx.Node, name: str, value: Value) -> None:
        self.names[node] = name
        self.values[name] = Value(name, value.shape, value.dtype)
