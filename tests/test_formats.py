"""Formats in models: both frameworks simulate them, files hold them, and no target writes what it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.files import archive, strictjson
from slimline.graph.edits import PutTensors, Round
from slimline.graph.quantization import Quantization
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked, along
from slimline.runtimes.base import runtime

INPUTS, UNITS = 10, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, INPUTS)).astype(np.float32)
FRAMEWORKS = ("torch", "keras")
NAMES = {"torch": ("fc.weight", "x"), "keras": ("fc/kernel", "x")}
SHAPES = {"torch": (UNITS, INPUTS), "keras": (INPUTS, UNITS)}
MEMBERS = {"torch": "model/extra/slimline_formats.safetensors", "keras": "formats.safetensors"}
NOTES = {"torch": "model/extra/slimline.json", "keras": "slimline.json"}
TARGETS = {"torch": "onnxruntime", "keras": "litert"}


def scales(*counts: int) -> np.ndarray:
    return np.asarray(RNG.uniform(0.05, 0.3, counts), np.float32)


def _weight_formats(shape: tuple[int, int]) -> dict[str, Format]:
    rows, columns = shape
    return {
        "int4 tensor": IntegerGrid(scales(), (), 4, True),
        "int8 axis": IntegerGrid(scales(1, columns), along(1, 2), 8, True, True),
        "uint16 affine": IntegerGrid(scales() / 100, (), 16, False, False, np.asarray(30000, np.int32)),
        "uint3 affine axis": IntegerGrid(
            scales(rows, 1), along(0, 2), 3, False, False, np.full((rows, 1), 3, np.int32)
        ),
        "int4 blocks": IntegerGrid(scales(rows, -(-columns // 4)), (1, 4), 4, True),
        "uint4 squares": IntegerGrid(
            scales(-(-rows // 4), -(-columns // 3)),
            (4, 3),
            4,
            False,
            False,
            RNG.integers(0, 16, (-(-rows // 4), -(-columns // 3))).astype(np.int32),
        ),
        "float16": FloatFormat.plain("float16"),
        "bfloat16": FloatFormat.plain("bfloat16"),
        "float8_e4m3fn": FloatFormat(scales(rows, 1) / 1000, along(0, 2), "float8_e4m3fn"),
        "float8_e5m2": FloatFormat.plain("float8_e5m2"),
        "binary": Levels.binary(scales(rows, 1), along(0, 2)),
        "ternary blocks": Levels.ternary(scales(rows, -(-columns // 4)), (1, 4)),
        "powers of two": Levels.powers_of_two(4, scales()),
        "masked int4": Masked(RNG.random(shape) < 0.5, IntegerGrid(scales(), (), 4, True)),
        "masked ternary": Masked(RNG.random(shape) < 0.5, Levels.ternary(scales())),
    }


FORMATS = {framework: _weight_formats(SHAPES[framework]) for framework in FRAMEWORKS}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def model(request: pytest.FixtureRequest) -> sl.Model:
    """A single layer called ``fc`` on the input ``x``."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)

        class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.fc = torch.nn.Linear(INPUTS, UNITS)

            def forward(self, x: Any) -> Any:
                return self.fc(x)

        return sl.load(Net().eval(), X)
    pytest.importorskip("tensorflow")
    import slimline.frameworks.keras  # noqa: F401  chooses the backend

    import keras  # isort: skip

    keras.utils.set_random_seed(0)
    inputs = keras.Input((INPUTS,), name="x")
    return sl.load(keras.Model(inputs, keras.layers.Dense(UNITS, name="fc")(inputs)), X)


def rounded(model: sl.Model, quantization: Quantization) -> sl.Model:
    return model.then(model.edit(Round(quantization)), {"step": "test"}, quantization)


def oracle(model: sl.Model, weight: Format, x: np.ndarray) -> np.ndarray:
    stored = {name.replace("/", ".").rpartition(".")[2]: array for name, array in model.parameters().items()}
    if model.framework == "torch":
        return x @ weight.round(stored["weight"]).T + stored["bias"]
    return x @ weight.round(stored["kernel"]) + stored["bias"]


