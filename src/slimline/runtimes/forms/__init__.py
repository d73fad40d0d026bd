"""Exchange forms: in what frameworks hand networks over to runtimes.

An adapter names the forms it gives, a runtime those it takes, best first; `slimline.model.lowering.road` finds one that
both have. So a framework or a runtime that is added needs to know no other.

====================== ====================================================================================
`ONNX`                 an `onnx_ir.Model`, with ``slimline::FakeQuantize`` where values are rounded, see `onnx`
`EXPORTED_PROGRAM`     a `torch.export.ExportedProgram`, integers in pairs on int8, see `exported_program`
`TENSORFLOW_FUNCTION`  a `slimline.runtimes.forms.tensorflow.Function`
====================== ====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPORTED_PROGRAM = "exported_program"
ONNX = "onnx"
TENSORFLOW_FUNCTION = "tensorflow_function"


@dataclass(frozen=True)
class Form:
    """A network on its way from a framework to a runtime.

    Attributes
    ----------
    kind : which form it is.
    content : what this module says of the form; it is the runtime's to change.
    integer : whether it simulates integers that the artifact is to compute with.
    """

    kind: str
    content: Any
    integer: bool
