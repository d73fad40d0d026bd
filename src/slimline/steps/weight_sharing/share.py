"""From a `WeightSharing` to weights of few values: which tensors, their codebooks, and what that costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.evidence.grams import collect
from slimline.graph.edits import PutTensors
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods.clustering import codebook, shared, vector_codebook, vector_shared
from slimline.methods.entropy import entropy
from slimline.methods.gram import Gram, output_energy
from slimline.model import Model
from slimline.model.masks import held
from slimline.recipe.layers import first_match, matches, refuse_unmatched
from slimline.steps.sparse.prune import refreshed
from slimline.steps.weight_sharing.step import WeightSharing

if TYPE_CHECKING:
    from slimline.data import Data

log = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sharing:
    """A tensor whose weights are to share values.

    Attributes
    ----------
    layer : the user's name of it.
    clusters : of each codebook.
    matrix : how the tensor is read as a matrix; None where it is none, such as an embedding.
    """

    layer: str
    clusters: int
    matrix: LayerMatrix | None


@dataclass(frozen=True)
class Shared:
    """The model with shared weights; why layers were left out; per layer what became of it, ready for JSON."""

    model: Model
    refused: list[dict[str, str]]
    layers: dict[str, dict[str, float]]


def chosen(model: Model, step: WeightSharing) -> tuple[dict[str, Sharing], list[dict[str, str]]]:
    """The tensors that are to share values, by name, and the layers that cannot, with the reason.

    Raises
    ------
    SlimlineError : a pattern that fits no layer, a layer that is named and has fewer weights than clusters, or nothing
        that is left.
    """
    graph = model.graph
    readings = {matrix.weight: matrix for matrix in reversed(matrices(graph))}
    owners: dict[str, str] = {}
    for node in graph.nodes:
        for name in node.inputs:
            if name in graph.trainable and len(graph.values[name].shape) > 1:
                owners.setdefault(name, node.layer or node.name)
    for what, globs in (("layers", step.layers), ("keep", step.keep), ("overrides", step.overrides)):
        refuse_unmatched(f"layer with weights for {what}", globs, owners.values(), graph.types)
    tensors: dict[str, Sharing] = {}
    refused = []
    for name, layer in owners.items():
        named = [pattern for pattern in step.layers if matches((layer,), (pattern,), graph.types)]
        if not named or matches((layer,), step.keep, graph.types):
            continue
        clusters = step.clusters_of(first_match((layer,), step.overrides, graph.types))
        matrix = readings.get(name)
        size = int(np.prod(graph.values[name].shape))
        if step.per == "channel" and matrix is not None:
            size = matrix.shape[2]
        last = graph.values[name].shape[-1] if matrix is None else matrix.shape[2]
        size //= step.vector
        what = "weights" if step.vector == 1 else f"vectors of {step.vector} weights"
        reason = ""
        if name in graph.frozen:
            reason = "its weights are frozen"
        elif last % step.vector:
            reason = f"it has {last} weights in a row, which are no vectors of {step.vector}"
        elif step.per == "channel" and matrix is None:
            reason = "its weights have no output channels"
        elif size <= clusters:
            each = f"{what} in a channel" if step.per == "channel" else what
            reason = f"it has {size} {each} and no more, for {clusters} clusters"
        if not reason:
            tensors[name] = Sharing(layer, clusters, matrix)
        elif "*" in named:
            refused.append({"what": layer, "reason": reason})
        else:
            raise SlimlineError(f"{layer} cannot share its weights, because {reason}: leave it out.")
    if not tensors:
        why = "; ".join(f"{r['what']}: {r['reason']}" for r in refused[:3]) or "no layer with weights is left"
        raise SlimlineError(f"No weights can be shared ({why}): choose other layers, or fewer clusters.")
    return tensors, refused


def share(model: Model, step: WeightSharing, data: Data | None = None, seed: int = 0) -> Shared:
    """The model whose chosen tensors hold only the values of their codebooks; zeros stay zero."""
    tensors, refused = chosen(model, step)
    for entry in refused:
        log.warning("%(what)s does not share its weights: %(reason)s.", entry)
    batches = []
    if data is not None and data.has("calibration"):
        batches = first(data.split("calibration"), step.samples, step.batch_size)
    readings = [each.matrix for each in tensors.values() if each.matrix is not None]
    grams = collect(model, readings, batches) if batches and step.importance == "inputs" else {}
    stored, weights, rows = model.parameters(), {}, {}
    for number, (name, each) in enumerate(tensors.items()):
        gram = None if each.matrix is None else grams.get(each.matrix.node)
        new = _clustered(stored[name], each, gram, step, seed + number)
        weights[name] = new
        label = each.layer if each.layer not in rows else f"{each.layer} ({name})"
        rows[label] = _row(stored[name], new, each.matrix, gram, step.vector)
    record = step.model_dump(mode="json")
    result = held(model.edited((PutTensors(weights),), record))
    if step.refresh and batches and any(node.kind == "batch_norm" for node in model.graph.nodes):
        result = replace(result, native=refreshed(result, result.native, batches, seed))
    return Shared(result, refused, rows)


def _clustered(weight: Array, each: Sharing, gram: Gram | None, step: WeightSharing, seed: int) -> Array:
    """A weight tensor with the values of its codebooks."""
    if each.matrix is None:
        return _coded(weight, None, each.clusters, step, seed)
    matrix = each.matrix.matrix(weight)
    importance = None
    if gram is not None:
        importance = np.broadcast_to(gram.norm[:, None, :] ** 2, matrix.shape)
    if step.per == "tensor":
        new = _coded(matrix, importance, each.clusters, step, seed)
    else:
        new = np.empty_like(matrix)
        for place in np.ndindex(matrix.shape[:2]):
            own = None if importance is None else importance[place]
            new[place] = _coded(matrix[place], own, each.clusters, step, seed)
    return each.matrix.tensor(new, weight.shape).astype(weight.dtype)


def _coded(weights: Array, importance: Array | None, clusters: int, step: WeightSharing, seed: int) -> Array:
    """Weights of one codebook, in its values or, along the last dimension, in its vectors."""
    if step.vector == 1:
        return shared(weights, codebook(weights, clusters, importance, step.start, seed))
    vectors = weights.reshape(-1, step.vector)
    own = None if importance is None else importance.reshape(-1, step.vector)
    return vector_shared(vectors, vector_codebook(vectors, clusters, own, seed), own).reshape(weights.shape)


def _row(before: Array, after: Array, matrix: LayerMatrix | None, gram: Gram | None, vector: int) -> dict[str, float]:
    """Values (or vectors) that a tensor holds, bits a weight that their entropy is, and the error: of the layer's
    output in parts of its energy where inputs are known, else of the weights."""
    rows = (after if matrix is None else matrix.matrix(after)).reshape(-1, vector)
    _, counts = np.unique(rows, return_counts=True, axis=0)
    change, old = np.asarray(after, np.float64) - before, np.asarray(before, np.float64)
    if matrix is not None and gram is not None:
        lost, whole = (output_energy(matrix.matrix(w), gram.second).sum() for w in (change, old))
    else:
        lost, whole = (change**2).sum(), (old**2).sum()
    return {
        "values": len(counts),
        "bits": round(entropy(counts) / vector, 4),
        "error": float(f"{lost / whole if whole else 0.0:.4g}"),
    }


def codes(weights: Mapping[str, Array], tensors: Mapping[str, Sharing], step: WeightSharing) -> dict[str, Array]:
    """Of each tensor whose weights share values, which share one: a number per weight, of its shape; -1 for zeros. Of
    vectors each number shares with those at its place in equal vectors."""
    groups = {}
    for name, each in tensors.items():
        weight = weights[name]
        read = weight if each.matrix is None else each.matrix.matrix(weight)
        rows = read.reshape(-1, read.shape[-1])
        books = rows if step.per == "channel" and each.matrix is not None else rows.reshape(1, -1)
        numbers, used = np.empty(books.shape, np.int64), 0
        for row, part in zip(numbers, books, strict=True):
            vectors = part.reshape(-1, step.vector)
            values, inverse = np.unique(vectors, return_inverse=True, axis=0)
            own = used + inverse.reshape(-1, 1) * step.vector + np.arange(step.vector)
            row[:] = np.where(vectors == 0, -1, own).reshape(-1)
            used += values.size
        shaped = numbers.reshape(weight.shape if each.matrix is None else each.matrix.shape)
        groups[name] = shaped if each.matrix is None else each.matrix.tensor(shaped, weight.shape)
    return groups
