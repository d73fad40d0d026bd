"""What the benchmarks share: data, a cache of artifacts, measurement side by side, and the tables they leave behind."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import slimline as sl
from slimline.data.proof import Proof
from slimline.measure import environment, file_bytes, measure_latency, outputs, score, speedup
from slimline.measure.figures import Latency

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights/fashion_resnet.safetensors"
CACHE = HERE / ".cache"
FASHION = Path("/usr/share/datasets/fashion-mnist")
PEERS = Path(os.environ.get("PEERS", "/tmp/peers"))
MAX_DROP = 0.01

log = logging.getLogger("benchmark")


@dataclass(frozen=True)
class Row:
    """One artifact at one batch size; None is "not measured". `speedup` and `size_ratio` are against the original,
    `output_error` is the part of the variance of its outputs that is lost."""

    case: str
    tool: str
    recipe: str
    target: str | None = None
    batch: int | None = None
    threads: int | None = None
    accuracy: float | None = None
    drop: float | None = None
    bound: float | None = None
    median_ms: float | None = None
    speedup: float | None = None
    file_bytes: int | None = None
    size_ratio: float | None = None
    seconds_to_compress: float | None = None
    samples_ms: tuple[float, ...] | None = None
    peak_memory_ratio: float | None = None
    agreement: float | None = None
    output_error: float | None = None
    peak_bytes: int | None = None
    cpu_seconds: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Entry:
    """An artifact to be measured, and how it came to be: in how many seconds, and where it was trained."""

    tool: str
    recipe: str
    artifact: Path
    seconds: float | None = None
    device: str | None = None

    @property
    def name(self) -> str:
        return f"{self.tool}: {self.recipe}"


def options(
    description: str | None, only: Sequence[str] = (), more: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """``--quick``, ``--fresh`` and, where there are such, the ``names`` of what alone is to run; `more` switches with
    their help; logging is set up."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test on few samples; results go to .cache/quick")
    parser.add_argument("--fresh", action="store_true", help="make every artifact anew")
    for switch, says in (more or {}).items():
        parser.add_argument(switch, action="store_true", help=says)
    if only:
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(only)}")
    logging.basicConfig(level=logging.WARNING, format="%(relativeCreated)8d ms  %(message)s")
    for name in ("benchmark", "slimline"):
        logging.getLogger(name).setLevel(logging.INFO)
    return parser.parse_args()


def fashion(channels_last: bool, quick: bool, augmented: bool = True) -> sl.Data:
    """Fashion-MNIST in [0, 1]; `augmented` training images are mirrored and shifted by up to two pixels.

    Test images that are training images too are left out.
    """
    x, y, xt, yt = (
        _read_idx(FASHION / f"{name}-ubyte.gz")
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    if quick:
        x, y, xt, yt = x[:4000], y[:4000], xt[:1000], yt[:1000]
    axis = -1 if channels_last else 1
    train, test = (np.expand_dims(images.astype(np.float32) / 255, axis) for images in (x, xt))
    augment = _augment(axis) if augmented else None
    return sl.Data(train=(train, y), test=(test, yt), augment=augment, overlap="drop", classes=10)


def _read_idx(path: Path) -> np.ndarray:
    if not path.exists():
        sys.exit(f"There is no {path}: run apt-get install dataset-fashion-mnist.")
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _augment(axis: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x = np.squeeze(images, axis)
        n, height, width = x.shape
        x = np.where(rng.random(n)[:, None, None] < 0.5, x[:, :, ::-1], x)
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))
        rows = (rng.integers(0, 5, n)[:, None] + np.arange(height))[:, :, None]
        columns = (rng.integers(0, 5, n)[:, None] + np.arange(width))[:, None, :]
        return np.expand_dims(x[np.arange(n)[:, None, None], rows, columns], axis)

    return augment


def peer(module: str, package: str) -> Any:
    """A competing package from `PEERS`, so that it never enters the project's environment."""
    if not (PEERS / module).is_dir():
        sys.exit(f"{package} is not installed: run pip install --no-deps --target {PEERS} {package}.")
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    return __import__(module)


class Cost:
    """What the work of a process costs, from now on: wall time, and processor time of it and of those that it started;
    and the most that it ever had resident."""

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), sum(os.times()[:4])

    def facts(self) -> dict[str, Any]:
        """Fields of `Row`; ``peak_bytes`` is None where there is no /proc."""
        status = Path("/proc/self/status")  # ru_maxrss would begin with what the parent had
        lines = status.read_text().splitlines() if status.exists() else []
        peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return {
            "seconds_to_compress": time.perf_counter() - self._start,
            "cpu_seconds": sum(os.times()[:4]) - self._before,
            "peak_bytes": peak[0] if peak else None,
        }


