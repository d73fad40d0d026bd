"""Every figure that README.md and docs/ quote is what benchmarks/results/ measured."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


@cache
def rows(name: str) -> tuple[Row, ...]:
    return tuple(json.loads((RESULTS / f"{name}.json").read_text())["rows"])


def row(name: str, **fields: Any) -> Row:
    """The one row of a result that has these fields; a recipe may be named by how it begins."""

    def fits(candidate: Row) -> bool:
        return all(
            str(candidate[k]).startswith(v) if isinstance(v, str) else candidate[k] == v for k, v in fields.items()
        )

    (found,) = [candidate for candidate in rows(name) if fits(candidate)]
    return found


def percent(part: float, digits: int = 2) -> str:
    return f"{100 * part:.{digits}f} %"


def points(part: float) -> str:
    return f"{100 * part:.2f}"


def kilobytes(r: Row) -> str:
    return f"{r['file_bytes'] / 1000:,.0f} kB"


def milliseconds(r: Row) -> str:
    ms = r["median_ms"]
    return f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1}f} ms"


def times(ratio: float) -> str:
    return f"{ratio:.1f}×"


def fashion(tool: str, recipe: str) -> str:
    """The cells of a row of README's first table, after its name."""
    one, many = (row("fashion_torch", tool=tool, recipe=recipe, batch=batch) for batch in (1, 32))
    cells = [percent(one["accuracy"]), f"{points(one['bound'])} points"]
    cells.append(f"{kilobytes(one)}, {times(one['size_ratio'])} smaller")
    cells += [f"{milliseconds(r)}, {times(r['speedup'])} faster" for r in (one, many)]
    return " | ".join(cells)


def encoder(tool: str, words: str) -> str:
    """Words on MiniLM in INT8 on ONNX Runtime."""
    one = row("targets", case="MiniLM", tool=tool, recipe="INT8", target="onnxruntime", batch=1)
    return words.format(speed=times(one["speedup"]), alike=percent(one["agreement"]))


def covered(name: str) -> str:
    return f"{sum(r['covered'] for r in rows(name))} of {len(rows(name))}"


def exported() -> str:
    """Of the models from PyTorch and Keras that were exported, those whose artifact answers as they do."""
    every = [r["exported"] for path in RESULTS.glob("zoo_*.json") if path.stem != "zoo_onnx" for r in rows(path.stem)]
    return f"{every.count(True)} of {len(every) - every.count(None)}"


def seeds(tool: str, recipe: str) -> str:
    of = [r for r in rows("recovery") if r["tool"] == tool and r["batch"] == 1]
    found = [r["accuracy"] for r in of if r["recipe"].startswith(recipe)]
    return f"{percent(mean(found))} ({points(min(found))} to {points(max(found))})"


def side_by_side() -> list[str]:
    """The rows of the tables in docs/targets.md: of the ResNet at batch 32, of the encoder at batch 1."""
    lines = []
    for case, batch in (("ResNet", 32), ("MiniLM", 1)):
        of = [r for r in rows("targets") if case in r["case"] and r["batch"] == batch and r["median_ms"] is not None]
        recipes = [r["recipe"] for r in of if r["tool"] == "slimline" and r["recipe"].endswith("INT8")]
        for target in dict.fromkeys(r["target"] for r in of):
            for recipe in dict.fromkeys(recipes):
                (ours,) = [r for r in of if (r["target"], r["recipe"], r["tool"]) == (target, recipe, "slimline")]
                cells = [f"{milliseconds(ours)}, {times(ours['speedup'])} faster", percent(ours["agreement"])]
                theirs = [r for r in of if (r["target"], r["recipe"]) == (target, recipe) and r["tool"] != "slimline"]
                for peer in theirs:
                    cells.append(f"{peer['tool']}: {milliseconds(peer)}, {times(peer['speedup'])}")
                    cells.append(percent(peer["agreement"]))
                lines.append(f"| `{target}` | {recipe} | {' | '.join(cells if theirs else [*cells, '–', '–'])} |")
    return lines


def products() -> list[str]:
    """The rows of the table in docs/low_rank.md."""
    return [
        f"| {r['case'].partition(' ')[0].rstrip(',')} | {r['tool']}, {r['recipe']} | {percent(r['output_error'])} "
        f"| {points(r['drop'])} | {percent(r['agreement'])} | {r['size_ratio']:.2f}× |"
        for r in rows("low_rank")
        if r["tool"] != "original"
    ]


