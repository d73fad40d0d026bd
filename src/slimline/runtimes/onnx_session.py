"""ONNX files loaded by ONNX Runtime: by the target of that name, and by others that have it answer for their files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime as ort

Array = np.ndarray[Any, np.dtype[Any]]


class OnnxSession:
    """An ONNX file loaded by ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.names = [i.name for i in session.get_inputs()]
        self.output_names = [o.name for o in session.get_outputs()]

    def run(self, inputs: tuple[Array, ...]) -> Array:
        """The first of `outputs`."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs for `inputs`, arrays of the artifact's own dtypes, ``(batch, …)`` each."""
        return tuple(self.session.run(None, dict(zip(self.names, inputs, strict=True))))
