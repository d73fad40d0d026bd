"""Small ONNX models: written by hand around an operator, and exported from the zoo of torch modules."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import numpy_helper, parser

import slimline as sl
from slimline.model import Model
from slimline.plans import Plan
from tests.zoo_torch import ZOO

Array = np.ndarray


def model(
    body: str,
    weights: Mapping[str, Array],
    inputs: str = "float[N,3,6,6] x",
    output: str = "float[N,K] y",
    opset: int = 18,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A model of these operators, in ONNX' own text."""
    graph = parser.parse_graph(f"g ({inputs}) => ({output}) {{ {body} }}")
    graph.initializer.extend(numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    for node in graph.node:  # the text knows no dots
        node.input[:] = [name.replace("__", ".") for name in node.input]
    imports = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(d, 1) for d in domains)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)


def weights(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Random ones, by name; a double underscore stands for a dot."""
    rng = np.random.default_rng(0)
    return {name.replace("__", "."): rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def images(between: str, width: int = 12, opset: int = 18, more: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """A convolution of 12 channels ``c``, any operators that make ``d`` of `width` channels, a mean, a linear layer."""
    body = f"c = Conv(x, conv_w, conv_b) {between} p = GlobalAveragePool(d) f = Flatten(p) y = Gemm(f, fc_w, fc_b)"
    own = weights(conv_w=(12, 3, 3, 3), conv_b=(12,), fc_w=(width, 5), fc_b=(5,))
    return model(body, {**own, **(more or {})}, opset=opset)


def tokens(between: str, width: int = 12, opset: int = 18, more: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """A linear layer of 12 features ``t`` over 6 tokens, any operators that make ``u``, another linear layer."""
    body = f"m = MatMul(x, first_w) t = Add(m, first_b) {between} y = MatMul(u, last_w)"
    own = weights(first_w=(8, 12), first_b=(12,), last_w=(width, 5))
    return model(body, {**own, **(more or {})}, "float[N,6,8] x", "float[N,T,K] y", opset)


def ints(**numbers: object) -> dict[str, Array]:
    """Whole numbers, by name."""
    return {name: np.array(value, np.int64) for name, value in numbers.items()}


def exported(name: str, opset: int | None = None) -> tuple[onnx.ModelProto, torch.nn.Module, tuple[Array, ...]]:
    """A module of the zoo by torch's exporter, or in version `opset` by its older one, which keeps norms; the module;
    its example."""
    factory, example = ZOO[name]
    module, arrays = factory(), tuple(np.asarray(x) for x in example())
    tensors = tuple(torch.from_numpy(x) for x in arrays)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if opset is None:
            free = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
            made = torch.onnx.export(module, tensors, dynamo=True, verbose=False, dynamic_shapes=free)
            assert made is not None
            return made.model_proto, module, arrays
        names = [f"x{i}" for i in range(len(tensors))]
        buffer = io.BytesIO()
        torch.onnx.export(
            module, tensors, buffer, dynamo=False, opset_version=opset, input_names=names,
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamic_axes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue()), module, arrays


def exact(loaded: Model, ratio: float = 0.4, tolerance: float = 2e-5) -> Plan:
    """`apply` computes what `mask` does, on a batch of three where any goes, and something else than the model."""
    plan = sl.plan(loaded, sl.ChannelPruning(ratio=ratio, criterion="l2"))
    rows = len(loaded.example[0])
    more = loaded.adapter.free(loaded.native) == "batch"
    inputs = tuple(np.resize(x, (rows + more, *x.shape[1:])) if len(x) == rows else x for x in loaded.example)
    before, small, masked = (m.outputs(*inputs) for m in (loaded, plan.apply(loaded), plan.mask(loaded)))
    for a, b in zip(small, masked, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
    assert max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(before, masked, strict=True)) > 1e-3
    assert plan.apply(loaded).graph.size == plan.parameters
    return plan
