"""A transformer's encoder in integers: which of its products each runtime executes so, and what attention becomes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import slimline as sl
from slimline.graph.ir import IDLE
from slimline.model.equality import echo
from slimline.model.lowering import write
from slimline.runtimes.base import runtime
from slimline.runtimes.onnxruntime import OnnxRuntime

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

TOKENS, WIDTH, HEADS = 6, 16, 2
PRODUCTS = ("query", "key", "value", "out", "up", "down")


class Block(nn.Module):
    """Attention with separate projections, as BERT has it, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = (layer(x).view(-1, TOKENS, HEADS, WIDTH // HEADS) for layer in (self.query, self.key, self.value))
        heads = nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), attn_mask=mask)
        x = self.first(x + self.out(heads.transpose(1, 2).reshape(-1, TOKENS, WIDTH)))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Words and which of them count -> logits; like BERT it has a pooler, which nobody reads here."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, WIDTH), nn.LayerNorm(WIDTH)
        self.block = Block()
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.block(self.norm(self.table(words)), (mask > 0)[:, None, None, :])
        torch.tanh(self.pooler(x[:, 0]))
        return self.head(x.mean(1))


RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 20, (32, TOKENS))
MASK = (np.arange(TOKENS) < RNG.integers(1, TOKENS + 1, (32, 1))).astype(np.int64)
MASK[3] = 0  # no word counts
INPUTS = WORDS, MASK
STATIC = sl.StaticQuantization(undo=False, observer="minmax")


@pytest.fixture(scope="module")
def encoder() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Encoder().eval(), (WORDS[:2], MASK[:2]))


def static(model: sl.Model, target: str) -> sl.Model:
    return sl.apply(model, STATIC, sl.Data(calibration=(INPUTS,)), target=target, progress=False)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "litert"])
def test_every_linear_product_is_integer(encoder: sl.Model, target: str, tmp_path: Path) -> None:
    if reason := runtime(target).available():
        pytest.skip(reason)
    small = static(encoder, target)
    path = sl.export(small, target, tmp_path)
    executed = runtime(target).integer_layers(path)
    assert {executed[name] for name in (*(f"block.{name}" for name in PRODUCTS), "head")} == {"integer"}
    answer, simulated = runtime(target).load(path).run(INPUTS), small.predict(*INPUTS)
    assert np.abs(answer - simulated).max() < 0.02 * np.abs(simulated).max()
    assert (answer.argmax(1) == encoder.predict(*INPUTS).argmax(1)).mean() > 0.9


def test_integer_products_add_their_biases(encoder: sl.Model, tmp_path: Path) -> None:
    """Short weights too; but only for the CPU, as nothing else has the operator."""
    step, data = STATIC.model_copy(update={"weights": "int4"}), sl.Data(calibration=(INPUTS,))
    small = sl.apply(encoder, step, data, target="onnxruntime", progress=False)
    own, standard = tmp_path / "own.onnx", tmp_path / "standard.onnx"
    write(OnnxRuntime(), small, own)
    write(OnnxRuntime(provider="cuda"), small, standard)
    kinds = [Counter(node.op_type for node in onnx.load(path).graph.node) for path in (own, standard)]
    assert kinds[0]["MatMulIntegerToFloat"] == kinds[1]["MatMul"] - kinds[0]["MatMul"] == len(PRODUCTS)
    assert not kinds[1]["MatMulIntegerToFloat"]
    assert {each.domain for each in onnx.load(standard).opset_import} == {""}
    one, other = (runtime("onnxruntime").load(path).run(INPUTS) for path in (own, standard))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "litert"])
def test_attention_chooses_between_no_products(encoder: sl.Model, target: str, tmp_path: Path) -> None:
    """And gives zeros, as torch does, where there is nothing to look at."""
    if reason := runtime(target).available():
        pytest.skip(reason)
    path = sl.export(encoder, target, tmp_path)
    chosen = [name for name in runtime(target).integer_layers(path) if "Where" in name or "SELECT" in name]
    assert len(chosen) <= 1, "of the mask"
    np.testing.assert_allclose(runtime(target).load(path).run(INPUTS), encoder.predict(*INPUTS), atol=1e-5)


@pytest.mark.parametrize("step", [sl.DynamicQuantization(undo=False), sl.WeightQuantization(dtype="int8")])
def test_layers_that_nobody_reads_are_left(encoder: sl.Model, step: sl.Step, tmp_path: Path) -> None:
    small = sl.apply(encoder, step)
    assert small.quantization is not None and "pooler.weight" not in small.quantization.weights
    path = sl.export(small, "onnxruntime", tmp_path)
    answer, simulated = runtime("onnxruntime").load(path).run(INPUTS), small.predict(*INPUTS)
    assert np.abs(answer - simulated).max() < 0.02 * np.abs(simulated).max()


def test_static_quantization_says_which_layer_nobody_reads(encoder: sl.Model) -> None:
    quantization = static(encoder, "onnxruntime").quantization
    assert quantization is not None and dict(quantization.float_layers) == {"pooler": IDLE}


