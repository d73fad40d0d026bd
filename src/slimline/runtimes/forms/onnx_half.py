"""ONNX files whose real numbers are float16 inside, for runtimes that compute in the types that a file has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError, first_line

if TYPE_CHECKING:
    import onnx


def halved(content: bytes) -> bytes:
    """A file of the same network in float16, inputs and outputs as they were; the same bytes each time.

    Raises
    ------
    SlimlineError : a grid whose step float16 does not hold, or an operator that cannot be in float16.
    """
    import onnx
    import onnx_ir as ir

    paths = list(sys.path)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    sys.path[:] = paths  # to which that package adds its own folder
    model = onnx.load_from_string(content)
    _check_steps(model)
    try:
        half = ir.from_proto(convert_float_to_float16(model, keep_io_types=True))
        half.graph.sort()  # what casts inputs is written last
        proto = ir.to_proto(half)
        del proto.graph.value_info[:]
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker raises many types
        raise SlimlineError(
            f"The model cannot be written in float16 ({first_line(error)[:200]}): export it in float32."
        ) from error
    smaller: bytes = proto.SerializeToString(deterministic=True)
    return smaller


def _check_steps(model: onnx.ModelProto) -> None:
    from onnx import numpy_helper

    held = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in held:
            step = numpy_helper.to_array(held[node.input[1]]).astype(np.float64)
            if (np.abs(step.astype(np.float16) - step) > 0.01 * step).any():
                raise SlimlineError(
                    f"float16 does not hold the step {step.min():.3g} of an integer grid: export in float32."
                )
