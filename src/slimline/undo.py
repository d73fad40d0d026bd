"""Quantization that has to pay: layers whose integers are slower or wrong go back to float.

Everything is decided on real artifacts, loaded and timed by the runtime itself. Because a clock decides, two
runs may decide differently; what was decided is in the recipe's record, and a run that goes on keeps it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimline.calibration import Ranges, calibrate
from slimline.measure.parity import compare
from slimline.model import Model
from slimline.recipe import StaticQuantization
from slimline.runtimes.base import runtime
from slimline.runtimes.gate import lower
from slimline.splits import first

if TYPE_CHECKING:
    from slimline.measure.parity import Parity
    from slimline.steps import Context

log = logging.getLogger(__name__)

CLEAR = 0.8  # of its float time that a layer may take in integers to be beyond doubt
TRIALS = 24  # artifacts of one comparison at most: beyond, layers are tried in runs of neighbours
GAIN = 1.03  # by which going back to float must speed the artifact up, with 95 % confidence
PARITY_ROWS = 256
BATCH = 32


def quantize_what_pays(model: Model, step: StaticQuantization, context: Context) -> tuple[Model, list[dict[str, str]]]:
    """The quantized model, and what was put back to float: ``{"what": layer, "reason": …}``.

    All of it goes back, and `model` itself is returned, where integers as a whole are slower than float or
    where no choice of layers passes the parity gate.
    """
    assert context.data is not None
    trial = _Trial(model, step, context.target, first(context.data.split("calibration"), step.samples, step.batch_size))
    if not step.undo:
        return trial.quantized({}), []
    with tempfile.TemporaryDirectory(prefix="slimline-undo-") as folder:
        trial.folder = Path(folder)
        back = trial.until_parity()
        if back is None:
            reason = f"no choice of layers passes the parity gate on {context.target} ({trial.last_parity.reason})"
            return model, [{"what": "StaticQuantization", "reason": reason}]
        back = trial.faster(back, context)
        slower = trial.slower_than_float(back, context)
        if slower:
            return model, [{"what": "StaticQuantization", "reason": slower}]
        return trial.quantized(back), [{"what": layer, "reason": reason} for layer, reason in back.items()]


class _Trial:
    """Artifacts of one model with different layers in float."""

    folder: Path
    last_parity: Parity

    def __init__(
        self, model: Model, step: StaticQuantization, target: str, batches: Sequence[tuple[np.ndarray, ...]]
    ) -> None:
        self.model, self.step, self.target, self.batches = model, step, target, batches
        self.runtime = runtime(target)
        self._ranges: Ranges = {}
        self._made: dict[tuple[str, ...], tuple[Model, Path]] = {}

    def quantized(self, back: Mapping[str, str]) -> Model:
        return calibrate(self.model, self.step, self.batches, self.target, back, self._ranges)

    def artifact(self, back: Mapping[str, str]) -> tuple[Model, Path]:
        key = tuple(sorted(back))
        if key not in self._made:
            made = self.quantized(back)
            path = self.folder / f"trial-{len(self._made)}{self.runtime.suffix}"
            self.runtime.lower(made, path)
            self._made[key] = made, path
        return self._made[key]

    def integer_layers(self, back: Mapping[str, str]) -> tuple[str, ...]:
        """Layers that compute in integers when those in `back` do not."""
        quantization = self.artifact(back)[0].quantization
        return quantization.layers if quantization is not None else ()

    def parity(self, back: Mapping[str, str]) -> Parity:
        rows = tuple(np.concatenate(parts)[:PARITY_ROWS] for parts in zip(*self.batches, strict=True))
        made, path = self.artifact(back)
        self.last_parity = compare(made.outputs(*rows), self.runtime.load(path).outputs(rows), integer=True)
        return self.last_parity

    def until_parity(self) -> dict[str, str] | None:
        """Layers to put back so that artifact and simulation agree: greedily the one that helps most."""
        back: dict[str, str] = {}
        found = self.parity(back)
        while not found.passed:
            layers = self.integer_layers(back)
            groups = [g for g in _runs(layers) if set(g) != set(layers)]
            if not groups:
                return None
            tried = [(self.parity({**back, **dict.fromkeys(g, "")}), g) for g in groups]
            best, chosen = min(tried, key=lambda t: t[0].mean_error if t[0].mean_error is not None else np.inf)
            reason = f"in integers the artifact disagreed with its simulation: {found.reason}"
            back |= dict.fromkeys(chosen, reason)
            found = best
        self.last_parity = found
        return back

    def faster(self, back: dict[str, str], context: Context) -> dict[str, str]:
        """Put back every layer (or run of neighbours) without whose integers the artifact is faster."""
        from slimline.measure import measure_latency, speedup

        base = self.artifact(back)
        layers = self.integer_layers(back)
        trials: dict[str, tuple[str, ...]] = {}
        paths = {"base": base[1]}
        for group in _runs(self.suspects(back)):
            if len(group) < len(layers):
                name = f"without {', '.join(group)}"
                trials[name] = group
                paths[name] = self.artifact({**back, **dict.fromkeys(group, "")})[1]
        if not trials:
            return back
        times = measure_latency(paths, self.batches[0], (BATCH,), 1, 0.15, 15, context.seed)
        gains = {name: speedup(times["base"][BATCH], times[name][BATCH], seed=context.seed) for name in trials}
        better = {name: gain for name, gain in gains.items() if gain.low > GAIN}
        if not better:
            return back
        best = max(better, key=lambda n: better[n].ratio)
        choices = {
            "all": {layer for name in better for layer in trials[name]},
            "best": set(trials[best]),
        }
        made = {
            name: {**back, **dict.fromkeys(sorted(picked), "its integers made the artifact slower")}
            for name, picked in choices.items()
        }
        paths = {"base": base[1], **{name: self.artifact(b)[1] for name, b in made.items()}}
        times = measure_latency(paths, self.batches[0], (BATCH,), 1, 0.5, 30, context.seed)
        final = {name: speedup(times["base"][BATCH], times[name][BATCH], seed=context.seed) for name in made}
        winner = max(final, key=lambda n: final[n].ratio)
        if final[winner].low <= 1 or not self.parity(made[winner]).passed:
            return back
        log.info("back to float: %s, %.2f times faster", ", ".join(made[winner]), final[winner].ratio)
        return made[winner]

    def suspects(self, back: Mapping[str, str]) -> list[str]:
        """Integer layers that the runtime's own profile does not show to be clearly faster than in float.

        A profile is no proof, as it leaves out what conversions cost elsewhere, but it spares the trial of layers
        that gain without doubt. Where the runtime has none, every layer is tried.
        """
        layers = self.integer_layers(back)
        integer = self.runtime.profile(self.artifact(back)[1], self.batches[0])
        float_ = self.runtime.profile(self.float_artifact(), self.batches[0])
        return [x for x in layers if _spent(x, integer) >= CLEAR * _spent(x, float_) or not _spent(x, integer)]

    def float_artifact(self) -> Path:
        """The artifact of the model before quantization."""
        path = self.folder / f"float{self.runtime.suffix}"
        if not path.exists():
            lower(self.runtime, self.model, path, quick=True)
        return path

    def slower_than_float(self, back: Mapping[str, str], context: Context) -> str:
        """Why integers do not pay at all, or ''."""
        from slimline.measure import measure_latency, speedup

        paths = {"float": self.float_artifact(), "integer": self.artifact(back)[1]}
        times = measure_latency(paths, self.batches[0], (BATCH,), 1, 0.5, 30, context.seed)
        gain = speedup(times["float"][BATCH], times["integer"][BATCH], seed=context.seed)
        if gain.high >= 1:
            return ""
        return f"in integers the artifact takes {1 / gain.ratio:.2f} times as long as in float on {self.target}"


def _runs(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Layers one by one, or where there are many in runs of neighbours."""
    length = max(1, -(-len(layers) // TRIALS))
    return [tuple(layers[i : i + length]) for i in range(0, len(layers), length)]


def _spent(layer: str, profile: Mapping[str, float]) -> float:
    """Milliseconds of the operators that are named after a layer, whatever the runtime appended."""
    return sum(
        ms for name, ms in profile.items() if name.startswith(layer) and not name[len(layer) : len(layer) + 1].isalnum()
    )
