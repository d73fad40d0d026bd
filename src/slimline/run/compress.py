"""The main job, readable from top to bottom: load, plan, apply, recover, lower, measure, certify, report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from slimline import arguments

from slimline.run import parts as parted
from slimline.arguments import takes
from slimline.data.arrays import examples
from slimline.files.atomic import writing
from slimline.console import telling
from slimline.data import Data
from slimline.errors import SlimlineError, unknown
from slimline.frameworks.base import adapter, adapter_for
from slimline.graph.quantization import Quantization
from slimline.model import Model
from slimline.run.named_code import granted
from slimline.run.parts import PartedModel
from slimline.run.permits import code_of, home_of, permit
from slimline.run.stages import due, original_key, saved, work
from slimline.steps.plans import plan
from slimline.steps.precheck import check
from slimline.recipe import Budget, Recipe, StaticQuantization, Step, load_recipe
from slimline.recipe.recipe import check_order
from slimline.run.directory import Run
from slimline.runtimes.base import Runtime, runtime, usual
from slimline.runtimes.gate import lower
from slimline.steps.perform import Context, Tell, neighbours, perform
from slimline.training.teacher import fingerprint, teacher_for
from slimline.training.trial import try_augment, try_score

if TYPE_CHECKING:
    pass

__all__ = ["apply", "compress", "export", "load", "plan", "resume"]

SUFFIXES = {".pt2": "torch", ".pt": "torch", ".pth": "torch", ".keras": "keras"}


@overload
def load(source: Any, example_inputs: Any = None, *, allow_pickle: bool = False, parts: None = None) -> Model: ...
@overload
def load(source: Any, example_inputs: Any = None, *, parts: Sequence[str] | str | Path) -> PartedModel: ...
def load(
    source: Any,
    example_inputs: Any = None,
    *,
    allow_pickle: bool = False,
    parts: Sequence[str] | str | Path | None = None,
) -> Model | PartedModel:
    """Read a network.

    Parameters
    ----------
    source : a `torch.nn.Module` or ExportedProgram, a `keras.Model`, the path of a ``.pt2`` or ``.keras`` file, or
        a `Model`, which is returned as it is. The user's object is never changed.
    example_inputs : arrays or tensors ``(batch, …)``, one per input; needed for a torch module or a pickle of one.
    allow_pickle : whether a ``.pt`` or ``.pth`` file, which can run any code, may be opened.
    parts : for a torch module whose control flow depends on data: names of the submodules to compress, captured on
        what they receive when the module is called with `example_inputs` (a tuple for several arguments); or the
        folder that `PartedModel.save` wrote. See `slimline.run.parts`.

    Raises
    ------
    SlimlineError
        For what cannot be read, NaN or infinite weights, or a model without weights.
    """
    if parts is not None:
        return parted.load(source, example_inputs, parts)
    if isinstance(source, Model):
        return source
    if isinstance(source, PartedModel):
        raise SlimlineError("A model by parts is pruned by slimline.plan and slimline.apply: compress its parts else.")
    given = None
    if example_inputs is not None:
        given = examples(example_inputs, source)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix not in SUFFIXES:
            raise unknown("model format", path.suffix or path.name, SUFFIXES)
        if not path.is_file():
            raise SlimlineError(f"There is no model file {path}: check the path.")
        found = adapter(SUFFIXES[path.suffix])
        native, example, metadata = found.open(path, allow_pickle, given)
        return _checked(Model.restored(found, native, example, metadata))
    found = adapter_for(source)
    native, example = found.load(source, given)
    return _checked(Model(found, native, example, masks=found.masks(source)))


def _checked(model: Model) -> Model:
    stored = model.parameters()
    if not stored:
        raise SlimlineError("The model has no weights: there is nothing to compress.")
    for name, array in stored.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        # A mask that attention adds holds minus infinity, and a bound that was never set is one infinite number.
        meant = np.isinf(array) if array.ndim == 0 else np.isneginf(array)
        if name in model.graph.trainable or not (np.isfinite(array) | meant).all():
            raise SlimlineError(f"The weights {name} hold NaN or infinity: train or load the model anew.")
    if model.quantization is not None:
        _check_grids(model, model.quantization)
    return model


def _check_grids(model: Model, quantization: Quantization) -> None:
    for grids in (quantization.activations, quantization.weights):
        for name, grid in grids.items():
            if name not in model.graph.values:
                raise unknown("value with an integer grid called", name, model.graph.values)
            shape, counts = model.graph.values[name].shape, {len(grid.scale), len(grid.zero_point)}
            fits = counts == {1} if grid.axis is None else -len(shape) <= grid.axis < len(shape)
            fits = fits and (grid.axis is None or counts == {shape[grid.axis]})
            if not fits or grid.low >= grid.high or not all(np.isfinite(s) and s > 0 for s in grid.scale):
                raise SlimlineError(f"The integer grid of {name} does not fit it: quantize the model again.")


M = TypeVar("M", Model, PartedModel)


@takes(
    model=arguments.any_model,
    steps=arguments.steps,
    data=arguments.optional(arguments.data),
    target=arguments.optional(arguments.text),
    seed=arguments.seed,
    progress=arguments.progress,
)
def apply(
    model: M,
    steps: Step | Sequence[Step],
    data: Data | None = None,
    *,
    target: str | None = None,
    seed: int = 0,
    progress: Tell | bool | None = None,
    teacher: Any = None,
) -> M:
    """A new model to which the steps were done, one after the other; `model` stays as it is.

    Parameters
    ----------
    data : needed by recovery, quantization and gradient criteria.
    target : the runtime that quantization is for; the framework's usual one by default.
    progress : as of `compress`.
    teacher : what training learns from, anything `load` takes; by default the uncompressed model that `model` was made
        of, also by earlier calls. A model that was saved and loaded does not know it any more.
    """
    wanted = (steps,) if isinstance(steps, Step) else tuple(steps)
    if isinstance(model, PartedModel):
        if teacher is not None:
            raise SlimlineError("A model by parts is not trained here: drop teacher=, and train its native module.")
        return parted.apply(model, wanted, seed)
    _check_order(wanted, model, teacher)
    if data is not None:
        data = data.check(model.example)
        if any("train" in step.needs for step in wanted):
            try_augment(data)
    if len(wanted) > 1:
        check(wanted, model)
    tutor = teacher_for(model, teacher, wanted)
    with telling(progress) as tell:
        for position, step in enumerate(wanted):
            context = Context(
                tutor, data, target or usual(model.framework), seed, tell=tell, **neighbours(wanted, position)
            )
            model = perform(step, model, context).model
    return model


def _check_order(steps: Sequence[Step], model: Model, teacher: Any) -> None:
    """Refuse an order that has no meaning after what was done to `model`."""
    done = [str(entry.get("step")) for entry in model.history]
    if model.quantization is not None and StaticQuantization.__name__ not in done:
        done.append(StaticQuantization.__name__)
    check_order(steps, done, follows=bool(done) or teacher is not None)


@takes(model=arguments.model, target=arguments.text, output=arguments.path)
def export(model: Model, target: str, output: str | Path) -> Path:
    """Write the artifact that the runtime `target` loads.

    Parameters
    ----------
    output : a folder, in which it is called ``model`` with the target's suffix, or a path with that suffix.

    Returns
    -------
    Path of the artifact.

    Raises
    ------
    SlimlineError
        If the artifact does not answer as the model does, see `slimline.runtimes.gate`; then nothing is written.
    """
    found = _runtime(target, model)
    path = Path(output)
    if path.suffix != found.suffix:
        path = path / f"model{found.suffix}"
    with writing(path.parent), _folders(path.parent):
        lower(found, model, path)
    return path


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if what follows fails, those that were made go again."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for made in missing:
            with suppress(OSError):  # somebody has put something there
                made.rmdir()
        raise


def _runtime(target: str, model: Model) -> Runtime:
    found = runtime(target)
    if model.framework not in found.frameworks:
        usable = usual(model.framework)
        raise SlimlineError(f"{target} does not take {model.framework} models yet: choose the target {usable}.")
    missing = found.available()
    if missing:
        raise SlimlineError(missing)
    return found


@takes(
    data=arguments.data,
    target=arguments.optional(arguments.text),
    output=arguments.path,
    seed=arguments.optional(arguments.seed),
    batch_sizes=arguments.optional(arguments.sizes),
    progress=arguments.progress,
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
) -> Run:
    """Compress `model` for the runtime `target`, measure the artifact and certify the accuracy lost.

    Parameters
    ----------
    model : anything `load` takes.
    target : a name from ``slimline targets``; the framework's usual one by default.
    budget : limits; a limit on latency, size or MACs that the recipe cannot meet is refused before training,
        and with the recipe ``"auto"`` decides how much is pruned.
    recipe : ``"auto"``, a preset's name, a YAML path, steps, or a `Recipe`.
    output : the run directory, new or empty.
    seed, batch_sizes, threads : replace the recipe's own.
    progress : called as the work goes on; True shows bars on stderr, False nothing; by default there are bars where
        stderr is a terminal.
    command, sources : how it was called, for the report and for `resume`.
    teacher : what training learns from, anything `load` takes; by default the uncompressed model that `model` was made
        of, `model` itself where nothing has been done to it.
    allow_code : names ``package.module:function`` in the recipe that may be imported and called.

    Raises
    ------
    SlimlineError
        For bad input or an impossible budget, before long work starts and with nothing left behind.
    """
    original = load(model, example_inputs if example_inputs is not None else data.example())
    chosen = load_recipe(
        recipe,
        usual(original.framework),
        data.has("train"),
        seed=seed,
        batch_sizes=None if batch_sizes is None else tuple(batch_sizes),
        threads=threads,
        budget=budget,
        **({} if target is None else {"target": target}),
    )
    assert chosen.target is not None
    _runtime(chosen.target, original)
    with granted(chosen.steps, allow_code):
        _check_order(chosen.steps, original, teacher)
        tutor = teacher_for(original, teacher, chosen.steps)
        samples = _fitting(original, data, chosen)
        check(chosen.steps, original)
        run = Run.create(
            Path(output),
            chosen,
            command=command,
            sources=sources,
            data=samples.fingerprint(),
            model=_weights_of(original),
            teacher=None if tutor is None or tutor is original else fingerprint(tutor),
            title=_title(model, sources),
        )
        with telling(progress) as tell, run:
            return work(run, original, samples, tell, lambda: tutor)


@takes(path=arguments.path, data=arguments.optional(arguments.data), progress=arguments.progress)
def resume(
    path: str | Path,
    model: Any = None,
    data: Data | None = None,
    progress: Tell | bool | None = None,
    *,
    teacher: Any = None,
    allow_code: str | Sequence[str] = (),
    allow_pickle: bool = False,
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
        check(run.wish.steps, original)

        def tutor() -> Model | None:
            named = _again(run, "teacher", data) if teacher is None and original.origin is None else teacher
            return teacher_for(original, named, run.wish.steps)

        with granted([*run.recipe.steps, *run.wish.steps], code_of(run), home_of(run)):
            return work(run, original, samples, tell, tutor)


def _title(model: Any, sources: Mapping[str, Any] | None) -> str | None:
    """What a model is called: by its source, its file, or the class or name that its user gave it."""
    source = dict((sources or {}).get("model") or {}).get("name")
    if source is not None or isinstance(model, str | Path):
        text = str(source or model)
        return text if ":" in text else Path(text).name
    native = model.native if isinstance(model, Model) else model
    given = getattr(native, "name", None)
    if isinstance(given, str) and given:
        return given
    return None if isinstance(model, Model) else type(native).__name__


def _original(run: Run, model: Any, data: Data | None) -> Model:
    """The model that a run compresses: as the user gives it, as the run keeps it, or loaded again."""
    if model is None and not run.due("original", original_key(run)):
        return load(saved(run, "original"))
    example = None if data is None else data.example()
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
    answer = model.predict(*model.example)
    classes = answer.shape[-1] if answer.ndim == 2 and data.metric is None else None
    sizes = [s.batch_size for s in recipe.steps if s.step == "StaticQuantization"]
    samples = data.check(model.example, classes, batch=min(sizes, default=None))
    samples.refuse_overlap()
    try_augment(samples)
    try_score(model, samples, recipe.budget.max_drop)
    return samples


def _reason(run: Run) -> str:
    """Why the first stage that is to be done again is, where it was done before."""
    name, why = due(run)
    return f" (stage {name}: {why})" if name and run.done(name) else ""
