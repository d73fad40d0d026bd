"""Where in an ``.onnx`` file its tensors lie."""

from __future__ import annotations

import onnx

from slimline.basics.errors import SlimlineError
from slimline.files.slim.archive import Span

_LEAST = 64  # bytes of a tensor that is worth looking for


def spans(content: bytes) -> list[Span]:
    """Of each initializer whose bytes stand in the message.

    Raises
    ------
    SlimlineError : weights in other files.
    """
    placed, at = [], 0
    for tensor in onnx.ModelProto.FromString(content).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise SlimlineError(
                "The weights of this ONNX model lie in files beside it: load it with slimline.load and save it in one."
            )
        raw = tensor.raw_data
        place = content.find(raw, at) if len(raw) >= _LEAST else -1
        count = 1
        for n in tensor.dims:
            count *= n
        if place >= 0 and count and len(raw) % count == 0 and len(raw) // count in (1, 2, 4, 8):
            placed.append(Span(place, tuple(tensor.dims), len(raw) // count))
            at = place + len(raw)
    return placed
