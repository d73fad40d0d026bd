"""What leaves for a runtime answers as its model does: any target, any output, any rank, any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.quantization import Quantization
from slimline.model import lowering as gate
from slimline.runtimes.forms import Form

Outputs = tuple[np.ndarray, ...]


@dataclass
class Echo:
    """A target whose artifacts answer as the model does, but for what `spoil` does to the answer."""

    model: Any
    spoil: Callable[[Outputs], Outputs] = lambda outputs: outputs
    name: str = "echo"
    seen: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    forms = ("toy",)
    elsewhere = ""
    rounds_reals = False

    def lower(self, form: Form, path: Path) -> None:
        assert form.kind == "toy"
        path.write_bytes(b"artifact")

    def load(self, path: Path, threads: int = 1) -> Any:
        assert path.read_bytes() == b"artifact"

        def outputs(inputs: tuple[np.ndarray, ...]) -> Outputs:
            self.seen.append(inputs)
            return self.spoil(tuple(x.copy() for x in self.model.outputs(*inputs)))

        return SimpleNamespace(outputs=outputs)

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        return [(f"x{i}", (None,) * x.ndim, str(x.dtype)) for i, x in enumerate(self.model.example)]


@dataclass(frozen=True)
class Toy:
    """As much of a `slimline.Model` as the gate looks at."""

    example: tuple[np.ndarray, ...]
    answer: Callable[..., Outputs]
    free: str = "batch"
    quantization: Quantization | None = None
    native: Any = None
    forms: tuple[str, ...] = ("other", "toy")
    output_names: tuple[str, ...] = ()

    @property
    def graph(self) -> Any:
        return SimpleNamespace(trainable=(), values={}, parameters={}, batch=1, outputs=())

    def parameters(self) -> dict[str, np.ndarray]:
        return {}

    def edit(self, *edits: Any) -> Any:
        return self.native

    @property
    def adapter(self) -> Any:
        return SimpleNamespace(free=lambda native: self.free, form=lambda *form: None)

    def outputs(self, *inputs: np.ndarray) -> Outputs:
        return self.answer(*inputs)


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


WEIGHT = _floats(6, 5)
SEQUENCE = Toy((_floats(2, 4, 6),), lambda x: (x @ WEIGHT, (x @ WEIGHT).mean(1)))


def test_an_equal_artifact_is_put_in_place_and_was_asked_at_three_batches(tmp_path: Path) -> None:
    target = Echo(SEQUENCE)
    found = gate.lower(target, SEQUENCE, tmp_path / "model.echo")
    assert found.passed and found.outputs == 2 and (tmp_path / "model.echo").read_bytes() == b"artifact"
    assert {len(x) for (x,) in target.seen} == {1, 2, 3}
    assert sum(np.array_equal(x, SEQUENCE.example[0]) for (x,) in target.seen) == 1  # the others are random
    assert [f.name for f in tmp_path.iterdir()] == ["model.echo"]


def _changed(index: int, change: Callable[[np.ndarray], Any]) -> Callable[[Outputs], Outputs]:
    def spoil(outputs: Outputs) -> Outputs:
        made = list(outputs)
        array = made[index]
        result = change(array)
        made[index] = array if result is None else result
        return tuple(made)

    return spoil


def _put(place: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[place] = value(array) if callable(value) else value

    return change


SPOILT = {
    "second output": _changed(1, lambda x: x * 1.01),
    "permuted": _changed(0, lambda x: x[..., ::-1]),
    "one position": _changed(0, _put((0, 2), 0.0)),
    "one channel": _changed(0, _put((..., 3), 0.0)),
    "one row": _changed(0, _put(0, 0.0)),
    "fewer outputs": lambda outputs: outputs[:1],
    "swapped outputs": lambda outputs: outputs[::-1],
    "another dtype": _changed(0, lambda x: x.astype(np.float64)),
    "another shape": _changed(0, lambda x: x[:, :3]),
    "empty": _changed(0, lambda x: x[:, :0]),
    "not a number": _changed(0, _put((0, 0, 0), np.nan)),
    "infinite": _changed(0, _put((0, 0, 0), np.inf)),
    "batch of three": lambda outputs: tuple(np.zeros_like(x) if len(x) == 3 else x for x in outputs),
    "batch of one": lambda outputs: tuple(x + 0.1 if len(x) == 1 else x for x in outputs),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_wrong_artifact_leaves_nothing(how: str, tmp_path: Path) -> None:
    with pytest.raises(SlimlineError, match="echo artifact disagrees with the model on ") as error:
        gate.lower(Echo(SEQUENCE, SPOILT[how]), SEQUENCE, tmp_path / "model.echo")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "model.echo").write_text("older")
    with pytest.raises(SlimlineError):
        gate.lower(Echo(SEQUENCE, SPOILT["one row"]), SEQUENCE, tmp_path / "model.echo")
    assert (tmp_path / "model.echo").read_text() == "older"


def test_small_channels_beside_large_ones_count(tmp_path: Path) -> None:
    model = replace(SEQUENCE, answer=lambda x: (np.concatenate([10_000 * x, x[..., :1]], -1),))
    wrong = _changed(0, _put((..., -1), 0.0))  # less than a thousandth of the largest output
    with pytest.raises(SlimlineError, match="index 6 of dimension 2"):
        gate.lower(Echo(model, wrong), model, tmp_path / "model.echo")


def test_an_artifact_that_does_not_run_is_told_in_one_sentence(tmp_path: Path) -> None:
    def fail(outputs: Outputs) -> Outputs:
        if len(outputs[0]) == 3:
            raise RuntimeError("shape mismatch at node 7\nstack\nof lines")
        return outputs

    with pytest.raises(SlimlineError, match=r"does not run on a random batch of 3.*shape mismatch at node 7") as error:
        gate.lower(Echo(SEQUENCE, fail), SEQUENCE, tmp_path / "model.echo")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_fixed_batch_is_kept_to_and_other_free_sizes_are_tried(tmp_path: Path) -> None:
    fixed, target = replace(SEQUENCE, free="none"), Echo(SEQUENCE)
    gate.lower(target, fixed, tmp_path / "model.echo")
    assert {x.shape for (x,) in target.seen} == {(2, 4, 6)}
    free = Toy((_floats(2, 4, 6),), lambda x: (x * 2,), "sizes")
    target = Echo(free, lambda outputs: tuple(x + (x.shape[1] == 5) for x in outputs))
    with pytest.raises(SlimlineError, match="inputs of other sizes"):
        gate.lower(target, free, tmp_path / "free.echo")


def test_random_inputs_are_ones_that_the_model_is_for(tmp_path: Path) -> None:
    table = _floats(50, 6)
    tokens = np.array([[3, 49, 7], [0, 5, 1]])
    mask = np.array([[True, True, False], [True, True, True]])

    def answer(ids: np.ndarray, keep: np.ndarray, level: np.ndarray) -> Outputs:
        assert ids.dtype == np.int64 and keep.dtype == bool and level.dtype == np.float32
        assert (level > 0).all()
        rows = table[ids] * keep[..., None]
        return (rows.sum(1) / keep.sum(1)[:, None] + np.log(level),)  # a row that is masked away gives no number

    model = Toy((tokens, mask, np.abs(_floats(2, 1))), answer)
    target = Echo(model)
    gate.lower(target, model, tmp_path / "model.echo")
    drawn = target.seen[1:]
    assert any(not np.array_equal(x, np.resize(tokens, x.shape)) for x, *_ in drawn)
    assert any(not np.array_equal(x, np.resize(mask, x.shape)) for _, x, _ in drawn)


def test_where_bold_inputs_give_nothing_finite_gentler_ones_do(tmp_path: Path) -> None:
    example = np.array([[1.0, 2.0], [2.0, 4.0]], np.float32)

    def answer(x: np.ndarray) -> Outputs:  # defined near the example alone
        with np.errstate(invalid="ignore"):
            return (np.sqrt(0.01 - np.square(x[:, 1:] / x[:, :1] / 2 - 1)).astype(np.float32),)

    model = Toy((example,), answer)
    with pytest.raises(SlimlineError, match="disagrees with the model on a random batch of 3"):
        gate.lower(Echo(model, SPOILT["batch of three"]), model, tmp_path / "model.echo")
    never = Toy((example,), lambda x: (x * np.nan,))
    with pytest.raises(SlimlineError, match="nothing finite for its example inputs"):
        gate.lower(Echo(never), never, tmp_path / "model.echo")


def test_an_integer_artifact_may_round_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = replace(SEQUENCE, quantization=Quantization())
    noise = np.random.default_rng(0)
    near = Echo(model, lambda outputs: tuple((x + 0.05 * noise.normal(size=x.shape)).astype(x.dtype) for x in outputs))
    assert gate.lower(near, model, tmp_path / "near.echo").integer
    off = Echo(model, lambda outputs: tuple((x + 0.3 * noise.normal(size=x.shape)).astype(x.dtype) for x in outputs))
    caplog.clear()
    assert not gate.lower(off, model, tmp_path / "near.echo").passed
    assert "differs from its simulation" in caplog.text and caplog.records[-1].levelname == "WARNING"
    for how in ("permuted", "swapped outputs", "not a number", "another dtype"):
        with pytest.raises(SlimlineError, match="disagrees"):
            gate.lower(Echo(model, SPOILT[how]), model, tmp_path / "far.echo")
    assert [f.name for f in tmp_path.iterdir()] == ["near.echo"]


def test_an_output_of_one_number_is_judged_by_how_it_varies_and_not_by_its_size(tmp_path: Path) -> None:
    """As of regression: at a batch of one it has no spread, and far from zero its size says nothing."""
    model = Toy((_floats(2, 6),), lambda x: (x @ WEIGHT[:, :1] + np.float32(1000),), quantization=Quantization())
    near = Echo(model, lambda outputs: tuple((x + 0.02).astype(x.dtype) for x in outputs))
    assert gate.lower(near, model, tmp_path / "near.echo").passed
    constant = Echo(model, lambda outputs: tuple(np.full_like(x, 1000) for x in outputs))
    with pytest.raises(SlimlineError, match="disagrees"):
        gate.lower(constant, model, tmp_path / "constant.echo")


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(SlimlineError, match="choose a place"):
        gate.lower(Echo(SEQUENCE), SEQUENCE, tmp_path / "missing" / "model.echo")


def test_export_is_gated_and_makes_no_folder_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from slimline.runtimes.onnx_session import OnnxSession

    model = sl.load(torch.nn.Linear(3, 2), _floats(2, 3))
    honest = OnnxSession.outputs
    monkeypatch.setattr(OnnxSession, "outputs", lambda self, inputs: tuple(x[::-1] for x in honest(self, inputs)))
    with pytest.raises(SlimlineError, match="disagrees"):
        sl.export(model, "onnxruntime", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert sl.export(model, "onnxruntime", tmp_path / "a" / "b").is_file()