@pytest.mark.parametrize("name", list(FORMATS["torch"]))
def test_weights_are_rounded_as_the_format_says_and_files_hold_it(model: sl.Model, name: str, tmp_path: Path) -> None:
    weight, value = NAMES[model.framework]
    each = FORMATS[model.framework][name]
    quantization = Quantization({value: IntegerGrid(scales() + 0.01, (), 8, True)}, {weight: each}, ("fc",))
    simulated = rounded(model, quantization)
    wanted = oracle(model, each, quantization.activations[value].round(X))
    np.testing.assert_allclose(simulated.predict(X), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(simulated.parameters()[weight], model.parameters()[weight])
    again = sl.load(simulated.save(tmp_path / f"m{model.adapter.suffix}"))
    assert again.quantization == quantization
    np.testing.assert_array_equal(again.predict(X), simulated.predict(X))
    assert (tmp_path / f"m{model.adapter.suffix}").read_bytes() == again.save(
        tmp_path / f"n{model.adapter.suffix}"
    ).read_bytes()


@pytest.mark.parametrize(
    "each",
    [
        IntegerGrid(scales(), (), 5, False, False, np.asarray(9, np.int32)),
        IntegerGrid(scales(1, INPUTS), along(1, 2), 8, True),
        IntegerGrid(scales(1, -(-INPUTS // 4)), (None, 4), 4, True),
        FloatFormat.plain("bfloat16"),
        Levels.ternary(scales()),
    ],
    ids=Format.describe,
)
def test_activations_are_rounded_at_every_batch(model: sl.Model, each: Format) -> None:
    simulated = rounded(model, Quantization({NAMES[model.framework][1]: each}))
    for rows in (1, 3):
        wanted = oracle(model, FloatFormat.plain("float32"), each.round(X[:rows]))
        np.testing.assert_allclose(simulated.predict(X[:rows]), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_go_straight_through(model: sl.Model) -> None:
    weight, _ = NAMES[model.framework]
    shape = SHAPES[model.framework]
    plain = model.adapter.gradients(model.native, [((X,), None)], "norm")[weight]
    for each in (FloatFormat.plain("float32"), Masked(np.ones(shape, bool), FloatFormat.plain("float32"))):
        simulated = rounded(model, Quantization(weights={weight: each}))
        found = simulated.adapter.gradients(simulated.native, [((X,), None)], "norm")[weight]
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    coarse = rounded(model, Quantization(weights={weight: Levels.binary(np.asarray(0.1, np.float32))}))
    assert np.abs(coarse.adapter.gradients(coarse.native, [((X,), None)], "norm")[weight]).min() > 0


@pytest.mark.parametrize("name", ["int4 tensor", "uint16 affine", "int4 blocks", "float16", "ternary blocks"])
def test_a_target_refuses_a_format_that_it_cannot_write(model: sl.Model, name: str, tmp_path: Path) -> None:
    weight, value = NAMES[model.framework]
    each = FORMATS[model.framework][name]
    target = TARGETS[model.framework]
    if runtime(target).can_write(each, stored=True):
        pytest.skip(f"{target} writes it")
    simulated = rounded(model, Quantization(weights={weight: each}))
    said = rf"{target} cannot write the weight {weight} of layer fc.* as {each.describe()}.*it takes integer grids of "
    with pytest.raises(SlimlineError, match=said):
        sl.export(simulated, target, tmp_path)
    simulated = rounded(model, Quantization({value: each if each.fits(X.shape) else FloatFormat.plain("float16")}))
    with pytest.raises(SlimlineError, match=f"cannot write the activation {value} as "):
        sl.export(simulated, target, tmp_path)


def _changed(path: Path, change: Any) -> Path:
    """A copy of an archive with members changed by hand."""
    held = archive.read(path, packed=True)
    members = {name: held.read(name) for name in held.sizes}
    change(members)
    changed = path.with_name(f"changed{path.suffix}")
    archive.write(changed, members)
    return changed


def test_no_number_of_a_format_is_json_and_damage_is_one_sentence(model: sl.Model, tmp_path: Path) -> None:
    weight, _ = NAMES[model.framework]
    member, notes = MEMBERS[model.framework], NOTES[model.framework]
    grid = IntegerGrid(scales(1, SHAPES[model.framework][1]), along(1, 2), 8, True, True)
    path = rounded(model, Quantization(weights={weight: grid})).save(tmp_path / f"q{model.adapter.suffix}")
    torch = model.framework == "torch"

    def stored(content: bytes) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(bytes.fromhex(content.decode()) if torch else content)

    def bytes_of(arrays: dict[str, np.ndarray]) -> bytes:
        content = safetensors.numpy.save(arrays)
        return content.hex().encode() if torch else content

    held = archive.read(path, packed=True)
    arrays = stored(held.read(member))
    assert [a.tolist() for a in arrays.values()] == [grid.scale.tolist()]
    text = held.read(notes)
    assert b"0." not in text and strictjson.parse(text)["metadata"]["quantization"]["weights"][weight]["bits"] == 8

    def spoilt(change: Any) -> Any:
        return lambda members: members.update({member: bytes_of({k: change(a) for k, a in arrays.items()})})

    def half(members: dict[str, bytes]) -> None:
        members[member] = members[member][: len(members[member]) // 2]

    damages = {
        "none": lambda members: members.pop(member),
        "half": half,
        "garbage": lambda members: members.update({member: b"zz" * 40}),
        "zero": spoilt(lambda a: a * 0),
        "nan": spoilt(lambda a: a * np.float32(np.nan)),
        "double": spoilt(lambda a: a.astype(np.float64)),
        "shorter": spoilt(lambda a: np.ascontiguousarray(a[..., 1:])),
        "flat": spoilt(lambda a: a.ravel()),
        "more": lambda members: members.update({member: bytes_of({**arrays, "more": np.ones(1)})}),
        "other name": lambda members: members.update({member: bytes_of({f"{k}x": a for k, a in arrays.items()})}),
        "old notes": lambda members: members.update({notes: text.replace(b'"kind": "integer", ', b"")}),
        "bits": lambda members: members.update({notes: text.replace(b'"bits": 8', b'"bits": 80')}),
    }
    for name, damage in damages.items():
        with pytest.raises(SlimlineError) as caught:
            sl.load(_changed(path, damage))
        assert "\n" not in str(caught.value), name


def test_a_file_whose_network_rounds_otherwise_than_its_notes_say_is_refused(model: sl.Model, tmp_path: Path) -> None:
    weight, value = NAMES[model.framework]
    notes = NOTES[model.framework]
    shape = SHAPES[model.framework]
    honest = Quantization(
        {value: IntegerGrid(np.asarray(0.05, np.float32), (), 8, False, False, np.asarray(128, np.int32))},
        {weight: IntegerGrid(scales(1, shape[1]), along(1, 2), 8, True, True)},
        ("fc",),
    )
    each, grid = honest.activations[value], honest.weights[weight]
    assert isinstance(each, IntegerGrid) and isinstance(grid, IntegerGrid)
    zero = np.asarray(127, np.int32)
    others: list[tuple[str, dict[str, Format], dict[str, Format]]] = [
        (value, {value: replace(each, scale=each.scale * 2)}, {weight: grid}),
        (value, {value: replace(each, zero_point=zero)}, {weight: grid}),
        (value, {value: replace(each, bits=7, zero_point=zero)}, {weight: grid}),
        (value, {value: Levels.ternary(each.scale)}, {weight: grid}),
        (value, {}, {weight: grid}),
        (weight, {value: each}, {weight: replace(grid, scale=np.nextafter(grid.scale, np.float32(1)))}),
        (weight, {value: each}, {weight: replace(grid, narrow=False)}),
        (weight, {value: each}, {weight: replace(grid, scale=scales(shape[0], 1), blocks=along(0, 2))}),
        (weight, {value: each}, {weight: Masked(np.ones(shape, bool), grid)}),
        (weight, {value: each}, {}),
    ]
    path = rounded(model, honest).save(tmp_path / f"honest{model.adapter.suffix}")
    assert sl.load(path).quantization == honest
    member = MEMBERS[model.framework]
    for name, activations, weights in others:
        other = model.then(rounded(model, honest).native, {"step": "test"}, Quantization(activations, weights, ("fc",)))
        said = archive.read(other.save(tmp_path / f"other{model.adapter.suffix}"), packed=True)
        own = {part: said.read(part) for part in (notes, member) if part in said.sizes}
        with pytest.raises(SlimlineError, match=f"does not round {name} to the format that its notes hold"):
            sl.load(_changed(path, lambda members, own=own: members.update(own)))


def test_a_weight_that_was_rounded_for_good_is_of_its_format(model: sl.Model, tmp_path: Path) -> None:
    weight, _ = NAMES[model.framework]
    for name, each in FORMATS[model.framework].items():
        native = model.edit(PutTensors({weight: each.round(model.parameters()[weight])}))
        stored = model.then(native, {"step": "test"}, Quantization(weights={weight: each}))
        assert sl.load(stored.save(tmp_path / f"m{model.adapter.suffix}")).quantization == stored.quantization, name
    other = model.then(native, {"step": "test"}, Quantization(weights={weight: IntegerGrid(scales(), (), 4, True)}))
    with pytest.raises(SlimlineError, match=f"does not round {weight} to the format"):
        sl.load(other.save(tmp_path / f"other{model.adapter.suffix}"))


def test_every_format_is_told_from_another(model: sl.Model) -> None:
    weight, _ = NAMES[model.framework]
    formats = FORMATS[model.framework]
    for name, each in formats.items():
        native = rounded(model, Quantization(weights={weight: each})).native
        agree = [
            other for other, o in formats.items()
            if model.adapter.format_mismatches(native, Quantization(weights={weight: o})) == []
        ]  # fmt: skip
        assert agree == [name]


def test_a_network_that_rounds_by_itself_is_not_quantized() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(INPUTS, UNITS)

        def forward(self, x: Any) -> Any:
            return self.fc(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))

    model = sl.load(Net().eval(), X)
    with pytest.raises(SlimlineError, match="rounds x by itself"):
        sl.apply(model, sl.StaticQuantization(samples=4), sl.Data(train=(X, np.arange(len(X)) % 2)))


def test_a_keras_layer_rebuilt_from_its_config_says_that_its_numbers_are_missing() -> None:
    pytest.importorskip("tensorflow")
    import slimline.frameworks.keras  # noqa: F401  chooses the backend
    from slimline.frameworks.keras.functional import clone
    from slimline.frameworks.keras.gridded import FakeQuantize

    layer = FakeQuantize(format=IntegerGrid(scales(), (), 8, True))
    np.testing.assert_array_equal(clone(layer)(X), layer(X))
    with pytest.raises(SlimlineError, match="lacks the numbers"):
        FakeQuantize.from_config(layer.get_config())(X)


def test_a_buffer_of_a_user_s_that_is_called_like_a_scale_stays_apart() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(INPUTS, UNITS, bias=False)
            self.fc.register_buffer("weight_scale", torch.full((UNITS,), 3.0))

        def forward(self, x: Any) -> Any:
            return self.fc(x) * self.fc.weight_scale

    model = sl.load(Net().eval(), X)
    grid = IntegerGrid(scales(UNITS, 1), along(0, 2), 8, True)
    simulated = rounded(model, Quantization(weights={"fc.weight": grid}))
    wanted = X @ grid.round(model.parameters()["fc.weight"]).T * 3
    np.testing.assert_allclose(simulated.predict(X), wanted, rtol=1e-5, atol=1e-5)
