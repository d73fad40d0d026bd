"""Embeddings in integers: of a table of codes the rows that are looked up are decoded, and not the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import slimline as sl
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.base import runtime

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

ROWS, WIDTH = 400, 12
WORDS = np.random.default_rng(0).integers(0, ROWS, (24, 6))
TARGETS = ["onnxruntime", "openvino"]
STEPS = {
    "static": sl.StaticQuantization(undo=False, observer="minmax"),
    "alone": sl.WeightQuantization(dtype="int8", rounding="nearest", layers=("table", "other")),
    "dynamic": sl.DynamicQuantization(undo=False),
}


class Bag(nn.Module):
    """Words -> logits: the mean of what two tables say of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():  # rows of very different sizes, and one of nothing
            self.table.weight *= torch.logspace(-2, 1, ROWS)[:, None]
            self.table.weight[7] = 0

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(words) + self.other(words)).mean(1))


@pytest.fixture(scope="module")
def bag() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Bag().eval(), WORDS[:2])


def compressed(model: sl.Model, step: sl.Step, target: str) -> sl.Model:
    return sl.apply(model, step, sl.Data(calibration=((WORDS,),)), target=target, progress=False)


def looked_up(path: Path) -> list[np.ndarray]:
    """The stored tables of integers that an ONNX file looks rows up in."""
    graph = onnx.load(path).graph
    stored = {each.name: each for each in graph.initializer}
    tables = [stored[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in stored]
    return [array for array in map(numpy_helper.to_array, tables) if array.dtype == np.int8]


@pytest.mark.parametrize("step", STEPS)
def test_the_file_holds_codes_and_nothing_decodes_all_of_them(bag: sl.Model, step: str, tmp_path: Path) -> None:
    small = compressed(bag, STEPS[step], "onnxruntime")
    path = sl.export(small, "onnxruntime", tmp_path)
    tables = looked_up(path)
    assert small.quantization is not None and len(tables) == 2
    each = small.quantization.weights["table.weight"]
    assert isinstance(each, IntegerGrid) and each.bits == 8 and each.scale.shape == (ROWS, 1)
    float_table = bag.parameters()["table.weight"]
    np.testing.assert_array_equal(tables[0], each.encode(float_table))
    assert (np.abs(each.round(float_table) - float_table) <= 0.501 * each.scale).all(), "by the scale of its row"
    # Whatever the runtime folds at load, no float table is in what it runs.
    held = [node for node in onnx.load(path).graph.node if node.op_type == "Cast"]
    assert all(node.input[0] not in {i.name for i in onnx.load(path).graph.initializer} for node in held)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", ["static", "alone"])
def test_artifact_and_simulation_agree(bag: sl.Model, step: str, target: str, tmp_path: Path) -> None:
    if reason := runtime(target).available():
        pytest.skip(reason)
    small = compressed(bag, STEPS[step], target)
    path = sl.export(small, target, tmp_path)
    answer, simulated = runtime(target).load(path).run((WORDS,)), small.predict(WORDS)
    np.testing.assert_allclose(answer, simulated, atol=1e-5 * np.abs(simulated).max())
    again = sl.load(small.save(tmp_path / "small.pt2"))
    np.testing.assert_array_equal(again.predict(WORDS), simulated)


def test_onnx_and_keras_tables(bag: sl.Model, tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    from keras import layers

    words = keras.Input((6,), dtype="int32")
    network = layers.GlobalAveragePooling1D()(layers.Embedding(ROWS, WIDTH)(words))
    models = {
        "onnx": sl.load(sl.export(bag, "onnxruntime", tmp_path / "bag.onnx")),
        "keras": sl.load(keras.Model(words, layers.Dense(5)(network))),
    }
    for name, model in models.items():
        inputs = WORDS if name == "onnx" else WORDS.astype(np.int32)
        data = sl.Data(calibration=((inputs,),))
        small = sl.apply(model, STEPS["static"], data, target="onnxruntime", progress=False)
        path = sl.export(small, "onnxruntime", tmp_path / f"{name}8.onnx")
        assert len(looked_up(path)) == (2 if name == "onnx" else 1), name
        np.testing.assert_allclose(
            runtime("onnxruntime").load(path).run((inputs,)), small.predict(inputs), atol=1e-4, err_msg=name
        )


def test_a_preview_names_the_tables(bag: sl.Model) -> None:
    found = sl.preview(bag, [STEPS["static"]])
    assert "looked up in tables of int8: table, other" in str(found)
    codes, scales = 2 * ROWS * WIDTH + 5 * WIDTH, 5 * (2 * ROWS + 5)
    rest = 4 * 5  # the bias
    assert found.expected.file_bytes == pytest.approx(codes + scales + rest, rel=0.2)


@pytest.mark.parametrize(
    "step",
    [
        sl.StaticQuantization(undo=False, keep=("table",)),
        sl.StaticQuantization(undo=False, overrides={"table": {"weights": "float32"}}),
    ],
)
def test_layers_that_are_left_out(bag: sl.Model, step: sl.Step) -> None:
    small = compressed(bag, step, "onnxruntime")
    assert small.quantization is not None
    assert "table.weight" not in small.quantization.weights and "other.weight" in small.quantization.weights


def test_targets_without_such_lookups_keep_the_table(bag: sl.Model) -> None:
    if reason := runtime("litert").available():
        pytest.skip(reason)
    small = compressed(bag, STEPS["static"], "litert")
    assert small.quantization is not None and set(small.quantization.weights) == {"head.weight"}


def test_a_table_that_is_also_the_output_layer_stays_float_or_has_its_codes_read_by_both(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.hidden(self.table(words).mean(1)), self.table.weight)

    torch.manual_seed(0)
    model = sl.load(Tied().eval(), WORDS[:2])
    small = compressed(model, STEPS["static"], "onnxruntime")
    assert small.quantization is not None and set(small.quantization.weights) == {"hidden.weight"}
    step = sl.WeightQuantization(dtype="int8", layers=("table",))
    small = compressed(model, step, "onnxruntime")
    path = sl.export(small, "onnxruntime", tmp_path)
    (codes,) = looked_up(path)
    table = small.quantization.weights["table.weight"]
    assert np.array_equal(codes, table.encode(small.parameters()["table.weight"]))
    assert "integer" in runtime("onnxruntime").integer_layers(path).values()


@pytest.mark.parametrize(
    ("fields", "by"),
    [
        ({"overrides": {"table": {"weights": "int4"}}}, "the override of 'table'"),
        ({"overrides": {"type:embedding": {"weights": "int4"}}, "weights": "int4"}, "the override of 'type:embedding'"),
        ({"first_layers": "int4"}, "first_layers"),
    ],
)
def test_int4_that_is_asked_of_a_table_is_refused(bag: sl.Model, fields: dict[str, object], by: str) -> None:
    with pytest.raises(sl.SlimlineError, match=f"table is an embedding, .* let {by} ask int4 of other layers alone"):
        compressed(bag, sl.StaticQuantization(undo=False, observer="minmax", **fields), "onnxruntime")


def test_int4_for_layers_that_multiply_leaves_tables_at_8_bits(bag: sl.Model) -> None:
    own = {"table": {"weights": "int8"}, "head": {"weights": "int4"}}
    fields = [{"weights": "int4"}, {"first_layers": "int4", "overrides": own, "keep": ("other",)}]
    for each in fields:
        small = compressed(bag, sl.StaticQuantization(undo=False, observer="minmax", **each), "onnxruntime")
        assert small.quantization is not None
        formats = small.quantization.weights
        assert (formats["table.weight"].bits, formats["head.weight"].bits) == (8, 4)
