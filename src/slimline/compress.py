"""The main job, readable from top to bottom: load, plan, apply, recover, lower, measure, certify, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from slimline import parted
from slimline.console import telling
from slimline.data import Data
from slimline.errors import SlimlineError, unknown
from slimline.frameworks.base import adapter, adapter_for
from slimline.journal import fingerprint
from slimline.model import Model
from slimline.parted import PartedModel
from slimline.plans import plan
from slimline.precheck import check
from slimline.recipe import Budget, ChannelPruning, Distillation, Recipe, SparsePruning, Step, load_recipe
from slimline.recipe.recipe import check_order
from slimline.recovery import Progress
from slimline.run import RECIPE, Run, versions
from slimline.runtimes.base import Runtime, runtime, usual
from slimline.steps import Context, Tell, perform

if TYPE_CHECKING:
    from slimline.measure.results import Report

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
        folder that `PartedModel.save` wrote. See `slimline.parted`.

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
        many = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        given = tuple(np.asarray(x) for x in many)
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
    return model


M = TypeVar("M", Model, PartedModel)


def apply(
    model: M,
    steps: Step | Sequence[Step],
    data: Data | None = None,
    *,
    target: str | None = None,
    seed: int = 0,
    progress: Tell | bool | None = None,
) -> M:
    """A new model to which the steps were done, one after the other; `model` stays as it is.

    Parameters
    ----------
    data : needed by recovery, quantization and gradient criteria.
    target : the runtime that quantization is for; the framework's usual one by default.
    progress : as of `compress`.
    """
    wanted = (steps,) if isinstance(steps, Step) else tuple(steps)
    if isinstance(model, PartedModel):
        return parted.apply(model, wanted, seed)
    check_order(wanted, [str(h.get("step")) for h in model.history])
    if data is not None:
        data = data.check(model.example)
    if len(wanted) > 1:
        check(wanted, model)
    original = model
    with telling(progress) as tell:
        for position, step in enumerate(wanted):
            context = Context(
                original, data, target or usual(model.framework), seed, tell=tell, **_neighbours(wanted, position)
            )
            model = perform(step, model, context).model
    return model


def _neighbours(steps: Sequence[Step], position: int) -> dict[str, Any]:
    """The fields of `Context` that are the steps around the one at `position`, where they work together."""
    before = steps[position - 1] if position else None
    following = steps[position + 1] if position + 1 < len(steps) else None
    return {
        "recovery": following if isinstance(following, Distillation) else None,
        "pruning": before if isinstance(before, SparsePruning) and before.trains else None,
        "removal": following if isinstance(following, ChannelPruning) else None,
    }


def export(model: Model, target: str, output: str | Path) -> Path:
    """Write the artifact that the runtime `target` loads.

    Parameters
    ----------
    output : a folder, in which it is called ``model`` with the target's suffix, or a path with that suffix.

    Returns
    -------
    Path of the artifact.
    """
    found = _runtime(target, model)
    path = Path(output)
    if path.suffix != found.suffix:
        path = path / f"model{found.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.lower(model, path)
    return path


def _runtime(target: str, model: Model) -> Runtime:
    found = runtime(target)
    if model.framework not in found.frameworks:
        usable = usual(model.framework)
        raise SlimlineError(f"{target} does not take {model.framework} models yet: choose the target {usable}.")
    missing = found.available()
    if missing:
        raise SlimlineError(missing)
    return found


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
    samples = _fitting(original, data, chosen)
    check(chosen.steps, original)
    run = Run.create(
        Path(output),
        chosen,
        command=command,
        sources=sources,
        data=samples.fingerprint(),
        model=_weights_of(original),
        title=_title(model, sources),
    )
    with telling(progress) as tell, run:
        _fit(run, original, samples, tell)
        return _work(run, original, samples, tell)


def resume(path: str | Path, model: Any = None, data: Data | None = None, progress: Tell | bool | None = None) -> Run:
    """Go on with a run that was stopped or killed; one that is finished and sound is returned as it is.

    Every file is compared with its hash before it is read. What is missing or altered is copied from elsewhere in the
    run, or made again, and a warning says so. An edited ``recipe.yaml`` is taken over from the first step that it
    touches. Where packages have other versions than the run was begun with, finished training stays as it is, and
    whatever is not done, the artifacts and what is measured are made with the present ones.

    Parameters
    ----------
    model, data : needed where the run was started from Python with objects; else they are loaded again.
    progress : as of `compress`.

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
        if _fitted(run) and not _due(run):
            return _work(run, None, None, tell)
        run.read_versions()
        original = _original(run, model, data)
        if data is None:
            data = _again(run, "data")(original.adapter.layout)
        samples = _fitting(original, data, run.recipe)
        run.check("data", samples.fingerprint())
        check(run.recipe.steps, original)
        _fit(run, original, samples, tell)
        return _work(run, original, samples, tell)


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
    if model is None and not run.due("original", _key(run, "original")):
        return load(_saved(run, "original"))
    example = None if data is None else data.example()
    original = _again(run, "model") if model is None else load(model, example)
    run.check("model", _weights_of(original))
    return original


