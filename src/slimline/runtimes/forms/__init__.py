"""Exchange forms: in what frameworks hand networks over to runtimes.

An adapter names the forms it gives, a runtime those it takes, best first; `road` finds one that both have, or one that
can be made of another. So a framework or a runtime that is added needs to know no other.

====================== ====================================================================================
`ONNX`                 an `onnx_ir.Model`, with ``slimline::FakeQuantize`` where values are rounded, see `onnx`
`EXPORTED_PROGRAM`     a `torch.export.ExportedProgram`, integers in pairs on int8, see `exported_program`
`TENSORFLOW_FUNCTION`  a `slimline.runtimes.forms.tensorflow.Function`
====================== ====================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from slimline.methods.formats import Array, Format

EXPORTED_PROGRAM = "exported_program"
ONNX = "onnx"
TENSORFLOW_FUNCTION = "tensorflow_function"

PLAIN: Mapping[str, Format] = MappingProxyType({})
"""No stored tensor is in a format."""
_CONVERSIONS = {(ONNX, TENSORFLOW_FUNCTION): ("slimline.runtimes.forms.onnx_tensorflow", "to_function")}
"""The function that makes the content of one form from that of another."""


@dataclass(frozen=True)
class Form:
    """A network on its way from a framework to a runtime.

    Attributes
    ----------
    kind : which form it is.
    content : what this module says of the form; it is the runtime's to change.
    integer : whether it simulates integers that the artifact is to compute with.
    weights : by name, formats of the stored tensors that the artifact holds as codes, while activations are float.
    tensors : their rounded numbers, in the layout of the framework.
    dynamic : those of them whose layers multiply by codes, and round what they multiply as they run.
    """

    kind: str
    content: Any
    integer: bool
    weights: Mapping[str, Format] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)
    dynamic: tuple[str, ...] = ()


def road(forms: Sequence[str], taken: Sequence[str]) -> tuple[str, ...] | None:
    """The forms that a network goes through from a framework that gives `forms` to a runtime that takes others, best
    first; None where there is no road."""
    for kind in taken:
        if kind in forms:
            return (kind,)
    for kind in taken:
        for source in forms:
            if (source, kind) in _CONVERSIONS:
                return source, kind
    return None


def converted(content: Any, road: Sequence[str], marked: Collection[str] = ()) -> Any:
    """What is the content of the first form of a road, in the last; `marked` are the stored tensors that are marked in
    the first, which may be called otherwise in the last."""
    for step in pairwise(road):
        module, function = _CONVERSIONS[step]
        content = getattr(import_module(module), function)(content, marked)
    return content
