"""ONNX models from messages in memory and from files."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array
from slimline.frameworks.onnx import payload
from slimline.frameworks.onnx.canonical import canonical
from slimline.frameworks.onnx.native import Native
from slimline.frameworks.onnx.operators import QUANTIZED


def load(source: onnx.ModelProto, example: Example | None) -> tuple[Native, tuple[Array, ...]]:
    """The native model of a message, which stays as it is, and example inputs (made from the input shapes where None).

    Raises
    ------
    SlimlineError : what is no model, or one that is quantized already: that comes by a file, which says so.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(source)
    try:
        checked = payload.checked(copied)
    except Malformed as reason:
        raise SlimlineError(f"The ONNX model cannot be read: it {reason}; export it anew.") from reason
    native, arrays = canonical(checked, example)
    if quantized(native.model):
        raise SlimlineError(
            "The ONNX model is quantized already: save it to a file and load that, or give the float one."
        )
    return native, arrays


def quantized(model: ir.Model) -> bool:
    """Whether some of its operators compute with integers in place of real numbers."""
    return any(node.op_type in QUANTIZED for node in model.graph.all_nodes())
