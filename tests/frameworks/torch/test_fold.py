"""Batch norms folded into the layer before them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.frameworks.base import adapter
from slimline.graph.edits import FoldNorms

TORCH = adapter("torch")


class Normalised(nn.Module):
    """A batch norm behind a linear layer: over its outputs in matrices, over the rows of sequences as wide as long."""

    def __init__(self, sequences: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.sequences = sequences
        for tensor in (self.norm.running_mean, self.norm.bias):
            nn.init.normal_(tensor)
        for tensor in (self.norm.running_var, self.norm.weight):
            nn.init.uniform_(tensor, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(y.mean(1) if self.sequences else y)


@pytest.mark.parametrize("sequences", [False, True])
def test_a_norm_behind_a_linear_layer_is_folded_of_matrices_alone(sequences: bool, tmp_path: Path) -> None:
    """Also in a pruned graph, which notes no shapes."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 8, 6) if sequences else (4, 6)).astype(np.float32)
    model = sl.load(Normalised(sequences).eval(), (x,))
    small = sl.apply(model, sl.ChannelPruning(ratio=0.5))
    for each in (model, small):
        folded = each.edit(FoldNorms())
        assert ("norm.running_mean" in dict(folded.named_buffers())) == sequences
        np.testing.assert_allclose(TORCH.outputs(folded, (x,))[0], each.predict(x), atol=1e-5)
    sl.export(small, "onnxruntime", tmp_path / "small.onnx")
    quantized = sl.apply(small, sl.StaticQuantization(undo=False), sl.Data(calibration=((x,),)))
    sl.export(quantized, "onnxruntime", tmp_path / "int8.onnx")