def _weights_of(model: Model) -> str:
    """A hash of a model's stored tensors in their order; names differ from one process to the next."""
    digest = hashlib.sha256()
    for array in model.parameters().values():
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fitted(run: Run) -> bool:
    """Whether it was decided what the recipe becomes within the budget."""
    return run.decided("fit", run.base)


def _fit(run: Run, original: Model, data: Data, tell: Tell | None) -> None:
    """Take the recipe that meets the budget, found once in the life of a run."""
    from slimline.fit import fit

    def choose() -> dict[str, Any]:
        return fit(original, data, run.recipe, tell).model_dump(mode="json", by_alias=True)

    chosen = Recipe.model_validate(run.timed("fit", lambda: run.decide("fit", choose, run.base)))
    if chosen != run.recipe:
        run.settle(chosen)


def _again(run: Run, what: str) -> Any:
    from slimline.sources import load_again

    sources = run.created.get("sources") or {}
    if what not in sources:
        raise SlimlineError(
            f"{run.path} was started from Python: go on with slimline.resume({str(run.path)!r}, model, data)"
            f"{_reason(run)}."
        )
    return load_again(sources, what)


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
    return data.check(model.example, classes, batch=min(sizes, default=None))


def _reason(run: Run) -> str:
    """Why the first stage that is to be done again is, where it was done before."""
    name = _due(run)
    return f" (stage {name}: {run.due(name, _key(run, name))})" if name and run.done(name) else ""


def _saved(run: Run, stage: str) -> Path:
    """The model that a stage has left, which has just been compared with its hash."""
    found = [f for f in run.files_of(stage) if Path(f).stem == "model" and Path(f).suffix in SUFFIXES]
    if len(found) != 1:
        raise SlimlineError(f"Stage {stage} of {run.path} holds no model: start a new run in another directory.")
    return run.path / found[0]


def _stages(recipe: Recipe) -> list[str]:
    """The names of a run's stages, in their order."""
    steps = [f"{position + 1:02d}-{step.step}" for position, step in enumerate(recipe.steps)]
    return ["original", "baseline", *steps, "artifact", "report"]


def _key(run: Run, name: str) -> str:
    """A hash of all that decides what a stage gives: its step, and what the stages before it gave.

    Versions of packages count where models are lowered and measured, which is quick, and not for what was trained.
    """
    recipe, names = run.recipe, _stages(run.recipe)
    position = names.index(name) - 2
    if name == "original":
        return fingerprint(run.created.get("model"))
    if name == "baseline":
        return fingerprint([run.digest("original"), recipe.target, versions()])
    if name == "artifact":
        return fingerprint([run.digest(names[-3] if recipe.steps else "original"), recipe.target, versions()])
    if name == "report":
        made = [run.digest(stage) for stage in names[:-1]]
        return fingerprint([made, recipe.dump(), run.created.get("data"), versions()])
    step, beside = recipe.steps[position], _neighbours(recipe.steps, position)
    others = {role: None if other is None else other.model_dump(mode="json") for role, other in beside.items()}
    before = "original" if position == 0 else names[position + 1]
    made = [run.digest("original"), run.digest(before), str(run.created.get("data"))]
    return fingerprint([step.model_dump(mode="json"), others, recipe.seed, recipe.target, made])


def _due(run: Run) -> str:
    """The first stage that is to be done, or done again; '' where none is."""
    return next((name for name in _stages(run.recipe) if run.due(name, _key(run, name))), "")


