"""The command line: what it passes to the library, what it prints, how it ends."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from slimline import cli
from slimline.basics.progress import Progress
from slimline.data.datasets import builtin
from slimline.measure.figures import Figures, Latency
from slimline.recipe import Budget, Recipe, configs, handlers, presets
from slimline.report.console import Display
from slimline.report.tables import bytes_text, figures_table, latency_text
from slimline.run.directory import Run
from slimline.run.sources import DataSource, ModelSource, load_again, load_data, load_weights
from slimline.steps.quantization.step import StaticQuantization


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``slimline WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["slimline", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = "{'torch', 'keras', 'tensorflow', 'onnxruntime', 'matplotlib', 'sklearn', 'onnx', 'numpy'}"
    code = "import sys; sys.argv = ['slimline', '--help']\nimport slimline.cli\ntry: slimline.cli.main()\n"
    code += f"except SystemExit: print('LOADED', sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in said
    commands = ("demo", "compress", "inspect", "plan", "export", "measure", "resume", "verify", "report")
    for command in (*commands, "recipes", "targets", "steps"):
        assert command in said


def test_compress_stays_the_function_however_it_is_imported() -> None:
    code = "from slimline.run.compress import load\nimport slimline as sl\nassert callable(sl.compress), sl.compress\n"
    code += "assert sl.load is load and all(hasattr(sl, name) for name in sl.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes_lists_and_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "recipes")
    assert code == 0
    assert all(name in out for name in presets())
    code, out, _ = run(capsys, monkeypatch, "recipes", "show", "int8")
    assert code == 0
    assert yaml.safe_load(out)["steps"][0]["observer"] == "mse"


def test_targets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "targets")
    assert code == 0
    for part in ("onnxruntime", "litert", "openvino", "torch by onnx", "run, time", "basic"):
        assert part in out


def test_a_target_that_is_missing_can_be_asked_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimline.runtimes.openvino.find_spec", lambda name: None)
    code, out, _ = run(capsys, monkeypatch, "targets", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)["targets"]}
    assert code == 0 and found["openvino"]["can"] == []
    assert found["openvino"]["missing"] == "openvino is not installed: run pip install 'slimline[openvino]'."
    assert found["openvino"]["roads"]["torch"] == ["onnx"] and "run" in found["onnxruntime"]["can"]


def test_lists_are_json_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("targets", "recipes", "steps"):
        code, out, err = run(capsys, monkeypatch, name, "--json")
        assert (code, err) == (0, "") and out.isascii()
        read = json.loads(out)
        assert read["schema"] == 1 and read.keys() == {"schema", name}
        found[name] = {entry["name"]: entry for entry in read[name]}
    assert found["targets"].keys() >= {"litert", "onnxruntime", "openvino"}
    assert found["targets"]["onnxruntime"].keys() == {
        "name", "frameworks", "suffix", "description", "missing",
        "forms", "roads", "precisions", "can", "cannot", "settings",
    }  # fmt: skip
    assert {name: Recipe.model_validate({k: v for k, v in entry.items() if k != "name"})
            for name, entry in found["recipes"].items()} == presets()  # fmt: skip
    assert found["steps"].keys() == configs().keys()
    assert found["steps"]["Distillation"]["reads"] == [
        {"samples": "train", "when": ""}, {"samples": "selection", "when": ""}
    ]  # fmt: skip


def test_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.out, "_width", 300)  # COLUMNS counts only where it was set before the first import
    code, out, _ = run(capsys, monkeypatch, "steps")
    assert code == 0
    for each in handlers().values():
        line = next(line for line in out.splitlines() if each.config.__name__ in line)
        assert each.config.kind in line and each.summary in line and each.reading in line


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's module in it, and a compress that only notes how it was called."""
    pytest.importorskip("torch")
    (tmp_path / "mine.py").write_text(
        "import numpy as np, slimline\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def data():\n    return slimline.Data(test=(np.ones((50, 1, 8, 8)), np.arange(50) % 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_compress_passes_everything_on(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def fake(model: Any, data: Any, **given: Any) -> None:
        called.update(given, model=model, data=data)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("slimline.run.compress"), "compress", fake)
    words = ["compress", "mine:net", "--data", "mine:data", "-o", "out", "--max-drop", "0.02", "--max-latency", "0.5"]
    words += ["--seed", "7", "--batch", "1", "--batch", "8", "--threads", "2", "-t", "onnxruntime"]
    code, _, _ = run(capsys, monkeypatch, *words)
    assert code == 130
    recipe = called["recipe"]
    assert recipe.steps == presets()["int8"].steps, "auto without training data must not train"
    assert (recipe.seed, recipe.batch_sizes, recipe.threads, recipe.target) == (7, (1, 8), 2, "onnxruntime")
    assert (called["budget"].max_drop, called["budget"].max_latency) == (0.02, 0.5)
    assert called["command"] == ["slimline", *words]
    assert called["model"].example[0].shape == (2, 1, 8, 8)
    records = json.loads(json.dumps(called["sources"]))
    monkeypatch.chdir("/")
    assert len(load_again(records, "data", at_home=True)("channels_first").split("certification")) == 30
    again = load_again(records, "model", at_home=True)
    assert sorted(again.parameters()) == sorted(called["model"].parameters())