@pytest.mark.parametrize("count", [1, 8])
def test_one_number_that_all_outputs_share_is_no_bias(count: int, tmp_path: Path) -> None:
    from tests.frameworks.onnx.graphs import model, weights

    graph = model(
        "z = MatMul(x, first__weight) y = Add(z, shift)",
        {**weights(first__weight=(6, 8)), "shift": np.full(count, 0.5, np.float32)},
        "float[N,5,6] x",
        "float[N,5,8] y",
    )
    x = np.random.default_rng(0).normal(size=(16, 5, 6)).astype(np.float32)
    small = sl.apply(sl.load(graph, x[:2]), sl.StaticQuantization(undo=False), sl.Data(calibration=x), progress=False)
    path = sl.export(small, "onnxruntime", tmp_path)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("MatMulIntegerToFloat" in operators) == (count == 8)
    answers = runtime("onnxruntime").load(path).outputs((x,))[0]
    np.testing.assert_allclose(answers, small.outputs(x)[0], atol=1e-5)


def test_echo_moves_floats_alone(encoder: sl.Model) -> None:
    """By as much as the arithmetic of a runtime does; the same each time."""
    small = static(encoder, "onnxruntime")
    first, again = echo(small, INPUTS), echo(small, INPUTS)
    np.testing.assert_array_equal(first[0], again[0])
    simulated = small.predict(*INPUTS)
    moved = np.abs(first[0] - simulated)
    assert 0 < moved.max() < 0.05 * np.abs(simulated).max()
    assert np.median(moved) < 1e-3 * np.abs(simulated).max(), "most roundings fall as they did"


@pytest.mark.parametrize("target", ["onnxruntime", "litert"])
def test_models_of_every_framework_have_an_echo(encoder: sl.Model, target: str, tmp_path: Path) -> None:
    """Or the gate would break off where it should ask."""
    keras = pytest.importorskip("keras")
    from keras import layers

    if reason := runtime(target).available():
        pytest.skip(reason)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    dense = keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu", bias_initializer="ones"), layers.Dense(4)])
    models = {"onnx": (sl.load(sl.export(encoder, "onnxruntime", tmp_path)), INPUTS), "keras": (sl.load(dense), (x,))}
    for name, (model, inputs) in models.items():
        small = sl.apply(model, STATIC, sl.Data(calibration=(inputs,)), target=target, progress=False)
        (simulated,), (moved,) = small.outputs(*inputs), echo(small, inputs)
        assert moved.shape == simulated.shape and np.isfinite(moved).all(), name
        assert np.abs(moved - simulated).mean() < 0.01 * np.abs(simulated).max(), name
        stored, again = small.parameters(), small.outputs(*inputs)[0]
        np.testing.assert_array_equal(again, simulated, err_msg=f"{name} itself stays as it is")
        assert stored.keys() == small.parameters().keys()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_queries_and_keys_are_integers_where_their_product_is_faster_so(encoder: sl.Model, target: str) -> None:
    if reason := runtime(target).available():
        pytest.skip(reason)
    quantization, graph = static(encoder, target).quantization, encoder.graph
    assert quantization is not None
    made = {node.layer: node.outputs[0] for node in graph.nodes if node.kind == "linear"}
    rounded = {layer for layer, name in made.items() if name in quantization.activations}
    expected = {"block.query", "block.key"} if target == "openvino" else set()
    assert rounded & {"block.query", "block.key", "block.value"} == expected
    data, kept = sl.Data(calibration=(INPUTS,)), STATIC.model_copy(update={"keep": ("block.key",)})
    alone = sl.apply(encoder, kept, data, target=target, progress=False).quantization
    assert alone is not None and made["block.key"] not in alone.activations


def test_openvino_multiplies_queries_and_keys_in_integers(encoder: sl.Model, tmp_path: Path) -> None:
    """Not only are they rounded: its fused attention takes codes, as its own list of what it executes has it."""
    openvino = runtime("openvino")
    if reason := openvino.available():
        pytest.skip(reason)
    small = static(encoder, "openvino")
    assert small.quantization is not None
    made = {node.layer: node.outputs[0] for node in encoder.graph.nodes if node.kind == "linear"}
    zeros = [small.quantization.activations[made[f"block.{name}"]].zero for name in ("query", "key")]  # type: ignore[attr-defined]
    assert zeros == [128, 128]
    path = sl.export(small, "openvino", tmp_path)
    (attention,) = (each.removesuffix(" (Subgraph)") for each in openvino.profile(path, INPUTS) if "Subgraph" in each)
    assert openvino.integer_layers(path)[attention] == "integer"
    answer, simulated = openvino.load(path).run(INPUTS), small.predict(*INPUTS)
    assert np.abs(answer - simulated).max() < 0.02 * np.abs(simulated).max()


class Fused(nn.Module):
    """Queries, keys and values by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part.view(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2) for part in self.all(x).chunk(3, -1))
        heads = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(heads.transpose(1, 2).reshape(-1, TOKENS, WIDTH)).mean(1)


def test_what_makes_the_values_too_is_not_rounded_for_the_scores() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(8, TOKENS, WIDTH)).astype(np.float32)
    model = sl.load(Fused().eval(), x[:2])
    small = sl.apply(model, STATIC, sl.Data(calibration=((x,),)), target="openvino", progress=False)
    (fused,) = [node.outputs[0] for node in model.graph.nodes if node.layer == "all"]
    assert small.quantization is not None and fused not in small.quantization.activations