def archives() -> list[str]:
    """The rows of the table of networks in docs/sharing.md; of several seeds the mean, least to most."""
    of: dict[tuple[str, str], list[Row]] = {}
    for r in rows("sharing"):
        of.setdefault((r["case"].split()[1], r["recipe"].partition(", seed")[0]), []).append(r)

    def spread(each: list[Row], field: str) -> str:
        values = [100 * r[field] for r in each]
        return f"{mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")

    lines = []
    for (network, recipe), each in of.items():
        cells = [network, recipe, spread(each, "accuracy")]
        cells += ["", ""] if recipe == "none" else [spread(each, "drop"), points(max(r["bound"] for r in each))]
        cells.append(f"{mean(r['file_bytes'] for r in each) / 1000:,.1f} kB")
        cells.append("" if recipe == "none" else times(min(r["size_ratio"] for r in each)))
        lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return lines


def photographs() -> list[str]:
    """The rows of the table of photographs in docs/quantization.md; none where it was not measured."""
    if not (RESULTS / "photographs.json").exists():
        return []
    lines = []
    for r in rows("photographs"):
        cells = [f"`{r['target']}`", f"{r['tool']}, {r['recipe']}"]
        cells += [percent(r["agreement"], 1), f"{milliseconds(r)}, {times(r['speedup'])}", kilobytes(r)]
        cells.append("" if r["cpu_seconds"] is None else f"{r['cpu_seconds']:.0f} s")
        cells.append("" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.0f} MB")
        lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return lines


def post_training() -> list[str]:
    """The rows of the table of time and memory in docs/quantization.md; none where it was not measured."""
    if not (RESULTS / "post_training.json").exists():
        return []
    return [
        f"| {r['case']} | `{r['target']}` | {r['tool']}, {r['recipe']} | {r['cpu_seconds']:.1f} s "
        f"| {r['peak_bytes'] / 1e6:,.0f} MB |"
        for r in rows("post_training")
    ]


def untrained() -> list[str]:
    """The rows of the table of static quantization without training in docs/quantization.md."""
    cases = {"Fashion-MNIST, ResNet 32-64-128": "ResNet", "Fashion-MNIST, like MobileNetV2": "MobileNetV2-like"}
    lines = []
    for case, label in cases.items():
        every = {(r["tool"], r["recipe"], r["batch"]): r for r in rows("quantization") if r["case"] == case}
        for (tool, recipe, batch), one in every.items():
            if batch == 1 and tool != "original":
                fast = " / ".join(times(each["speedup"]) for each in (one, every[tool, recipe, 32]))
                lines.append(
                    f"| {label} | {tool}, {recipe} | {percent(one['accuracy'])} | {points(one['drop'])} | {fast} "
                    f"| {times(one['size_ratio'])} |"
                )
    return lines


def few_bits() -> list[str]:
    """The rows of the table of training in few bits in docs/quantization.md."""
    lines = []
    for r in rows("qat"):
        if r["batch"] == 1 and r["tool"] == "slimline":
            many = row("qat", recipe=r["recipe"], batch=32)
            lines.append(
                f"| {r['recipe']} | {percent(r['accuracy'])} | {points(r['drop'])} | {points(r['bound'])} "
                f"| {times(r['size_ratio'])} | {r['file_bytes'] / 1000:,.0f} kB | {times(many['speedup'])} |"
            )
    return lines


def language() -> list[str]:
    """The rows of the table of a language model in docs/quantization.md; none where it was not measured."""
    if not (RESULTS / "smollm.json").exists():
        return []
    lines = []
    for r in rows("smollm"):
        if "perplexity" in r and r["perplexity"] is not None and r["case"].endswith("256 tokens"):
            single = row("smollm", case=r["case"].replace("256 tokens", "1 token"), tool=r["tool"], recipe=r["recipe"],
                         target=r["target"])  # fmt: skip
            cells = [f"`{r['target']}`", f"{r['tool']}, {r['recipe']}", f"{r['perplexity']:.2f}"]
            cells.append(f"{r['file_bytes'] / 1e6:,.0f} MB")
            cells += [f"{each['tokens_per_second']:,.0f}" for each in (r, single)]
            cells.append("" if r["cpu_seconds"] is None else f"{r['cpu_seconds']:,.0f} s")
            cells.append("" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f} GB")
            lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return lines


