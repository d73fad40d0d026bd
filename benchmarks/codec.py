"""What the entropy coder of .slim archives takes: bytes beside deflate, zstd, Huffman and the entropy, and its speed.

    python benchmarks/codec.py [--quick]

Every tool is given the same integers, one byte each, a tensor at a time; tables are counted. zstd is measured where its
command is installed, at level 19. Speeds are those of one thread: integers a second, and the bytes of float32 weights
that an archive gives back in that time. The table goes to benchmarks/results/codec.json and codec.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import safetensors.numpy

from slimline.files.slim import arrays
from slimline.measure import environment
from slimline.methods import entropy
from slimline.methods.clustering import codebook, shared
from slimline.methods.entropy import Stream

HERE = Path(__file__).parent
Array = np.ndarray[Any, np.dtype[Any]]
Tensors = list[Array]


def synthetic(size: int) -> dict[str, Tensors]:
    """Integers from distributions as weights have them; one of 95 % zeros is what little can be said of."""
    rng = np.random.default_rng(0)
    bell = rng.standard_normal(size)
    levels = np.clip(np.rint(bell * 5 + 16), 0, 31)
    return {
        "bell, 32 values": [levels],
        "bell, 256 values (INT8)": [np.clip(np.rint(bell * 40 + 128), 0, 255)],
        "skewed, 16 values": [np.minimum(rng.geometric(0.7, size) - 1, 15)],
        "90 % zeros, 32 values": [np.where(rng.random(size) < 0.9, 0, levels)],
        "95 % zeros, 16 values": [np.where(rng.random(size) < 0.95, 0, levels // 2)],
    }


def resnet(path: Path) -> dict[str, Tensors]:
    """Codes of the weights of the Fashion-MNIST ResNet, clustered; as it is, and with the smallest 90 % at zero."""
    weights = [w for w in safetensors.numpy.load_file(path).values() if w.ndim > 1 and w.size > 1000]
    pruned = [np.where(np.abs(w) < np.quantile(np.abs(w), 0.9), 0, w) for w in weights]
    return {
        "ResNet, 32 clusters": [codes(w, 32) for w in weights],
        "ResNet, 90 % zeros, 16 clusters": [codes(w, 16) for w in pruned],
    }


def codes(weight: Array, clusters: int) -> Array:
    """Which value of the best codebook each weight has."""
    return np.unique(shared(weight, codebook(weight, clusters)), return_inverse=True)[1].ravel()


def huffman_bytes(symbols: Array) -> float:
    """Of a canonical Huffman code, with a byte for the length of each symbol's word."""
    counts = np.bincount(symbols)
    order = count()
    heap = [(int(n), next(order), [symbol]) for symbol, n in enumerate(counts) if n]
    lengths = np.zeros(len(counts), np.int64)
    if len(heap) == 1:
        return 1 + len(symbols) / 8
    heapq.heapify(heap)
    while len(heap) > 1:
        n, _, left = heapq.heappop(heap)
        m, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (n + m, next(order), left + right))
    return float(lengths @ counts) / 8 + len(counts)


def zstd_bytes(content: bytes) -> int | None:
    """Of the command at level 19."""
    if shutil.which("zstd") is None:
        return None
    return len(subprocess.run(["zstd", "-19", "-c"], input=content, capture_output=True, check=True).stdout)


def row(case: str, tensors: Tensors, repeats: int) -> dict[str, Any]:
    """Bytes of every tool, and the speeds of ours."""
    parts = [part.astype(np.uint8) for part in tensors]
    least = sum(entropy.entropy(np.bincount(part)) * len(part) / 8 for part in parts)
    zstd = [zstd_bytes(part.tobytes()) for part in parts]
    streams = [Stream(part.astype(np.uint16), int(part.max()) + 1) for part in parts]
    sizes = [(len(stream.symbols), stream.alphabet) for stream in streams]
    coded = entropy.encode(streams)
    levels = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    weights = [levels[part] for part in parts]
    packed = arrays.written([code for w in weights if (code := arrays.encode(w.tobytes(), w.shape, 4)) is not None])
    total = sum(map(len, parts))
    return {
        "case": case,
        "integers": total,
        "entropy_bytes": round(least),
        "slimline_bytes": len(coded),
        "huffman_bytes": round(sum(huffman_bytes(part) for part in parts)),
        "deflate_bytes": sum(len(zlib.compress(part.tobytes(), 9)) for part in parts),
        "zstd_bytes": None if None in zstd else sum(size or 0 for size in zstd),
        "array_bytes": len(packed),
        "encode_per_second": round(total / best(repeats, lambda: entropy.encode(streams))),
        "decode_per_second": round(total / best(repeats, lambda: entropy.decode(coded, sizes))),
        "weights_bytes_per_second": round(
            4 * total / best(repeats, lambda: arrays.read(packed, [(w.nbytes, 4) for w in weights]))
        ),
    }


def best(repeats: int, work: Any) -> float:
    """Seconds of the fastest of so many runs."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """The table for people: sizes against the entropy, which is 1."""
    head = "| integers | entropy | slimline | Huffman | deflate | zstd | decodes | gives weights |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for each in rows:
        sizes = [each[f"{tool}_bytes"] for tool in ("slimline", "huffman", "deflate", "zstd")]
        shown = ["–" if size is None else f"{size / each['entropy_bytes']:.3f}" for size in sizes]
        speeds = f"{each['decode_per_second'] / 1e6:.0f} M/s | {each['weights_bytes_per_second'] / 1e6:.0f} MB/s"
        lines.append(f"| {each['case']} | {each['entropy_bytes']:,} B | {' | '.join(shown)} | {speeds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer integers; results go to .cache/quick")
    quick = parser.parse_args().quick
    cases = {**synthetic(100_000 if quick else 2_000_000), **resnet(HERE / "weights/fashion_resnet.safetensors")}
    rows = [row(case, tensors, 1 if quick else 5) for case, tensors in cases.items()]
    folder = HERE / (".cache/quick" if quick else "results")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
    (folder / "codec.json").write_text(text + "\n", "utf-8")
    (folder / "codec.md").write_text(markdown(rows), "utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
