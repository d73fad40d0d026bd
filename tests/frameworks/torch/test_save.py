import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.run.sources import DataSource, ModelSource, load_pair

TORCH = adapter("torch")
X = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(8, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, x):
        a, b = (self.norm(self.first(x)) * self.scale).chunk(2, 1)
        return self.last(torch.cat([a, b, b, a], 1)) + torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.fixture(scope="module")
def native():
    torch.manual_seed(0)
    return TORCH.load(Net(), (X,))[0]


@pytest.fixture
def saved(native, tmp_path):
    path = tmp_path / "model.pt2"
    TORCH.save(native, path, (X,), {"history": [{"step": "one"}]})
    return path


def test_what_was_saved_comes_back(native, saved):
    back, example, metadata = TORCH.open(saved, False)
    assert metadata == {"history": [{"step": "one"}]}
    np.testing.assert_array_equal(example[0], X)
    five = np.resize(X, (5, 8))
    np.testing.assert_array_equal(TORCH.outputs(back, (five,))[0], TORCH.outputs(native, (five,))[0])
    assert set(back.state_dict()) == set(native.state_dict()) == set(Net().state_dict())
    assert back.last.weight is back.first.weight
    assert TORCH.read(back, example) == TORCH.read(native, example)


def test_the_same_model_gives_the_same_bytes_and_nothing_else(native, saved):
    first = saved.read_bytes()
    TORCH.save(native, saved, (X,), {"history": [{"step": "one"}]})
    assert saved.read_bytes() == first
    assert [p.name for p in saved.parent.iterdir()] == ["model.pt2"]


def test_no_pickle_is_inside(saved):
    with zipfile.ZipFile(saved) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not content.startswith((b"PK", b"\x80\x02", b"\x80\x04")), name


def test_torch_reads_it_too(native, saved):
    program = torch.export.load(saved)
    expected = TORCH.outputs(native, (X,))[0]
    np.testing.assert_array_equal(program.module()(torch.from_numpy(X)).detach().numpy(), expected)


def test_a_foreign_program_is_read_with_its_own_example(tmp_path):
    program = torch.export.export(nn.Linear(8, 2), (torch.from_numpy(X),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    native, example, metadata = TORCH.open(tmp_path / "foreign.pt2", False)
    assert metadata == {} and native.fixed_batch == 2
    np.testing.assert_array_equal(example[0], X)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_inside_is_refused_and_not_run(tmp_path):
    program = torch.export.export(nn.Linear(8, 2), (torch.from_numpy(X),))
    good, bad = tmp_path / "good.pt2", tmp_path / "bad.pt2"
    torch.export.save(program, good)
    buffer = io.BytesIO()
    torch.save(((Bomb(),), {}), buffer)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, buffer.getvalue() if "/sample_inputs/" in name else source.read(name))
    with pytest.raises(SlimlineError, match="holds a pickle"):
        TORCH.open(bad, False)


def test_pickles_need_the_flag(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SlimlineError, match="pass --allow-pickle"):
        TORCH.open(path, False)
    torch.save({"state": 1}, path)
    with pytest.raises(SlimlineError, match="holds a dict, not a module"):
        TORCH.open(path, True)
    path.write_bytes(b"nothing")
    with pytest.raises(SlimlineError, match="cannot be unpickled"):
        TORCH.open(path, True)


def test_a_trusted_pickle_takes_its_example_from_the_caller(tmp_path):
    path, x = tmp_path / "model.pt", np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    module = torch.nn.Linear(4, 2)
    torch.save(module, path)
    with pytest.raises(SlimlineError, match="needs example_inputs"):
        sl.load(path, allow_pickle=True)
    with torch.no_grad():
        np.testing.assert_allclose(
            sl.load(path, x, allow_pickle=True).predict(x), module(torch.tensor(x)).numpy(), atol=1e-6
        )
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "x_train.npy", x)
    source, data = ModelSource(str(path), allow_pickle=True), DataSource(str(tmp_path / "data"))
    assert load_pair(source, data)[0].graph.inputs


@pytest.mark.parametrize("damage", ["empty", "text", "zip", "cut", "inside"])
def test_a_damaged_file_is_one_sentence(saved, damage):
    content = saved.read_bytes()
    if damage == "zip":
        with zipfile.ZipFile(saved, "w") as archive:
            archive.writestr("hello", "world")
    elif damage == "inside":
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(saved, "w") as target:
            for name in source.namelist():
                target.writestr(name, b"{}" if name.endswith("models/model.json") else source.read(name))
    else:
        saved.write_bytes({"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(SlimlineError, match="is damaged or not"):
        TORCH.open(saved, False)


def test_places_that_do_not_exist(native, tmp_path):
    with pytest.raises(SlimlineError, match="There is no file"):
        TORCH.open(tmp_path / "none.pt2", False)
    with pytest.raises(SlimlineError, match="Cannot write"):
        TORCH.save(native, tmp_path / "none" / "model.pt2", (X,), {})


def test_every_way_to_transpose_a_matrix_is_saved(tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.weight.T @ self.weight.mT @ self.weight.H @ self.weight.t()

    model = sl.load(Turned().eval(), X[:, :4])
    again = sl.load(model.save(tmp_path / "model.pt2"))
    np.testing.assert_array_equal(again.predict(X[:, :4]), model.predict(X[:, :4]))
