"""One part of a network after the other learns to give, on grids, what it gave in float (BRECQ, QDrop).

A part reads what the rounded parts before it made of the calibration samples, and is trained towards what the float
network makes there. So it makes up for their errors too, and no label and no pass through the whole network is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.named import Labels, Named
from slimline.basics.progress import Progress
from slimline.evidence.propagation import layer_by_layer
from slimline.frameworks.base import Trainer
from slimline.graph.blocks import blocks
from slimline.graph.edits import Extract, LearnRounding, PutTensors
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.quantization import Quantization
from slimline.graph.segments import Segment, innermost, segments
from slimline.methods.adaround import penalty, towards
from slimline.methods.formats import IntegerGrid, Scaled
from slimline.methods.gram import Gram
from slimline.methods.outputs import Output
from slimline.methods.scales import widest
from slimline.methods.schedules import rate
from slimline.model import Model
from slimline.steps.base import Context
from slimline.steps.quantization_aware.formats import Site
from slimline.steps.quantization_aware.step import QuantizationAwareTraining
from slimline.steps.weight_rounding import WeightRounding
from slimline.training.loop import Store
from slimline.training.teacher import fingerprint

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Reconstructed:
    """What is learned.

    Attributes
    ----------
    tensors : by name, of the float network.
    formats : of the whole network.
    records : of each part its layers, and the squared error of its outputs over their variance, before and after.
    """

    tensors: Arrays
    formats: Quantization
    records: list[dict[str, Any]]


def parts(step: QuantizationAwareTraining, site: Site) -> list[tuple[Segment, Any]]:
    """The parts that are trained by themselves, and their native models."""
    graph = site.model.graph
    own = innermost(blocks(graph)) if step.reconstruct == "block" else ()
    every = segments(graph, site.blocks.keys(), own)
    return [(each, site.model.edit(Extract(each.inputs, each.outputs))) for each in every]


def reconstruct(
    step: QuantizationAwareTraining,
    site: Site,
    formats: Quantization,
    learning: Callable[[Quantization, frozenset[str]], LearnRounding],
    masks: Mapping[str, Array],
    batches: Sequence[tuple[Array, ...]],
    context: Context,
    known: Collection[str] = (),
) -> Reconstructed:
    """Train every part of a network whose norms are folded, from the first to the last.

    Parameters
    ----------
    formats : calibrated, of all that is rounded.
    learning : the edit that makes a network one whose formats learn, but for those that stay.
    masks : by weight, what is False stays zero.
    batches : calibration inputs.
    known : weights that set out with the scales they have, as a step before has chosen them.
    """
    model = site.model
    every = parts(step, site)
    exact: Arrays = dict(zip(model.graph.inputs, map(np.concatenate, zip(*batches, strict=True)), strict=True))
    rounded = dict(exact)
    groups = {} if site.placement is None else site.placement.groups
    settled: set[str] = set()  # groups of activations whose grid an earlier part has learned
    tensors: Arrays = {}
    records = []
    for index, (segment, native) in enumerate(every):
        part = Model(model.adapter, native, tuple(exact[name][: len(model.example[0])] for name in segment.inputs))
        stored = part.parameters()
        read = {name for node in part.graph.nodes for name in node.inputs}
        here = [name for name in formats.activations if name in read]
        own = replace(
            formats,
            activations={name: each for name, each in formats.activations.items() if name in here},
            weights={name: each for name, each in formats.weights.items() if name in stored},
        )
        fixed = frozenset(name for name in here if groups[name] in settled)
        before, now = ([held[name] for name in segment.inputs] for held in (exact, rounded))
        own, weights, unrounded = _rounded(part, own, before, now, masks, step.batch_size, known)
        edit = learning(own, fixed)
        answers = _answers(step, part, segment, part.native, exact)
        if step.rounding == "adaround":
            soft = {
                name: towards(each, unrounded[name], weights.get(name, unrounded[name]))
                for name, each in own.weights.items()
                if isinstance(each, IntegerGrid)
            }
            nearest = {name: own.weights[name].round(x) for name, x in soft.items()}
            error = _error(_answers(step, part, segment, part.edit(PutTensors(weights | nearest)), rounded), answers)
            strength = penalty(error, sum(x.size for x in soft.values()))
            turns = step.epochs * -(-len(rounded[segment.inputs[0]]) // step.batch_size)
            edit = replace(edit, softened=dict.fromkeys(soft, strength), turns=turns)
            weights |= soft
        begun = replace(part, native=part.edit(PutTensors(weights)))
        run = _Part(step, part, begun.edit(edit), segment, context.seed + index)
        trained, errors = run.trained(exact, rounded, answers, masks, context.inner(f"part-{index}"))
        learned = model.adapter.learned(trained, own)
        shared = {groups[name]: each for name, each in learned.activations.items()}
        settled |= shared.keys()
        formats = replace(
            formats,
            activations={name: shared.get(groups[name], each) for name, each in formats.activations.items()},
            weights={**formats.weights, **learned.weights},
        )
        taught = model.adapter.parameters(trained)
        if edit.softened:
            taught = {**taught, **model.adapter.softened(trained)}
        tensors |= {name: taught[name] for name in stored if name in taught}
        exact, rounded = exact | answers, rounded | _answers(step, part, segment, trained, rounded)
        needed = {name for later, _ in every[index + 1 :] for name in later.inputs}
        exact, rounded = ({name: x for name, x in held.items() if name in needed} for held in (exact, rounded))
        records.append({"layers": list(segment.layers), "error": errors[0], "error_after": errors[1]})
    return Reconstructed(tensors, formats, records)


def _rounded(
    part: Model,
    formats: Quantization,
    exact: Sequence[Array],
    inputs: Sequence[Array],
    masks: Mapping[str, Array],
    size: int,
    known: Collection[str],
) -> tuple[Quantization, Arrays, Arrays]:
    """The formats and weights from which a part sets out: scales of least error, and each weight makes up for the
    errors of those before it, in its layer (GPTQ) and in the network; and the weights that these are roundings of."""
    starts = range(0, len(inputs[0]), size)
    before, now = ([tuple(x[i : i + size] for x in each) for i in starts] for each in (exact, inputs))
    stored, readers = part.parameters(), part.graph.consumers()
    layers = [x for x in matrices(part.graph) if x.weight in formats.weights and len(readers[x.weight]) == 1]
    grids = dict(formats.weights)
    unrounded = {name: stored[name] * masks.get(name, True) for name in grids}

    def change(layer: LayerMatrix, gram: Gram) -> Arrays:
        each = grids[layer.weight]
        assert isinstance(each, Scaled)
        rounding = WeightRounding(stored[layer.weight], layer, gram, masks.get(layer.weight))
        if isinstance(each, IntegerGrid) and layer.weight not in known:
            each = rounding.fitted(widest(rounding.visible, f"int{each.bits}", each.blocks), "gptq")
        grids[layer.weight] = each
        unrounded[layer.weight] = rounding.visible
        return {layer.weight: rounding.rounded(each, "gptq")}

    weights = layer_by_layer(part, layers, before, {}, change, now)
    return replace(formats, weights=grids), weights, unrounded


def _answers(
    step: QuantizationAwareTraining, part: Model, segment: Segment, native: Any, values: Mapping[str, Array]
) -> Arrays:
    """The outputs of a native model of the part."""
    inputs, size = [values[name] for name in segment.inputs], step.batch_size
    slices = [slice(i, i + size) for i in range(0, len(inputs[0]), size)]
    every = part.adapter.answers(native, [tuple(x[rows] for x in inputs) for rows in slices])
    return dict(zip(segment.outputs, map(np.concatenate, zip(*every, strict=True)), strict=True))


def _error(answers: Arrays, targets: Arrays) -> float:
    """The mean squared error, each output's over its variance."""
    errors = [np.square(answers[n].astype(np.float64) - x).mean() / _variance(x) for n, x in targets.items()]
    return float(np.mean(errors))


