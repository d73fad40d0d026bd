"""Which module carries out which edit of an ONNX model."""

from __future__ import annotations

from slimline.frameworks.edit import Table
from slimline.frameworks.onnx import cut, fakequant, mask, replace, rewire, rewrite
from slimline.graph.edits import (
    Compute,
    FoldNorms,
    Mask,
    Multiply,
    Narrow,
    PoolInput,
    Project,
    PutTensors,
    Replace,
    Resize,
    Rewire,
    Round,
    Silence,
    Threshold,
    Tie,
)

EDITS: Table = {
    Resize: lambda native, edit, example: rewrite.apply(native, edit.removal, example),
    Mask: lambda native, edit, example: mask.mask(native, edit.removal),
    Narrow: lambda native, edit, example: cut.cut(native, edit.cuts, example),
    Replace: lambda native, edit, example: replace.replace(native, edit, example),
    Project: lambda native, edit, example: replace.project(native, edit),
    Rewire: lambda native, edit, example: rewire.rewire(native, edit.instead, example),
    Silence: lambda native, edit, example: rewire.silence(native, edit.values, example),
    Threshold: lambda native, edit, example: rewire.truncate(native, edit.thresholds),
    Multiply: lambda native, edit, example: rewire.multiply(native, edit, example),
    Compute: lambda native, edit, example: rewire.compute(native, edit.functions, example),
    PutTensors: lambda native, edit, example: rewrite.replace(native, edit.tensors),
    Tie: lambda native, edit, example: rewire.tie(native, edit.instead),
    PoolInput: lambda native, edit, example: rewire.pool(native, edit, example),
    FoldNorms: lambda native, edit, example: fakequant.fold(native),
    Round: lambda native, edit, example: fakequant.quantize(native, edit.quantization),
}
