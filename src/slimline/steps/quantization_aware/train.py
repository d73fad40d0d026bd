"""From a float (or calibrated) model to one that was trained on the grids of its formats.

Training goes in phases, each a training of its own that can be resumed: before activations are rounded, before batch
norms are folded, and after. A phase trains a copy whose formats learn; what it learned goes into the float model and
into the formats, which the next phase, and in the end the simulation, is made of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.files.decisions import checked
from slimline.graph.edits import LearnRounding, PutTensors, Unround
from slimline.graph.quantization import Quantization
from slimline.methods.formats import Format, IntegerGrid, Scaled
from slimline.methods.ranges import affine_grid
from slimline.model import Model
from slimline.model.masks import held
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, Prepared, StepResult
from slimline.steps.quantization.calibration import activation_grids, integer_grids, observe_ranges
from slimline.steps.quantization.undo import WeightBits
from slimline.steps.quantization_aware import formats as of
from slimline.steps.quantization_aware.formats import Site
from slimline.steps.quantization_aware.reconstruct import reconstruct
from slimline.steps.quantization_aware.signs import sign_formats, signed, with_thresholds
from slimline.steps.quantization_aware.step import QuantizationAwareTraining
from slimline.training.loop import recover

_log = logging.getLogger(__name__)
_NONE = Quantization()
Array = np.ndarray[Any, np.dtype[Any]]


def quantize(step: QuantizationAwareTraining, model: Model, context: Context) -> StepResult:
    """The trained model on its formats, and the record."""
    of.check(step, model)
    of.check_target(step, context.target, model)
    state = start(step, model, context)
    if step.reconstruct is not None:
        state, records = state.folded().calibrated().reconstructed()
        return state.finished({"parts": records})
    phases = step.phases()
    history: list[dict[str, Any]] = []
    chosen: list[int] = []
    for begin, end in phases:
        if step.fold_norms is not None and begin >= step.fold_norms:
            state = state.folded()
        if begin >= step.delay:
            state = state.calibrated()
        inner = context if len(phases) == 1 else context.inner(f"phase-{begin}")
        state, records, best = state.trained(end - begin, begin, inner)
        history += records
        chosen.append(best)
    return state.finished({"best_epochs": chosen, "history": history})


def prepare(step: QuantizationAwareTraining, model: Model, context: Context) -> Prepared:
    """A network whose formats learn, and how what it has learned becomes a model."""
    of.check(step, model)
    if step.reconstruct is not None:
        raise SlimlineError(
            "reconstruct trains parts in a loop of slimline's own: leave it out, or use slimline.apply."
        )
    if (step.delay or step.fold_norms) and not model.adapter.delays_formats:
        raise SlimlineError(
            "delay and fold_norms are of slimline's own loop where a framework's takes no callback: leave them out."
        )
    of.check_target(step, context.target, model)
    state = start(step, model, context)
    if step.fold_norms == 0:
        state = state.folded()
    begun = state.calibrated()
    native = begun.site.model.edit(begun.learning(delayed=bool(step.delay)))
    if not step.delay:
        state = begun

    def taught() -> State:
        return state.taught(replace(state.site.model, native=native, quantization=None))

    def observe() -> Quantization:
        nonlocal state
        state = taught().calibrated()
        return state.formats

    def finish() -> Model:
        return held(taught().finished({}).model)

    return Prepared(native, finish, step.delay, step.fold_norms, observe, model.masks)


@dataclass(frozen=True)
class State:
    """A network between two phases.

    Attributes
    ----------
    site : it, and where it is to be rounded.
    after : the same with folded norms, as it was at the start; None once they are folded.
    formats : so far.
    known : formats that a step before has calibrated, by value and weight.
    floating : layers that stay in float, with the reason.
    """

    step: QuantizationAwareTraining
    context: Context
    source: Model
    site: Site
    norms: bool
    formats: Quantization
    known: Quantization
    exclude: Mapping[str, str]

    def calibrated(self) -> State:
        """With formats of the activations, from ranges that are observed on the weights as they are rounded now."""
        placement = self.site.placement
        if placement is None or self.formats.activations:
            return self
        step, context = self.step, self.context
        bits, signed = of.activation_type(step, context.target)
        batches = self.calibration
        observed = self.site.model
        if step.delay:
            stored = observed.parameters()
            rounded = {name: each.round(stored[name]) for name, each in self.formats.weights.items()}
            observed = replace(observed, native=observed.edit(PutTensors(rounded)))
        ranges = observe_ranges(observed, placement, step.static, batches, {}, partial(affine_grid, bits=bits))
        rules = runtime(context.target).policy
        grids: dict[str, Format] = dict(
            activation_grids(placement, ranges, *integer_grids(bits, signed, rules.symmetric))
        )
        if self.site.signs:
            grids |= sign_formats(observed, self.site.signs, batches)
        grids |= {n: f for n, f in self.known.activations.items() if n in grids and _alike(f, grids[n])}
        return replace(self, formats=replace(self.formats, activations=grids))

    @property
    def calibration(self) -> list[tuple[Array, ...]]:
        """Batches of inputs."""
        return calibration(self.step, self.context)

    def reconstructed(self) -> tuple[State, list[dict[str, Any]]]:
        """After its parts were trained by themselves, and what is to be said of each."""

        def learning(formats: Quantization, fixed: frozenset[str]) -> LearnRounding:
            edit = replace(self, formats=formats).learning()
            return replace(edit, fixed=edit.fixed | fixed, drop=self.step.drop)

        masks, known = self.source.masks, frozenset(self.known.weights)
        done = reconstruct(self.step, self.site, self.formats, learning, masks, self.calibration, self.context, known)
        native = self.site.model.edit(PutTensors(done.tensors))
        site = replace(self.site, model=replace(self.site.model, native=native))
        return replace(self, site=site, formats=done.formats), done.records

    def trained(self, epochs: int, begin: int, context: Context) -> tuple[State, list[dict[str, Any]], int]:
        """After so many epochs of training, their records, and the best of them."""
        step, data = self.step, context.data
        if data is None:
            raise SlimlineError(f"{step.step} needs data: pass slimline.Data with train=(x, y) or train=(x,).")
        model, tell = self.site.model, context.tell
        student = replace(model, native=model.edit(self.learning()), quantization=None)
        phase = step.model_copy(update={"epochs": epochs, "delay": 0, "fold_norms": None})
        trained = recover(student, context.teacher, phase, data, context.seed + begin, context.checkpoint, tell)
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in trained.records]
        return self.taught(trained.model), records, trained.best_epoch

    def learning(self, delayed: bool = False) -> LearnRounding:
        """The edit that makes the network one whose formats learn; those of activations `delayed`."""
        placement = self.site.placement
        shared = {} if placement is None else dict(placement.groups)
        if self.step.scales == "calibrated":
            fixed = frozenset((*self.formats.activations, *self.formats.weights))
        else:
            fixed = frozenset(() if placement is None else placement.ranges)
        activations, none = frozenset(self.formats.activations), frozenset[str]()
        clipped = activations if self.step.scales == "clipping" else none
        skewed = of.skews(self.step, self.site) & self.formats.weights.keys()
        return LearnRounding(self.formats, shared, fixed, activations if delayed else none, clipped, skewed)

    def taught(self, student: Model) -> State:
        """With the weights and formats that a copy has learned, which `learning` made of this network."""
        model = self.site.model
        tensors = student.parameters()
        plain = replace(model, native=model.edit(PutTensors({name: tensors[name] for name in model.parameters()})))
        learned = student.adapter.learned(student.native, self.formats)
        return replace(self, site=replace(self.site, model=plain), formats=learned)

    def folded(self) -> State:
        """With its norms folded."""
        if not self.norms:
            return self
        after = of.site(self.step, self.site.model, self.context.target, self.exclude, fold=True)
        return replace(self, site=after, norms=False, formats=of.carried(self.formats, self.site, after))

    def finished(self, training: Mapping[str, Any]) -> StepResult:
        """The model that simulates its artifact, and what the report says of it; `training` is what it says of that."""
        state = self.folded().calibrated()
        site, step, target = state.site, self.step, self.context.target
        placement = site.placement
        formats = state.formats
        if placement is not None:
            reasons = {**placement.refused, **self.exclude}
            formats = replace(formats, layers=placement.layers, float_layers=reasons)
        native, formats = of.finished(site, formats, target)
        record = step.model_dump(mode="json")
        noted = {**record, "target": target, "float_layers": dict(formats.float_layers)}
        masks = dict(self.source.masks)
        result = self.source.then(native, noted, formats, masks)
        shapes = site.model.parameters()
        record |= {
            **training,
            "formats": formats.summary(),
            "refused": [],
            "layers": {
                site.layers[name]: {
                    "format": each.describe(),
                    "bits": round(each.bits_per_value(shapes[name].shape), 3),
                }
                for name, each in state.formats.weights.items()
            },
        }
        if placement is not None:
            record |= {"float_layers": dict(formats.float_layers), "integer_layers": list(formats.layers)}
        return StepResult(result, record)


def calibration(step: QuantizationAwareTraining, context: Context) -> list[tuple[Array, ...]]:
    """Batches of inputs."""
    data = context.data
    if data is None or not data.has("calibration"):
        raise SlimlineError(f"{step.step} needs data: pass slimline.Data with calibration or training samples.")
    return first(data.split("calibration"), step.samples, step.batch_size)


def start(step: QuantizationAwareTraining, model: Model, context: Context) -> State:
    """Before any training: the formats of the weights are there, those of activations where nothing delays them."""
    known = model.quantization or _NONE
    plain = model
    if model.quantization is not None:
        native = model.native if known.stored else model.edit(Unround(known))
        plain = replace(model, native=native, quantization=None)
    exclude = dict(known.float_layers)
    target = context.target
    decided = context.decide("weight-bits", lambda: {"bits": runtime(target).weight_bits})
    most = checked(WeightBits, decided, "the bits of weights").bits
    if step.activations == "float32":
        most = 8

    def weights(site: Site) -> dict[str, Scaled]:
        stored = site.model.parameters()
        grids = {
            name: of.weight_format(stored[name], of.dtype_of(step, site, name), blocks, most)
            for name, blocks in site.blocks.items()
        }
        own = {name: each for name, each in known.weights.items() if name in grids and _alike(each, grids[name])}
        return {**grids, **own}  # type: ignore[dict-item]

    if step.has_signs:
        unsigned = of.site(step, plain, target, exclude, fold=False)
        seeing = signed(step, plain, unsigned.blocks)
        plain = with_thresholds(plain, seeing, calibration(step, context)) if seeing else plain
    unfolded = of.site(step, plain, target, exclude, fold=False)
    after = of.site(step, plain, target, exclude, fold=True)
    grids = weights(unfolded)
    norms = not of.skews(step, unfolded) and of.absorbs(unfolded, after, grids.__getitem__)
    site = unfolded if norms else after
    _log.info("train %d weights and %d activations in few bits", len(site.blocks), len(site.activations))
    formats = Quantization(weights=grids if norms else weights(after))
    return State(step, context, model, site, norms, formats, known, exclude)


def _alike(one: Format, other: Format) -> bool:
    """Whether two formats differ in no more than their numbers."""
    if isinstance(one, IntegerGrid) and isinstance(other, IntegerGrid):
        return (one.bits, one.signed, one.blocks) == (other.bits, other.signed, other.blocks)
    return False
