"""ONNX files: what is written is read back, what strangers wrote is read or refused in a sentence."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.onnx import canonical, payload
from slimline.graph.edits import PutTensors
from slimline.model.lowering import lower
from slimline.run.sources import ModelSource, load_model
from slimline.run.stages import names, saved
from slimline.runtimes.base import runtime
from slimline.steps.quantization.calibration import calibrate
from tests.frameworks.onnx.graphs import exported, images, ints, model, tokens, weights

X = np.random.default_rng(1).standard_normal((5, 3, 6, 6)).astype(np.float32)


@pytest.fixture
def labelled() -> sl.Data:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3, 6, 6)).astype(np.float32)
    return sl.Data(train=(x[:100], np.arange(100) % 5), test=(x[100:], np.arange(300) % 5))


def refused(path: Path, words: str) -> None:
    with pytest.raises(SlimlineError, match=words) as error:
        sl.load(path)
    assert "\n" not in str(error.value)


def test_saved_files_are_read_back_and_run_anywhere(tmp_path: Path) -> None:
    for name in ("resnet", "bert"):
        proto, _, example = exported(name, 17)
        loaded = sl.load(proto, example)
        small = sl.apply(loaded, sl.ChannelPruning(ratio=0.3))
        again = sl.load(small.save(tmp_path / "small.onnx"))
        assert again.history == small.history and again.adapter.free(again.native) == "batch"
        answers = small.outputs(*example)
        session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
        alone = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), example, strict=True)})
        for a, b, c in zip(answers, again.outputs(*example), alone, strict=True):
            assert np.array_equal(a, b) and np.allclose(a, c, atol=1e-5)
        assert set(again.graph.values) == set(small.graph.values)
        again.save(tmp_path / "again.onnx")
        assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_weights_that_are_inputs_too_are_weights() -> None:
    # As exporters wrote them before version 4 of the format.
    proto = images("d = Relu(c)", more=weights(conv_w=(12, 3, 6, 6)))
    known = sl.load(proto).predict(X)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    loaded = sl.load(proto)
    assert loaded.graph.inputs == ("x",) and np.array_equal(loaded.predict(X), known)


def test_masks_and_grids_come_back(tmp_path: Path, labelled: sl.Data) -> None:
    loaded = sl.load(
        images("r = Relu(c) d = Conv(r, k__weight, k__bias)", more=weights(k__weight=(12, 12, 3, 3), k__bias=(12,)))
    )
    sparse = sl.apply(loaded, sl.SparsePruning(amount=0.5, criterion="l1"), labelled)
    quantized = sl.apply(sparse, sl.StaticQuantization(undo=False), labelled)
    again = sl.load(quantized.save(tmp_path / "both.onnx"))
    assert again.quantization == quantized.quantization
    assert np.array_equal(again.predict(X), quantized.predict(X))
    assert (again.parameters()["k.weight"][~again.masks["k.weight"]] == 0).all()
    path = sl.export(again, "onnxruntime", tmp_path / "out")
    file = path if isinstance(path, Path) else tmp_path / "out" / "model.onnx"
    file = file / "model.onnx" if file.is_dir() else file
    layers = runtime("onnxruntime").integer_layers(file)
    assert layers["k"] == "integer"
    error = np.abs(runtime("onnxruntime").load(file).run((X,)) - again.predict(X)).max()
    assert error < 0.05 * np.abs(again.predict(X)).max()
    with pytest.raises(SlimlineError, match="prune first, then quantize"):
        again.edited((PutTensors({}),), {"step": "x"})


def test_a_file_that_rounds_otherwise_than_its_notes_say_is_refused(tmp_path: Path, labelled: sl.Data) -> None:
    quantized = sl.apply(sl.load(images("d = Relu(c)")), sl.StaticQuantization(undo=False), labelled)
    path = quantized.save(tmp_path / "honest.onnx")
    held = sl.load(path)
    assert quantized.quantization is not None and held.quantization == quantized.quantization

    def scale(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        stored = next(t for t in proto.graph.initializer if t.name == node.input[1])
        stored.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored) * np.float32(2), stored.name))

    def zero_point(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        stored = next(t for t in proto.graph.initializer if t.name == node.input[2])
        stored.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored) ^ 1, stored.name))

    def limits(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        node.metadata_props[0].value = "-3 5"

    def mark(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        del node.metadata_props[:]

    def around(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        real = next(n for n in proto.graph.node if node.output[0] in n.input)
        for other in proto.graph.node:
            if other is not node and other is not real:
                other.input[:] = [node.input[0] if name == real.output[0] else name for name in other.input]

    def other_end(node: onnx.NodeProto, proto: onnx.ModelProto) -> None:
        real = next(n for n in proto.graph.node if node.output[0] in n.input)
        stored = next(t for t in proto.graph.initializer if t.name == real.input[1])
        array = onnx.numpy_helper.to_array(stored) * np.float32(1.5)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "other"))
        real.input[1] = "other"

    for name in ("x", "d", "conv_w"):
        for change in (scale, zero_point, limits, mark, around, other_end):
            proto = onnx.load(path)
            change(next(n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name), proto)
            refused(write(tmp_path, proto), f"does not round {name} to the format that its notes hold")


def test_quantized_files_of_others_are_not_pruned(tmp_path: Path, labelled: sl.Data) -> None:
    loaded = sl.load(images("r = Relu(c) d = Conv(r, k, k_b)", more=weights(k=(12, 12, 3, 3), k_b=(12,))))
    sl.export(sl.apply(loaded, sl.StaticQuantization(undo=False), labelled), "onnxruntime", tmp_path)
    foreign = sl.load(tmp_path / "model.onnx")
    assert foreign.quantization is not None
    for step in (sl.ChannelPruning(ratio=0.3), sl.SparsePruning(amount=0.5), sl.StaticQuantization()):
        with pytest.raises(SlimlineError, match="quantiz"):
            sl.apply(foreign, step, labelled)
    with pytest.raises(SlimlineError, match="quantized already"):
        sl.load(onnx.load(tmp_path / "model.onnx"))


def test_the_whole_job_from_a_file(tmp_path: Path, labelled: sl.Data) -> None:
    onnx.save(
        images("r = Relu(c) d = Conv(r, k, k_b)", more=weights(k=(12, 12, 3, 3), k_b=(12,))), tmp_path / "net.onnx"
    )
    recipe = [sl.ChannelPruning(ratio=0.25), sl.StaticQuantization(undo=False)]
    run = sl.compress(
        sl.load(tmp_path / "net.onnx"), labelled, recipe=recipe, output=tmp_path / "run", batch_sizes=(1,)
    )
    assert run.artifact == run.path / "onnxruntime" / "model.onnx"
    assert run.model.framework == "onnx" and len(run.model.history) == 2
    assert run.model.graph.size < sl.load(tmp_path / "net.onnx").graph.size
    left = [sl.load(saved(run, stage)) for stage in names(run.recipe) if stage == "original" or "-" in stage]
    assert [len(each.history) for each in left] == [0, 1, 2]  # models of stages, and no artifacts, which are .onnx too


@pytest.mark.parametrize("target", ["openvino", "litert"])
def test_roads_to_other_targets(target: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow" if target == "litert" else "openvino")
    body = "r = Relu(c) d = Conv <pads = [1, 1, 1, 1]> (r, k__weight, k__bias)"
    loaded = sl.load(images(body, more=weights(k__weight=(12, 12, 3, 3), k__bias=(12,))))
    quantized = calibrate(loaded, sl.StaticQuantization(), [(X,)], target)
    way = runtime(target)
    for each, tolerance, computed in ((loaded, 1e-5, "float"), (quantized, 0.05, "integer")):
        path = tmp_path / f"{computed}{way.suffix}"
        lower(way, each, path)
        answer = each.predict(X)
        assert np.abs(way.load(path).run((X,)) - answer).max() < tolerance * np.abs(answer).max()
        assert way.integer_layers(path)["k"] == computed


def test_example_inputs_by_name_and_names_of_outputs() -> None:
    body = "c = MatMul(a, w) d = MatMul(b, v) first = Relu(c) second = Add(c, d)"
    shapes = "float[N,4] a, float[N,6] b", "float[N,3] first, float[N,3] second"
    proto = model(body, weights(w=(4, 3), v=(6, 3)), *shapes)
    a, b = np.ones((2, 4), np.float32), np.ones((2, 6), np.float32)
    loaded = sl.load(proto, {"b": b, "a": a})
    assert [x.shape for x in loaded.example] == [(2, 4), (2, 6)]
    assert loaded.output_names == ("first", "second")
    assert [(i.name, i.shape) for i in loaded.inputs] == [("a", (None, 4)), ("b", (None, 6))]
    with pytest.raises(SlimlineError, match="no size of its inputs free"):
        sl.load(proto, dynamic=True)
    with pytest.raises(SlimlineError, match="the model takes a, b"):
        sl.load(proto, {"b": b, "c": a})


def test_what_is_given_and_what_is_exported_stay_as_they_are(tmp_path: Path) -> None:
    proto = model("w = Transpose <perm = [1, 0]> (v) y = MatMul(x, w)", weights(v=(5, 8)), "float[N,8] x")
    content = proto.SerializeToString()
    loaded = sl.load(proto)
    assert proto.SerializeToString() == content
    loaded.save(tmp_path / "before.onnx")
    sl.export(loaded, "onnxruntime", tmp_path / "out")
    loaded.save(tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_old_files_list_weights_as_inputs() -> None:
    proto = images("d = Relu(c)", opset=11)
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert sl.load(proto).graph.inputs == ("x",)


def test_constants_and_turned_weights_keep_their_names() -> None:
    body = "w = Transpose <perm = [1, 0]> (fc__weight) y = MatMul(x, w)"
    loaded = sl.load(model(body, weights(fc__weight=(5, 8)), "float[N,8] x"))
    assert loaded.parameters()["fc.weight"].shape == (8, 5)
    assert [n.layer for n in loaded.graph.nodes] == ["fc"]
    body = "k = Constant <value = float[2] {1.0, 2.0}> () y = Mul(x, k)"
    assert [a.shape for a in sl.load(model(body, {}, "float[N,2] x")).parameters().values()] == [(2,)]


def test_the_data_give_an_example_of_sizes_that_a_file_leaves_free(tmp_path: Path) -> None:
    own = weights(w=(7, 3, 3, 3), v=(7, 5))
    body = "c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, v)"
    onnx.save(model(body, own, "float[N,3,H,W] x"), tmp_path / "free.onnx")
    data = sl.Data(test=(X, np.arange(5)))
    source = ModelSource(str(tmp_path / "free.onnx"))
    read = load_model(source, lambda layout: data)
    assert read.inputs[0].shape == (None, 3, None, None) and read.example[0].shape[1:] == (3, 6, 6)
    with pytest.raises(SlimlineError, match="give --input-shape"):
        load_model(source)
    fixed = sl.load(model(body, own, "float[4,3,6,6] x"))
    assert fixed.predict(X[:4]).shape == (4, 5)
    with pytest.raises(SlimlineError, match="batches of exactly 4, not 5: export it with a free batch"):
        fixed.predict(X)


# -- weights in other files ------------------------------------------------------------------


def external(folder: Path, location: str, **more: object) -> Path:
    """A model whose first weight lies elsewhere."""
    proto = tokens("u = Relu(t)")
    tensor = proto.graph.initializer[0]
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    told = {"location": location, "offset": 0, "length": len(content), **more}
    for key, value in told.items():
        tensor.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    (folder / "weights.bin").write_bytes(content)
    return path


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    x = np.ones((2, 6, 8), np.float32)
    answer = sl.load(tokens("u = Relu(t)")).predict(x)
    assert np.array_equal(sl.load(external(tmp_path, "weights.bin")).predict(x), answer)
    with pytest.raises(SlimlineError, match="in memory"):
        sl.load(onnx.load(tmp_path / "model.onnx", load_external_data=False))


def test_weights_outside_the_folder_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 384)
    for location in ("../secret.bin", str(secret), "a/../../secret.bin", "", "nothing.bin", "/dev/zero"):
        refused(external(folder, location), "folder|not there")
    (folder / "link.bin").symlink_to(secret)
    refused(external(folder, "link.bin"), "folder|not there")
    os.mkfifo(folder / "pipe")
    refused(external(folder, "pipe"), "not there or is no plain file")
    refused(external(folder, "weights.bin", offset=1), "does not have")
    refused(external(folder, "weights.bin", offset=-1), "does not have")
    refused(external(folder, "weights.bin", length=10**12), "does not have")
    refused(external(folder, "weights.bin", offset="x"), "no number")


def test_a_small_file_beside_a_model_is_not_read_a_thousand_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path, "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    for k in range(100):
        proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
        proto.graph.initializer[-1].name = f"copy_{k}"
    path.write_bytes(proto.SerializeToString())
    sl.load(path)
    monkeypatch.setattr(payload, "FREE_BYTES", 1000)
    refused(path, "38,784 bytes of weights from 384 beside it")


# -- files that lie ----------------------------------------------------------------------------


def write(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    content = tokens("u = Relu(t)").SerializeToString()
    path = tmp_path / "model.onnx"
    for damaged in (content[:-30], content[: len(content) // 2], b"", b"PK\x03\x04", b"not a model"):
        path.write_bytes(damaged)
        refused(path, "ONNX|operator")
    refused(tmp_path / "nothing.onnx", "no model file")
    for opset in (6, 99):
        proto = tokens("u = Relu(t)")
        proto.opset_import[0].version = opset
        refused(write(tmp_path, proto), f"operators version {opset}")


def test_tensors_that_are_not_what_they_say(tmp_path: Path) -> None:
    for change, words in (
        (lambda t: t.dims.append(10**9), "bytes of|2 GB"),
        (lambda t: t.dims.extend([2**40, 2**40]), "2 GB"),
        (lambda t: t.dims.__setitem__(0, -8), "shape that is none"),
        (lambda t: t.dims.__setitem__(0, 9), "bytes of"),
        (lambda t: setattr(t, "data_type", TensorProto.DOUBLE), "bytes of"),
        (lambda t: setattr(t, "data_type", 77), "type"),
        (lambda t: setattr(t, "raw_data", t.raw_data[:-1]), "bytes of"),
        (lambda t: t.ClearField("raw_data"), "numbers of"),
    ):
        proto = tokens("u = Relu(t)")
        change(proto.graph.initializer[0])
        refused(write(tmp_path, proto), words)
    nan = weights(first_w=(8, 12))["first_w"]
    nan[0, 0] = np.nan
    proto = tokens("u = Relu(t)")
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(nan, "first_w"))
    refused(write(tmp_path, proto), "NaN or infinity")


def test_graphs_that_cannot_be(tmp_path: Path) -> None:
    cyclic = tokens("u = Relu(t)")
    cyclic.graph.node[0].input[0] = "u"
    refused(write(tmp_path, cyclic), "rule of ONNX")
    twice = tokens("u = Relu(t)")
    twice.graph.node.append(twice.graph.node[0])
    refused(write(tmp_path, twice), "rule of ONNX")
    unknown = tokens("u = Relu(t)")
    unknown.graph.node[2].op_type = "Teleport"
    refused(write(tmp_path, unknown), "Teleport")
    foreign = tokens("u = Relu(t)")
    foreign.graph.node[2].domain = "acme"
    foreign.opset_import.append(helper.make_opsetid("acme", 1))
    refused(write(tmp_path, foreign), "acme")
    large = model("z = ConstantOfShape(n) s = ReduceSum(z) y = Mul(x, s)", ints(n=[10**6, 10**6]), "float[N,2] x")
    refused(write(tmp_path, large), "too large")
    refused(write(tmp_path, model("y = Relu(x)", {}, "float[N,1000000,1000000] x")), "too large")
    body = "z = ConstantOfShape(n) s = ReduceSum(z) y = Mul(x, s)"
    refused(write(tmp_path, model(body, ints(n=[2**14, 2**13]), "float[N,2] x")), "536,870,912 bytes")
    body = "z = ConstantOfShape(n) a = Neg(z) b = Neg(a) s = ReduceSum(b) y = Mul(x, s)"
    refused(write(tmp_path, model(body, ints(n=[2**12, 2**13]), "float[N,2] x")), "too large")


def test_a_loop_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(times: int) -> Path:
        names = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
        names += [
            helper.make_tensor_value_info(n, k, []) for n, k in (("go", TensorProto.BOOL), ("s", TensorProto.FLOAT))
        ]
        outputs = [helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])]
        outputs += [helper.make_tensor_value_info("next", TensorProto.FLOAT, [])]
        steps = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Cos", ["s"], ["next"])]
        proto = model("h = MatMul(x, w) s = ReduceMax<keepdims=0>(h) y = Add(h, s)", weights(w=(2, 2)), "float[N,2] x")
        proto.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.array(times), "times"))
        proto.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.array(True), "true"))
        loop = helper.make_node(
            "Loop", ["times", "true", "s"], ["l"], body=helper.make_graph(steps, "b", names, outputs)
        )
        proto.graph.node.insert(2, loop)
        proto.graph.node[3].input[1] = "l"
        return write(tmp_path, proto)

    sl.load(counted(9))
    monkeypatch.setattr(canonical, "PATIENCE", 0.5)
    refused(counted(2**62), "within 0.5 seconds")


def test_depth_is_bounded(tmp_path: Path) -> None:
    def nest(depth: int) -> onnx.GraphProto:
        inner = [helper.make_node("Identity", ["x"], ["o"])]
        if depth:
            inner = [helper.make_node("If", ["q"], ["o"], then_branch=nest(depth - 1), else_branch=nest(0))]
        return helper.make_graph(inner, "g", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])

    proto = model(
        "s = ReduceSum(x) z = Constant <value_float = 0.0> () q = Greater(s, z) y = Relu(x)", {}, "float[N,2] x"
    )
    proto.graph.node.append(helper.make_node("If", ["q"], ["e"], then_branch=nest(20), else_branch=nest(0)))
    refused(write(tmp_path, proto), "levels deep")

    calls = model("y = f.a(x)", {}, "float[N,2] x")
    calls.opset_import.append(helper.make_opsetid("f", 1))
    for name, body in (("a", "b"), ("b", "a")):
        node = helper.make_node(body, ["x"], ["y"], domain="f")
        own = [helper.make_opsetid("f", 1), helper.make_opsetid("", 18)]
        calls.functions.append(helper.make_function("f", name, ["x"], ["y"], [node], own))
    refused(write(tmp_path, calls), "call themselves")
    bomb = model("y = f.f0(x)", {}, "float[N,2] x")
    bomb.opset_import.append(helper.make_opsetid("f", 1))
    for k in range(40):
        inner = [
            helper.make_node(f"f{k + 1}", ["x"], ["h"], domain="f"),
            helper.make_node(f"f{k + 1}", ["h"], ["y"], domain="f"),
        ]
        inner = inner if k < 39 else [helper.make_node("Relu", ["x"], ["y"])]
        own = [helper.make_opsetid("f", 1), helper.make_opsetid("", 18)]
        bomb.functions.append(helper.make_function("f", f"f{k}", ["x"], ["y"], inner, own))
    refused(write(tmp_path, bomb), "more than 200,000 operators")


def test_functions_are_written_out() -> None:
    proto = tokens("u = f.twice(t)")
    proto.opset_import.append(helper.make_opsetid("f", 1))
    inner = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Add", ["h", "h"], ["y"])]
    proto.functions.append(helper.make_function("f", "twice", ["x"], ["y"], inner, [helper.make_opsetid("", 18)]))
    assert {"relu", "add"} <= {n.attributes.get("function") for n in sl.load(proto).graph.nodes}


def test_notes_that_are_not_slimlines(tmp_path: Path) -> None:
    empty = base64.b64encode(safetensors.numpy.save({})).decode()
    plain = {"metadata": {}, "example": empty, "formats": ""}
    changes: list[dict[str, object]] = [
        {"metadata": []}, {"example": ""}, {"example": "AAAA"}, {"formats": "AAAA"}, {"formats": "*"}, {"formats": 1},
        {"more": 1}, {"metadata": {"quantization": {"$array": "x"}}},
    ]  # fmt: skip
    for notes in ("", "[]", "{}", *(json.dumps({**plain, **change}) for change in changes)):
        proto = tokens("u = Relu(t)")
        proto.metadata_props.add(key="slimline", value=notes)
        refused(write(tmp_path, proto), "notes")
    proto = tokens("u = Relu(t)")
    proto.metadata_props.add(key="names", value="cat, dog")
    again = sl.load(sl.load(write(tmp_path, proto)).save(tmp_path / "own.onnx"))
    assert again.native.model.metadata_props == {"names": "cat, dog"}


def test_own_names_of_a_stranger_mean_nothing() -> None:
    body = "slimline_sizes = Relu(x) slimline_batch = Neg(slimline_sizes) y = MatMul(slimline_batch, w)"
    loaded = sl.load(model(body, weights(w=(4, 3)), "float[N,4] x"))
    assert not {"slimline_sizes", "slimline_batch"} & set(loaded.graph.values)


@pytest.mark.parametrize(("bound", "at"), [("Min", 64), ("Max", 8)])
def test_a_number_that_follows_the_batch_to_a_limit_does_so_beyond_it(bound: str, at: int) -> None:
    between = f"s = Shape<start=0, end=1>(x) n = {bound}(s, limit) f = Cast<to=1>(n) u = Mul(t, f)"
    proto = tokens(between, more=ints(limit=[at]))
    x = np.random.default_rng(2).normal(size=(90, 6, 8)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    try:
        answer = sl.load(proto).predict(x)
    except SlimlineError:  # refused, or a batch that is not free: no wrong answer
        return
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-4)