def sentences() -> list[str]:
    """The rows of the table of a sentence encoder in docs/quantization.md; none where it was not measured."""
    if not (RESULTS / "dynamic_minilm.json").exists():
        return []
    lines = []
    for r in rows("dynamic_minilm"):
        if r["batch"] == 1:
            many = row("dynamic_minilm", tool=r["tool"], recipe=r["recipe"], batch=8)
            cells = [f"{r['tool']}, {r['recipe']}", percent(r["accuracy"])]
            cells.append("" if r["drop"] is None else points(r["drop"]))
            cells += [f"{milliseconds(each)}, {times(each['speedup'])}" for each in (r, many)]
            cells.append(f"{r['file_bytes'] / 1e6:.1f} MB, {times(r['size_ratio'])}")
            lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return lines


def distilled() -> list[str]:
    """The rows of the table in docs/distillation.md."""
    table = (RESULTS / "distillation.md").read_text("utf-8").partition("## Over the seeds")[2]
    return [line for line in table.splitlines() if line.startswith("|") and "---" not in line][1:]


def closed(loss: str) -> str:
    """The part of the gap that a loss closes there."""
    (line,) = [line for line in distilled() if line.startswith(f"| {loss} |")]
    return line.split(" | ")[3]


def patient() -> list[str]:
    """Rows of the table on long teaching there: means over the seeds, the largest bound, the least speedups."""
    labels = {
        "60 % of the MACs pruned by OBS, taught": "60 % of the MACs pruned, FP32",
        "60 % of the MACs pruned by OBS, trained": "the same without a teacher, FP32",
        "half of": "half of depth and widths (16-32-64, one block a stage), INT8",
    }
    table = []
    for recipe, label in labels.items():
        own = [r for r in rows("patience") if r["recipe"].startswith(recipe)]
        one, many = ([r for r in own if r["batch"] == batch] for batch in (1, 32))
        drops = [r["drop"] for r in one]
        spread = "" if len(one) == 1 else f" ({points(min(drops))} to {points(max(drops))})"
        cells = [
            label,
            str(len(one)),
            f"{points(sum(drops) / len(drops))}{spread}",
            points(max(r["bound"] for r in one)),
        ]
        cells += [times(min(r["speedup"] for r in each)) for each in (one, many)]
        table.append(f"| {' | '.join(cells)} | {times(min(r['size_ratio'] for r in one))} |")
    return table


def patience() -> str:
    """The sentence on long teaching in README.md."""
    one = [r for r in rows("patience") if r["batch"] == 1]
    taught, small = ([r for r in one if start in r["recipe"]] for start in ("OBS, taught", "half of"))
    gain, drop = (sum(r["drop"] for r in each) / len(each) for each in (taught, small))
    return (
        f"without 60 % of its multiplications gains {points(-gain)} points, and with half of its depth and widths, in "
        f"INT8, loses {points(drop)} and is {times(min(r['speedup'] for r in small))} as fast"
    )


def recurrent() -> str:
    """The sentence on an LSTM in docs/quantization.md."""
    of = {(r["tool"], r["batch"]): r for r in rows("dynamic_lstm")}
    ours, theirs = ([of[tool, batch] for batch in (1, 32)] for tool in ("slimline", "onnxruntime"))

    def fast(each: list[dict[str, Any]]) -> str:
        return f"{times(each[0]['speedup'])} and {times(each[1]['speedup'])}"

    return (
        f"is {fast(ours)} as fast at batch 1 and 32, {times(ours[0]['size_ratio'])} smaller and loses "
        f"{points(ours[0]['drop'])} points; `quantize_dynamic` gives {fast(theirs)}, "
        f"{times(theirs[0]['size_ratio'])} and {points(theirs[0]['drop'])}"
    )


SCORES = {
    "accuracy, 1 point, no gains": "accuracy, lost in 1 %, never gained",
    "accuracy, 1 point, few gains": "accuracy, lost in 1.3 %, gained in 0.3 %",
    "accuracy, 5 points": "accuracy, lost in 8 %, gained in 3 %",
    "accuracy, no drop": "accuracy, lost and gained in 2 %",
    "heavy losses in 1 %": "in [0, 1], lost wholly in 1 %",
    "heavy losses in 0.3 %": "in [0, 1], lost wholly in 0.3 %",
    "heavy losses in 1 %, noise": "in [0, 1], lost in 1 %, noise elsewhere",
    "heavy losses in 20 %": "in [0, 1], lost in 20 %, noise elsewhere",
    "groups lost in 5 %": "groups of 1 to 30, 5 % of groups lost",
    "groups lost in 0.3 %": "groups of 1 to 30, 0.3 % of groups lost",
}
"""Cases of the simulated certificates, and what docs/certificates.md calls them."""
SETS = {
    "F1, a class of 10 %, of which 5 % are lost": "F1, of a class of 10 % 5 % are lost",
    "AUC, 10 % positive, 1 % ranked last": "AUC, 10 % positive, 1 % ranked last",
    "correlation, 1 % outliers": "correlation, 1 % outliers",
}
"""The same of metrics over the whole set."""


