"""The main job, readable from top to bottom: load, plan, apply, recover, lower, measure, certify, report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data import Data
from slimline.data.data import is_data
from slimline.frameworks.base import Adapter
from slimline.frameworks.device import device_name, on, using, wish
from slimline.model import Model
from slimline.model.loading import load
from slimline.model.outputs import bare_outputs
from slimline.recipe import Budget, Recipe, Step, load_recipe
from slimline.recipe.named_code import granted
from slimline.report.console import telling
from slimline.run.apply import check, check_order_after
from slimline.run.directory import Run
from slimline.run.export import runtime_of
from slimline.run.permits import code_of, home_of, permit
from slimline.run.stages import due, original_key, saved, searches, work
from slimline.runtimes.base import Runtime
from slimline.steps.base import Tell
from slimline.training.teacher import fingerprint, teacher_for
from slimline.training.trial import try_augment, try_score


@takes(
    data=is_data,
    target=arguments.optional(arguments.text),
    output=arguments.path,
    seed=arguments.optional(arguments.seed),
    batch_sizes=arguments.optional(arguments.sizes),
    progress=arguments.progress,
    device=arguments.optional(device_name),
)
def compress(
    model: Any,
    data: Data,
    target: str | None = None,
    budget: Budget | None = None,
    recipe: str | Path | Step | Sequence[Step] | Recipe = "auto",
    output: str | Path = "run",
    *,
    example_inputs: Any = None,
    seed: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    progress: Tell | bool | None = None,
    command: list[str] | None = None,
    sources: Mapping[str, Any] | None = None,
    teacher: Any = None,
    allow_code: str | Sequence[str] = (),
    device: str | None = None,
) -> Run:
    """Compress `model` for the runtime `target`, measure the artifact and certify the accuracy lost.

    Parameters
    ----------
    model : anything `load` takes.
    target : a name from ``slimline targets``; the framework's usual one by default.
    budget : limits; a limit on latency, size, memory or MACs that the recipe cannot meet is refused before
        training, and with the recipe ``"auto"`` decides how much is pruned.
    recipe : ``"auto"``, a preset's name, a YAML path, steps, or a `Recipe`.
    output : the run directory, new or empty.
    seed, batch_sizes, threads : replace the recipe's own.
    progress : called as the work goes on; True shows bars on stderr, False nothing; by default there are bars where
        stderr is a terminal.
    command, sources : how it was called, for the report and for `resume`.
    teacher : what training learns from, anything `load` takes; by default the uncompressed model that `model` was made
        of, `model` itself where nothing has been done to it.
    allow_code : names ``package.module:function`` in the recipe that may be imported and called.
    device : where training, calibration and gradients are computed: ``cuda``, ``cuda:1``, ``mps`` or ``cpu``; by
        default what the environment variable ``SLIMLINE_DEVICE`` says, else the best there is. The artifact is measured
        where its target runs it.

    Raises
    ------
    SlimlineError
        For bad input or an impossible budget, before long work starts and with nothing left behind.
    """
    original = load(model, example_inputs if example_inputs is not None else data.example_by_name())
    chosen = load_recipe(
        recipe,
        original.usual_target,
        data.has("train") and original.adapter.untrainable(original.native) is None,
        seed=seed,
        batch_sizes=None if batch_sizes is None else tuple(batch_sizes),
        threads=threads,
        budget=budget,
        **({} if target is None else {"target": target}),
    )
    assert chosen.target is not None
    _refuse_unmeasured(runtime_of(chosen.target, original), chosen)
    with granted(chosen.steps, allow_code), on(original.adapter, device):
        check_order_after(chosen.steps, original, teacher)
        tutor = teacher_for(original, teacher, chosen.steps)
        samples = _fitting(original, data, chosen)
        check(chosen.steps, original, chosen.target)
        itself = tutor is original and original.uncompressed is original  # what was compressed before names its teacher
        run = Run.create(
            Path(output),
            chosen,
            command=command,
            sources=sources,
            data=samples.fingerprint(),
            model=_weights_of(original),
            teacher=None if tutor is None or itself else fingerprint(tutor),
            title=_title(model, sources),
        )
        with telling(progress) as tell, run:
            run.compute_on(original.adapter.device(wish()))
            return work(run, original, samples, tell, lambda: tutor)


@takes(
    path=arguments.path,
    data=arguments.optional(is_data),
    progress=arguments.progress,
    device=arguments.optional(device_name),
)
def resume(
    path: str | Path,
    model: Any = None,
    data: Data | None = None,
    progress: Tell | bool | None = None,
    *,
    teacher: Any = None,
    allow_code: str | Sequence[str] = (),
    allow_pickle: bool = False,
    device: str | None = None,
) -> Run:
    """Go on with a run that was stopped or killed; one that is finished and sound is returned as it is.

    Every file is compared with its hash before it is read. What is missing or altered is copied from elsewhere in the
    run, or made again, and a warning says so. An edited ``recipe.yaml`` is taken over from the first step that it
    touches. Where packages have other versions than the run was begun with, finished training stays as it is, and
    whatever is not done, the artifacts and what is measured are made with the present ones.

    Parameters
    ----------
    model, data, teacher : needed where the run was started from Python with objects; else they are loaded again.
    progress : as of `compress`.
    allow_code, allow_pickle : names ``package.module:function`` in the run that may be imported and called, and whether
        a pickle that it names may be opened; not needed for a run that this user started on this machine.
    device : as of `compress`; by default that on which the run was computed so far, if it is there. Training goes on
        from a checkpoint on any device.

    Raises
    ------
    SlimlineError
        For another model or other data than the run was started with, a recipe edited after the end, and what can
        neither be copied nor made again.
    """
    with telling(progress) as tell, Run.open(path) as run:
        if run.finished:
            if not run.restore():
                run.finish()
                return run
            run.reopen()
        run.read_recipe()
        if run.decided("fit", run.base) and not due(run)[0]:
            return work(run, None, None, tell)
        run.read_versions()
        permit(run, {"model": model, "data": data, "teacher": teacher}, allow_code, allow_pickle)
        original = _original(run, model, data)
        if data is None:
            data = _again(run, "data", None)(original.adapter.layout)
        samples = _fitting(original, data, run.recipe)
        run.check("data", samples.fingerprint())
        check(run.wish.steps, original, run.wish.target)

        def tutor() -> Model | None:
            named = _again(run, "teacher", data) if teacher is None and original.origin is None else teacher
            return teacher_for(original, named, run.wish.steps)

        code = granted([*run.recipe.steps, *run.wish.steps], code_of(run), home_of(run))
        with code, _going_on(run, original.adapter, device):
            return work(run, original, samples, tell, tutor)


@contextmanager
def _going_on(run: Run, adapter: Adapter, device: str | None) -> Iterator[None]:
    """Compute on the device that is wished, else on the one that the run was computed on so far, if it is there."""
    before = run.devices[-1] if run.devices else None
    with on(adapter, device):
        actual = adapter.device(wish())
        if before not in (None, actual) and wish() is None:
            with suppress(SlimlineError):
                actual = device = adapter.device(before)
        with using(device):
            run.compute_on(actual)
            yield


def _refuse_unmeasured(target: Runtime, recipe: Recipe) -> None:
    """Refuse what only measuring could decide, for a target whose artifacts are not run here."""
    if not target.elsewhere:
        return
    where = f"{target.name} artifacts run {target.elsewhere}, not here"
    for limit in ("max_latency", "max_memory"):
        if getattr(recipe.budget, limit) is not None:
            raise SlimlineError(f"{where}, so {limit} cannot be judged: leave it out of the budget.")
    if searches(recipe):
        raise SlimlineError(f"{where}, so no strength can be chosen by what it loses: name the steps of the recipe.")


def _title(model: Any, sources: Mapping[str, Any] | None) -> str | None:
    """What a model is called: by its source, its file, or the class or name that its user gave it."""
    source = dict((sources or {}).get("model") or {}).get("name")
    if source is not None or isinstance(model, str | Path):
        text = str(source or model)
        return text if ":" in text else Path(text).name
    native = model.native if isinstance(model, Model) else model
    name = getattr(native, "name", None)
    if isinstance(name, str) and name:
        return name
    return None if isinstance(model, Model) else type(native).__name__


def _original(run: Run, model: Any, data: Data | None) -> Model:
    """The model that a run compresses: as the user gives it, as the run keeps it, or loaded again."""
    if model is None and not run.due("original", original_key(run)):
        return load(saved(run, "original"))
    example = None if data is None else data.example_by_name()
    original = _again(run, "model", data) if model is None else load(model, example)
    run.check("model", _weights_of(original))
    return original


def _weights_of(model: Model) -> str:
    """A hash of a model's stored tensors in their order; names differ from one process to the next."""
    digest = hashlib.sha256()
    for array in model.parameters().values():
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _again(run: Run, what: str, data: Data | None) -> Any:
    from slimline.run.sources import load_again

    sources = run.created.get("sources") or {}
    if what not in sources:
        raise SlimlineError(
            f"{run.path} was started from Python: go on with slimline.resume({str(run.path)!r}, model, data"
            f"{', teacher=teacher' if run.created.get('teacher') else ''})"
            f"{_reason(run)}."
        )
    return load_again(sources, what, data, at_home=run.own)


def _fitting(model: Model, data: Data, recipe: Recipe) -> Data:
    """The data as the model takes it, once everything that can be refused has been."""
    for role, step in recipe.needs().items():
        if not data.has(role):  # type: ignore[arg-type]
            raise SlimlineError(
                f"{step} needs {role} samples: give Data {'train' if role == 'train' else role}=(x, y)."
            )
    if not data.has("certification"):
        raise SlimlineError("The result cannot be certified without test samples: give Data test=(x, y).")
    sizes = [step.reads_together for step in recipe.steps if step.reads_together is not None]
    samples = data.check(model.inputs, batch=min(sizes, default=None))
    samples.check_labels(bare_outputs(model, samples))
    samples.refuse_overlap()
    try_augment(samples)
    try_score(model, samples, recipe.budget.max_drop)
    return samples


def _reason(run: Run) -> str:
    """Why the first stage that is to be done again is, where it was done before."""
    name, why = due(run)
    return f" (stage {name}: {why})" if name and run.has_stage(name) else ""
