"""Inputs by name, and sizes beside the batch that stay free, from loading to the artifact, in both frameworks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

import slimline as sl
from slimline.graph.ir import InputSpec
from slimline.runtimes.base import runtime

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


IMAGE, MASK = floats(60, 4), floats(60, 6)
LABELS = np.arange(60) % 3


def torch_two() -> tuple[Any, str]:
    torch = pytest.importorskip("torch")

    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

        def forward(self, image: Any, mask: Any) -> Any:
            return self.head(torch.relu(self.a(image) + 2 * self.b(mask)))

    torch.manual_seed(0)
    return Two(), "onnxruntime"


def keras_two() -> tuple[Any, str]:
    keras = pytest.importorskip("keras")
    image, mask = keras.Input((4,), name="image"), keras.Input((6,), name="mask")
    layers = keras.layers
    joined = layers.ReLU()(layers.Add()([layers.Dense(8)(image), layers.Dense(8)(mask)]))
    return keras.Model({"image": image, "mask": mask}, layers.Dense(3)(joined)), "litert"


DATA = {
    name: ({"mask": MASK, "image": IMAGE + shift}, LABELS)
    for shift, name in enumerate(("calibration", "selection", "test"))
}


@pytest.mark.parametrize("make", [torch_two, keras_two])
def test_inputs_are_matched_by_name_in_any_order(make: Any, tmp_path: Path) -> None:
    network, target = make()
    order = sl.load(network, (IMAGE[:2], MASK[:2]))
    assert [spec.name for spec in order.inputs] == ["image", "mask"]
    by_name = sl.load(network, {"mask": MASK[:2], "image": IMAGE[:2]})
    np.testing.assert_array_equal(by_name.outputs(IMAGE, MASK)[0], order.outputs(IMAGE, MASK)[0])
    with pytest.raises(sl.SlimlineError, match="called ids, mask, and the model takes image, mask"):
        sl.load(network, {"ids": IMAGE[:2], "mask": MASK[:2]})
    tuples = sl.Data(**{name: ((x["image"], x["mask"]), y) for name, (x, y) in DATA.items()})
    step = sl.ChannelPruning(ratio=0.5, criterion="taylor")
    pruned, expected = (sl.apply(order, step, data) for data in (sl.Data(**DATA), tuples))
    np.testing.assert_array_equal(pruned.outputs(IMAGE, MASK)[0], expected.outputs(IMAGE, MASK)[0])
    artifact = Path(sl.export(pruned, target, tmp_path / f"model{runtime(target).suffix}"))
    taken = [InputSpec(*spec) for spec in runtime(target).input_specs(artifact)]
    assert [spec.name for spec in taken] == ["image", "mask"]
    inputs = sl.Data(**DATA).check(taken).split("certification").inputs
    np.testing.assert_array_equal(inputs[0], IMAGE + 2)


def test_arrays_of_several_inputs_in_files(tmp_path: Path) -> None:
    from slimline.run.sources import DataSource, load_data

    arrays = {"x_test.mask": MASK, "x_test.image": IMAGE, "y_test": LABELS, "x_train.other": MASK[:0]}
    np.savez(tmp_path / "data.npz", **{k: v for k, v in arrays.items() if "train" not in k})
    (tmp_path / "folder").mkdir()
    for name in ("x_test.mask", "x_test.image", "y_test"):
        np.save(tmp_path / "folder" / f"{name}.npy", arrays[name])
    for path in (tmp_path / "data.npz", tmp_path / "folder"):
        example = load_data(DataSource(str(path))).example_by_name()
        assert isinstance(example, dict) and {name: x.shape for name, x in example.items()} == {
            "image": (2, 4),
            "mask": (2, 6),
        }
    np.save(tmp_path / "folder" / "x_test.npy", MASK)
    with pytest.raises(sl.SlimlineError, match=r"has both x_test and x_test\.image: name every input, or none"):
        load_data(DataSource(str(tmp_path / "folder")))


@pytest.mark.slow
@pytest.mark.parametrize("make", [torch_two, keras_two])
def test_a_run_on_inputs_by_name_and_a_metric_of_the_set(make: Any, tmp_path: Path) -> None:
    network, target = make()
    groups = np.arange(60) // 2
    data = sl.Data(**DATA, metric="f1_macro", groups=groups)
    run = sl.compress(
        network, data, target, recipe=[sl.ChannelPruning(ratio=0.5)], output=tmp_path / "run", batch_sizes=(1,)
    )
    proof = run.certificate
    assert (proof.verdict, proof.metric, proof.method, proof.groups) == ("measured", "f1_macro", "set bootstrap", 30)
    assert "only the mean of a score per sample can be certified" in proof.sentence()
    answer = runtime(target).load(run.artifact).outputs((IMAGE + 2, MASK))[0]
    value = f1_score(LABELS, answer.argmax(1), average="macro")
    assert run.report.compressed.accuracy == pytest.approx(value)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "F1_macro" in page and "paired bootstrap of a metric over the whole set" in page
    measured = sl.measure(
        run.artifact, data, against=run.path / "stages" / "baseline" / run.artifact.name, batch_sizes=(1,)
    )
    assert measured.figures["artifact"].accuracy == pytest.approx(value)
    assert measured.certificate is not None and measured.certificate.observed_drop == proof.observed_drop


class TestFreeSizes:
    """Loaded, pruned, saved, loaded, exported: the artifact still runs at other sizes, and agrees."""

    @staticmethod
    def through(model: sl.Model, other: np.ndarray, target: str, path: Path) -> sl.Model:
        spec = model.inputs[0]
        small = sl.apply(model, sl.ChannelPruning(ratio=0.5))
        assert small.graph.size < model.graph.size
        expected = small.outputs(other)[0]
        again = sl.load(small.save(path.with_suffix(model.adapter.suffix)))
        assert again.inputs == small.inputs == (spec,)
        np.testing.assert_allclose(again.outputs(other)[0], expected, atol=1e-5)
        artifact = sl.export(again, target, path.with_suffix(runtime(target).suffix))
        assert runtime(target).input_specs(Path(artifact))[0][1] == spec.shape
        np.testing.assert_allclose(runtime(target).load(Path(artifact)).outputs((other,))[0], expected, atol=1e-4)
        return again

    def test_a_transformer_keeps_its_sequence_free(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")

        class Tagger(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.tokens, self.places = torch.nn.Embedding(20, 16), torch.nn.Embedding(64, 16)
                self.layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
                self.head = torch.nn.Linear(16, 3)

            def forward(self, tokens: Any) -> Any:
                x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
                return self.head(self.layer(x))

        torch.manual_seed(0)
        network = Tagger().eval()
        model = sl.load(network, RNG.integers(0, 20, (2, 7)), dynamic=True)
        assert model.inputs[0].shape == (None, None)
        assert sl.load(network, RNG.integers(0, 20, (2, 7))).inputs[0].shape == (None, 7)
        longer = RNG.integers(0, 20, (3, 11))
        with torch.no_grad():
            np.testing.assert_allclose(model.outputs(longer)[0], network(torch.tensor(longer)), atol=1e-5)
        again = self.through(model, longer, "onnxruntime", tmp_path / "tagger")
        # Data of another length than the example's.
        data = sl.Data(test=(RNG.integers(0, 20, (40, 9)), RNG.integers(0, 3, (40, 9))), metric="f1_macro")
        assert data.check(again.inputs).split("certification").inputs[0].shape[1] == 9

    def test_a_convolutional_network_keeps_its_image_free(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        torch = pytest.importorskip("torch")
        nn = torch.nn

        class Skip(nn.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
                self.down, self.up = nn.Conv2d(16, 8, 3, 2, padding=1), nn.Conv2d(24, 4, 1)

            def forward(self, image: Any) -> Any:
                fine = torch.relu(self.norm(self.first(image)))
                coarse = torch.relu(self.down(fine))
                return self.up(torch.cat([fine, nn.functional.interpolate(coarse, size=fine.shape[2:])], 1))

        torch.manual_seed(0)
        with caplog.at_level(logging.WARNING, "slimline"):
            model = sl.load(Skip().eval(), floats(2, 3, 12, 16), dynamic=True)
            assert model.inputs == (("image", (None, 3, None, None), "float32"),)
            self.through(model, floats(3, 3, 21, 14), "onnxruntime", tmp_path / "skip")
        assert not caplog.text

    def test_a_program_of_others_keeps_what_it_declares(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        network = torch.nn.Sequential(torch.nn.Conv1d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv1d(8, 3, 1))
        dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("time")}
        program = torch.export.export(network.eval(), (torch.rand(2, 2, 9),), dynamic_shapes=({**dims},))
        model = sl.load(program, floats(2, 2, 9))
        assert model.inputs[0].shape == (None, 2, None)
        self.through(model, floats(3, 2, 15), "onnxruntime", tmp_path / "conv")

    def test_where_nothing_is_free_that_is_an_error(self) -> None:
        torch = pytest.importorskip("torch")
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        with pytest.raises(sl.SlimlineError, match="Sequential leaves no size of its inputs free but the batch"):
            sl.load(network, floats(2, 12), dynamic=True)

    def test_sizes_of_none_of_a_keras_model_stay(self, tmp_path: Path) -> None:
        keras = pytest.importorskip("keras")
        image = keras.Input((None, None, 3), name="image")
        x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
        model = sl.load(keras.Model(image, keras.layers.Conv2D(4, 3, padding="same")(x)), floats(2, 8, 8, 3))
        assert model.inputs == (("image", (None, None, None, 3), "float32"),)
        self.through(model, floats(3, 11, 9, 3), "litert", tmp_path / "image")
