"""Crafted ``.pt2`` files: none runs code, each is refused in one sentence, and benign ones load."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.files.strictjson import Malformed
from slimline.frameworks.torch import allowed, expressions, program
from tests.security import hostile_torch as h

CODE = "__import__('pathlib').Path({canary!r}).touch()"


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.foreign(tmp_path_factory.mktemp("benign") / "foreign.pt2")


def _weights(entry: dict[str, Any]) -> Any:
    return h.in_json(h.WEIGHTS, lambda c: c["config"]["first.weight"].update(entry))


def _constants(name: str, **entry: Any) -> Any:
    def change(config: Any) -> None:
        (held,) = config["config"].values()
        config["config"][name] = {**held, **entry}

    return h.in_json(h.CONSTANTS_CONFIG, change)


def _node(index: int, **entry: Any) -> Any:
    return h.in_json(h.MODEL, lambda p: h.nodes(p)[index].update(entry))


def _signature(**entry: Any) -> Any:
    return h.in_json(h.MODEL, lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(entry))


def _expression(text: str) -> Any:
    def change(p: Any) -> None:
        for meta in p["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text

    return h.in_json(h.MODEL, change)


def _renamed(old: str, new: str) -> Any:
    """Every text that is `old`, wherever it stands in the program and its configs."""

    def apply(held: h.Members) -> None:
        for name in (h.MODEL, h.WEIGHTS, h.CONSTANTS_CONFIG):
            held[name] = held[name].replace(json.dumps(old).encode(), json.dumps(new).encode())

    return apply


def _added(name: str, content: Any) -> Any:
    return lambda held: held.update({name: content})


def _both(*changes: Any) -> Any:
    def apply(held: h.Members) -> None:
        for change in changes:
            change(held)

    return apply


def _call(canary: Path, target: str, *arguments: Any) -> Any:
    inputs = [{"name": "", "arg": {"as_string": a} if isinstance(a, str) else a, "kind": 1} for a in arguments]
    return _node(-1, target=target, inputs=inputs)


def attacks(canary: Path) -> dict[str, Any]:
    code = CODE.format(canary=str(canary))
    bomb, raw = h.saved(h.Bomb(canary)), h.pickled(h.Bomb(canary))
    quote = f'x", {code}, "'
    tree = '[1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]'
    evil_tree = tree.replace("builtins.tuple", "collections.namedtuple").replace('"null"', '"\\"os.system\\""')
    keys = json.dumps([f"k=({code})", "b"])
    leaf = {"type": None, "context": None, "children_spec": []}
    keyword_tree = json.dumps(
        [
            1,
            {
                "type": "builtins.tuple",
                "context": "null",
                "children_spec": [
                    {"type": "builtins.tuple", "context": "null", "children_spec": []},
                    {"type": "builtins.dict", "context": keys, "children_spec": [leaf, leaf]},
                ],
            },
        ]
    )
    return {
        "legacy weights": _added("data/weights/model.pt", bomb),
        "legacy constants": _added("data/constants/model.pt", bomb),
        "custom object": _both(_constants("o", path_name="custom_obj_0"), _added("data/constants/custom_obj_0", raw)),
        "opaque object": _both(_constants("o", path_name="opaque_obj_0"), _added("data/constants/opaque_obj_0", raw)),
        "opaque by config": _constants("o", path_name="opaque_obj_0"),
        "state dict": _added("serialized_state_dict.pt", bomb),
        "old program": _added("serialized_exported_program.json", b"{}"),
        "pickle member": _added("data/x.pkl", raw),
        "library": _added("data/aotinductor/model/a.so", b"\x7fELF"),
        "library source": _added("data/aotinductor/model/a.cpp", b""),
        "executorch": _added("data/executorch/a.pte", b""),
        "use_pickle": _both(_weights({"use_pickle": True}), _added("data/weights/weight_0", bomb)),
        "use_pickle 1": _both(_weights({"use_pickle": 1}), _added("data/weights/weight_0", bomb)),
        "use_pickle text": _both(_weights({"use_pickle": "yes"}), _added("data/weights/weight_0", bomb)),
        "use_pickle spaced": lambda held: held.update(
            {
                h.WEIGHTS: held[h.WEIGHTS].replace(b'"use_pickle": false', b'"use_\\u0070ickle"  :\n true'),
                "data/weights/weight_0": bomb,
            }
        ),
        "use_pickle twice": lambda held: held.update(
            {h.WEIGHTS: held[h.WEIGHTS].replace(b'"use_pickle": false', b'"use_pickle": false, "use_pickle": true')}
        ),
        "constant pickle": _both(_constants("o", use_pickle=True), _added("data/constants/tensor_0", bomb)),
        "samples": _added(h.SAMPLES, h.saved(((h.Bomb(canary),), {}))),
        "samples raw": _added(h.SAMPLES, raw),
        "second model": lambda held: held.update({"models/other.json": held[h.MODEL]}),
        "formula": _expression(code),
        "formula attribute": _expression("s0.func.__globals__"),
        "formula call": _expression(f"Symbol('s0').subs('{code}')"),
        "formula power": _expression("Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
        "formula nested": _expression("(" * 900 + "s0" + ")" * 900),
        "range": h.in_json(h.MODEL, lambda p: p["range_constraints"].update({code: {"min_val": 0, "max_val": 9}})),
        "range unbacked": h.in_json(
            h.MODEL, lambda p: p["range_constraints"].update({"u99999999999": {"min_val": 0, "max_val": 9}})
        ),
        "target builtin": _call(canary, "torch.os.system", f"touch {canary}"),
        "target load": _call(canary, "torch.load", str(canary)),
        "target operator": _call(canary, "_operator.attrgetter", "x"),
        "target operator call": _call(canary, "_operator.methodcaller", "system"),
        "target math": _call(canary, "math.__loader__.load_module", "os"),
        "target hub": _call(canary, "torch.hub.load", "a/b"),
        "target ops": _call(canary, "torch.ops.load_library", str(canary)),
        "target dunder": _call(canary, "torch.ops.aten.add.__class__", "x"),
        "target registry": _call(canary, "#x:y"),
        "target prim": _call(canary, "torch.ops.prim.Print.default", "x"),
        "from_file": _call(canary, "torch.ops.aten.from_file.default", str(canary), {"as_bool": True}, {"as_int": 4}),
        "save": _call(canary, "torch.ops.aten.save.default", str(canary)),
        "operator argument": _node(-1, inputs=[{"name": "x", "arg": {"as_operator": "torch.os.system"}, "kind": 1}]),
        "hop": _call(canary, "torch.ops.higher_order.cond", {"as_bool": True}),
        "value name": _renamed("relu", f"relu = {code}; relu"),
        "value name line": _renamed("relu", f"relu\n    {code}\n    x"),
        "value keyword": _renamed("relu", "import"),
        "value hides": _renamed("relu", "torch"),
        "input name": _renamed("x", f"x=({code})"),
        "weight name": _renamed("first.weight", quote),
        "weight name slash": _renamed("first.weight", "a\\"),
        "weight dunder": _renamed("first.weight", "__class__"),
        "constant name": _renamed("lifted_tensor_0", quote),
        "argument names": _signature(forward_arg_names=[f"x=({code})"]),
        "keyword names": _signature(in_spec=keyword_tree, forward_arg_names=None),
        "input tree": _signature(in_spec=evil_tree),
        "tree nested": _signature(in_spec="[" * 5000),
        "tree type": _signature(in_spec=tree.replace("builtins.tuple", "torch.nn.Module")),
        "device": h.in_json(h.WEIGHTS, lambda c: c["config"]["first.weight"]["tensor_meta"]["device"].update(type="x")),
        "sizes": h.in_json(
            h.WEIGHTS, lambda c: c["config"]["first.weight"]["tensor_meta"].update(sizes=[{"as_int": 10**12}] * 2)
        ),
        "offset": h.in_json(
            h.WEIGHTS, lambda c: c["config"]["first.weight"]["tensor_meta"].update(storage_offset={"as_int": 10})
        ),
        "negative stride": h.in_json(
            h.WEIGHTS, lambda c: c["config"]["first.weight"]["tensor_meta"].update(strides=[{"as_int": -8}] * 2)
        ),
        "sparse": h.in_json(h.WEIGHTS, lambda c: c["config"]["first.weight"]["tensor_meta"].update(layout=1)),
        "traversal": _weights({"path_name": "../../../etc/passwd"}),
        "short weights": _added("data/weights/weight_0", b"\0" * 8),
        "dialect": h.in_json(h.MODEL, lambda p: p.update(verifiers=["os"])),
        "unknown key": h.in_json(h.MODEL, lambda p: p.update(extra=1)),
        "digits": lambda held: held.update({h.MODEL: held[h.MODEL].replace(b"10}", b"1" * 5000 + b"}", 1)}),
        "nested json": _added(h.MODEL, b"[" * 10**6),
        "wide memory": _node(
            -2,
            target="torch.ops.aten.full.default",
            inputs=[
                {"name": "size", "arg": {"as_ints": [10**6, 10**6]}, "kind": 1},
                {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1},
            ],
        ),
        "notes": _added("extra/slimline.json", b'{"metadata": 1}'),
        "notes name": _both(
            _added(
                "extra/slimline.json",
                json.dumps(
                    {"metadata": {}, "fixed_batch": None, "free": "batch", "ties": {}, "names": {"relu": f"x={code}"}}
                ).encode(),
            ),
            _added("extra/slimline_example.safetensors", b""),
        ),
    }


NAMES = list(attacks(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
def test_a_crafted_program_runs_nothing_and_is_refused_in_a_sentence(name: str, benign: Path, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bad.pt2"
    root, held = h.members(benign)
    attacks(canary)[name](held)
    h.write(path, root, held)
    started = time.process_time()
    with pytest.raises(SlimlineError) as error:
        sl.load(path)
    assert not canary.exists()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - started < 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt2"]


@pytest.mark.parametrize("what", ["guards", "metadata", "custom"])
def test_code_in_parts_that_are_left_out_is_never_read(what: str, benign: Path, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "odd.pt2"
    code = CODE.format(canary=str(canary))
    root, held = h.members(benign)
    {
        "guards": h.in_json(h.MODEL, lambda p: p.update(guards_code=[code])),
        "metadata": _node(
            0,
            metadata={"source_fn_stack": f"a,torch.{code}", "from_node": code, "nn_module_stack": code, "custom": "["},
        ),
        "custom": h.in_json(h.MODEL, lambda p: p["graph_module"].update(metadata={"custom": code})),
    }[what](held)
    h.write(path, root, held)
    model = sl.load(path)
    model.native(torch.ones(2, 8))
    model.save(tmp_path / "again.pt2")
    assert not canary.exists()
    assert code.encode() not in (tmp_path / "again.pt2").read_bytes()


def _stored(content: bytes, **info: Any) -> bytes:
    """The archive again with one more member, of odd properties."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held = {n: archive.read(n) for n in archive.namelist()}
    root = next(iter(held)).partition("/")[0]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
        member = zipfile.ZipInfo(f"{root}/extra/{info.pop('name', 'note')}")
        method = info.pop("method", zipfile.ZIP_STORED)
        for key, value in info.items():
            setattr(member, key, value)
        archive.writestr(member, b"x" * 100, method)
    return buffer.getvalue()


