"""The stages of a run: what each gives, from what, and under which key it stands."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.frameworks.base import written
from slimline.model import Model
from slimline.model.lowering import lower
from slimline.recipe import Recipe
from slimline.run.directory import Run, versions
from slimline.run.journal import fingerprint
from slimline.run.layout import RECIPE
from slimline.runtimes.base import runtime
from slimline.search.attempts import Attempt, Outcome, Selection, search
from slimline.search.fit import decided, stage_name
from slimline.search.ladder import ladder
from slimline.steps.base import Context, Tell, handler_of, neighbours, perform
from slimline.training.teacher import fingerprint as of_weights

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.measure.limits import Cost
    from slimline.measure.results import Report

Teacher = Callable[[], Model | None]


def names(recipe: Recipe) -> list[str]:
    """The names of the stages of a run that tries one strength, in their order."""
    steps = [stage_name(position, step.step) for position, step in enumerate(recipe.steps)]
    return ["original", "baseline", *steps, "artifact", "report"]


def original_key(run: Run) -> str:
    """Of the first stage."""
    return fingerprint(run.created.get("model"))


def teaches(run: Run) -> bool:
    """Whether training learns from another model than the one that is compressed."""
    return run.created.get("teacher") is not None


def teacher_key(run: Run) -> str:
    """Of the stage that keeps it."""
    return fingerprint(["teacher", run.created.get("teacher")])


def due(run: Run) -> tuple[str, str]:
    """The first stage that is to be done, or done again, and why; '' where none is.

    Of a run that tries several strengths that cannot be told before its model is there.
    """
    if teaches(run) and (why := run.due("teacher", teacher_key(run))):
        return "teacher", why
    if searches(run.wish):
        return "original", run.due("original", original_key(run)) or "several strengths are tried"
    last = "original"
    recipe = run.recipe
    for position, name in enumerate(names(recipe)):
        if name == "original":
            key = original_key(run)
        elif name in ("baseline", "artifact"):
            key = lowered_key(run, "original" if name == "baseline" else last)
        elif name == "report":
            key = _report_key(run, names(recipe)[:-1])
        else:
            key = _step_key(run, recipe, position - 2, last)
            last = name
        if why := run.due(name, key):
            return name, why
    return "", ""


def searches(recipe: Recipe) -> bool:
    """Whether several strengths may have to be tried."""
    return len(ladder(recipe)) > 1 and recipe.budget.max_drop is not None


def lowered_key(run: Run, stage: str) -> str:
    """Of the artifact of what `stage` left. Versions of packages count where models are lowered and measured, which is
    quick, and not for what was trained."""
    return fingerprint([run.digest(stage), run.wish.target, versions()])


def _step_key(run: Run, recipe: Recipe, position: int, last: str) -> str:
    step = recipe.steps[position]
    others = [other and other.model_dump(mode="json") for other in neighbours(recipe.steps, position)]
    before = [run.digest("original"), run.digest(last), str(run.created.get("data"))]
    if teaches(run):
        before.append(run.digest("teacher"))
    timed = [list(recipe.batch_sizes), recipe.threads] if step.kind == "quantization" else None
    return fingerprint([step.model_dump(mode="json"), others, recipe.seed, recipe.target, timed, before])


def _report_key(run: Run, stages: Sequence[str]) -> str:
    digests = [run.digest(stage) for stage in stages]
    return fingerprint([digests, run.recipe.dump(), run.created.get("data"), versions()])


def saved(run: Run, stage: str) -> Path:
    """The model that a stage has left, which has just been compared with its hash."""
    files = [f for f in run.files_of(stage) if Path(f).stem == "model" and Path(f).suffix in written()]
    if len(files) != 1:
        raise SlimlineError(f"Stage {stage} of {run.path} holds no model: start a new run in another directory.")
    return run.path / files[0]


def work(run: Run, original: Model | None, data: Data | None, tell: Tell | None, teacher: Teacher | None = None) -> Run:
    """All stages of a run; those that stand as the journal says are not done again, and read back where needed.

    `teacher` gives what training learns from, where that is not the original; it is asked if no stage has kept it yet.
    Without `original` and `data`, which a run has none of whose stages is due, only what comes after them is done.
    """
    return _Pipeline(run, original, data, tell, teacher).work()


class _Pipeline:
    def __init__(
        self, run: Run, original: Model | None, data: Data | None, tell: Tell | None, teacher: Teacher | None
    ) -> None:
        self.run, self.tell, self.give = run, tell, teacher
        self._original, self._data = original, data
        self.wish = run.wish
        self.target = str(self.wish.target)
        self.runtime = runtime(self.target)
        self.total = len(self.wish.steps) + 4
        self.searches = searches(self.wish)
        self._loaded: dict[str, Model] = {}

    def say(self, done: int, what: str) -> None:
        if self.tell is not None:
            self.tell(Progress("Compressing", done, self.total, {"now": what}))

    @property
    def original(self) -> Model:
        """The model that the user gave."""
        if self._original is None:
            raise SlimlineError(f"{self.run.path} changed while it was read: resume it again.")
        return self._original

    @property
    def data(self) -> Data:
        """The samples."""
        if self._data is None:
            raise SlimlineError(f"{self.run.path} changed while it was read: resume it again.")
        return self._data

    def model_of(self, stage: str) -> Model:
        """The model that a stage has left, read back from disk: the same bytes after a kill and without one."""
        from slimline.model.loading import load

        if stage not in self._loaded:
            for other in self._loaded.keys() - {"original", "teacher"}:
                del self._loaded[other]
            self._loaded[stage] = load(saved(self.run, stage))
        return self._loaded[stage]

    def decide(self, name: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is decided once for the recipe that the user gave."""
        return self.run.decide(name, choose, self.run.base)

    def save(self, model: Model, folder: Path) -> None:
        model.save(folder / f"model{model.adapter.suffix}")

    @property
    def teacher(self) -> Model | None:
        """What training learns from."""
        return self.model_of("teacher") if teaches(self.run) else self.model_of("original").uncompressed

    def keep_teacher(self, folder: Path) -> None:
        """Save the teacher, if it is the one that the run was started with."""
        teacher = None if self.give is None else self.give()
        self.run.check("teacher", "" if teacher is None else of_weights(teacher))
        assert teacher is not None
        self.save(teacher, folder)

    def lower(self, stage: str, folder: Path) -> None:
        lower(self.runtime, self.model_of(stage), folder / f"model{self.runtime.suffix}")

    def work(self) -> Run:
        run, wish = self.run, self.wish
        rungs = ladder(wish)
        start = min(1, len(rungs) - 1)
        fitted = run.timed(
            "fit", lambda: decided(self.decide, rungs, start, lambda: (self.original, self.data), wish, self.tell)
        )
        self.say(0, "Saving the original")
        if teaches(run):
            run.stage("teacher", self.keep_teacher, key=teacher_key(run))
        run.stage("original", lambda f: self.save(self.original, f), key=original_key(run))
        self.say(1, f"Exporting the original to {self.target}")
        baseline, _ = run.stage("baseline", lambda f: self.lower("original", f), key=lowered_key(run, "original"))
        baseline_file = baseline / f"model{self.runtime.suffix}"
        selection = Selection(lambda: self.data, wish, baseline_file, lambda: self.original.output_names)
        ended = search(
            rungs,
            start,
            fitted,
            wish.budget,
            self.attempt,
            lambda tried: self.judged(tried, selection),
            lambda rung: self.shapes(rung.recipe),
            self.decide,
        )
        recipe = self.begin(ended.attempt.rung.recipe)
        last, records, small = ended.result
        stages = self.stages_of(ended.attempt, recipe)
        if self.searches:
            tried = small
            small, _ = run.stage("artifact", lambda f: _copied(tried, f), self.target, lowered_key(run, last))
        model = f"model{saved(run, last).suffix}"
        run.write(model, saved(run, last).read_bytes())
        self.say(self.total - 1, "Measuring on the runtime")

        def report(folder: Path) -> None:
            before, after = (self.model_of("original"), baseline), (self.model_of(last), small)
            _report(run, folder, before, after, self.data, records, _spoken_of(run, last, model), self.tell, ended)

        folder, _ = run.stage("report", report, key=_report_key(run, ["original", "baseline", *stages, "artifact"]))
        files = [Path(f).name for f in run.files_of("report")]
        for name in files:
            run.write(name, (folder / name).read_bytes())
        run.finish([RECIPE, model, *run.files_of("artifact"), *files])
        self.say(self.total, "Done")
        return run

    def begin(self, recipe: Recipe) -> Recipe:
        """Let ``recipe.yaml`` say what is being done."""
        if self.run.recipe != recipe:
            self.run.adopt(recipe)
        return recipe

    def stages_of(self, tried: Attempt, recipe: Recipe) -> list[str]:
        """Names of the stages of an attempt's steps."""
        return [f"{tried.prefix}{stage_name(position, step.step)}" for position, step in enumerate(recipe.steps)]

    def attempt(self, tried: Attempt) -> tuple[str, list[dict[str, Any]], Path]:
        """The stage that left the model, the records of its steps, and the folder of the artifact."""
        run = self.run
        recipe = self.begin(tried.rung.recipe)
        last, records = "original", []
        for position, (name, step) in enumerate(zip(self.stages_of(tried, recipe), recipe.steps, strict=True)):
            self.say(2 + position, f"{step.step} ({tried.rung.name})" if self.searches else step.step)
            key = _step_key(run, recipe, position, last)
            _, record = run.stage(
                name,
                lambda f, a=(tried, recipe, position, name, last, key): self.perform(f, *a),  # type: ignore[misc]
                key=key,
            )
            records.append(_checked_record(run, name, record))
            last = name
        self.say(self.total - 2, f"Exporting to {self.target}")
        written, _ = run.stage(
            f"{tried.prefix}tried-artifact" if self.searches else "artifact",
            lambda f: self.lower(last, f),
            None if self.searches else self.target,
            lowered_key(run, last),
        )
        return last, records, written

    def perform(
        self, folder: Path, tried: Attempt, recipe: Recipe, position: int, name: str, last: str, key: str
    ) -> dict[str, Any]:
        """Do a step; its record."""
        step = recipe.steps[position]

        def decide(what: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            known = tried.decisions.get(f"{stage_name(position, step.step)}/{what}")
            return self.run.decide(f"{name}/{what}", choose if known is None else lambda: known, key)

        context = Context(
            self.teacher,
            self.data,
            self.target,
            recipe.seed,
            *neighbours(recipe.steps, position),
            checkpoint=self.run.scratch(name, key),
            tell=self.tell,
            decide=decide,
            batch_sizes=recipe.batch_sizes,
            threads=recipe.threads,
        )
        outcome = perform(step, self.model_of(last), context)
        self.save(outcome.model, folder)
        return outcome.record

    def judged(self, tried: tuple[str, list[dict[str, Any]], Path], selection: Selection) -> tuple[Cost, float | None]:
        """What an attempt costs, as far as that needs no clock, and what it loses on the selection samples."""
        from slimline.graph import cost
        from slimline.measure import Cost, Part, file_bytes

        last, _, folder = tried
        artifact = folder / f"model{self.runtime.suffix}"
        size = Part.exact(file_bytes(artifact), file_bytes(selection.baseline), "B")
        macs = Part.exact(cost.macs(self.model_of(last).graph), cost.macs(self.model_of("original").graph))
        return Cost(size=size, macs=macs), selection.drop(artifact)

    def shapes(self, recipe: Recipe) -> str:
        """The same text for recipes that lead to networks of the same shapes; nothing is trained."""
        model = self.original
        for step in recipe.steps:
            rehearsed = handler_of(step).rehearsal(step) if step.kind == "structural" else None
            if rehearsed is not None:
                model = perform(rehearsed, model, Context(self.original, self.data, self.target, recipe.seed)).model
        graph = model.graph
        quantized = sum(step.kind == "quantization" for step in recipe.steps)
        sizes = [(name, graph.values[name].shape) for name in sorted(graph.trainable)]
        return hashlib.sha256(repr((quantized, sizes)).encode()).hexdigest()


def _copied(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


class _StepRecord(BaseModel):
    """What the record of a step must be like for a report to be made of it."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: str
    refused: list[dict[Literal["what", "reason"], str]] = []
    float_layers: dict[str, str] = {}
    history: list[dict[str, Any]] = []
    plan: dict[str, Any] = {}
    notes: list[str] = []


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
    ended: Outcome[Any],
) -> None:
    """Measure, certify, and write ``report.json``, ``environment.json`` and ``report.html``."""
    from slimline.report.page import render
    from slimline.run.examine import examine

    report: Report = examine(run, before, after, data, records, tell, ended.trials, ended.conflict)
    report = report.model_copy(update={"files": dict(files)})
    text = report.to_json()
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "environment.json").write_text(json.dumps(report.environment, indent=2) + "\n", "utf-8")
    render(json.loads(text), folder / "report.html")