def false_rates() -> list[str]:
    """The rows of the table in docs/certificates.md."""
    false = {(r["method"], r["case"]): r["false"] for r in rows("certificates")}
    found = []
    for case, label in SCORES.items():
        rates = false["certificate", case]
        found.append(f"| {label} | " + " | ".join(f"{100 * rates[n]:.1f}" for n in ("50", "200", "1000")) + " |")
    for part in ("1 %", "0.3 %"):
        rates = false["bootstrap", f"heavy losses in {part}"]
        cells = " | ".join(f"*{100 * rates[n]:.0f}*" for n in ("50", "200", "1000"))
        found.append(f"| *bootstrap, lost in {part}: gives no verdict* | {cells} |")
    for case, label in SETS.items():
        cells = " | ".join(f"*{100 * false['set bootstrap', case][n]:.0f}*" for n in ("50", "200", "1000"))
        found.append(f"| *set bootstrap, {label}: gives no verdict* | {cells} |")
    return found


def claims() -> dict[str, list[str]]:
    """By page, every quotation of a result as it has to read."""
    torch1, torch32 = (row("fashion_torch", tool="original", batch=b) for b in (1, 32))
    keras = {b: row("fashion_keras", tool="slimline", batch=b) for b in (1, 32)}
    obs16 = row("structured", recipe="OBS, in 16s, 50%", batch=1)
    l1 = row("structured", recipe="L1, 50%", batch=1)
    kept, plain = row("minilm", recipe="OBS, probe kept"), row("minilm", tool="magnitude", recipe="L2, probe kept")
    (recovered,) = {f"{r['speedup']:.1f}" for r in rows("recovery") if r["tool"] != "original"}
    half, most = (row("sparse", tool="slimline", recipe=f"{part} %, exact") for part in (50, 70))
    peak = row("planning", recipe="INT8")["peak_memory_ratio"]
    trained = row("sparse", recipe="90 %, cubic")
    mobile = [r for r in rows("quantization") if "MobileNetV2" in r["case"] and r["batch"] == 1]
    ternary, binary = (row("qat", recipe=name, batch=1) for name in ("ternary", "binary"))
    coded = row("sharing", recipe="half of all widths")
    four = {r["tool"]: r for r in mobile if r["recipe"] in ("W4A8, GPTQ", "quantize_static, W4A8")}
    return {
        "docs/sharing.md": [*(RESULTS / "codec.md").read_text("utf-8").splitlines()[2:], *archives()],
        "README.md": [
            f"({percent(torch1['accuracy'])} on the 10,000 test images)",
            f"| {percent(torch1['accuracy'])} | | {kilobytes(torch1)} | {milliseconds(torch1)} "
            f"| {milliseconds(torch32)} |",
            fashion("slimline", "50 % pruned"),
            fashion("Torch-Pruning + ONNX Runtime", "50 % pruned"),
            fashion("ONNX Runtime", "quantize_static"),
            f"costs {points(obs16['drop'])} points and runs {times(obs16['speedup'])} faster",
            f"(plain L1 loses {100 * l1['drop']:.0f} points)",
            f"embeddings gets {percent(kept['accuracy'], 1)} of 1,000 Reuters texts right with the pruned ones "
            f"({percent(row('minilm', tool='original')['accuracy'], 1)} with the original's, "
            f"{percent(plain['accuracy'], 1)} after pruning by magnitude), {times(kept['speedup'])} faster",
            encoder(
                "slimline", "is {speed} faster on ONNX Runtime at batch 1 and has the same nearest text for {alike}"
            ),
            encoder("quantize_static", "(`quantize_static`: {speed} and {alike})"),
            f"{points(four['slimline']['drop'])} points lost, where `quantize_static` with INT4 weights loses "
            f"{points(four['ONNX Runtime']['drop'])}",
            f"loses {points(ternary['drop'])} points with ternary weights, {times(ternary['size_ratio'])} smaller, and "
            f"{points(binary['drop'])} with binary ones, {times(binary['size_ratio'])}",
            f"closes {closed('pruned, kl')} of what plain training leaves to the teacher, one with random weights "
            f"{closed('kl')}",
            patience(),
            f"is {times(coded['size_ratio'])} smaller for a true drop of at most {points(coded['bound'])} points",
            f"three seeds, {recovered}× faster on ONNX Runtime in FP32",
            f"slimline by OBS {seeds('slimline', 'OBS')}, by L2 norm {seeds('slimline', 'L2')}; Torch-Pruning by L2",
            f"with the same training {seeds('Torch-Pruning', 'L2')}; "
            f"the original has {percent(row('recovery', tool='original', batch=1)['accuracy'])}",
            f"{percent(keras[1]['accuracy'])}, a true drop of at most {points(keras[1]['bound'])} points, "
            f"{times(keras[1]['size_ratio'])} smaller, {times(keras[1]['speedup'])} faster at batch 1 and "
            f"{times(keras[32]['speedup'])} at batch 32",
            f"`import slimline` takes {row('planning', recipe='import')['median_ms']:.0f} ms, planning a ResNet-50 "
            f"{row('planning', tool='slimline', recipe='plan')['median_ms'] / 1000:.1f} s once it is captured, "
            f"and INT8 of a 100 MB model peaks at {peak:.1f} times the model",
            f"50 % cost nothing ({percent(half['accuracy'])}), 70 % cost {points(most['drop'])} points "
            f"(magnitude {points(row('sparse', tool='magnitude', recipe='70')['drop'])}, SparseGPT-style "
            f"{points(row('sparse', tool='SparseGPT', recipe='70')['drop'])}). *While training* for six epochs 90 % "
            f"cost {points(trained['drop'])} points",
            f"[{covered('zoo_torchvision')} torchvision models]",
            f"[{covered('zoo_timm')} timm families]",
            f"[{covered('zoo_transformers')} transformers]",
            f"[{covered('zoo_keras')} keras.applications]",
            f"[{covered('zoo_keras_hub')} KerasHub backbones]",
            f"Exported, {exported()} pruned networks answer in their runtime as they do in the framework",
        ],
        "docs/certificates.md": false_rates(),
        "docs/targets.md": side_by_side(),
        "docs/low_rank.md": products(),
        "docs/distillation.md": [*distilled(), *patient()],
        "docs/quantization.md": [
            *photographs(),
            *post_training(),
            *untrained(),
            *few_bits(),
            *language(),
            *sentences(),
            recurrent(),
        ],
        "docs/sparsity.md": [f"90 % zeros is {_gzip():.1f} times smaller"],
        "docs/sparse-training.md": [
            f"(digits, {training('none')} right), half of every width cut at once leaves {training('no training')} "
            f"right; after this training {training('growing')},",
            f"leaves {training('group_lasso 0.01, 8 epochs, cut')} with",
            f"24 epochs with 0.02 leave {training('batch_norm 0.02, 24 epochs, not cut')}, and after the cut by its "
            f"scales {training('batch_norm 0.02, 24 epochs, cut')}",
        ],
    }


