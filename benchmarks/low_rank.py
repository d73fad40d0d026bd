"""Low rank without training: MiniLM on Reuters R8 and a ViT on Fashion-MNIST, 30 % of what can be factorised removed.

    python benchmarks/low_rank.py [--quick] [--fresh]

MiniLM needs what `minilm.py` needs, and reads 64 tokens. The ViT is that of ``train_fashion.py vit``. Both see 512
unlabelled training samples; 128 of them where layers make up for those before. All linear layers (and the ViT's
patches, not its classifier) lose 30 % of their parameters: by the plain singular value decomposition of their weights,
each alike or shared out among them, and by what they do to the samples. Everything is measured on exported ONNX
artifacts: accuracy (of MiniLM that on 1,000 texts of a logistic regression which was fitted on the original's
embeddings of 1,000 others), agreement with the original, and the part of the variance of the outputs that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Entry, Row, cached, fashion, log, options, peer, write

import slimline as sl
from slimline.measure import file_bytes, outputs

RATIO, SAMPLES, COMPENSATED = 0.3, 512, 128
LENGTH, FITTED, TESTED = 64, 1000, 1000
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Case:
    """A trained network, what it may see, and by what it is judged.

    Attributes
    ----------
    keep : layers that stay.
    inputs, labels : of the test samples.
    classifier : from the original's artifact what makes classes of outputs.
    """

    name: str
    model: sl.Model
    data: sl.Data
    keep: tuple[str, ...]
    inputs: tuple[Array, ...]
    labels: Array
    classifier: Callable[[Path], Callable[[Array], Array]]


def minilm(quick: bool) -> Case:
    """Embeddings of texts, of which a probe makes classes."""
    peer("transformers", "transformers")
    from minilm import Encoder, texts, tokens
    from sklearn.linear_model import LogisticRegression

    (train, y), (test, labels) = texts("train"), texts("test")
    rng = np.random.default_rng(0)
    drawn, judged = rng.permutation(len(train))[:FITTED], rng.permutation(len(test))[: 100 if quick else TESTED]
    known = tokens([train[i] for i in drawn], LENGTH)

    def probe(original: Path) -> Callable[[Array], Array]:
        fitted = LogisticRegression(C=10, max_iter=2000).fit(answers(original, known), y[drawn])
        return lambda embeddings: np.asarray(fitted.predict(embeddings))

    return Case(
        f"MiniLM-L6-v2, Reuters R8, {LENGTH} tokens",
        sl.load(Encoder().eval(), tuple(x[:2] for x in known)),
        sl.Data(calibration=(tuple(x[: 64 if quick else SAMPLES] for x in known),)),
        ("type:embedding",),
        tokens([test[i] for i in judged], LENGTH),
        labels[judged],
        probe,
    )


def vit(quick: bool) -> Case:
    """Classes of images."""
    from safetensors.torch import load_file
    from train_fashion import WEIGHTS, fashion_vit

    network = fashion_vit()
    network.load_state_dict(load_file(WEIGHTS / "fashion_vit.safetensors"))
    data = fashion(channels_last=False, quick=quick)
    images, test = data.split("train").inputs[0], data.split("certification")
    drawn = np.random.default_rng(0).permutation(len(images))[:SAMPLES]
    assert test.labels is not None
    return Case(
        "ViT (six blocks of width 96), Fashion-MNIST",
        sl.load(network.eval(), (images[:2],)),
        sl.Data(calibration=(images[drawn],)),
        ("head",),
        tuple(np.asarray(x) for x in test.inputs),
        np.asarray(test.labels),
        lambda _: lambda logits: logits.argmax(1),
    )


def recipes(keep: Sequence[str]) -> dict[tuple[str, str], sl.LowRank]:
    """By tool and name."""

    def step(samples: int = SAMPLES, **fields: Any) -> sl.LowRank:
        return sl.LowRank(ratio=RATIO, samples=samples, undo=False, keep=tuple(keep), **fields)

    return {
        ("plain SVD", "each layer alike"): step(criterion="weight", scope="local"),
        ("plain SVD", "shared out"): step(criterion="weight"),
        ("slimline", "outputs"): step(compensate=False),
        ("slimline", "outputs, compensated"): step(COMPENSATED),
    }


def answers(artifact: Path, inputs: tuple[Array, ...]) -> Array:
    """What an artifact gives."""
    return np.asarray(outputs(artifact, inputs, 50, 1))


def measured(case: Case, quick: bool, fresh: bool) -> list[Row]:
    """A row for the original, and one for each recipe."""

    def entry(tool: str, name: str, step: sl.LowRank | None) -> Entry:
        def make(artifact: Path, folder: Path) -> None:
            small = case.model if step is None else sl.apply(case.model, step, case.data)
            sl.export(small, "onnxruntime", folder / "out").replace(artifact)

        config = {"case": case.name, "step": step and step.model_dump(mode="json"), "quick": quick}
        stored = cached("slimline", f"low rank {case.name.split()[0]} {tool} {name}", ".onnx", config, make, fresh)
        return Entry(tool, name, stored.artifact)

    original = entry("original", "none", None)
    classes = case.classifier(original.artifact)
    before = answers(original.artifact, case.inputs)
    right, spread = classes(before) == case.labels, np.square(before - before.mean(0)).sum()
    rows = []
    for each in (original, *(entry(*key, step) for key, step in recipes(case.keep).items())):
        after = answers(each.artifact, case.inputs)
        accuracy, size = float((classes(after) == case.labels).mean()), file_bytes(each.artifact)
        row = Row(
            case.name, each.tool, each.recipe, target="onnxruntime",
            accuracy=accuracy, drop=None if each is original else float(right.mean()) - accuracy,
            agreement=float((classes(after) == classes(before)).mean()),
            output_error=float(np.square(after - before).sum() / spread),
            file_bytes=size, size_ratio=file_bytes(original.artifact) / size,
        )  # fmt: skip
        log.info("%s", row)
        rows.append(row)
    return rows


def main() -> None:
    args = options(__doc__)
    rows = [row for case in (minilm, vit) for row in measured(case(args.quick), args.quick, args.fresh)]
    print(write("low_rank", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