def _work(run: Run, original: Model | None, data: Data | None, tell: Tell | None) -> Run:
    """All stages of a run; those that stand as the journal says are not done again, and read back where needed.

    Without `original` and `data`, which a run has none of whose stages is due, only what comes after them is done.
    """
    recipe, names = run.recipe, _stages(run.recipe)
    target = str(recipe.target)
    found = runtime(target) if original is None else _runtime(target, original)
    total = len(recipe.steps) + 4

    def say(done: int, what: str) -> None:
        if tell is not None:
            tell(Progress("Compressing", done, total, {"now": what}))

    def save(model: Model, folder: Path) -> None:
        model.save(folder / f"model{model.adapter.suffix}")

    def stage(name: str, work: Callable[[Path], Any], place: str | None = None) -> tuple[Path, dict[str, Any]]:
        return run.stage(name, work, place, _key(run, name))

    loaded: dict[str, Model] = {}

    def model_of(name: str) -> Model:
        """The model that a stage has left, read back from disk: the same bytes after a kill and without one."""
        if name not in loaded:
            for other in loaded.keys() - {"original"}:
                del loaded[other]
            loaded[name] = load(_saved(run, name))
        return loaded[name]

    def given() -> tuple[Model, Data]:
        if original is None or data is None:
            raise SlimlineError(f"{run.path} changed while it was read: resume it again.")
        return original, data

    say(0, "Saving the original")
    stage("original", lambda f: save(given()[0], f))
    say(1, f"Exporting the original to {target}")
    baseline, _ = stage("baseline", lambda f: found.lower(model_of("original"), f / f"model{found.suffix}"))

    last, records = "original", []
    for position, step in enumerate(recipe.steps):
        name = names[position + 2]
        say(2 + position, step.step)

        def work(folder: Path, name: str = name, step: Step = step, last: str = last, at: int = position) -> Any:
            key = _key(run, name)

            def decide(what: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
                return run.decide(f"{name}/{what}", choose, key)

            context = Context(
                model_of("original"),
                given()[1],
                target,
                recipe.seed,
                checkpoint=run.scratch(name, key),
                tell=tell,
                decide=decide,
                **_neighbours(recipe.steps, at),
            )
            done = perform(step, model_of(last), context)
            save(done.model, folder)
            return done.record

        _, record = stage(name, work)
        records.append(_checked_record(run, name, record))
        last = name

    say(total - 2, f"Exporting to {target}")
    small, _ = stage("artifact", lambda f: found.lower(model_of(last), f / f"model{found.suffix}"), target)
    model = f"model{_saved(run, last).suffix}"
    run.write(model, _saved(run, last).read_bytes())
    say(total - 1, "Measuring on the runtime")

    def report(folder: Path) -> None:
        before, after = (model_of("original"), baseline), (model_of(last), small)
        _report(run, folder, before, after, given()[1], records, _spoken_of(run, last, model), tell)

    folder, _ = stage("report", report)
    files = [Path(f).name for f in run.files_of("report")]
    for name in files:
        run.write(name, (folder / name).read_bytes())
    run.finish([RECIPE, model, *run.files_of("artifact"), *files])
    say(total, "Done")
    return run


class _StepRecord(BaseModel):
    """What the record of a step must be like for a report to be made of it."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: str
    refused: list[dict[Literal["what", "reason"], str]] = []
    float_layers: dict[str, str] = {}
    history: list[dict[str, Any]] = []
    plan: dict[str, Any] = {}


def _checked_record(run: Run, name: str, record: dict[str, Any]) -> dict[str, Any]:
    try:
        _StepRecord.model_validate(record)
    except ValidationError as e:
        raise SlimlineError(f"The journal of {run.path} is damaged at stage {name}: start a new run.") from e
    return record


def _spoken_of(run: Run, last: str, model: str) -> dict[str, str]:
    """SHA-256 of the files that a report speaks of, by path in the run."""
    recipe = hashlib.sha256(run.recipe.dump().encode()).hexdigest()
    (of_model,) = run.files_of(last).values()
    return {RECIPE: recipe, model: of_model, **run.files_of("artifact"), **run.files_of("baseline")}


def _report(
    run: Run,
    folder: Path,
    before: tuple[Model, Path],
    after: tuple[Model, Path],
    data: Data,
    records: Sequence[Mapping[str, Any]],
    files: Mapping[str, str],
    tell: Tell | None,
) -> None:
    """Measure, certify, and write ``report.json``, ``environment.json`` and ``report.html``."""
    from slimline.examine import examine
    from slimline.report import render

    report: Report = examine(run, before, after, data, records, tell).model_copy(update={"files": dict(files)})
    text = report.to_json()
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "environment.json").write_text(json.dumps(report.environment, indent=2) + "\n", "utf-8")
    render(json.loads(text), folder / "report.html")
