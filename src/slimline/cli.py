"""The command line: each command is a few lines over the library.

Nothing heavy is imported before a command needs it, so ``slimline --help`` is quick.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimline.basics.errors import SlimlineError
from slimline.report.console import Display, Log, PlainConsole, lenient

if TYPE_CHECKING:
    from slimline.measure.results import Report
    from slimline.model import Model
    from slimline.recipe import Recipe
    from slimline.report.printed import Printed
    from slimline.run.directory import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress a trained PyTorch, Keras or ONNX network for the runtime that serves it, and prove what was lost.",
)
recipes_app = typer.Typer(invoke_without_command=True, help="List the recipes that come with slimline, or show one.")
app.add_typer(recipes_app, name="recipes")
out, err = PlainConsole(), PlainConsole(stderr=True)


def _loud(verbose: bool) -> None:
    if verbose:
        logging.getLogger("slimline").setLevel(logging.DEBUG)


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A .pt2, .keras, .onnx or .slim file, or package.module:factory.")
]
DataName = Annotated[
    str,
    typer.Option("--data", "-d", help="An .npz, a folder of .npy, package.module:factory, digits or fashion-mnist."),
]
Weights = Annotated[str | None, typer.Option(help="A .safetensors file for the model that a factory returns.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Open a .pt or .pth pickle, which can run any code.")]
Code = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code", metavar="PACKAGE.MODULE:FUNCTION", help="Code a file names that may be run; may be repeated."
    ),
]
Shape = Annotated[str | None, typer.Option(help="Shape of one sample, such as 3,224,224, if the data gives none.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Batch size to measure at; may be repeated.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime that is measured.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of every random choice.")]
Target = Annotated[str | None, typer.Option("--target", "-t", help="One of slimline targets.")]
Example = Annotated[str | None, typer.Option("--data", "-d", help="Gives example inputs.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="auto, one of slimline recipes, or a YAML.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else, numbers not rounded.")]
Device = Annotated[
    str | None,
    typer.Option(help="Where training and calibration are computed: cuda, cuda:1, mps or cpu; else the best there is."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=_loud, help="Say more about what is done.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The run directory, new or empty.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command()
def demo(
    framework: Annotated[str, typer.Option(help="torch or keras.")] = "torch",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run directory.")] = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The whole job on real handwritten digits, without a download."""
    from slimline.demo import run_demo

    _check_device(device)
    with _aside(as_json), Display(err) as display:
        run = run_demo(framework, output, display, device)
    _show(run, as_json)


@app.command()
def compress(
    model: ModelName,
    data: DataName,
    output: Output,
    recipe: RecipeName = "auto",
    target: Target = None,
    max_drop: Annotated[float | None, typer.Option(help="Accuracy that may be lost; 0.01 is one point.")] = None,
    max_latency: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Part of the original's latency that may stay, or '5 ms'.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Part of the original's file that may stay, or '2 MB'.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Part of the original's peak memory, or '200 MB'.")
    ] = None,
    max_macs: Annotated[float | None, typer.Option(help="Part of the original's MACs that may stay.")] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the bound on the drop.")] = None,
    seed: Seed = None,
    batch: Batches = None,
    threads: Threads = None,
    weights: Weights = None,
    teacher: Annotated[str | None, typer.Option(help="What training learns from, as MODEL; else MODEL itself.")] = None,
    input_shape: Shape = None,
    device: Device = None,
    allow_pickle: Pickle = False,
    allow_code: Code = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compress MODEL within a budget, measure it on its runtime and certify the accuracy lost."""
    from slimline.recipe import Budget, load_recipe
    from slimline.recipe.named_code import as_names, names, refuse
    from slimline.run.sources import DataSource, ModelSource, load_pair
    from slimline.runtimes.base import runtime

    limits = {
        "max_drop": max_drop,
        "max_latency": max_latency,
        "max_size": max_size,
        "max_memory": max_memory,
        "max_macs": max_macs,
        "confidence": confidence,
    }

    def wished(trainable: bool = True) -> Recipe:
        return load_recipe(recipe, None, trainable, target=target, seed=seed, batch_sizes=batch, threads=threads)

    # What is wrong with the wishes is said before anything is loaded.
    _check_device(device)
    chosen = wished()
    allowed = as_names(allow_code or ())
    refuse([name for name in names(chosen.steps) if name not in allowed], f"The recipe {recipe}")
    overrides = {key: value for key, value in limits.items() if value is not None}
    budget = Budget.model_validate({**chosen.budget.model_dump(), **overrides})
    if chosen.target is not None:
        runtime(chosen.target)
    model_source = ModelSource(model, weights, _shape(input_shape), allow_pickle)
    data_source = DataSource(data, chosen.seed)
    teacher_source = None if teacher is None else ModelSource(teacher, None, _shape(input_shape), allow_pickle)
    sources = {"model": model_source.record(), "data": data_source.record()}
    sources |= {} if teacher_source is None else {"teacher": teacher_source.record()}
    with _aside(as_json):
        loaded, samples, tutor = load_pair(model_source, data_source, teacher_source)
    chosen = wished(samples.has("train"))

    from slimline.run.compress import compress as work
    from slimline.steps.base import handler_of

    for step in chosen.steps:
        for remark in handler_of(step).remarks(step, chosen.target or loaded.usual_target):
            err.say(remark)
    try:
        with _aside(as_json), Display(err) as display:
            run = work(
                loaded,
                samples,
                target=chosen.target,
                budget=budget,
                recipe=chosen,
                output=output,
                progress=display,
                command=["slimline", *sys.argv[1:]],
                sources=sources,
                teacher=tutor,
                allow_code=allowed,
                device=device,
            )
    except (KeyboardInterrupt, ValueError) as error:
        # pydantic wraps an interrupt that comes while it writes a recipe in an error of its own, a ValueError.
        if not isinstance(error, KeyboardInterrupt) and "KeyboardInterrupt" not in str(error):
            raise
        if output.is_dir():
            err.say(f"Stopped; go on with: slimline resume {shlex.quote(str(output))}")
        raise KeyboardInterrupt from error
    _show(run, as_json)


@app.command()
def resume(
    run: RunPath,
    device: Device = None,
    allow_code: Code = None,
    allow_pickle: Pickle = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a run that was stopped or killed; code that a run of somebody else names needs your word."""
    from slimline.run.compress import resume as work

    _check_device(device)
    allowed = tuple(allow_code or ())
    with _aside(as_json), Display(err) as display:
        resumed = work(run, progress=display, allow_code=allowed, allow_pickle=allow_pickle, device=device)
    _show(resumed, as_json)


