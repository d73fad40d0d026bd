"""From a `SparsePruning` to zeros: scores, how many of each layer go, and how those that stay make up for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.evidence.grams import collect, collect_pair
from slimline.graph.edits import PutTensors
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods import obs, sparsity
from slimline.methods.gram import Gram, diagonal_loading, output_energy
from slimline.methods.sparsity import Amount, Array, Layout, Pattern
from slimline.model import Model
from slimline.model.masks import held
from slimline.model.outputs import described_outputs
from slimline.recipe.layers import Types, first_match, matches, refuse_unmatched
from slimline.recipe.named_code import function_of
from slimline.steps.distillation.step import Distillation
from slimline.steps.sparse.step import SparsePruning
from slimline.steps.sparse.user_masks import user_masks

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.frameworks.base import Batch

log = logging.getLogger(__name__)

L = TypeVar("L", bound=Layout)
Batches = list[tuple[np.ndarray, ...]]
CURVE = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
"""Sparsities at which `sensitivity` measures a layer's error."""


@dataclass(frozen=True)
class Sparsified:
    """The pruned model; why layers were left out; per layer the part that is zero and its relative output error."""

    model: Model
    refused: list[dict[str, str]]
    layers: dict[str, dict[str, float]]


def sparsify(model: Model, step: SparsePruning, data: Data | None = None, seed: int = 0) -> Sparsified:
    """Prune at once.

    Weights that earlier masks hold at zero count towards the amount and stay zero.

    Raises
    ------
    SlimlineError
        No layer to prune, no layer that fits the pattern (or one named by `layers` that does not), more weights than
        there are, missing data or labels, a criterion that returns what is no score.
    """
    pattern = Pattern.parse(step.pattern)
    layers, refused = chosen(model, step)
    work = _Work(model, step, pattern, layers, data, seed)
    weights, masks = work.prune()
    masks = {**model.masks, **masks}
    pruned = model.edited((PutTensors(weights),), step.model_dump(mode="json"), masks)
    pruned = held(pruned)
    if work.refresh:
        pruned = replace(pruned, native=refreshed(pruned, pruned.native, work.batches, seed))
    for entry in refused:
        log.warning("%(what)s is not pruned: %(reason)s.", entry)
    return Sparsified(pruned, refused, work.summary(masks))


def chosen(model: Model, step: SparsePruning) -> tuple[dict[str, LayerMatrix], list[dict[str, str]]]:
    """The layers to prune by weight name, and those that cannot have the pattern, with the reason."""
    every: dict[str, LayerMatrix] = {}
    for layer in matrices(model.graph):
        every.setdefault(layer.weight, layer)
    layers, refused = fitting(
        {weight: (layer.layer, layer) for weight, layer in every.items()}, step, model.graph.types
    )
    for weight in [name for name in layers if name in model.graph.frozen]:
        refused.append({"what": layers.pop(weight).layer, "reason": "its weights are frozen"})
    if not layers and refused and all(entry["reason"] == "its weights are frozen" for entry in refused):
        raise SlimlineError("All weights that SparsePruning may prune are frozen: unfreeze them before slimline.load.")
    for node in model.graph.nodes:
        name = node.layer or node.name
        if node.kind == "recurrent" and matches((name,), step.layers, model.graph.types):
            refused.append({"what": name, "reason": "single weights of a recurrent layer have no rule"})
    return layers, refused


def fitting(
    every: Mapping[str, tuple[str, L]], step: SparsePruning, types: Types = MappingProxyType({})
) -> tuple[dict[str, L], list[dict[str, str]]]:
    """Of all weights, each with the name of its layer and its layout, those that the globs and the pattern choose."""
    pattern = Pattern.parse(step.pattern)
    names = [name for name, _ in every.values()]
    for field, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer with a weight matrix for {field}", globs, names, types)
    layouts, refused = {}, []
    for weight, (name, layout) in every.items():
        named = [pattern for pattern in step.layers if matches((name,), (pattern,), types)]
        if not named or matches((name,), step.keep, types):
            continue
        reason = pattern.misfit(layout.shape)
        if not reason:
            layouts[weight] = layout
        elif "*" in named:
            refused.append({"what": name, "reason": f"the pattern {step.pattern} does not fit: {reason}"})
        else:
            raise SlimlineError(
                f"{name} cannot have the pattern {step.pattern}, because {reason}: choose another pattern or "
                f"keep=[{name!r}]."
            )
    if not layouts:
        why = "; ".join(f"{r['what']}: {r['reason']}" for r in refused[:3]) or "no layer with a weight matrix is left"
        raise SlimlineError(f"Nothing can be pruned ({why}): choose other layers or another pattern.")
    return layouts, refused


