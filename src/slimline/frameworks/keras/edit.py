"""Which module carries out which edit of a Keras model."""

from __future__ import annotations

from slimline.frameworks.edit import Table
from slimline.frameworks.keras import cut, extract, fakequant, learned, replace, rewire, rewrite
from slimline.graph.edits import (
    Compute,
    Extract,
    FoldNorms,
    LearnRounding,
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
    Subtract,
    Threshold,
    Tie,
    Unround,
)

EDITS: Table = {
    Resize: lambda native, edit, example: rewrite.apply(native, edit.removal, example),
    Mask: lambda native, edit, example: rewrite.mask(native, edit.removal),
    Narrow: lambda native, edit, example: cut.cut(native, edit.cuts),
    Replace: lambda native, edit, example: replace.replace(native, edit),
    Project: lambda native, edit, example: replace.project(native, edit),
    Rewire: lambda native, edit, example: rewire.rewire(native, edit.instead),
    Silence: lambda native, edit, example: rewire.silence(native, edit.values),
    Threshold: lambda native, edit, example: rewire.truncate(native, edit.thresholds),
    Subtract: lambda native, edit, example: rewire.subtract(native, edit),
    Multiply: lambda native, edit, example: rewire.multiply(native, edit),
    Compute: lambda native, edit, example: rewire.compute(native, edit.functions),
    PutTensors: lambda native, edit, example: rewrite.replace(native, edit.tensors),
    Tie: lambda native, edit, example: rewire.tie(native, edit.instead),
    PoolInput: lambda native, edit, example: rewire.pool(native, edit),
    Extract: lambda native, edit, example: extract.extract(native, edit.inputs, edit.outputs),
    FoldNorms: lambda native, edit, example: fakequant.fold(native, example),
    Round: lambda native, edit, example: fakequant.quantize(native, edit.quantization, edit.composed),
    LearnRounding: lambda native, edit, example: learned.learn(native, edit),
    Unround: lambda native, edit, example: fakequant.unround(native, edit.quantization),
}