def _patched(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    at = content.rindex(mark) + offset
    return content[:at] + value + content[at + len(value) :]


ARCHIVES: dict[str, Any] = {
    "prefix": lambda c: b"#!/bin/sh\n" + c,
    "suffix": lambda c: c + b"PK",
    "twice": lambda c: c + c,
    "comment": lambda c: c[:-2] + b"\x03\x00abc",
    "deflated": lambda c: _stored(c, method=zipfile.ZIP_DEFLATED),
    "bzip2": lambda c: _stored(c, method=zipfile.ZIP_BZIP2),
    "link": lambda c: _stored(c, external_attr=0o120777 << 16),
    "absolute": lambda c: _stored(c).replace(b"extra/note", b"/tmp/a/../"),
    "two in case": lambda c: _stored(_stored(c), name="NOTE"),
    "backslash": lambda c: _stored(c).replace(b"extra/note", b"extra\\note"),
    "nul": lambda c: _stored(c).replace(b"extra/note", b"extra/no\0e"),
    "encrypted": lambda c: _patched(c, b"PK\x01\x02", 8, struct.pack("<H", 1)),
    "local size": lambda c: _patched(c, b"PK\x03\x04", 18, struct.pack("<II", 5, 5)),
    "local flags": lambda c: _patched(c, b"PK\x03\x04", 6, struct.pack("<H", 0x41)),
    "local name": lambda c: _stored(c).replace(b"extra/note", b"extra/nota", 1),
    "checksum": lambda c: _stored(c).replace(b"x" * 100, b"y" * 100),
    "directory size": lambda c: _patched(c, b"PK\x01\x02", 24, struct.pack("<I", 2**31)),
    "overlap": lambda c: _patched(c, b"PK\x01\x02", 42, struct.pack("<I", 0)),
}


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_an_archive_that_two_readers_could_read_differently_is_refused(name: str, benign: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt2"
    content = ARCHIVES[name](_stored(benign.read_bytes()) if name == "checksum" else benign.read_bytes())
    path.write_bytes(content)
    if name == "checksum":  # of a member that is not needed: `inspect` and runs verify hashes, reading verifies its own
        from slimline.files import archive

        with pytest.raises(archive.Damaged):
            held = archive.read(path)
            [held.read(member) for member in held.sizes]
        return
    with pytest.raises(SlimlineError) as error:
        sl.load(path)
    assert "\n" not in str(error.value)


def test_a_benign_file_loads_with_its_example_and_answers_the_same(benign: Path) -> None:
    model = sl.load(benign)
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    expected = torch.export.load(benign).module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(model.predict(x), expected, atol=1e-6)
    np.testing.assert_array_equal(model.example[0], np.ones((2, 8), np.float32))


class _Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, k: torch.Tensor) -> dict[str, Any]:
        a = self.conv(x)
        with torch.no_grad():
            z = a * 2
        z = torch.nn.functional.interpolate(z + a, scale_factor=2.0).flatten(1)
        n = torch.arange(a.shape[2] * a.shape[3] // 2 + 1)
        q = [x.reshape(x.shape[0], -1), y.split(1, 0)[0] + k]
        return {"z": z, "q": q, "n": n, "r": self.rnn(x[:, 0, :, :5])[0]}


def test_formulas_blocks_keywords_and_nested_answers_are_read(tmp_path: Path) -> None:
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    inputs = torch.randn(2, 3, 17, 19), torch.randn(3, 2)
    shapes = {"x": dims, "y": None, "k": None}
    with pytest.warns(UserWarning):
        exported = torch.export.export(_Wide().eval(), inputs, {"k": torch.randn(2)}, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "wide.pt2")
    example = tuple(x.numpy() for x in (*inputs, torch.ones(2)))
    _, held = h.members(tmp_path / "wide.pt2")
    description = program.read(held[h.MODEL])
    assert any(n.target in allowed.BLOCKS for n in description.graph_module.graph.nodes)
    assert sl.load(tmp_path / "wide.pt2", example).predict(*example).shape[0] == 2


@pytest.mark.parametrize(
    "text",
    [
        "Add(Symbol('s0', positive=True, integer=True), Integer(-3))",
        "Max(Integer(3), FloorDiv(Symbol('s77', integer=True), Integer(2)))",
        "2*s0 + 1",
        "(s0//2)",
        "Pow(Symbol('u0', integer=True), Integer(2))",
        "Mod(s0, 8)",
        "Rational(1, 2)",
    ],
)
def test_formulas_that_torch_writes_are_read_and_written_in_one_way(text: str) -> None:
    formula = expressions.Expressions().parse(text)
    again = expressions.text_of(formula)
    assert expressions.Expressions().parse(again) == formula
    assert expressions.text_of(expressions.Expressions().parse(again)) == again


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os')", "s0.args", "lambda: 1", "[s0]", "s0[0]", "f'{s0}'", "Symbol('a b')", "Lambda(s0, s0)"),
        *("2**63", "s0**9", "2**62*4", "Integer(1.5)", "1e400", "Float('inf')", "FloorDiv(s0, 0)", "sympify('1')"),
        *("s0 if s0 else 1", "Add(*[1])", "Symbol('s0', commutative=False)", "", " " * 5000, "eval('1')", "s0 := 1"),
        "*".join(f"(s{i} + u{i})" for i in range(40)),
        "Symbol('s0', integer=True) + Symbol('s0', positive=True)",
    ],
)
def test_no_other_text_is_a_formula(text: str) -> None:
    with pytest.raises(Malformed):
        expressions.Expressions().parse(text)