def cached(
    tool: str, recipe: str, suffix: str, config: Mapping[str, Any], make: Callable[[Path, Path], None], fresh: bool
) -> Entry:
    """The artifact that ``make(artifact, folder)`` wrote, made only if none of this `config` is there.

    The key covers the weights that are compressed and, for slimline itself, its source: a changed slimline is
    never represented by an old artifact.
    """
    facts = json.dumps([tool, recipe, suffix, config], sort_keys=True, default=str).encode() + WEIGHTS.read_bytes()
    if tool == "slimline":
        facts += b"".join(p.read_bytes() for p in sorted(Path(sl.__file__).parent.rglob("*.py")))
    label = "".join(c if c.isalnum() else "-" for c in f"{tool}-{recipe}")
    folder = CACHE / f"{label}-{hashlib.sha256(facts).hexdigest()[:12]}"
    artifact, record = folder / f"model{suffix}", folder / "seconds.json"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if not record.exists():
        whole = not folder.exists()  # else it was killed, and what is left of the work is not its time
        folder.mkdir(parents=True, exist_ok=True)
        log.info("making %s: %s", tool, recipe)
        start = time.perf_counter()
        make(artifact, folder)
        record.write_text(json.dumps(time.perf_counter() - start if whole else None))
    return Entry(tool, recipe, artifact, json.loads(record.read_text()))


def slimline_entry(
    model: sl.Model,
    data: sl.Data,
    target: str,
    suffix: str,
    name: str,
    steps: Sequence[Any],
    quick: bool,
    fresh: bool,
    seed: int = 0,
) -> Entry:
    """The artifact of ``sl.compress``, with the time of the whole job: its own measurements included."""

    def make(artifact: Path, folder: Path) -> None:
        output, budget = folder / "run", sl.Budget(max_drop=MAX_DROP)
        if output.exists():
            run = sl.resume(output, model, data)
        else:
            run = sl.compress(model, data, target=target, budget=budget, recipe=list(steps), output=output, seed=seed)
        shutil.copy(run.artifact, artifact)

    config = {"steps": [step.model_dump(mode="json") for step in steps], "quick": quick, "seed": seed}
    return cached("slimline", name, suffix, config, make, fresh)


def compare(
    case: str,
    target: str,
    original: Entry,
    candidates: Sequence[Entry],
    data: sl.Data,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    quick: bool = False,
) -> list[Row]:
    """Every artifact timed in the same interleaved rounds, and certified on the same test images."""
    entries = [original, *candidates]
    test = data.split("certification")
    assert test.labels is not None
    scores = {}
    for entry in entries:
        log.info("accuracy of %s", entry.name)
        _, scores[entry.name] = score(outputs(entry.artifact, test.inputs, 100, threads), test.labels)
    log.info("latency of %d artifacts", len(entries))
    seconds, fewest = (0.1, 5) if quick else (4.0, 60)
    artifacts = {entry.name: entry.artifact for entry in entries}
    times = measure_latency(artifacts, test.inputs, batches, threads, seconds, fewest)
    proof = data.proof()
    return [
        _row(case, target, entry, original, proof, scores, times, batch, threads)
        for batch in batches
        for entry in entries
    ]


def _row(
    case: str,
    target: str,
    entry: Entry,
    original: Entry,
    proof: Proof,
    scores: Mapping[str, np.ndarray],
    times: Mapping[str, Mapping[int, Latency]],
    batch: int,
    threads: int,
) -> Row:
    before, after = times[original.name][batch], times[entry.name][batch]
    certificate = proof.certify(
        scores[original.name], scores[entry.name], MAX_DROP, metric="accuracy", score_range="known"
    )
    itself = entry is original
    return Row(
        case=case,
        tool=entry.tool,
        recipe=entry.recipe,
        target=target,
        batch=batch,
        threads=threads,
        accuracy=float(scores[entry.name].mean()),
        drop=None if itself else certificate.observed_drop,
        bound=None if itself else certificate.bound,
        median_ms=after.median_ms,
        speedup=1.0 if itself else speedup(before, after).ratio,
        file_bytes=file_bytes(entry.artifact),
        size_ratio=file_bytes(original.artifact) / file_bytes(entry.artifact),
        seconds_to_compress=entry.seconds,
        device=entry.device,
        samples_ms=after.samples_ms,
    )


