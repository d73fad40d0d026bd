"""Edits of ONNX models, against numpy, and what is observed of them, against torch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.onnx.run import APART, Session, apart, outlines, part, whole
from slimline.graph.cuts import Cut, readers
from slimline.graph.edits import FoldNorms, Narrow, PutTensors, Replace, Rewire, Round, Silence, Threshold
from slimline.graph.matrix import matrices
from slimline.graph.operators import Convolution, Linear
from slimline.graph.quantization import Quantization
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked
from slimline.methods.ranges import affine_grid, symmetric_grid
from slimline.model import Model
from tests.frameworks.onnx.graphs import exact, exported, images, ints, model, tokens, weights

X = np.random.default_rng(1).standard_normal((5, 3, 6, 6)).astype(np.float32)
T = np.random.default_rng(1).standard_normal((5, 6, 8)).astype(np.float32)
SLOW = pytest.mark.slow
NAMES = ["vit", *(pytest.param(n, marks=SLOW) for n in ("mobilenet_v3", "resnet", "shufflenet", "swin", "bert"))]
OLDER = [("resnet", 13), ("mobilenet_v3", 11), ("swin", 13), ("shufflenet", 17), ("densenet", 17), ("unet", 17)]


def edited(loaded: Model, *edits: object) -> Model:
    return Model(loaded.adapter, loaded.edit(*edits), loaded.example)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_exports_of_torch(name: str) -> None:
    proto, module, example = exported(name)
    loaded = sl.load(proto, example)
    with torch.no_grad():
        answer = module(*map(torch.from_numpy, example)).numpy()
    assert np.allclose(loaded.predict(*example), answer, atol=1e-4 * np.abs(answer).max())
    trained = sum(p.numel() for p in module.parameters())
    # Norms are folded, and the tables of positions within windows are stored as they are read.
    assert 0.8 * trained <= loaded.graph.size <= 1.3 * trained
    exact(loaded, 0.3)


@pytest.mark.parametrize(("name", "opset"), OLDER)
def test_exports_of_the_older_exporter(name: str, opset: int) -> None:
    proto, _, example = exported(name, opset)
    loaded = sl.load(proto, example)
    layers = {m.layer for m in matrices(loaded.graph)}
    assert not any("/" in layer or "onnx::" in layer for layer in layers)
    exact(loaded, 0.3)


def test_tensors_in_place_and_names_of_layers() -> None:
    loaded = sl.load(tokens("u = Relu(t)", more={}))
    new = np.ones((8, 12), np.float32)
    changed = edited(loaded, PutTensors({"first_w": new}))
    assert np.array_equal(changed.parameters()["first_w"], new) and not np.array_equal(
        loaded.parameters()["first_w"], new
    )
    with pytest.raises(SlimlineError, match="no tensor 'other'"):
        loaded.edit(PutTensors({"other": new}))
    with pytest.raises(SlimlineError, match="keeps shapes"):
        loaded.edit(PutTensors({"first_w": new.T}))
    first = matrices(loaded.graph)[0]
    assert (first.weight, first.bias, first.input) == ("first_w", "first_b", "x")


def test_norms_are_folded() -> None:
    for name in ("resnet", "densenet", "unet"):
        proto, _, example = exported(name, 17)
        loaded = sl.load(proto, example)
        folded = edited(loaded, FoldNorms())
        assert np.allclose(folded.predict(*example), loaded.predict(*example), atol=1e-5)
        kinds = [sum(n.kind == "batch_norm" for n in m.graph.nodes) for m in (loaded, folded)]
        assert kinds[1] < kinds[0]


def test_layers_give_way_to_two_in_sequence() -> None:
    loaded = sl.load(tokens("u = Relu(t)"))
    layer = matrices(loaded.graph)[0]
    full = loaded.parameters()[layer.weight].T
    u, s, v = np.linalg.svd(full, full_matrices=False)
    parts = [Linear((s[:, None] * v).astype(np.float32)), Linear(u.astype(np.float32), loaded.parameters()["first_b"])]
    changed = edited(loaded, Replace("first", layer.input, layer.output, parts))
    assert np.allclose(changed.predict(T), loaded.predict(T), atol=1e-5)
    assert {"first.0.weight", "first.1.weight", "first.1.bias"} <= set(changed.parameters())
    assert [m.layer for m in matrices(changed.graph)][:2] == ["first.0", "first.1"]
    with pytest.raises(SlimlineError, match="does not fit"):
        loaded.edit(Replace("first", layer.input, layer.output, parts[::-1]))
    with pytest.raises(SlimlineError, match="gives"):
        loaded.edit(Replace("first", layer.input, layer.output, [parts[0], Linear(np.ones((1, 8), np.float32))]))

    pictures = sl.load(images("d = Relu(c)"))
    conv = next(m for m in matrices(pictures.graph))
    kernel, bias = (pictures.parameters()[n] for n in ("conv_w", "conv_b"))
    wide = [Convolution(kernel, window=conv.window), Convolution(np.eye(12, dtype=np.float32)[..., None, None], bias)]
    changed = edited(pictures, Replace("conv", conv.input, conv.output, wide))
    assert np.allclose(changed.predict(X), pictures.predict(X), atol=1e-5)


def test_layers_read_less() -> None:
    body = "r = Relu(c) d = Conv <pads = [1, 1, 1, 1]> (r, k, b)"
    loaded = sl.load(images(body, more=weights(k=(12, 12, 3, 3), b=(12,))))
    reader = next(r for r in readers(loaded.graph) if r.layer.weight == "k")
    for cut in (Cut(reader, channels=(0, 3, 4, 9)), Cut(reader, window=((1, 1, 1), (0, 3, 1)))):
        zeroed = np.zeros((12, 12, 3, 3), np.float32)
        index = np.ix_(*(np.arange(n) if k is None else k for n, k in zip(zeroed.shape, cut.retained, strict=True)))
        zeroed[index] = loaded.parameters()["k"][index]
        small, masked = edited(loaded, Narrow([cut])), edited(loaded, PutTensors({"k": zeroed}))
        assert np.allclose(small.predict(X), masked.predict(X), atol=1e-5)
        assert small.graph.size < loaded.graph.size


def test_wires_and_activations() -> None:
    body = "r = Relu(c) q = Conv <pads = [1, 1, 1, 1]> (r, k, b) d = Add(q, r)"
    loaded = sl.load(images(body, more=weights(k=(12, 12, 3, 3), b=(12,))))
    relu = {n.attributes.get("function"): n.outputs[0] for n in loaded.graph.nodes}["relu"]
    added = next(n for n in loaded.graph.nodes if n.attributes.get("function") == "add")
    rest = edited(loaded, Rewire({added.outputs[0]: relu}))
    assert "k" not in rest.parameters() and "k" in loaded.parameters()
    plain = sl.load(images("d = Relu(c)"))
    assert np.allclose(rest.predict(X), plain.predict(X), atol=1e-6)
    silent = edited(plain, Silence(["x"]))
    assert np.allclose(silent.predict(X), plain.predict(0 * X), atol=1e-6)
    seen = {}
    cut = edited(plain, Threshold({plain.graph.nodes[1].outputs[0]: 0.25}))
    after = next(n.outputs[0] for n in cut.graph.nodes if n.attributes.get("function") == "threshold")
    cut.adapter.observe(cut.native, [(X,)], [plain.graph.nodes[1].outputs[0], after], seen.__setitem__)
    relu_, kept = seen.values()
    assert np.array_equal(kept, np.where(relu_ > 0.25, relu_, 0))


def test_rounding_is_that_of_the_grids() -> None:
    loaded = sl.load(images("d = Relu(c)"))
    weight = loaded.parameters()["conv_w"]
    grids = Quantization(
        weights={"conv_w": symmetric_grid(weight, 0)}, activations={"x": affine_grid(X.min(), X.max())}
    )
    rounded = edited(loaded, Round(grids))
    by_hand = edited(loaded, PutTensors({"conv_w": grids.weights["conv_w"].round(weight)}))
    answer = by_hand.predict(grids.activations["x"].round(X))
    assert np.allclose(rounded.predict(X), answer, atol=1e-5)
    assert np.array_equal(rounded.parameters()["conv_w"], weight)


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_weights_end_where_their_grid_does(bits: int) -> None:
    loaded = sl.load(images("d = Relu(c)"))
    weight = loaded.parameters()["conv_w"]
    grid = symmetric_grid(weight * 0.4, 0, bits)
    rounded = edited(loaded, Round(Quantization(weights={"conv_w": grid})))
    by_hand = edited(loaded, PutTensors({"conv_w": grid.round(weight)}))
    assert np.allclose(rounded.predict(X), by_hand.predict(X), atol=1e-5)
    assert np.array_equal(grid.round(rounded.parameters()["conv_w"]), grid.round(weight))


def test_formats_without_a_pair_are_refused() -> None:
    loaded = sl.load(images("d = Relu(c)"))
    one, weight = np.ones((), np.float32), loaded.parameters()["conv_w"]
    blocks = IntegerGrid(np.ones((3, 1, 1, 1), np.float32), (4, None, None, None), 8, True)
    refused: list[Format] = [IntegerGrid(one, (), 9, True), blocks, FloatFormat.plain("float16"), Levels.binary(one)]
    refused.append(Masked(weight > 0, symmetric_grid(weight, 0)))
    for each in refused:
        with pytest.raises(SlimlineError, match="cannot round conv_w to"):
            loaded.edit(Round(Quantization(weights={"conv_w": each})))
    with pytest.raises(SlimlineError, match="cannot round x to"):
        loaded.edit(Round(Quantization(activations={"x": affine_grid(-1, 1, 7)})))


def test_a_part_of_a_model_holds_what_its_outputs_need_and_nothing_else() -> None:
    loaded = sl.load(tokens("u = Relu(t)"))
    stored = loaded.parameters()
    first = part(loaded.native.model, ["u"])
    assert {t.name for t in first.proto.graph.initializer} == {"first_w", "first_b"}
    answer = np.maximum(T @ stored["first_w"] + stored["first_b"], 0)
    assert np.allclose(Session(first)([T])[0], answer, atol=1e-5)
    behind = part(loaded.native.model, ["y"], {"u": answer})
    assert [t.name for t in behind.proto.graph.initializer] == ["last_w"]
    assert np.allclose(Session(behind)([answer])[0], answer @ stored["last_w"], atol=1e-5)


def test_sessions_read_large_weights_where_they_lie() -> None:
    proto, _, example = exported("resnet", 17)
    loaded = sl.load(proto, example)
    model, stored = loaded.native.model, loaded.parameters()
    large = {name for name, array in stored.items() if array.nbytes >= APART}
    apart_from_it = whole(model)
    assert 0 < len(large) < len(stored) and apart_from_it.weights.keys() == large
    assert all(np.shares_memory(array, stored[name]) for name, array in apart_from_it.weights.items())
    message = ir.to_proto(model)
    assert apart_from_it.proto.ByteSize() < message.ByteSize() - sum(stored[name].nbytes for name in large)
    moved = apart(ir.to_proto(model))
    assert moved.weights.keys() == large
    answers = [Session(each)(example)[0] for each in (message, apart_from_it, moved)]
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])


def test_shapes_are_those_of_what_is_computed() -> None:
    proto, _, example = exported("resnet", 17)
    loaded = sl.load(proto, example)
    batches = [example, tuple(x[:1] for x in example)]
    shapes = outlines(loaded.native.model, batches)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for batch in batches:
        loaded.adapter.observe(loaded.native, [batch], list(shapes[0]), lambda name, x: seen.append((name, x.shape)))
    assert seen == [pair for each in shapes for pair in each.items()]


def test_what_is_observed_is_what_torch_computes() -> None:
    proto, module, example = exported("resnet", 17)
    loaded = sl.load(proto, example)
    layer = matrices(loaded.graph)[3]
    seen: dict[str, np.ndarray] = {}
    loaded.adapter.observe(loaded.native, [example], [*loaded.graph.inputs, layer.output], seen.__setitem__)
    found = {}
    module.get_submodule(layer.layer).register_forward_hook(lambda m, i, o: found.update(y=o.detach().numpy().copy()))
    with torch.no_grad():
        module(*map(torch.from_numpy, example))
    assert np.allclose(seen[layer.output], found["y"], atol=1e-5)
    assert np.array_equal(seen[loaded.graph.inputs[0]], example[0])
    again: dict[str, np.ndarray] = {}
    middle = matrices(loaded.graph)[1].output
    loaded.adapter.observe(loaded.native, [example], [middle], seen.__setitem__)
    read = [layer.input]
    loaded.adapter.observe(loaded.native, [example], read, seen.__setitem__)
    loaded.adapter.observe(loaded.native, [(seen[layer.input],)], [layer.output], again.__setitem__, sources=read)
    assert np.allclose(again[layer.output], seen[layer.output], atol=1e-5)
    with pytest.raises(SlimlineError, match="no value called 'nothing'"):
        loaded.adapter.observe(loaded.native, [example], ["nothing"], seen.__setitem__)


def test_norms_are_refreshed_as_torch_does() -> None:
    proto, module, example = exported("resnet", 17)
    loaded = sl.load(proto, example)
    rng = np.random.default_rng(3)
    batches = [(rng.normal(size=(8, *example[0].shape[1:])).astype(np.float32),) for _ in range(3)]
    trainer = loaded.adapter.trainer(loaded.native, None, sl.Distillation(epochs=0), 0, 1)
    trainer.refresh((batch, None) for batch in batches)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    with torch.no_grad():
        for (x,) in batches:
            module(torch.from_numpy(x))
        answer = module.eval()(torch.from_numpy(batches[0][0])).numpy()
    assert np.allclose(trainer.outputs(batches[0])[0], answer, atol=1e-4 * np.abs(answer).max())
    before = trainer.native()
    state = trainer.state()  # from here on it is PyTorch that computes
    assert np.allclose(trainer.outputs(batches[0])[0], answer, atol=1e-4 * np.abs(answer).max())
    again = trainer.native()
    assert all(np.array_equal(again.tensors[name], array) for name, array in before.tensors.items())
    trainer.restore(state)
    trainer.refresh((batch, None) for batch in batches)
    for name, array in trainer.native().tensors.items():
        assert np.allclose(array, before.tensors[name], atol=1e-5)


def test_several_inputs_and_outputs_keep_names_and_order() -> None:
    body = "c = MatMul(a, w) d = MatMul(b, w) e = Add(c, d) first = Relu(e) second = MatMul(e, v)"
    proto = model(
        body, weights(w=(4, 10), v=(10, 3)), "float[N,4] a, float[N,4] b", "float[N,10] first, float[N,3] second"
    )
    loaded = sl.load(proto)
    a, b = (np.random.default_rng(k).normal(size=(3, 4)).astype(np.float32) for k in (0, 1))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for own, other in zip(loaded.outputs(a, b), session.run(None, {"a": a, "b": b}), strict=True):
        assert np.allclose(own, other, atol=1e-6)
    assert loaded.graph.inputs == ("a", "b") and loaded.graph.outputs == ("first", "second")
    with pytest.raises(SlimlineError, match="takes 2 inputs"):
        loaded.predict(a)
    with pytest.raises(SlimlineError, match="cannot take inputs"):
        loaded.predict(a[:, :2], b)


def test_a_fixed_batch_stays_fixed() -> None:
    body = "f = Reshape(x, sizes) y = MatMul(f, w)"
    loaded = sl.load(model(body, weights(w=(108, 4)) | ints(sizes=[1, 108]), "float[N,3,6,6] x"), X[:1])
    assert loaded.adapter.free(loaded.native) == "none" and len(loaded.example[0]) == 1
    with pytest.raises(SlimlineError, match="batches of exactly 1, not 5"):
        loaded.predict(X)


def test_free_sizes_besides_the_batch_need_an_example() -> None:
    proto = model("y = GlobalAveragePool(x)", weights(), "float[N,3,H,W] x", "float[N,K,A,B] y")
    with pytest.raises(SlimlineError, match="free sizes besides the batch"):
        sl.load(proto)
    proto = model(
        "c = Conv(x, w) y = GlobalAveragePool(c)", weights(w=(4, 3, 3, 3)), "float[N,3,H,W] x", "float[N,K,A,B] y"
    )
    assert sl.load(proto, X).predict(X).shape == (5, 4, 1, 1)
    with pytest.raises(SlimlineError, match="the model takes"):
        sl.load(proto, X[:, :2])
    assert onnx.checker.check_model(proto) is None
