"""The exchange form ONNX of a torch model."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18, values

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch import onnx_recurrent
from slimline.frameworks.torch.attention import write_out
from slimline.frameworks.torch.fakequant import fold, fuse_floats, quantize
from slimline.frameworks.torch.native import Native, export, output_names
from slimline.frameworks.torch.operators import layer, packet
from slimline.frameworks.torch.pairs import move_as_pairs
from slimline.frameworks.torch.portions import slice_portions
from slimline.frameworks.torch.promotion import promote
from slimline.frameworks.torch.rounding import WHOLE
from slimline.frameworks.torch.through import drop_straight_through
from slimline.frameworks.torch.whole import whole
from slimline.graph.quantization import Quantization
from slimline.methods.dynamic import HIGH, LEVELS, LOW
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.forms.onnx import schema
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, attribute, replace

op: Any = opset18  # its operators are typed without those that may be left out

_INT64 = 7
_PARTS = ("scale", "zero_point", "low", "high")
_MARK = IntegerGrid(np.ones((), np.float32), (), 8, True)


def to_onnx(native: Native, example: tuple[Array, ...], integer: bool, weights: Collection[str] = ()) -> ir.Model:
    """The ONNX model, see `slimline.runtimes.forms.onnx`; batch norms are folded unless it is `integer`.

    The batch size stays free where the model's is. The same model gives the same bytes.

    Parameters
    ----------
    weights : stored tensors that a rounding operator marks, so that the exporter leaves them whole; what it rounds to
        means nothing.

    Raises
    ------
    SlimlineError : an operator that cannot be written as ONNX; names it and its layer where they can be told.
    """
    module: Any = native if integer or weights else fold(native, example)
    if integer:
        module = fuse_floats(module)
    if weights:
        module = quantize(module, Quantization(weights=dict.fromkeys(weights, _MARK)))
    program = None
    try:
        with _quiet(), _read_once(), whole(), torch.no_grad():
            program = export(module, example)
            write_out(program)
            move_as_pairs(program)
            promote(program)
            slice_portions(program)
            drop_straight_through(program)
            exported = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=_translations())
        assert exported is not None
        _store_constants(exported.model.graph)
        _fuse_dynamic(exported.model.graph)
        _name_outputs(exported.model.graph, output_names(native))
        return exported.model
    except SlimlineError:
        raise
    except Exception as error:  # torch and onnxscript raise many types
        raise SlimlineError(
            f"The model cannot be written as ONNX ({_reason(error, program)}): "
            "express that part of it by common operators."
        ) from error


def _store_constants(graph: ir.Graph) -> None:
    """Register numbers that nodes read and the graph does not hold: of the bounds of several clips of one value,
    onnxscript 0.7 registers the first alone."""
    for value in [value for node in graph for value in node.inputs if value is not None]:
        loose = value.producer() is None and not value.is_initializer() and not value.is_graph_input()
        if loose and value.const_value is not None:
            graph.register_initializer(value)


def _fuse_dynamic(graph: ir.Graph) -> None:
    """Of what rounds to a grid made at run time, the one operator that stands for it; the rest is nobody's then."""
    for node in list(graph):
        if node.op_type != FAKE_QUANTIZE or tuple(attribute(node, name, None) for name in _PARTS) != WHOLE:
            continue
        scaling = None if node.inputs[0] is None else node.inputs[0].producer()
        end: ir.Node | None = node
        for operator in ("Add", "Clip", "Sub", "Mul"):
            users = [] if end is None else [user for user, _ in end.outputs[0].uses()]
            end = users[0] if len(users) == 1 and users[0].op_type == operator else None
        if scaling is None or scaling.op_type not in ("Div", "Mul") or end is None:
            raise SlimlineError(
                "The exporter changed how values are rounded to ranges found at run time: report this model to "
                "slimline."
            )
        low, high = (0, LEVELS) if scaling.op_type == "Div" else (LOW, HIGH)
        attributes = {"dynamic": 1, "low": low, "high": high}
        rounding = ir.node(FAKE_QUANTIZE, [scaling.inputs[0]], attributes, domain=DOMAIN, name=str(node.name))
        replace(graph, end, [rounding])


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Call several outputs as the user does, where these are names and not positions, and no other value has them."""
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    taken |= set(graph.initializers)
    taken -= {value.name for value in graph.outputs}
    if len(names) == len(graph.outputs) > 1 and not taken & set(names) and not all(n[0].isdigit() for n in names):
        for value, name in zip(graph.outputs, names, strict=True):
            value.name = name


def _translations() -> dict[Any, Callable[..., Any]]:
    """The ``custom_translation_table`` for `torch.onnx.export` that keeps rounding and recurrent operators whole."""
    experts = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # registered by transformers, if it is used
    operator = values.Op(values.Opset(DOMAIN, 1), FAKE_QUANTIZE, schema())

    def tensor(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Any:
        return operator(x, scale=scale, zero_point=zero_point, low=quant_min, high=quant_max)

    def channel(x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        return operator(x, scale, axis=axis, low=quant_min, high=quant_max)

    return {
        torch.ops.aten.fake_quantize_per_tensor_affine.default: tensor,
        torch.ops.aten.fake_quantize_per_channel_affine.default: channel,
        **onnx_recurrent.translations(),
        **({experts.default: _experts} if experts else {}),
    }


def _experts(rows: Any, weight: Any, ends: Any) -> Any:
    """Runs of rows, each times its matrix, zero past the last run: every matrix times all rows, of which each row's
    own is taken."""
    weight = op.Pad(weight, op.Constant(value_ints=[0, 0, 0, 1, 0, 0]))
    products = op.MatMul(op.Unsqueeze(rows, [0]), weight)
    count = op.Gather(op.Shape(rows), op.Constant(value_int=0))
    place = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    ends = op.Unsqueeze(op.Cast(ends, to=_INT64), [1])
    expert = op.ReduceSum(op.Cast(op.GreaterOrEqual(op.Unsqueeze(place, [0]), ends), to=_INT64), [0], keepdims=0)
    return op.GatherND(products, op.Concat(op.Unsqueeze(expert, [1]), op.Unsqueeze(place, [1]), axis=-1))


@contextmanager
def _read_once() -> Iterator[None]:
    """Have the exporter read its own translations once, not at each export, where they are most of the work.

    torch promises none of the names that this takes, so where they are others the exporter does as it likes.
    """
    registry = _registry()
    if registry is None:
        yield
        return
    before = vars(registry)["from_torchlib"]

    def from_torchlib(opset_version: int) -> Any:
        known = _translations_of_torch(before, opset_version, "torchvision" in sys.modules)
        copy = registry()
        copy._opset_version = opset_version
        copy.functions = {operator: list(ways) for operator, ways in known.functions.items()}
        return copy

    registry.from_torchlib = staticmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = before


@cache
def _registry() -> Any:
    """The exporter's class of translations, if it is as it was."""
    try:
        registry: Any = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        instance = registry()
    except (ImportError, AttributeError, TypeError):
        return None
    known = isinstance(vars(registry).get("from_torchlib"), classmethod)
    return registry if known and {"_opset_version", "functions"} <= vars(instance).keys() else None


@cache
def _translations_of_torch(read: Any, opset_version: int, vision: bool) -> Any:
    """As torch reads them by its class method; those of torchvision's operators are there once that is loaded."""
    return read.__get__(None, _registry())(opset_version)


def _reason(error: BaseException, program: Any) -> str:
    """What an exporter stumbled over, in some words: the operator and its layer where they can be told."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", str(cause)) for cause in causes)
    nodes = {node.name: node for node in program.graph.nodes} if program is not None else {}
    for name in re.findall(r"(?:While executing|node '|node )%?(\w+)", text):
        if name in nodes and nodes[name].op == "call_function":
            return f"operator {packet(nodes[name])} in {layer(nodes[name]) or 'the model itself'}"
    operators = re.findall(r"OpOverload\(op='([\w.]+)'", text) or re.findall(r"target=torch\.ops\.([\w.]+)", text)
    if operators:
        return f"operator {operators[0]}"
    return " ".join((text.strip().splitlines() or [type(error).__name__])[0].split())[:200].rstrip(".: ")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks (missing torchvision, deprecations inside torch, what is not folded) off the user's
    terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