def write(name: str, rows: Sequence[Row], quick: bool = False, threads: int = 1) -> Path:
    """``NAME.json`` and the same as ``NAME.md``, in ``benchmarks/results`` (a quick run's in the cache)."""
    folder = CACHE / "quick" if quick else HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    about = environment(threads)
    content = {"environment": about, "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    page = folder / f"{name}.md"
    page.write_text(markdown(name, rows, about))
    log.info("wrote %s", page)
    return page


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tool": ("tool", str),
    "recipe": ("recipe", str),
    "accuracy": ("accuracy", lambda v: f"{100 * v:.2f} %"),
    "perplexity": ("perplexity", lambda v: f"{v:.2f}"),
    "agreement": ("agreement", lambda v: f"{100 * v:.2f} %"),
    "output_error": ("of the outputs lost", lambda v: f"{100 * v:.2f} %"),
    "drop": ("drop, points", lambda v: f"{100 * v:.2f}"),
    "bound": ("at most (95 %)", lambda v: f"{100 * v:.2f}"),
    "median_ms": ("median", lambda v: f"{v:.3f} ms"),
    "tokens_per_second": ("tokens a second", lambda v: f"{v:,.0f}"),
    "speedup": ("faster", lambda v: f"{v:.2f}×"),
    "file_bytes": ("file", lambda v: f"{v / 1000:,.0f} kB"),
    "size_ratio": ("smaller", lambda v: f"{v:.1f}×"),
    "peak_memory_ratio": ("peak memory / model", lambda v: f"{v:.2f}"),
    "seconds_to_compress": ("compressed in", lambda v: f"{v:.0f} s"),
    "device": ("trained on", str),
    "cpu_seconds": ("processor time", lambda v: f"{v:.0f} s"),
    "peak_bytes": ("peak memory of the work", lambda v: f"{v / 1e6:,.0f} MB"),
}


def markdown(name: str, rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """One table per case and batch size; a quantity that was not measured is a dash."""
    packages = ", ".join(f"{k} {v}" for k, v in about["packages"].items())
    flags = ", ".join(about["cpu_flags"])
    parts = [
        f"# {name}\n",
        f"{about['cpu']} ({flags}), {about['cores']} cores, Python {about['python']}; {packages}.\n",
    ]
    for case, target, batch, threads in dict.fromkeys((r.case, r.target, r.batch, r.threads) for r in rows):
        group = [r for r in rows if (r.case, r.target, r.batch, r.threads) == (case, target, batch, threads)]
        used = {key: form for key, form in _COLUMNS.items() if any(getattr(r, key) is not None for r in group)}
        labels = [case, target, batch and f"batch {batch}", threads and f"{threads} thread{'s' * (threads > 1)}"]
        parts.append(f"## {', '.join(part for part in labels if part)}\n")
        lines = [[title for title, _ in used.values()], ["---"] * len(used)]
        for row in group:
            values = [(getattr(row, key), form) for key, (_, form) in used.items()]
            lines.append(["–" if value is None else form(value) for value, form in values])
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
        parts += _verdicts(group)
    return "\n".join(parts)


def _as_fast(ours: Row, peer: Row) -> bool:
    before, after = (Latency.of(row.samples_ms or ()) for row in (peer, ours))
    return speedup(before, after).high >= 1


def _quality(row: Row) -> float | None:
    return row.agreement if row.accuracy is None else row.accuracy


def _verdicts(group: Sequence[Row]) -> list[str]:
    """For each peer, whether a slimline artifact is as accurate and, as far as the samples tell (95 %), as fast."""
    ours = [r for r in group if r.tool == "slimline" and r.median_ms is not None and _quality(r) is not None]
    if not ours:
        return []
    lines = []
    for row in group:
        if row.tool in ("slimline", "original") or row.median_ms is None or (least := _quality(row)) is None:
            continue
        better = [r for r in ours if _as_fast(r, row) and (_quality(r) or 0) >= least]
        best = max(better, key=lambda r: _quality(r) or 0, default=None)
        what = f"as fast and as accurate as {row.tool}, {row.recipe}"
        lines.append(
            f"- No slimline artifact is {what}.\n" if best is None else f"- slimline, {best.recipe}, is {what}.\n"
        )
    return ["".join(lines)]
