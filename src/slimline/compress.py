"""The main job, readable from top to bottom: load, plan, apply, recover, lower, measure, certify, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from slimline import parted
from slimline.data import Data
from slimline.errors import SlimlineError, unknown
from slimline.frameworks.base import adapter, adapter_for
from slimline.journal import Run
from slimline.model import Model
from slimline.parted import PartedModel
from slimline.plans import plan
from slimline.precheck import check
from slimline.recipe import Budget, ChannelPruning, Distillation, Recipe, SparsePruning, Step, load_recipe
from slimline.recipe.recipe import check_order
from slimline.recovery import Progress
from slimline.runtimes.base import Runtime, runtime, usual
from slimline.runtimes.gate import lower
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
    progress: Tell | None = None,
) -> M:
    """A new model to which the steps were done, one after the other; `model` stays as it is.

    Parameters
    ----------
    data : needed by recovery, quantization and gradient criteria.
    target : the runtime that quantization is for; the framework's usual one by default.
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
    for position, step in enumerate(wanted):
        context = Context(
            original, data, target or usual(model.framework), seed, tell=progress, **_neighbours(wanted, position)
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

    Raises
    ------
    SlimlineError
        If the artifact does not answer as the model does, see `slimline.runtimes.gate`; then nothing is written.
    """
    found = _runtime(target, model)
    path = Path(output)
    if path.suffix != found.suffix:
        path = path / f"model{found.suffix}"
    with _folders(path.parent):
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
    progress: Tell | None = None,
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
    progress : called as the work goes on.
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
    from slimline.fit import fit

    fingerprint = samples.fingerprint()
    run = Run.create(Path(output), chosen, command=command, sources=sources, data=fingerprint)
    with run:
        run.recipe = fit(original, samples, chosen, progress)
        run.write("recipe.yaml", run.recipe.dump().encode())
        return _work(run, original, samples, progress)


def resume(path: str | Path, model: Any = None, data: Data | None = None, progress: Tell | None = None) -> Run:
    """Go on with a run that was stopped or killed; one that is finished is returned as it is.

    Parameters
    ----------
    model, data : needed where the run was started from Python with objects; else they are loaded again.
    """
    with Run.open(path) as run:
        if (run.path / "report.html").is_file() and run.done("report"):
            return run
        if model is not None:
            original = load(model, None if data is None else data.example())
        elif run.done("original"):
            original = load(_saved(run.path / "stages/original"))
        else:
            original = _again(run, "model")
        if data is None:
            data = _again(run, "data")(original.adapter.layout)
        samples = _fitting(original, data, run.recipe)
        run.check_data(samples.fingerprint())
        if not run.done("original"):
            from slimline.fit import fit

            run.recipe = fit(original, samples, run.recipe, progress)
            run.write("recipe.yaml", run.recipe.dump().encode())
        return _work(run, original, samples, progress)


def _again(run: Run, what: str) -> Any:
    from slimline.sources import load_again

    sources = run.created.get("sources") or {}
    if what not in sources:
        raise SlimlineError(
            f"{run.path} was started from Python: go on with slimline.resume({str(run.path)!r}, model, data)."
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


def _lower(target: Runtime, model: Model, path: Path) -> None:
    lower(target, model, path)


def _saved(folder: Path) -> Path:
    return next(f for f in sorted(folder.iterdir()) if f.stem == "model" and f.suffix in SUFFIXES)


def _work(run: Run, original: Model, data: Data, tell: Tell | None) -> Run:
    """All stages of a run; those that the journal knows are read back instead of done."""
    recipe, suffix = run.recipe, original.adapter.suffix
    assert recipe.target is not None
    found = _runtime(recipe.target, original)
    total = len(recipe.steps) + 4

    def say(done: int, what: str) -> None:
        if tell is not None:
            tell(Progress("Compressing", done, total, {"now": what}))

    def save(model: Model, folder: Path) -> None:
        model.save(folder / f"model{suffix}")

    say(0, "Saving the original")
    folder, _ = run.stage("original", lambda f: save(original, f))
    original = load(folder / f"model{suffix}")
    say(1, f"Exporting the original to {recipe.target}")
    baseline, _ = run.stage("baseline", lambda f: _lower(found, original, f / f"model{found.suffix}"))

    model, records = original, []
    for position, step in enumerate(recipe.steps):
        name = f"{position + 1:02d}-{step.step}"
        say(2 + position, step.step)
        current = model

        def work(folder: Path, name: str = name, step: Step = step, model: Model = current, at: int = position) -> Any:
            scratch = run.scratch(name)
            beside = _neighbours(recipe.steps, at)

            def decide(what: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
                return run.decide(f"{name}/{what}", choose)

            context = Context(
                original,
                data,
                str(recipe.target),
                recipe.seed,
                checkpoint=scratch,
                tell=tell,
                decide=decide,
                **beside,
            )
            done = perform(step, model, context)
            save(done.model, folder)
            return done.record

        folder, record = run.stage(name, work)
        records.append(record)
        model = load(folder / f"model{suffix}")

    say(total - 2, f"Exporting to {recipe.target}")
    small, _ = run.stage(
        "artifact", lambda f: _lower(found, model, f / f"model{found.suffix}"), place=str(recipe.target)
    )
    run.write(f"model{suffix}", (folder / f"model{suffix}").read_bytes())
    say(total - 1, "Measuring on the runtime")
    run.stage(
        "report",
        lambda f: _report(run, f, (original, baseline), (model, small), data, records, tell),
        place="stages/report",
    )
    for file in sorted((run.path / "stages/report").iterdir()):
        run.write(file.name, file.read_bytes())
    run.finish()
    say(total, "Done")
    return run


def _report(
    run: Run,
    folder: Path,
    before: tuple[Model, Path],
    after: tuple[Model, Path],
    data: Data,
    records: Sequence[Mapping[str, Any]],
    tell: Tell | None,
) -> None:
    """Measure, certify, and write ``report.json``, ``environment.json`` and ``report.html``."""
    import json

    from slimline.examine import examine
    from slimline.report import render

    report: Report = examine(run, before, after, data, records, tell)
    text = report.to_json()
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "environment.json").write_text(json.dumps(report.environment, indent=2) + "\n", "utf-8")
    render(json.loads(text), folder / "report.html")