def test_no_listed_operator_opens_files_or_changes_the_process() -> None:
    odd = {"from_file", "save", "load", "warn", "set_", "set_data", "manual_seed", "seed", "set_grad_enabled", "_print"}
    assert not odd & allowed.ATEN
    for name in allowed.ATEN:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            arguments = getattr(packet, overload)._schema.arguments
            texts = [a.name for a in arguments if "str" in str(a.type)]
            assert not any("file" in text or "path" in text for text in texts), name


class _Apart(torch.nn.Module):
    def __init__(self, split: bool) -> None:
        super().__init__()
        self.layer, self.split = torch.nn.Linear(8, 4), split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = (self.layer(x) > 0)[:, :1].expand(-1, 7)
        return self.layer(x) + (torch.split(wide, 1, 1) if self.split else torch.unbind(wide, 1))[0].float()[:, None]


@pytest.mark.parametrize("split", [True, False])
def test_a_tensor_is_not_taken_apart_without_end(split: bool, tmp_path: Path) -> None:
    """A byte a piece is little; a tensor for each is not."""
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(_Apart(split).eval(), (torch.ones(2, 8),)), path)
    sl.load(path)
    root, held = h.members(path)
    h.in_json(h.MODEL, _widened)(held)
    h.write(path, root, held)
    with pytest.raises(SlimlineError, match="takes tensors apart into more than"):
        sl.load(path)


def _widened(program: Any) -> None:
    node = next(n for n in h.nodes(program) if "expand" in n["target"])
    next(i for i in node["inputs"] if "as_ints" in i["arg"])["arg"]["as_ints"] = [2, 2**26]