def criterion(step: SparsePruning) -> tuple[str, Callable[..., Any] | None]:
    """The criterion's name, and the user's function if it is one."""
    if callable(step.criterion):
        return getattr(step.criterion, "__name__", "criterion"), step.criterion
    if ":" not in step.criterion:
        return step.criterion, None
    return step.criterion, function_of(step.criterion)


def refreshed(model: Model, native: Any, batches: Sequence[tuple[np.ndarray, ...]], seed: int) -> Any:
    """`native` with batch-norm statistics of its own activations."""
    trainer = model.adapter.trainer(native, None, Distillation(), seed, 1)
    trainer.refresh((batch, None) for batch in batches)
    return trainer.native()


class _Work:
    """One pruning: everything by weight name, weights as matrices ``(groups, outputs, inputs)``."""

    def __init__(
        self,
        model: Model,
        step: SparsePruning,
        pattern: Pattern,
        layers: Mapping[str, LayerMatrix],
        data: Data | None,
        seed: int,
    ) -> None:
        self.model, self.step, self.pattern, self.layers, self.seed = model, step, pattern, layers, seed
        self.stored = model.parameters()
        self.name, self.function = criterion(step)
        self.batches = _batches(step, data)
        self.gradients = self._gradients(data)
        needs_grams = self.batches and (step.gram or self.function is not None)
        self.grams = collect(model, list(layers.values()), self.batches) if needs_grams else {}
        self.before = {name: self._matrix(name, self.stored[name]) for name in layers}
        self.old = {name: self._matrix(name, mask) for name, mask in model.masks.items() if name in layers}
        self.errors: dict[str, float] = {}
        self.refresh = step.refresh and bool(self.batches) and any(n.kind == "batch_norm" for n in model.graph.nodes)

    def prune(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """New weights and masks, in the layout of the framework."""
        if self.step.masks is not None:
            keep = user_masks(self.step, {name: self.stored[name].shape for name in self.layers})
            self.layers = {name: layer for name, layer in self.layers.items() if name in keep}
            keep = {name: self._matrix(name, mask) for name, mask in keep.items()}
        else:
            keep = self._keep()
        keep = {name: mask & self.old[name] if name in self.old else mask for name, mask in keep.items()}
        new = (
            self._updated(keep)
            if self.step.compensate
            else {n: np.where(m, self.before[n], 0) for n, m in keep.items()}
        )
        for name in keep:
            if self.layers[name].node in self.grams:
                self.errors[name] = self._error(name, new[name])
        weights = {n: self._tensor(n, w).astype(self.stored[n].dtype) for n, w in new.items()}
        return weights, {name: self._tensor(name, mask) for name, mask in keep.items()}

    def summary(self, masks: Mapping[str, Array]) -> dict[str, dict[str, float]]:
        """By layer the part that is zero and, where it was measured, the relative error of the output."""
        rows = {}
        for name, layer in self.layers.items():
            rows[layer.layer] = {"sparsity": round(1 - float(masks[name].mean()), 6)}
            if name in self.errors:
                rows[layer.layer]["error"] = float(f"{self.errors[name]:.4g}")
        return rows

    def _matrix(self, name: str, tensor: Array) -> Array:
        return self.layers[name].matrix(tensor)

    def _tensor(self, name: str, matrix: Array) -> Array:
        return self.layers[name].tensor(matrix, self.stored[name].shape)

    def _gradients(self, data: Data | None) -> Mapping[str, Array]:
        step = self.step
        optional = self.function is not None
        if not step.gradient and not (optional and data is not None):
            return {}
        assert data is not None
        lenient = True if step.loss == "norm" or optional else None
        outputs = described_outputs(self.model, data, "calibration", lenient=lenient)
        if step.loss == "cross_entropy" and not any(output.labelled for output in outputs):
            if optional:
                return {}
            raise SlimlineError(
                f"The {self.name} criterion needs the gradient of a loss, and there are no labels of the outputs: give "
                "labelled data, or set loss='norm'."
            )
        return self.model.adapter.gradients(self.model.native, _labelled(step, data), step.loss, outputs=outputs)

    def _h(self, name: str, gram: Gram | None = None) -> list[Array]:
        """`H` of each group of a layer, damped."""
        second = (gram or self.grams[self.layers[name].node]).second
        return [obs.damped(h, self.step.damping) for h in second]

    def _energy(self, name: str) -> float:
        """Of the layer's output."""
        return float(output_energy(self.before[name], self._second(name)).sum()) or 1.0

    def _second(self, name: str) -> Array:
        return self.grams[self.layers[name].node].second

    def _error(self, name: str, new: Array) -> float:
        change = np.asarray(self.before[name] - new, np.float64)
        return float(output_energy(change, self._second(name)).sum()) / self._energy(name)

    def _score(self, name: str) -> Array:
        """Importance of every weight of one layer."""
        w, layer = self.before[name], self.layers[name]
        gradient = self._matrix(name, self.gradients[name]) if name in self.gradients else None
        gram = self.grams.get(layer.node)
        if self.function is not None:
            arguments = np.array(w), None if gradient is None else np.array(gradient), gram
            score = sparsity.checked(self.function(*arguments), w.shape, self.name)
        elif self.name == "obs":
            score = self._second_order(name)
        else:
            seed = [self.seed, list(self.layers).index(name)]
            magnitude = "l1" if self.name == "threshold" else self.name
            score = sparsity.score(magnitude, w, gradient, gram, int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return np.where(self.old[name], score, -np.inf) if name in self.old else score

    def _second_order(self, name: str) -> Array:
        """What a weight costs, in parts of the energy of the layer's output."""
        w, pattern = self.before[name], self.pattern
        wide = w.shape[2] > self.step.exact
        costs = []
        for part, h in zip(np.asarray(w, np.float64), self._h(name), strict=True):
            if self.step.compensate and pattern.block == (1, 1) and not wide:
                costs.append(obs.traces(part, h, self._most(w.shape[2]), pattern.group))
            else:
                run = w.shape[2] if pattern.block is None else pattern.block[1]
                costs.append(obs.saliency(part, h, run).repeat(run, axis=1) / run)
        return np.stack(costs) / self._energy(name)

    def _most(self, inputs: int) -> int:
        """Weights that may go from one row: more than the part that goes of all, or rows could not differ."""
        amounts = [self.step.amount, *(override.amount for override in self.step.overrides.values())]
        parts = [amount if isinstance(amount, float) else 1.0 for amount in amounts]
        part = max(parts) if self.pattern.group is None else 1.0
        return int(np.ceil((1 - (1 - part) ** 2) * inputs))

    def _keep(self) -> dict[str, Array]:
        """The mask of every layer."""
        step, pattern = self.step, self.pattern
        scores = {name: self._score(name) for name in self.layers}
        if step.threshold is not None:
            limit = step.threshold
            return {n: pattern.spread(pattern.cells(s) >= limit, s.shape) for n, s in scores.items()}
        if pattern.group is not None:
            return {name: sparsity.keep_mask(s, 0, pattern) for name, s in scores.items()}
        masks: dict[str, Array] = {}
        for amount, part in self._parts(scores):
            if step.scope == "row":
                masks |= {name: sparsity.keep_rows(s, amount, pattern) for name, s in part.items()}
            else:
                counts = self._counts(part, amount)
                masks |= {n: sparsity.keep_mask(s, c, pattern) for (n, s), c in zip(part.items(), counts, strict=True)}
        return {name: masks[name] for name in scores}

    def _parts(self, scores: Mapping[str, Array]) -> list[tuple[Amount, dict[str, Array]]]:
        """The layers that are pruned among each other, with what they lose: each override's, and the rest."""
        step, types = self.step, self.model.graph.types
        assert step.amount is not None
        layers = {name: self.layers[name].layer for name in scores}
        refuse_unmatched("layer with a weight matrix for overrides", step.overrides, layers.values(), types)
        parts: dict[str | None, dict[str, Array]] = {}
        for name, score in scores.items():
            parts.setdefault(first_match((layers[name],), step.overrides, types), {})[name] = score
        return [(step.amount if n is None else step.overrides[n].amount, part) for n, part in parts.items()]

    def _counts(self, scores: Mapping[str, Array], amount: Amount) -> list[int]:
        if self.step.scope == "local":
            return sparsity.local_counts([s.size for s in scores.values()], amount)
        if self.step.scope == "erk":
            return sparsity.erk_counts([self.stored[name].shape for name in scores], amount)
        if self.step.scope == "global" or (self.name == "obs" and self.step.compensate):
            return sparsity.global_counts(list(scores.values()), amount, self.pattern)
        total = sparsity.count(amount, sum(s.size for s in scores.values()))
        return sparsity.allocate([self._curve(name, s) for name, s in scores.items()], total)

    def _curve(self, name: str, score: Array) -> tuple[list[int], list[float]]:
        """How many weights go, and the relative output error, over sparsities."""
        masks = [sparsity.keep_mask(score, round(part * score.size), self.pattern) for part in CURVE]
        points = {int((~m).sum()): self._error(name, np.where(m, self.before[name], 0)) for m in masks}
        return list(points), list(points.values())

    def _updated(self, keep: dict[str, Array]) -> dict[str, Array]:
        """Weights that make up for those that go, layer by layer in the order of the graph."""
        new: dict[str, Array] = {}
        current = self.model.native
        for name, layer in self.layers.items():
            if self.step.sequential:
                gram = collect_pair(self.model, current, layer, self.batches)
                new[name] = self._fit(name, keep, gram, gram.cross)
                tensor = self._tensor(name, new[name]).astype(self.stored[name].dtype)
                current = self.model.adapter.edit(current, (PutTensors({name: tensor}),), self.model.example)
                if self.refresh:  # the layers behind are to fit what they will really be given
                    current = refreshed(self.model, current, self.batches, self.seed)
            else:
                new[name] = self._fit(name, keep, self.grams[layer.node], None)
        return new

    def _fit(self, name: str, keep: dict[str, Array], gram: Gram, cross: Array | None) -> Array:
        """The weights of one layer; of a wide one the mask is chosen anew, block by block."""
        w, group = np.asarray(self.before[name], np.float64), self.pattern.group
        wide = w.shape[2] > self.step.exact and self.pattern.block == (1, 1) and self.step.scope != "row"
        parts = []
        for i, h in enumerate(self._h(name, gram)):
            if wide:
                part, stays = obs.blockwise(w[i], h, int((~keep[name][i]).sum()), group)
                keep[name][i] = stays & self.old[name][i] if name in self.old else stays
                parts.append(part)
            else:
                loading = float(diagonal_loading(gram.second[i], self.step.damping, 0.0))
                parts.append(obs.refit(w[i], keep[name][i], h, None if cross is None else cross[i], loading))
        return np.stack(parts)


def _batches(step: SparsePruning, data: Data | None) -> Batches:
    if data is not None and data.has("calibration"):
        return first(data.split("calibration"), step.samples, step.batch_size)
    if step.gram or step.gradient:
        what = step.criterion if isinstance(step.criterion, str) and step.scope != "sensitivity" else step.scope
        raise SlimlineError(f"SparsePruning by {what} needs data: pass slimline.Data with calibration samples.")
    return []


def _labelled(step: SparsePruning, data: Data) -> list[Batch]:
    batches, seen = [], 0
    for inputs, labels in data.split("calibration").batches(step.batch_size):
        batches.append((inputs, labels))
        seen += len(inputs[0])
        if seen >= step.samples:
            break
    return batches
