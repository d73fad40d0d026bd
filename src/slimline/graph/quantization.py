"""Which tensors of a graph live on integer grids, and which grids: data, the same for every framework."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slimline.methods.grids import Grid


class Quantization(BaseModel):
    """Grids of activations (by value name) and of weights (by parameter name) of one graph.

    Attributes
    ----------
    activations : grids of the values that are rounded where they are produced.
    weights : grids of the parameters.
    layers : user's names of the layers that compute in integers.
    float_layers : layers that were put back to float, with the reason.
    """

    model_config = ConfigDict(frozen=True)
    activations: dict[str, Grid] = {}
    weights: dict[str, Grid] = {}
    layers: tuple[str, ...] = ()
    float_layers: dict[str, str] = {}
