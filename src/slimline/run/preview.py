"""A recipe that is only rehearsed: what each of its steps would do to a model, without training it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data.data import is_data
from slimline.graph import cost
from slimline.graph.edits import FoldNorms
from slimline.model.loading import load
from slimline.model.lowering import road
from slimline.model.model import Model
from slimline.recipe import Recipe, Step, load_recipe
from slimline.recipe.named_code import granted
from slimline.report.printed import Printed, Row
from slimline.report.tables import Table, bytes_text
from slimline.run.apply import check, check_order_after
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, handler_of, neighbours

if TYPE_CHECKING:
    from slimline.data import Data


class Size(Row):
    """How large a network is.

    Attributes
    ----------
    parameters : trained numbers.
    macs : multiply-accumulates per sample.
    file_bytes : that its tensors take in an artifact, each in the format that it has, norms folded; what a file holds
        besides them is not in it.
    """

    parameters: int
    macs: int
    file_bytes: int


class StepPreview(Row):
    """What one step would do.

    Attributes
    ----------
    step, kind, settings : its name, its kind and every field of it.
    does : what it would do, in a sentence.
    skipped : whether what it is about was left out here, as training is.
    before, after : the network that it would be given, and leave.
    lines : particulars, for people.
    details : the same and more as data; what is in it depends on the step.
    """

    step: str
    kind: str
    settings: dict[str, Any]
    does: str
    skipped: bool
    before: Size
    after: Size
    lines: tuple[str, ...]
    details: dict[str, Any]


class Preview(Printed):
    """What a recipe would do to a model.

    Attributes
    ----------
    framework, target : of the model; the runtime that it would be for.
    original, expected : the network as it is, and as the last step would leave it.
    steps : in their order.
    notices : what the steps need to be done, and what is decided only then.
    """

    framework: str
    target: str
    original: Size
    expected: Size
    steps: tuple[StepPreview, ...]
    notices: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        """The size of the network after every step."""
        sizes = [("original", self.original), *((row.step, row.after) for row in self.steps)]
        rows = [(n, f"{s.parameters:,}", f"{s.macs:,}", bytes_text(s.file_bytes)) for n, s in sizes]
        title = f"What would be left after each step, for {self.target}"
        return [Table(title, ("step", "parameters", "MACs", "tensors in the file"), rows, ("parameters", "MACs"))]

    def lines(self) -> list[str]:
        """What each step would do, and the notices."""
        lines = []
        for number, row in enumerate(self.steps, 1):
            lines.append(f"{number}. {row.step} {row.does}.")
            lines += [f"   {line}" for line in row.lines]
        return [*lines, *self.notices]


@takes(
    data=arguments.optional(is_data),
    target=arguments.optional(arguments.text),
    seed=arguments.optional(arguments.seed),
)
def preview(
    model: Any,
    recipe: str | Path | Step | Sequence[Step] | Recipe = "auto",
    data: Data | None = None,
    *,
    target: str | None = None,
    seed: int | None = None,
    allow_code: str | Sequence[str] = (),
) -> Preview:
    """What each step of a recipe would do to `model`, on what the steps before it would leave; nothing is trained.

    Steps that change shapes are planned and carried out on a copy in memory; of quantization it is told which layers
    would be integer, by the placement of the target, and which not and why; training is skipped. Nothing is measured
    but what a step measures for its plan, as ``round_to="auto"`` of `ChannelPruning` does.

    Parameters
    ----------
    model : a `Model`, or anything else that `slimline.load` takes.
    recipe : as of `compress`. How strong ``"auto"`` is, is decided by the budget when it is done; here it is as strong
        as its preset.
    data : its calibration samples, for criteria that measure; nothing else of it is read.
    target : one of ``slimline targets``; the recipe's, or else the framework's usual one, by default.
    seed : replaces the recipe's own.
    allow_code : names ``package.module:function`` in the recipe that may be imported and called.

    Raises
    ------
    SlimlineError : a step that could not be done, an order that has no meaning, or a step that reads samples and `data`
        has none.
    """
    loaded = load(model, None if data is None else data.example_by_name())
    chosen = load_recipe(
        recipe,
        loaded.usual_target,
        (data is None or data.has("train")) and loaded.adapter.untrainable(loaded.native) is None,
        seed=seed,
        **({"target": target} if target else {}),
    )
    name = str(chosen.target)
    road(loaded.forms, runtime(name))
    with granted(chosen.steps, allow_code):
        check_order_after(chosen.steps, loaded, None)
        _refuse_without_samples(chosen.steps, data)
        samples = None if data is None else data.check(loaded.inputs)
        check(chosen.steps, loaded, name)
        return _rehearsed(loaded, chosen, samples, name)


def _refuse_without_samples(steps: Sequence[Step], data: Data | None) -> None:
    for step in steps:
        for role in handler_of(step).forecast_needs(step):
            if data is None or not data.has(role):  # type: ignore[arg-type]
                raise SlimlineError(
                    f"What {step.step} would do depends on {role} samples, which it reads: give --data (in Python "
                    "data=)."
                )


def _rehearsed(model: Model, recipe: Recipe, data: Data | None, target: str) -> Preview:
    size = original = _size(model)
    rows = []
    for position, step in enumerate(recipe.steps):
        context = Context(
            model.uncompressed,
            data,
            target,
            recipe.seed,
            *neighbours(recipe.steps, position),
            batch_sizes=recipe.batch_sizes,
            threads=recipe.threads,
            rehearsal=True,
        )
        forecast = handler_of(step).forecast(step, model, context)
        before, model = size, forecast.model
        size = _size(model, forecast.stored_bytes)
        rows.append(
            StepPreview(
                step=step.step,
                kind=step.kind,
                settings=step.model_dump(mode="json"),
                does=forecast.does,
                skipped=forecast.skipped,
                before=before,
                after=size,
                lines=forecast.lines,
                details=dict(forecast.details),
            )
        )
    return Preview(
        framework=model.framework,
        target=target,
        original=original,
        expected=size,
        steps=tuple(rows),
        notices=_notices(recipe),
    )


def _notices(recipe: Recipe) -> tuple[str, ...]:
    notices = []
    if recipe.fit:
        notices.append(
            "How strong the steps are is decided by the budget when it is done; here they are at full strength."
        )
    if needs := recipe.needs():
        reads = "".join(f"{role} ({step}), " for role, step in needs.items())
        notices.append(f"slimline compress would need samples for {reads}certification (the proof).")
    return tuple(notices)


def _size(model: Model, stored_bytes: Mapping[str, int] | None = None) -> Size:
    """How large a network is, if these tensors take so many bytes each."""
    graph = model.graph
    other = dict(stored_bytes or {})
    folded = graph
    if model.quantization is None:
        folded = Model(model.adapter, model.edit(FoldNorms()), model.example).graph
    else:
        formats = model.quantization.weights
        other |= {n: -(-math.prod(graph.values[n].shape) * each.stored_bits // 8) for n, each in formats.items()}
    file_bytes = sum(
        other.get(name, math.prod(folded.values[name].shape) * _itemsize(folded.values[name].dtype))
        for name in folded.parameters
    )
    return Size(parameters=graph.size, macs=cost.macs(graph), file_bytes=file_bytes)


def _itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
