"""What `sl.inspect`, `sl.preview` and `sl.measure` find, as objects, text and JSON, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.measure import file_bytes
from slimline.recipe import load_recipe
from slimline.recipe.registry import handlers
from slimline.steps.base import Context, perform

torch = pytest.importorskip("torch")
nn = torch.nn

KEYS = {
    "inspect": {"schema", "framework", "target", "quantized", "parameters", "macs", "outputs", "layers", "units",
                "frozen", "blocks"},
    "preview": {"schema", "framework", "target", "original", "expected", "steps", "notices"},
    "measure": {"schema", "figures", "paths", "targets", "metric", "certificate"},
}  # fmt: skip


class Network(nn.Module):
    """A residual block between a stem with a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def data() -> sl.Data:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1, 8, 8)).astype(np.float32)
    return sl.Data(train=(x[:150], np.arange(150) % 10), test=(x[150:], np.arange(150) % 10))


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Network().eval(), np.zeros((2, 1, 8, 8), np.float32))


@pytest.fixture(scope="module")
def files(model: sl.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The artifact of the model, and that of half of it."""
    folder = tmp_path_factory.mktemp("artifacts")
    half = sl.apply(model, sl.ChannelPruning(ratio=0.5))
    return sl.export(model, "onnxruntime", folder / "whole"), sl.export(half, "onnxruntime", folder / "half")


def test_inspect_tells_layers_units_axes_and_blocks(model: sl.Model) -> None:
    found = sl.inspect(model)
    assert (found.framework, found.target, found.quantized) == ("torch", "onnxruntime", False)
    assert found.parameters == model.graph.size == sum(row.parameters for row in found.layers)
    assert found.macs == sum(row.macs for row in found.layers)
    rows = {row.layer: row for row in found.layers}
    assert rows["a"].weight == (16, 16, 3, 3) and rows["a"].integer is True and rows["a"].macs == 64 * 16 * 16 * 9
    assert rows["norm"].integer is None and rows["norm"].macs == 0
    assert {unit.name: (unit.kind, unit.size) for unit in found.units} == {
        "stem": ("filters", 16),
        "a": ("filters", 16),
    }
    assert [axis.reason for axis in found.frozen if axis.size == 10] == ["the model's output"]
    assert [block.layers for block in found.blocks] == [("a", "b")]
    with pytest.raises(Exception, match="frozen"):
        found.macs = 0  # type: ignore[misc]


def test_an_inspection_is_json_and_text(model: sl.Model) -> None:
    found = sl.inspect(model)
    read = json.loads(found.to_json())
    assert read == found.summary() and read["schema"] == 1 and read.keys() == KEYS["inspect"]
    assert read["layers"][0].keys() == {"layer", "operator", "weight", "parameters", "macs", "integer", "reason"}
    text = str(found)
    for part in (f"{found.parameters:,} parameters", "16 × 1 × 3 × 3", "Can be pruned", "that can be left out"):
        assert part in text
    assert len(repr(found)) < 200


def test_a_quantized_model_says_what_is_integer_in_it(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    small = sl.apply(model, sl.StaticQuantization(undo=False, keep=("head",)), data)
    found = sl.inspect(small.save(tmp_path / "small.pt2"))
    assert found.quantized and "as it is quantized" in str(found)
    assert {row.layer: row.integer for row in found.layers if row.macs}["head"] is False
    assert sum(row.integer is True for row in found.layers) == 3
    assert sl.preview(small, []).expected.file_bytes < 0.5 * sl.inspect(model).parameters * 4


def test_inspect_refuses_in_one_sentence(model: sl.Model) -> None:
    for given, said in [
        ((model, "onnxruntim"), "did you mean 'onnxruntime'"),
        ((3,), "A int is no model slimline can read"),
        (("none.pt2",), "There is no model file none.pt2"),
    ]:
        with pytest.raises(SlimlineError, match=said):
            sl.inspect(*given)  # type: ignore[arg-type]


def test_a_preview_is_what_the_steps_then_do(model: sl.Model, data: sl.Data) -> None:
    steps = [
        sl.DepthPruning(blocks=1, criterion="l2"),
        sl.ChannelPruning(ratio=0.5),
        sl.Distillation(epochs=1),
        sl.StaticQuantization(undo=False),
    ]
    found = sl.preview(model, steps)
    assert [row.skipped for row in found.steps] == [False, False, True, False]
    assert found.original.parameters == model.graph.size
    for row, before in zip(found.steps, [found.original, *(row.after for row in found.steps)], strict=False):
        assert row.before == before
    small = sl.apply(model, steps, data)
    inspected = sl.inspect(small)
    assert (found.expected.parameters, found.expected.macs) == (small.graph.size, inspected.macs)
    assert found.steps[-1].details["integer_layers"] == list(small.quantization.layers)  # type: ignore[union-attr]
    assert model.history == (), "the model is as it was"


def test_the_bytes_are_those_of_the_artifact(data: sl.Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(1, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    model = sl.load(wide.eval(), np.zeros((2, 1, 8, 8), np.float32))
    found = sl.preview(model, [sl.ChannelPruning(ratio=0.25), sl.StaticQuantization(undo=False)])
    pruned = sl.apply(model, sl.ChannelPruning(ratio=0.25))
    small = sl.apply(pruned, sl.StaticQuantization(undo=False), data)
    expected = [found.original, found.steps[0].after, found.expected]
    for name, each, size in zip("abc", (model, pruned, small), expected, strict=True):
        written = file_bytes(sl.export(each, "onnxruntime", tmp_path / name))
        assert 0 <= written - size.file_bytes < 12_000, "the graph besides the tensors"


def test_a_preview_is_json_and_text(model: sl.Model, data: sl.Data) -> None:
    found = sl.preview(
        model, [sl.ChannelPruning(ratio=0.5, criterion="taylor"), sl.StaticQuantization(keep=("stem",))], data
    )
    read = json.loads(found.to_json())
    assert read == found.summary() and read.keys() == KEYS["preview"]
    assert read["steps"][0].keys() == {
        "step", "kind", "settings", "does", "skipped", "before", "after", "lines", "details"
    }  # fmt: skip
    assert read["steps"][0]["settings"] == load_recipe(sl.ChannelPruning(ratio=0.5, criterion="taylor")).steps[
        0
    ].model_dump(mode="json")
    assert len(read["steps"][0]["details"]["plan"]["units"][0]["removed"]) == 8
    assert read["steps"][1]["details"]["float_layers"] == {"stem": "layers and keep leave it out"}
    text = str(found)
    for part in ("stem: 16 -> 8", "stem stays in float: layers and keep leave it out", "samples for calibration"):
        assert part in text


@pytest.mark.parametrize("name", ["prune", "int8", "auto", "smallest"])
def test_presets_are_previewed_without_data(model: sl.Model, name: str) -> None:
    found = sl.preview(model, name)
    smaller = found.expected.file_bytes < found.original.file_bytes
    assert smaller == (name != "prune"), "its widths are multiples of 16, as these are already"
    assert ("decided by the budget" in str(found)) == (name == "auto")


def test_sparsity_is_previewed_at_once_and_while_training(model: sl.Model) -> None:
    at_once, later = (
        sl.preview(model, [sl.SparsePruning(amount=0.75, schedule=schedule), sl.Distillation()]).steps[0]  # type: ignore[arg-type]
        for schedule in ("oneshot", "polynomial")
    )
    assert not at_once.skipped and "a: 75.0% zero" in at_once.lines
    assert later.skipped and later.details["layers"] == ["stem", "a", "b", "head"]
    assert at_once.before == at_once.after == later.after, "zeros take as many bytes"


def test_a_preview_refuses_in_one_sentence(model: sl.Model, data: sl.Data) -> None:
    asks = "depends on calibration samples, which it reads: give --data"
    refusals: list[tuple[Any, str]] = [
        (sl.ChannelPruning(ratio=0.5, criterion="taylor"), f"What ChannelPruning would do {asks}"),
        ([sl.Distillation(), sl.ActivationPruning(sparsity=0.5)], "has nothing to recover"),
        ([sl.ChannelPruning(ratio=0.5), sl.ActivationPruning(sparsity=0.5)], f"What ActivationPruning would do {asks}"),
        (sl.ChannelPruning(ratio=0.5, layers=("nothing",)), "nothing"),
        (sl.ChannelPruning(ratio=0.5, criterion="mine:score"), "would import and call mine:score"),
        (sl.StaticQuantization(keep=("*",)), "finds no layer to quantize"),
        ("nope", "There is no recipe 'nope'"),
    ]
    for recipe, said in refusals:
        with pytest.raises(SlimlineError) as refused:
            sl.preview(model, recipe)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(SlimlineError, match="There is no target"):
        sl.preview(model, "int8", target="none")
    with pytest.raises(SlimlineError, match="samples of shape"):
        sl.preview(model, "int8", sl.Data(test=(np.zeros((50, 3, 8, 8)), np.arange(50) % 10)))


def test_every_step_says_what_it_reads() -> None:
    examples = [
        sl.ActivationPruning(sparsity=0.5), sl.ChannelPruning(ratio=0.5, criterion="taylor"),
        sl.DepthPruning(blocks=1), sl.Distillation(), sl.LowRank(ratio=0.5),
        sl.Lighten(convolution="separable"), sl.MergeLayers(), sl.TeacherHead(), sl.LayerTying(groups=1),
        sl.SparsePruning(amount=0.5, criterion="obs"),
        sl.SparseTraining(strength=0.1), sl.StaticQuantization(), sl.WeightQuantization(rounding="gptq"),
        sl.WeightSharing(), sl.DynamicQuantization(), sl.MixedPrecision(max_drop=0.1), sl.QuantizationAwareTraining(),
    ]  # fmt: skip
    own = {name for name, each in handlers().items() if type(each).__module__.startswith("slimline.")}
    assert own == {step.step for step in examples}, "a step without an example here"
    for step in examples:
        reads = handlers()[step.step].reads
        assert set(step.needs) == {role for role, when in reads if not when.startswith("where there are samples")}


def test_a_forecast_needs_no_more_than_the_step(model: sl.Model) -> None:
    step = sl.ChannelPruning(ratio=0.5)
    done = perform(step, model, Context(None, None, "onnxruntime")).model
    assert sl.preview(model, step).expected.parameters == done.graph.size


def test_measure_takes_paths_and_data(files: tuple[Path, Path], data: sl.Data) -> None:
    whole, half = files
    alone = sl.measure(str(half), data, batch_sizes=(1,))
    assert alone.certificate is None and list(alone.figures) == ["artifact"]
    assert alone.targets == {"artifact": "onnxruntime"} and alone.paths == {"artifact": str(half)}
    assert alone.figures["artifact"].file_bytes == file_bytes(half)
    told: list[Any] = []
    both = sl.measure(half, data, whole, target="onnxruntime", batch_sizes=[2], max_drop=0.9, progress=told.append)
    assert list(both.figures) == ["baseline", "artifact"] and told
    assert both.certificate is not None and both.certificate.verdict == "certified"
    read = json.loads(both.to_json())
    assert read == both.summary() and read.keys() == KEYS["measure"]
    assert read["figures"]["artifact"]["latency"].keys() == {"2"}
    text = str(both)
    assert "On onnxruntime" in text and "latency, batch 2" in text and "Certified: accuracy" in text


def test_measure_refuses_in_one_sentence(
    files: tuple[Path, Path], data: sl.Data, model: sl.Model, tmp_path: Path
) -> None:
    half = files[1]
    other = sl.export(
        sl.load(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval(), np.zeros((2, 3, 8, 8), np.float32)),
        "onnxruntime",
        tmp_path,
    )
    refusals: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((half, data, other), {}, "The artifact takes inputs of (1, 8, 8) and the baseline of (3, 8, 8): compare"),
        ((other, data), {}, "samples of shape (1, 8, 8) but the model takes (3, 8, 8)"),
        (("none.onnx", data), {}, "There is no artifact at none.onnx"),
        ((half, data, "none.onnx"), {"target": "onnxruntime"}, "There is no artifact at none.onnx"),
        ((half, data), {"target": "litert"}, "is nothing that litert loads: give an artifact that ends in .tflite"),
        ((half, data), {"target": "onnx"}, "There is no target 'onnx'"),
        ((half, (1, 2)), {}, "data is a tuple: give a slimline.Data"),
        ((half, data), {"batch_sizes": (0,)}, "A batch size is 0"),
        ((half, data), {"batch_sizes": ()}, "batch_sizes is empty"),
        ((half, data), {"threads": 0}, "threads is 0"),
        ((half, data), {"max_drop": 2}, "max_drop is 2"),
        ((3, data), {}, "artifact is '3': give a path"),
        ((tmp_path / "a.bin", data), {}, "There is no runtime for files ending in '.bin'"),
    ]
    for words, named, said in refusals:
        with pytest.raises(SlimlineError) as refused:
            sl.measure(*words, **named)
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_measure_stays_the_function_and_its_package_a_package() -> None:
    from slimline.measure import Figures, latency
    from slimline.measure.figures import Figures as same

    assert Figures is same and latency.__name__ == "slimline.measure.latency"
    assert sl.measure.__module__ == "slimline.run.measurement" and callable(sl.measure)