def test_budgets_take_units_on_the_command_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def fake(model: Any, data: Any, **given: Any) -> None:
        called.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("slimline.run.compress"), "compress", fake)
    words = ["compress", "mine:net", "--data", "mine:data", "-o", "out", "--max-latency", "250 us"]
    code, _, _ = run(capsys, monkeypatch, *words, "--max-size", "2 MB", "--max-memory", "0.5", "--max-macs", "0.3")
    assert code == 130
    assert called["budget"] == Budget(max_latency="0.25 ms", max_size="2000 kB", max_memory=0.5, max_macs=0.3)


def test_weights_fill_a_factory_exactly(project: Path) -> None:
    import torch
    from safetensors.torch import save_file

    first, second = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    save_file(first.state_dict(), project / "w.safetensors")
    load_weights(second, project / "w.safetensors")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize("packed", [True, False])
def test_arrays_from_npz_and_folder(tmp_path: Path, packed: bool) -> None:
    arrays = {"x_train": np.ones((20, 3)), "y_train": np.arange(20) % 3, "x_test": np.zeros((9, 3))}
    arrays["y_test"] = np.arange(9) % 3
    if packed:
        np.savez(tmp_path / "d.npz", **arrays)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = load_data(DataSource(str(tmp_path / "d.npz" if packed else tmp_path)))
    assert len(data.split("train")) == 18
    assert np.array_equal(data.split("certification").labels, arrays["y_test"])  # type: ignore[arg-type]


def test_records_are_json_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads(json.dumps(ModelSource("m.pt2", input_shape=(3, 8)).record()))
    assert record["name"] == str(tmp_path / "m.pt2")
    assert DataSource("digits").record()["name"] == "digits"
    assert load_data(DataSource("digits", 3)).fingerprint() == builtin("digits", seed=3).fingerprint()


def shown(printed: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(printed)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_says_what_was_gained_and_what_was_not_measured() -> None:
    before = Figures(
        accuracy=0.99, file_bytes=2_800_000, parameters=700_000, macs=70, latency={32: Latency.of([40.0, 41.0, 42.0])}
    )
    after = Figures(accuracy=0.985, file_bytes=200_000, parameters=700_000, macs=35, latency={32: Latency.of([82.0])})
    text = shown(figures_table({"original": before, "compressed": after}, "accuracy", "title"))
    for part in ("98.5", "-0.5", "2.8 MB", "200 kB", "14.00× smaller", "same", "2.00× fewer", "2.00× slower"):
        assert part in text
    assert text.count("not measured") == 2
    assert "41.0 ms [40.2–41.8]" in text
    assert "…" not in text, "the table must fit 80 columns"


def test_units_of_the_table() -> None:
    assert [bytes_text(n) for n in (12, 1_500, 999_700, 2.8e9)] == ["12 bytes", "1.5 kB", "1 MB", "2.8 GB"]
    assert latency_text(Latency.of([0.02])).startswith("20.0 µs")
    assert latency_text(Latency.of([2500.0])).startswith("2.50 s")


def test_progress_off_a_terminal_is_a_line_per_finished_job() -> None:
    console = Console(file=io.StringIO(), width=120)
    with Display(console) as display:
        for _ in range(2):
            for done in range(5):
                display(Progress("Training", done, 4, {"loss": 0.25}))
        display(Progress("Timing", 1, 2))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("Training: done in") == 2
    assert "loss 0.25" in said
    assert "Timing" not in said


def test_report_of_an_unfinished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Run.create(tmp_path / "r", Recipe(steps=(StaticQuantization(),))).close()
    code, out, err = run(capsys, monkeypatch, "report", str(tmp_path / "r"))
    assert (code, out) == (2, "")
    assert "has no report yet: finish it with slimline resume" in err