def _gzip() -> float:
    dense, sparse = (row("zeros", target="onnxruntime", kind=kind) for kind in ("dense", "90 % element"))
    return float(dense["gzip_bytes"] / sparse["gzip_bytes"])


def training(recipe: str) -> str:
    return percent(row("sparse_training", recipe=recipe)["accuracy"])


def plain(page: str) -> str:
    """A page as one line, without emphasis."""
    return " ".join((ROOT / page).read_text("utf-8").replace("**", "").split())


def test_layers_by_their_outputs_lose_a_third_of_what_plain_products_do() -> None:
    for case in {r["case"] for r in rows("low_rank")}:
        own = {(r["tool"], r["recipe"]): r for r in rows("low_rank") if r["case"] == case}
        ours = own["slimline", "outputs, compensated"]
        for plain in (each for (tool, _), each in own.items() if tool == "plain SVD"):
            assert ours["drop"] <= plain["drop"] / 3 and ours["output_error"] <= plain["output_error"] / 3


def test_few_values_cost_little_and_pruned_ones_are_as_small_as_deep_compression_made_them() -> None:
    shared = row("sharing", tool="slimline", recipe="32 clusters")
    assert shared["drop"] <= 0.003 and shared["size_ratio"] >= 5
    lenets = [r for r in rows("sharing") if r["tool"] == "slimline" and "LeNet-300-100" in r["case"]]
    assert len(lenets) == 3 and all(r["size_ratio"] >= 40 for r in lenets)


