"""Weights that Core ML packages hold as codes, palettes and without their zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked
from slimline.methods.levels import fitted
from slimline.methods.scales import widest
from slimline.runtimes.base import runtime
from slimline.runtimes.coreml_weights import can_store, container, packed, smallest, unpacked

BLOCKS = [(), (1, None), (None, 1), (1, 8), (2, 12), (1, 7)]

FORMATS = {
    "conv": "int8", "table": "int8", "a": "int4", "b": "ternary", "c": "binary", "d": "fp8_e4m3", "e": "fp16",
    "f": (-1.0, -0.3, 0.0, 0.37, 1.0), "g": "int3",
}  # fmt: skip


def _format(weight: np.ndarray, kind: str, blocks: tuple[int | None, ...]) -> Format:
    if kind in ("binary", "ternary", "list"):
        levels = {"binary": [-1, 1], "ternary": [-1, 0, 1], "list": [-1, -0.3, 0, 0.37, 1]}[kind]
        return fitted(weight, Levels(np.float32(1), (), np.array(levels, np.float32)), blocks)
    return widest(weight, kind.removesuffix("a"), blocks, symmetric=not kind.endswith("a"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["int8", "int8a", "int5", "int4", "int4a", "int3", "int2", "float8_e4m3fn", "float16", "float8_e5m2"]
    )
    | st.sampled_from(["binary", "ternary", "list"]),
    st.sampled_from(BLOCKS),
    st.floats(0, 0.95),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_what_is_stored_is_the_weight(
    kind: str, blocks: tuple[int | None, ...], zeros: float, legacy: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(16, 24)).astype(np.float32)
    each = _format(weight, kind, blocks)
    weight = each.round(weight)
    keep = generator.random(weight.shape) >= zeros
    if not isinstance(each, Levels) or 0 in each.codebook:
        weight *= keep
    way = smallest(weight, each, "float16", legacy)
    np.testing.assert_array_equal(way.values(), weight)
    assert way.bits <= 16 * weight.size + 512 and (way.legacy or not legacy)
    if not legacy and not way.is_plain and way.mask is None and way.offset is None and blocks != (1, 7):
        assert int("".join(filter(str.isdigit, way.kind))) == pytest.approx(container(each, legacy), abs=4)


def test_the_smallest_way_is_taken() -> None:
    generator = np.random.default_rng(0)
    shared = np.float32([0.1, -0.2, 0.3, 0.5])[generator.integers(0, 4, (64, 64))]
    rows = shared * generator.normal(size=(64, 1)).astype(np.float32)
    sparse = shared * (generator.random(shared.shape) > 0.9)
    plain = generator.normal(size=(64, 64)).astype(np.float32)
    header = 512
    assert smallest(plain, None, "float16", False).is_plain
    way = smallest(shared, None, "float16", False)
    assert (way.kind, way.bits) == ("uint2", 2 * 4096 + 16 * 4 + 2 * header) and way.legacy
    way = smallest(rows, None, "float16", False)
    assert (way.kind, way.bits) == ("uint2", 2 * 4096 + 64 * 16 * 4 + 2 * header) and not way.legacy
    assert not smallest(rows, None, "float16", True).is_plain  # 256 numbers in all, in 8 bits
    way = smallest(sparse, None, "float16", False)
    count = np.count_nonzero(sparse)
    assert (way.kind, way.bits) == ("uint2", 2 * count + 4096 + 16 * 4 + 3 * header)
    assert smallest(sparse, None, "float16", True).legacy
    grid = widest(plain, "int4", (1, 32))
    way = smallest(grid.round(plain), grid, "float16", False)
    assert (way.kind, way.bits) == ("int4", 4 * 4096 + 16 * 128 + 2 * header)


def test_short_last_blocks_become_parts_of_blocks() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 320)).astype(np.float32)
    grid = widest(weight, "int4", (1, 128))
    way = smallest(grid.round(weight), grid, "float16", False)
    assert way.scale is not None and way.scale.shape == (4, 5)  # of 64, which 128 and 320 are multiples of
    odd = widest(weight[:, :319], "int4", (1, 128))
    assert smallest(odd.round(weight[:, :319]), odd, "float16", False).is_plain  # a scale for each number is no saving


def test_scales_that_float16_lacks_leave_a_weight_plain() -> None:
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32) * 1e-6
    grid = widest(weight, "int8", (1, None))
    assert smallest(grid.round(weight), grid, "float16", False).is_plain
    assert not smallest(grid.round(weight), grid, "float32", False).is_plain


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_bits_are_packed_as_core_ml_reads_them(width: int) -> None:
    pytest.importorskip("coremltools")
    from coremltools.optimize._utils import pack_elements_into_bits

    codes = np.random.default_rng(width).integers(0, 2**width, 37).astype(np.uint8)
    np.testing.assert_array_equal(packed(codes, width), pack_elements_into_bits(codes, width))
    np.testing.assert_array_equal(unpacked(packed(codes, width), width, codes.size), codes)


def test_formats_that_it_cannot_hold() -> None:
    one = np.ones((4, 1), np.float32)
    grid = IntegerGrid(one, (1, None), 4, True)
    affine = IntegerGrid(one, (1, None), 8, False, zero_point=np.full((4, 1), 9, np.int32))
    blocks = IntegerGrid(np.ones((4, 2), np.float32), (1, 32), 4, True)
    ternary = Levels.ternary(one, (1, None))
    many = Levels(np.float32(1), (), np.arange(300, dtype=np.float32))
    half, eight = FloatFormat.plain("float16"), FloatFormat(one, (1, None), "float8_e4m3fn")
    mask = Masked(np.ones((4, 64), np.bool_), grid)
    held = {
        False: [grid, affine, blocks, ternary, half, eight, mask],
        True: [grid, affine, ternary, half],
    }
    every = [grid, affine, blocks, ternary, many, half, eight, mask, FloatFormat.plain("bfloat16")]
    for legacy, formats in held.items():
        assert [each for each in every if can_store(each, "float16", legacy)] == formats
    assert not can_store(half, "float32", False)
    assert [container(each, False) for each in (grid, affine, ternary, half, eight, mask)] == [4, 8, 2, 16, 8, 4]
    assert [container(each, True) for each in (grid, affine, ternary)] == [8, 8, 8]


def test_settings() -> None:
    assert runtime("coreml:fp32,ios17").name == "coreml:fp32,ios17"
    for name, what in (("coreml:ios16", "setting of coreml"), ("coreml:ios17,ios18", "two settings of system")):
        with pytest.raises(SlimlineError, match=what):
            runtime(name)


def test_what_zeros_and_shared_values_buy_is_said() -> None:
    from slimline.recipe.registry import handlers

    sparse, sharing = handlers()["SparsePruning"], handlers()["WeightSharing"]
    assert "leaves zeros out where that is smaller" in sparse.remarks(sl.SparsePruning(amount=0.5), "coreml")[0]
    assert "holds places in palettes" in sharing.remarks(sl.WeightSharing(), "coreml:ios17")[0]
    assert "slimline pack does" in sharing.remarks(sl.WeightSharing(), "onnxruntime")[0]


class TestPackages:
    """What is exported, read back and decoded."""

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        pytest.importorskip("coremltools")

    def model(self) -> sl.Model:
        torch = pytest.importorskip("torch")
        from torch import nn

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64)
                self.table = nn.Embedding(100, 64)
                for name in "abcdefg":
                    self.add_module(name, nn.Linear(64, 64))

            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                h = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + self.table(t)
                left, right = h.chunk(2, -1)
                h = torch.cat([right, left], -1)
                for name in "abcdefg":
                    h = torch.tanh(self.get_submodule(name)(h))
                return h

        torch.manual_seed(0)
        net = Net()
        for name in "abcdefg":
            nn.init.normal_(net.get_submodule(name).weight)
        net.train()(torch.randn(8, 16, 8, 8), torch.arange(8))
        x = np.random.default_rng(0).normal(size=(2, 16, 8, 8)).astype(np.float32)
        return sl.load(net.eval(), (x, np.array([3, 99])))

    def export(
        self, model: sl.Model, folder: Path, target: str = "coreml"
    ) -> tuple[Path, dict[str, tuple[str, float]]]:
        """The package, and by weight the last operator that decodes it and its bits per number."""
        from slimline.runtimes.coreml_package import Package

        path = sl.export(model, target, folder)
        stored = model.parameters()
        held = {}
        for each in Package(path).weights():
            names = [name for name, weight in stored.items() if weight.size == each.values.size]
            if len(names) > 1:
                flat = each.values.ravel()
                names = [name for name in names if np.allclose(stored[name].ravel(), flat, rtol=2e-3, atol=1e-6)]
            assert len(names) == 1
            held[names[0].removesuffix(".weight")] = (
                each.forms[0].removeprefix("constexpr_"), round(each.bits / each.values.size, 3)
            )  # fmt: skip
        return path, held

    def test_formats(self, tmp_path: Path) -> None:
        step = sl.WeightQuantization(overrides={name: {"dtype": dtype} for name, dtype in FORMATS.items()})
        small = sl.apply(self.model(), step, target="coreml")
        path, held = self.export(small, tmp_path)
        dense = {name: float(np.mean(small.parameters()[f"{name}.weight"] != 0)) for name in "bf"}
        table = 16 / 4096  # bits of a number in a palette, for each weight of a layer
        # Scales of 16 bits lie over 64 weights, of the convolution over 144; without zeros levels need a bit less.
        assert held == {
            "conv": ("blockwise_shift_scale", pytest.approx(8 + 16 / 144, abs=1e-3)),
            "table": ("blockwise_shift_scale", 8.25),
            "a": ("blockwise_shift_scale", 4.25),
            "b": ("blockwise_shift_scale", pytest.approx(1 + dense["b"] + 0.25 + 2 * table, abs=1e-3)),
            "c": ("blockwise_shift_scale", pytest.approx(1 + 0.25 + 2 * table, abs=1e-3)),
            "d": ("blockwise_shift_scale", pytest.approx(8 + 0.25 + 256 * table, abs=1e-3)),
            "f": ("blockwise_shift_scale", pytest.approx(1 + 2 * dense["f"] + 0.25 + 4 * table, abs=1e-3)),
            "g": ("blockwise_shift_scale", pytest.approx(3 + 0.25 + 8 * table, abs=1e-3)),
        }
        assert 32 / held["a"][1] > 7.5  # of four bits an eighth of float32 and the scales
        sizes = {name: small.parameters()[f"{name}.weight"].size for name in FORMATS}
        bits = sum(sizes[name] * (held[name][1] if name in held else 16) for name in sizes)
        weights = (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        assert bits / 8 < weights < bits / 8 + 128 * 40  # and biases, and what says where each array lies
        again = sl.export(sl.apply(self.model(), step, target="coreml"), "coreml", tmp_path / "again")
        for part in ("Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"):
            assert (again / part).read_bytes() == (path / part).read_bytes()
        from slimline.runtimes.coreml_package import Package

        description = Package(path).model.description.metadata.shortDescription
        assert description == "Needs iOS 18 or macOS 15." and Package(path).model.specificationVersion == 9

    def test_zeros(self, tmp_path: Path) -> None:
        pruned = sl.apply(self.model(), sl.SparsePruning(amount=0.8, scope="local"))
        overrides = {"a": {"dtype": "int8"}, "b": {"dtype": "int4"}, "c": {"dtype": "ternary"}}
        step = sl.WeightQuantization(layers=("a", "b", "c"), overrides=overrides)
        _, held = self.export(sl.apply(pruned, step, target="coreml"), tmp_path)
        assert {name: form for name, (form, _) in held.items()} == {
            **dict.fromkeys(("conv", "a", "b", "d", "e", "f", "g"), "sparse_to_dense"),
            "c": "blockwise_shift_scale",
        }
        for name, width in (("a", 8), ("b", 4), ("d", 16), ("c", 1)):  # of ternary weights only signs are left
            assert held[name][1] == pytest.approx(1 + 0.2 * width + (0.25 if name in "abc" else 0), abs=0.02)

    def test_shared_values(self, tmp_path: Path) -> None:
        step = sl.WeightSharing(clusters=16, overrides={"a": {"clusters": 4}, "b": {"clusters": 7}})
        shared = sl.apply(self.model(), step)
        _, held = self.export(shared, tmp_path)
        assert {form for form, _ in held.values()} == {"lut_to_dense"}
        assert held["c"][1] == pytest.approx(4 + 16 * 16 / 4096, abs=1e-3)
        assert held["a"][1] == pytest.approx(2 + 4 * 16 / 4096, abs=1e-3)
        assert held["b"][1] == pytest.approx(3 + 8 * 16 / 4096, abs=1e-3)
        # Folding the norm gave each of the 64 channels values of its own.
        assert held["conv"][1] == pytest.approx(4 + 16 * 16 / 144, abs=1e-3)
        path, held = self.export(shared, tmp_path / "older", "coreml:ios17")
        assert held["b"][1] == pytest.approx(4 + 16 * 16 / 4096, abs=1e-3) and "conv" not in held
        from slimline.runtimes.coreml_package import Package

        assert Package(path).model.description.metadata.shortDescription == "Needs iOS 17 or macOS 14."