@dataclass(frozen=True)
class _Part:
    """The training of one part: `learning` is the native model of `part` whose formats learn."""

    step: QuantizationAwareTraining
    part: Model
    learning: Any
    segment: Segment
    seed: int

    def trained(
        self, exact: Arrays, rounded: Arrays, targets: Arrays, masks: Mapping[str, Array], context: Context
    ) -> tuple[Any, tuple[float, float]]:
        """The native model that has learned, and the errors before and after; that from before where it is no worse."""
        step = self.step
        outputs = tuple(
            Output("regression", None, name, x.shape, x.dtype.name, labelled=True, scale=_variance(x))
            for name, x in targets.items()
        )
        samples = len(next(iter(targets.values())))
        total = step.epochs * -(-samples // step.batch_size)
        training = step.model_copy(update={"alpha": 0.0})
        trainer = self.part.adapter.trainer(self.learning, None, training, self.seed, total, outputs)
        trainer.hold({name: mask for name, mask in masks.items() if name in trainer.weights()})
        store = None
        if context.checkpoint is not None:
            facts = [step.model_dump(mode="json"), self.seed, samples, fingerprint(self.part)]
            facts += [
                hashlib.sha256(np.ascontiguousarray(rounded[n]).tobytes()).hexdigest() for n in self.segment.inputs
            ]
            store = Store(context.checkpoint, hashlib.sha256(json.dumps(facts).encode()).hexdigest())
        saved = None if store is None else store.read()
        if saved is not None:
            (record,), state, _ = saved
            trainer.restore(state)
            return trainer.native(), (record["error"], record["error_after"])
        start = trainer.state()
        before = self._error(trainer, rounded, targets)
        for turn, batch in enumerate(self._batches(exact, rounded, targets)):
            speed = step.learning_rate * rate(step.schedule, turn, total, step.warmup)
            loss = trainer.step(batch, speed)
            if not np.isfinite(loss):
                raise SlimlineError(
                    f"The error of {', '.join(self.segment.layers)} became {loss}: lower learning_rate, which is "
                    f"{step.learning_rate:g}."
                )
            if context.tell is not None:
                context.tell(
                    Progress("reconstruction", turn + 1, total, {"layer": self.segment.layers[0], "loss": loss})
                )
        after = self._error(trainer, rounded, targets)
        if not after < before:
            trainer.restore(start)
            after = before
        if store is not None:
            state = trainer.state()
            store.write(state, state, [{"error": before, "error_after": after}])
        return trainer.native(), (before, after)

    def _batches(self, exact: Arrays, rounded: Arrays, targets: Arrays) -> Iterator[tuple[tuple[Array, ...], Labels]]:
        step, names = self.step, self.segment.inputs
        samples = len(rounded[names[0]])
        for epoch in range(step.epochs):
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(samples)
            for first in range(0, samples, step.batch_size):
                rows = np.sort(order[first : first + step.batch_size])
                yield (
                    tuple(_mixed(rng, step.drop, exact[name][rows], rounded[name][rows]) for name in names),
                    Named([x[rows] for x in targets.values()]),
                )

    def _error(self, trainer: Trainer, values: Arrays, targets: Arrays) -> float:
        """The mean squared error of the outputs, each over its variance."""
        size, inputs = self.step.batch_size, [values[name] for name in self.segment.inputs]
        sums = np.zeros(len(targets))
        for first in range(0, len(inputs[0]), size):
            rows = slice(first, first + size)
            found = trainer.outputs(tuple(x[rows] for x in inputs))
            errors = (np.square(a.astype(np.float64) - b[rows]) for a, b in zip(found, targets.values(), strict=True))
            sums += [each.sum() for each in errors]
        return float(np.mean([s / (x.size * _variance(x)) for s, x in zip(sums, targets.values(), strict=True)]))


def _variance(x: Array) -> float:
    spread = float(np.var(x, dtype=np.float64)) if x.dtype.kind == "f" else 1.0
    return spread if spread > 0 else 1.0


def _mixed(rng: np.random.Generator, part: float, exact: Array, rounded: Array) -> Array:
    """Of floats a part, drawn at random, of the one and the rest of the other."""
    if not part or exact.dtype.kind != "f" or exact is rounded:
        return rounded
    return np.where(rng.random(exact.shape, np.float32) < part, exact, rounded)
