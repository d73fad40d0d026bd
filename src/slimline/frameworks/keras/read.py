"""Reads a canonical Keras model into the neutral graph.

A value is called as the operation that makes it (``conv1``, ``conv1.activation``; ``dense@1`` for the
second call of a shared layer, ``split:0`` for one of several outputs), a parameter by its variable's path
(``conv1/kernel``), a constant among the arguments of a bare function ``add/constant``. An operation
without a rule is `unknown`: all that it touches is frozen.
"""

from __future__ import annotations

import keras
import numpy as np

from slimline.frameworks.keras import learned
from slimline.frameworks.keras.gridded import PLAIN
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_index import INDEXING
from slimline.frameworks.keras.rules_layers import LAYERS
from slimline.frameworks.keras.rules_ops import FUNCTIONS
from slimline.frameworks.keras.rules_products import PRODUCTS
from slimline.frameworks.keras.rules_recurrent import RECURRENT
from slimline.frameworks.keras.unfold import rests
from slimline.graph.ir import Graph

Array = np.ndarray
_PLAIN = {**PLAIN, **learned.PLAIN}


def read(native: keras.Model, example: tuple[Array, ...]) -> Graph:
    """The neutral graph of a canonical model, with shapes at the example's batch size."""
    reader = Reader(native, example)
    for call in reader.calls:
        if call.is_input or call.is_weight:
            continue
        rules = {**LAYERS, **RECURRENT} if call.is_layer else {**FUNCTIONS, **INDEXING, **PRODUCTS}
        # Exact classes: a subclass may compute something else.
        kind = type(call.operation)
        rule = rules.get(_PLAIN.get(kind, kind))
        if rule is None and call.is_layer and len(call.inputs) == 1 and rests(call.operation, call.inputs[0]):
            rule = LAYERS[keras.layers.Identity]
        try:
            if rule is None:
                raise NoRule("slimline has no rule for it")
            rule(reader, call)
        except NoRule as reason:
            reader.unknown(call, str(reason))
    return reader.graph()