@app.command()
def report(run: RunPath, as_json: Json = False) -> None:
    """Show what a run found, and where its report is."""
    from slimline.run.directory import Run

    _show(Run.open(run, lock=False), as_json)


@app.command()
def verify(run: RunPath, as_json: Json = False) -> None:
    """Compare every file of a finished run with the hash that the run noted of it."""
    from slimline.report.printed import listing
    from slimline.report.tables import Table
    from slimline.run.directory import Run

    opened = Run.open(run, lock=False)
    differing = opened.verify()
    if as_json:
        files = [{"file": name, "sha256": digest} for name, digest in opened.files.items()]
        differences = [{"file": each.path, "what": each.what} for each in differing]
        _print_json({**listing("files", files), "run": str(run), "sound": not differences, "differences": differences})
    if differing:
        sentences = "; ".join(map(str, differing))
        raise SlimlineError(
            f"{run} is not whole and sound: {sentences}; slimline resume {run} makes it again where it can."
        )
    if not as_json:
        rows = [(name, digest[:16]) for name, digest in opened.files.items()]
        out.print(Table("Files of the run", ("file", "SHA-256"), rows))
        out.print(f"All {len(opened.files)} files of {run} are as the run left them.", soft_wrap=True)


@app.command()
def inspect(
    model: ModelName,
    data: Example = None,
    target: Target = None,
    weights: Weights = None,
    input_shape: Shape = None,
    allow_pickle: Pickle = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Layers, parameters, MACs and units of MODEL: what can be done to each, what not, and why."""
    from slimline.run.inspection import inspect as work

    with _aside(as_json):
        _known(target)
        inspection = work(_model(model, data, weights, input_shape, allow_pickle), target)
    _print(inspection, as_json)


@app.command()
def plan(
    model: ModelName,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="For criteria that measure, as of slimline compress.")
    ] = None,
    recipe: RecipeName = "auto",
    target: Target = None,
    seed: Seed = None,
    weights: Weights = None,
    input_shape: Shape = None,
    allow_pickle: Pickle = False,
    allow_code: Code = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What each step of a recipe would do to MODEL, and how large it would be; nothing is trained or written."""
    from slimline.recipe import load_recipe
    from slimline.recipe.named_code import as_names, names, refuse
    from slimline.run.preview import preview
    from slimline.run.sources import DataSource, ModelSource, load_model, load_pair

    with _aside(as_json):
        chosen = load_recipe(recipe, None, target=target, seed=seed)
        allowed = as_names(allow_code or ())
        refuse([name for name in names(chosen.steps) if name not in allowed], f"The recipe {recipe}")
        _known(chosen.target)
        source = ModelSource(model, weights, _shape(input_shape), allow_pickle)
        if data is None:
            loaded, samples = load_model(source), None
        else:
            loaded, samples, _ = load_pair(source, DataSource(data, chosen.seed))
        wish = recipe if recipe == "auto" else chosen
        forecast = preview(loaded, wish, samples, target=target, seed=seed, allow_code=allowed)
    _print(forecast, as_json)


@app.command()
def export(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder, or a file with the target's suffix.")],
    target: Annotated[str, typer.Option("--target", "-t", help="One of slimline targets.")],
    data: Example = None,
    weights: Weights = None,
    input_shape: Shape = None,
    allow_pickle: Pickle = False,
    verbose: Verbose = False,
) -> None:
    """Write the artifact of MODEL that a runtime loads, if it answers as MODEL does."""
    from slimline.run.export import export as work

    _known(target)
    written = work(_model(model, data, weights, input_shape, allow_pickle), target, output)
    out.say(f"Artifact: {written}")


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .pt2, .keras or .onnx file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The archive, which ends in .slim.")],
    verbose: Verbose = False,
) -> None:
    """Write MODEL to an archive in which its weights are entropy-coded; every command takes that for MODEL."""
    from slimline.model.packing import pack as work

    out.say(f"Archive: {work(model, output)}")


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="A .slim file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder, or a file; else beside the archive.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write the model file that ARCHIVE holds, byte for byte as it was packed."""
    from slimline.model.packing import unpack as work

    out.say(f"Model: {work(archive, output)}")