def test_long_teaching_keeps_what_was_asked_of_it() -> None:
    one = [r for r in rows("patience") if r["batch"] == 1]
    taught = [r for r in one if r["recipe"].startswith("60 % of the MACs pruned by OBS, taught")]
    small = [r for r in one if r["recipe"].startswith("half of")]
    assert len(taught) == len(small) == 3
    assert all(r["bound"] <= 0.003 for r in taught) and all(r["drop"] <= 0.008 for r in small)


CLAIMS = claims()
QUOTED = [(page, claim) for page, found in CLAIMS.items() for claim in found]


@pytest.mark.parametrize(("page", "claim"), QUOTED, ids=[f"{page}-{i}" for i, (page, _) in enumerate(QUOTED)])
def test_a_figure_is_what_was_measured(page: str, claim: str) -> None:
    assert claim in plain(page)


MEASURED = re.compile(r"(?<![\w.=])[−-]?\d[\d,.]*(?:\s?(?:%|×|ms\b|s\b|points|kB|MB|times)| of \d+)")
SETTINGS = {
    # What was asked for or is known of a case, and no result.
    "README.md": ["70 M MACs", "50 % of channels", "Torch-Pruning 50 %", "at most (95 %)", "−50 % of the MACs",
                  "−61 % of the MACs", "pruned at 30 %"],
    "docs/sparsity.md": [],
    "docs/sparse-training.md": [],
    "docs/structured-pruning.md": [],
    "docs/coverage.md": ["at 30 % of every unit", "at least 25 %", "than the 25 % that"],
    "docs/depth-and-activations.md": [],
    "docs/distillation.md": ["1 × 1, 3 × 3 and 1 × 1", "at −60 % of the MACs"],
    "docs/low_rank.md": ["1 × 1", "k × 1", "1 × k", "30 % of the parameters"],
    "docs/light.md": ["1 × 1"],
    "docs/parts.md": [],
    "docs/sharing.md": ["3 × 3 kernel", "40 times and LeNet-5 39 times", "at most (95 %)"],
    "docs/targets.md": ["iOS 17, of 3 bits"],
    "docs/quantization.md": ["An LSTM of 128 on 128 words", "at most (95 %)"],
    "docs/zoo.md": ["images of 32 × 32", "224 × 224"],
    "docs/architecture.md": [],
    "docs/certificates.md": ["With 95 % confidence", "wrong in up to 6.8 % of cases", "(5 % are allowed",
                             "of the allowed 5 %", "(1 % of samples"],
    "docs/security.md": ["256 MB", "100 times its size", "100 times the size", "256 times the weights",
                         "64 MB, 100 levels"],
}  # fmt: skip


@pytest.mark.parametrize("page", [*SETTINGS])
def test_no_other_figure_is_quoted(page: str) -> None:
    """A measured quantity that no claim covers has no result behind it that this file could check."""
    text = plain(page)
    for known in sorted([*CLAIMS.get(page, ()), *SETTINGS[page]], key=len, reverse=True):
        text = text.replace(known, "")
    text = re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text))
    assert MEASURED.findall(text) == []


def test_every_page_is_looked_at() -> None:
    pages = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} | {"README.md"}
    with_figures = {page for page in pages if MEASURED.search(re.sub(r"`[^`]*`", "", plain(page)))}
    assert with_figures <= set(SETTINGS)


@pytest.mark.parametrize("name", sorted(p.stem for p in RESULTS.glob("zoo_*.json")))
def test_a_table_counts_its_rows(name: str) -> None:
    first = (RESULTS / f"{name}.md").read_text("utf-8").splitlines()[0]
    assert first == f"# {name}: {covered(name)} covered"


@pytest.mark.parametrize("name", sorted(p.stem for p in RESULTS.glob("*.json") if not p.stem.startswith("zoo_")))
def test_a_table_shows_its_medians_and_scores(name: str) -> None:
    """The Markdown beside a result is of the same rows."""
    table = (RESULTS / f"{name}.md").read_text("utf-8")
    for r in rows(name):
        if r.get("accuracy") is not None:
            assert f"| {percent(r['accuracy'])} |" in table
        if r.get("median_ms") is not None:
            assert f"{r['median_ms']:.3f} ms" in table or f"| {r['median_ms']:.1f} |" in table


def test_the_picture_of_the_readme_is_drawn_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import picture

    assert picture.PICTURE.read_text("utf-8") == picture.picture(list(rows("fashion_torch")))
    assert picture.PICTURE.name in (ROOT / "README.md").read_text("utf-8")
