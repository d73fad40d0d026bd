"""Roads from frameworks to runtimes, and the gate at their end: no artifact leaves that disagrees with its model.

`road` leads through the exchange forms from what an adapter gives to what a runtime takes. `lower` has the runtime
write the artifact in a folder beside its destination, loads it again, compares all that it answers with all that the
model answers, and only then puts it in its place. A new target is gated because it is a `Runtime`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError, first_line
from slimline.measure.integers import layer_name, stored_weights
from slimline.measure.parity import Parity, common_spread
from slimline.measure.probes import Arrays, probes
from slimline.methods.outputs import bare
from slimline.model.equality import answers_alike, finite_answers
from slimline.model.portions import batched_inputs
from slimline.runtimes import base as runtimes
from slimline.runtimes import forms
from slimline.runtimes.forms import Form

if TYPE_CHECKING:
    from slimline.methods.formats import Format
    from slimline.model import Model
    from slimline.runtimes.base import Runtime, Session

log = logging.getLogger(__name__)


def lower(runtime: Runtime, model: Model, path: Path, quick: bool = False) -> Parity | None:
    """Write the artifact of `model` to `path` if it computes what the model does; the worst parity that was met.

    A float artifact has to pass; an integer one is compared with its simulation, and what rounding may do to it is only
    logged. What cannot be run here is checked by `Runtime.verify`; None where nothing answers in its place.

    Parameters
    ----------
    quick : compare on the example and one random batch only: for artifacts that are timed and thrown away.

    Raises
    ------
    SlimlineError
        If they disagree; then nothing is at `path` that was not there before.
    """
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SlimlineError(
            f"Cannot write {path} ({error.strerror}): choose a place that can be written to."
        ) from error
    with folder:
        written = Path(folder.name, path.name)
        form = write(runtime, model, written)
        session = runtime.verify(form, written) if runtime.elsewhere else runtime.load(written)
        parity = None if session is None else compared(runtime, session, model, written, quick)
        for part in sorted(Path(folder.name).iterdir(), key=lambda part: part.name == path.name):  # the main file last
            _put(part, path.with_name(part.name))
    return parity


def write(runtime: Runtime, model: Model, path: Path) -> Form:
    """Write the artifact of `model` without comparing them: for artifacts that are compared later, or thrown away. The
    form that it was made of, as the runtime left it.

    Raises
    ------
    SlimlineError : there is no road, or a tensor is in a format that the runtime cannot write.
    """
    way = road(model.forms, runtime)
    _check_formats(runtime, model)
    quantization = model.quantization
    weights = quantization.weights if quantization is not None and quantization.stored else {}
    integer = quantization is not None and not weights
    content = model.adapter.form(model.native, way[0], model.example, integer, weights)
    stored = model.parameters() if weights else {}
    tensors = {name: stored[name] for name in weights}
    dynamic = quantization.dynamic if quantization is not None else ()
    form = Form(way[-1], forms.converted(content, way, weights), integer, weights, tensors, dynamic)
    runtime.lower(form, path)
    return form


def _check_formats(runtime: Runtime, model: Model) -> None:
    if model.quantization is None:
        return
    if model.quantization.stored:
        if model.quantization.layers:
            check_dynamic(runtime, model)
        for name, each in model.quantization.weights.items():
            check = check_multiplied if model.quantization.layers else check_stored
            check(runtime, each, f"the weight {_owned(name, model)}")
        check_marks(runtime, model)
        return
    sides = (("activation", model.quantization.activations), ("weight", model.quantization.weights))
    for side, formats in sides:
        for name, each in formats.items():
            if not runtime.can_write(each, side == "weight"):
                check_written(runtime, each, side == "weight", f"the {side} {_owned(name, model)}")


def check_written(runtime: Runtime, each: Format, stored: bool, what: str = "") -> None:
    """Refuse a target that cannot write a format, see `Runtime.can_write`; `what` names the tensor in the sentence."""
    if not runtime.can_write(each, stored):
        what = what or ("weights" if stored else "activations")
        others = [name for name in runtimes.names() if runtimes.runtime(name).can_write(each, stored)]
        instead = f"; choose the target {' or '.join(others)}, which can" if others else ""
        raise SlimlineError(
            f"{runtime.name} cannot write {what} as {each.describe()}: it takes {runtime.writes}{instead}."
        )


def _owned(name: str, model: Model) -> str:
    """The name of a tensor, with its layer."""
    graph = model.graph
    users = [n for n in graph.nodes if name in n.outputs or name in stored_weights(n, graph)]
    return f"{name} of layer {layer_name(users[0], graph)}" if users else name


def check_stored(runtime: Runtime, each: Format, what: str = "weights") -> None:
    """Refuse a target that cannot hold weights in a format while their layers compute in float; `what` names them in
    the sentence."""
    if runtime.can_store(each):
        return
    others = [name for name in runtimes.names() if runtimes.runtime(name).can_store(each)]
    stores = f"it stores {runtime.stores}" if runtime.stores else "it has no storage for weights alone"
    instead = f"choose the target {' or '.join(others)}, which can" if others else "choose another dtype"
    raise SlimlineError(f"{runtime.name} cannot store {what} as {each.describe()}: {stores}; {instead}.")


def check_multiplied(runtime: Runtime, each: Format, what: str = "weights") -> None:
    """Refuse a target that cannot have weights in a format beside ranges found at run time."""
    if not runtime.can_multiply(each):
        raise SlimlineError(
            f"{runtime.name} has no integers whose ranges are found at run time for {what} as {each.describe()}: "
            f"quantize the float model for {runtime.name}."
        )


def check_dynamic(runtime: Runtime, model: Model | None = None) -> None:
    """Refuse a target that makes no grids of activations when it runs, or makes others than `model` has."""
    if not runtime.dynamic:
        others = [name for name in runtimes.names() if runtimes.runtime(name).dynamic]
        instead = f", as {runtime.dynamic_instead}; or" if runtime.dynamic_instead else ":"
        raise SlimlineError(
            f"{runtime.name} is given no integers whose ranges are found at run time{instead} choose the target "
            f"{' or '.join(others)}, which has them, or StaticQuantization."
        )
    quantization = None if model is None else model.quantization
    if quantization is not None and quantization.dynamic and quantization.dynamic_grid != runtime.dynamic_grid:
        raise SlimlineError(
            f"{runtime.name} finds ranges at run time otherwise ({_words(runtime.dynamic_grid)}) than this model was "
            f"quantized for ({_words(quantization.dynamic_grid)}): quantize the float model for {runtime.name}."
        )


def _words(grid: str) -> str:
    return grid.replace("_", " ")


def check_marks(runtime: Runtime, model: Model) -> None:
    """Refuse a model whose framework has no form in which weights stand apart, so that codes could take their place,
    where the target needs one."""
    if runtime.marked_weights and not model.adapter.marks_weights:
        found = [name for name in runtimes.names() if not runtimes.runtime(name).marked_weights]
        raise SlimlineError(
            f"Models of this framework cannot be written with their weights alone as codes for {runtime.name}: choose "
            f"the target {' or '.join(found)}, export the model as ONNX and compress that file, or use "
            "StaticQuantization."
        )


def rounds(runtime: Runtime, model: Model) -> bool:
    """Whether the artifact of a model computes with rounded activations, so that it may differ from its simulation."""
    if runtime.rounds_reals:
        return True
    if model.quantization is None:
        return False
    if not model.quantization.stored or model.quantization.layers:
        return True
    return any(runtime.rounds_inputs(each) for each in model.quantization.weights.values())


def _put(part: Path, final: Path) -> None:
    if part.is_dir() and final.is_dir():
        shutil.rmtree(final)
    part.replace(final)


def road(offered: Sequence[str], runtime: Runtime) -> tuple[str, ...]:
    """The exchange forms through which a framework that gives some reaches a runtime: the first is the framework's, the
    last the runtime's.

    Raises
    ------
    SlimlineError : there is none.
    """
    way = forms.road(offered, runtime.forms)
    if way is not None:
        return way
    reached = [name for name in runtimes.names() if forms.road(offered, runtimes.runtime(name).forms)]
    raise SlimlineError(f"{runtime.name} does not take such models yet: choose the target {', '.join(reached)}.")


def check(runtime: Runtime, model: Model, path: Path, quick: bool = False) -> Parity:
    """The worst parity of an artifact and its model, see `compared`."""
    return compared(runtime, runtime.load(path), model, path, quick)


def compared(runtime: Runtime, session: Session, model: Model, path: Path, quick: bool = False) -> Parity:
    """The worst parity of a loaded artifact and its model, see `lower`; refuses a float artifact that disagrees, and an
    integer one that differs by more than rounding can make it."""
    integer = rounds(runtime, model)
    worst: Parity | None = None
    answers = [(what, *finite_answers(model, candidates)) for what, candidates in _inputs(runtime, model, path, quick)]
    answers = [each for each in answers if each[1]]
    spreads = [common_spread(outputs) for outputs in zip(*(references for _, references, _ in answers), strict=True)]
    for what, references, inputs in answers:
        known = bare(model.output_names, references)
        answered = _run(runtime, session, inputs, what)
        parity = answers_alike(model, inputs, references, answered, integer, known, spreads)
        if parity.gross:
            raise SlimlineError(
                f"The {runtime.name} artifact disagrees with the model on {what} ({parity.reason}), so it was not "
                "written: report this model to slimline."
            )
        if not parity.passed:
            log.log(
                logging.INFO if quick else logging.WARNING,
                "In integers the %s artifact differs from its simulation on %s by more than rounding explains: %s. "
                "Measure it on your own data (slimline.compress does).", runtime.name, what, parity.reason,
            )  # fmt: skip
        if worst is None or (parity.mean_error or 0.0) > (worst.mean_error or 0.0):
            worst = parity
    if worst is None:
        raise SlimlineError(
            "The model gives nothing finite for its example inputs, so that no artifact can be compared with it: "
            "load it with inputs that it was made for."
        )
    return worst


def _inputs(runtime: Runtime, model: Model, path: Path, quick: bool) -> Iterator[tuple[str, list[Arrays]]]:
    batched = batched_inputs(model)
    yield from probes(model.example, batched, quick)
    if model.adapter.free(model.native) == "sizes" and not quick:
        other = _longer(model.example, [shape for _, shape, _ in runtime.input_specs(path)], batched)
        if other is not None:
            yield "inputs of other sizes", [other]


def _longer(example: Arrays, shapes: Sequence[tuple[int | None, ...]], batched: Sequence[bool]) -> Arrays | None:
    """The example with one more along every free dimension but the batch; None where no other dimension is free."""
    longer = tuple(
        np.pad(x, [(0, int(size is None and not (axis == 0 and free))) for axis, size in enumerate(shape)], "wrap")
        if x.ndim
        else x
        for x, shape, free in zip(example, shapes, batched, strict=True)
    )
    same = all(a.shape == b.shape for a, b in zip(example, longer, strict=True))
    return None if same else longer


def _run(runtime: Runtime, session: Session, inputs: Arrays, what: str) -> tuple[np.ndarray, ...]:
    try:
        return session.outputs(inputs)
    except Exception as error:  # each runtime raises classes of its own
        raise SlimlineError(
            f"The {runtime.name} artifact does not run on {what}, as the model does ({first_line(error)[:200]}), so it "
            "was not written: report this model to slimline."
        ) from error