@app.command()
def measure(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A file or folder that a target loads.")],
    data: DataName,
    against: Annotated[Path | None, typer.Option(help="The artifact to compare with.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Which runtime, where several load such files.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(min=0, max=1, help="Drop to certify.")] = None,
    batch: Batches = None,
    threads: Threads = None,
    seed: Seed = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Accuracy, size, latency and memory of an artifact on its runtime, alone or against another."""
    from slimline.run.measurement import measure as work
    from slimline.run.sources import DataSource

    with _aside(as_json), Display(err) as display:
        measurement = work(
            artifact,
            DataSource(data, seed or 0),
            against,
            target=target,
            batch_sizes=tuple(batch or (1, 32)),
            threads=threads or 1,
            max_drop=max_drop,
            progress=display,
        )
    _print(measurement, as_json)


@app.command()
def targets(as_json: Json = False) -> None:
    """List the runtimes that slimline compresses for, and what can be asked of each here."""
    from slimline.frameworks.base import frameworks
    from slimline.report.printed import listing
    from slimline.report.tables import Table
    from slimline.runtimes.base import ABILITIES, names, runtime
    from slimline.runtimes.forms import road

    with _aside(as_json):
        listed: list[dict[str, Any]] = []
        for each in map(runtime, names()):
            missing = each.available()
            can = [] if missing else [ability for ability in ABILITIES if ability in each.abilities]
            ways = {name: road(known.forms, each.forms) for name, known in frameworks().items()}
            by = {name: list(way) for name, way in ways.items() if way is not None}
            listed.append(
                {
                    "name": each.name,
                    "frameworks": list(by),
                    "suffix": each.suffix,
                    "description": each.description,
                    "missing": missing,
                    "forms": list(each.forms),
                    "roads": by,
                    "precisions": list(each.precisions),
                    "can": can,
                    "cannot": [ability for ability in ABILITIES if ability not in can],
                    "settings": each.settings(),
                }
            )
    if as_json:
        _print_json(listing("targets", listed))
        return
    rows = [
        (
            entry["name"],
            "; ".join(f"{framework} by {', '.join(way)}" for framework, way in entry["roads"].items()) or "none",
            f"{entry['description']} ({', '.join(entry['precisions'])})",
            entry["missing"] or "yes",
            _asked(entry["can"], entry["cannot"]) if not entry["missing"] else "nothing",
            ", ".join(word for words in entry["settings"].values() for word in words) or "none",
        )
        for entry in listed
    ]
    columns = ("target", "from", "what", "installed", "can be asked here", "settings")
    out.print(Table("Runtimes that slimline compresses for", columns, rows))
    out.say("A setting stands behind the name: --target onnxruntime:basic.")


@app.command()
def steps(as_json: Json = False) -> None:
    """List the steps that recipes are made of."""
    from slimline.recipe.registry import handlers
    from slimline.report.printed import listing
    from slimline.report.tables import Table

    with _aside(as_json):
        known = handlers()
    if as_json:
        entries = [
            {
                "name": name,
                "kind": each.config.kind,
                "summary": each.summary,
                "reads": [{"samples": role, "when": when} for role, when in each.reads],
            }
            for name, each in known.items()
        ]
        _print_json(listing("steps", entries))
        return
    rows = [(name, each.config.kind, each.summary, each.reading) for name, each in known.items()]
    out.print(Table("Steps that recipes are made of", ("step", "kind", "what it does", "samples it reads"), rows))


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes that come with slimline."""
    from slimline.recipe import presets
    from slimline.report.printed import listing
    from slimline.report.tables import Table

    if context.invoked_subcommand is not None:
        return
    if as_json:
        entries = [{"name": name, **each.model_dump(mode="json", by_alias=True)} for name, each in presets().items()]
        _print_json(listing("recipes", entries))
        return
    rows = [
        (name, " → ".join(step.step for step in recipe.steps), recipe.description) for name, recipe in presets().items()
    ]
    out.print(Table("Recipes that come with slimline", ("recipe", "steps", "what"), rows))


@recipes_app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name or YAML file.")]) -> None:
    """Print a recipe with every field in full."""
    from slimline.recipe import load_recipe

    sys.stdout.write(load_recipe(name).dump())


def _check_device(name: str | None) -> None:
    from slimline.frameworks.device import device_name

    if name is not None:
        device_name("--device", name)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise SlimlineError(f"--input-shape {text} is no shape: write numbers with commas, such as 3,224,224.")
    return tuple(int(size) for size in sizes)


def _asked(can: list[str], cannot: list[str]) -> str:
    """What a target does when asked, and what not, in words."""
    return ", ".join(can) + (f"; not: {', '.join(cannot)}" if cannot else "")


def _known(target: str | None) -> None:
    """Refuse a target that there is not, before anything is loaded."""
    from slimline.runtimes.base import runtime

    if target is not None:
        runtime(target)


def _model(name: str, data: str | None, weights: str | None, input_shape: str | None, allow_pickle: bool) -> Model:
    """MODEL, with example inputs from `data` where it needs them."""
    from slimline.run.sources import DataSource, ModelSource, load_data, load_model

    source = ModelSource(name, weights, _shape(input_shape), allow_pickle)
    return load_model(source, None if data is None else lambda layout: load_data(DataSource(data), layout))


@contextmanager
def _aside(as_json: bool) -> Iterator[None]:
    """Keep what others print, such as the user's own factory, off the standard output while JSON is made for it."""
    if as_json:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _print(result: Printed, as_json: bool) -> None:
    """A result as its tables and sentences, or as JSON."""
    if as_json:
        _print_json(result.summary())
        return
    for table in result.tables():
        out.print(table)
    for line in result.lines():
        out.say(line)


def _show(run: Run, as_json: bool) -> None:
    """The table, the report's path and what the certificate says; or the report as JSON."""
    from slimline.report.tables import summary_table

    report = run.report
    if as_json:
        _print_json(json.loads(report.to_json()))
        _met(report)
        return
    out.print(summary_table(report))
    for refused in report.refused:
        out.say(f"{refused.what}: {refused.reason}", "refused", "yellow")
    for notice in report.notices:
        out.say(f"{notice.what}: {notice.reason}", "notice", "cyan")
    for warning in report.warnings:
        out.say(warning, "warning", "bold yellow")
    out.say(report.verdict)
    for limit in report.limits:
        if limit.outcome != "missed":
            sure = limit.outcome == "met"
            out.say(limit.sentence(), "within budget" if sure else "unclear", "green" if sure else "yellow")
    out.say(f"Artifact: {run.artifact}")
    out.say(f"Report: {run.path / 'report.html'}")
    _met(report)


def _met(report: Report) -> None:
    """Refuse a result that is over its budget."""
    missed = list(report.unmet)
    if report.certificate is not None and report.certificate.verdict == "refuted":
        missed.append(f"the drop in {report.certificate.metric} is more than the budget")
    if missed:
        raise SlimlineError(f"The budget was not met: {'; '.join(missed)}; the artifact above is the best reached.")


def main() -> None:
    """Entry point: a mistake is one line and exit code 2."""
    lenient()
    logging.basicConfig(format="%(message)s", handlers=[Log(err)])
    warnings.simplefilter("ignore", FutureWarning)  # of the frameworks, about each other
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        app()
    except SlimlineError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'A file'} cannot be used: {e.strerror or e}."
    except MemoryError:
        message = "The memory is full: use a smaller batch or fewer samples."
    else:
        return
    err.say(message.replace("\n", " "), "slimline:", "red")
    sys.exit(2)
