"""Samples that were certified on before are recognised, whatever was done to hide it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimline.measure import ledger


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """An original and five models."""
    paths = [tmp_path / f"m{i}" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return paths


def samples(n: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, n).astype(np.uint64)


def number(keys: np.ndarray, files: list[Path], model: int, metric: str = "accuracy") -> int:
    return ledger.use(keys, files[0], files[model], metric).number


def test_other_models_on_the_same_samples_count(files: list[Path]) -> None:
    keys = samples()
    assert [number(keys, files, m) for m in (1, 2, 3)] == [1, 2, 3]
    assert [number(keys, files, m) for m in (2, 1, 3)] == [2, 1, 3], "the same again costs nothing"
    assert number(keys, files, 1, "iou") == 4
    assert number(samples(seed=1), files, 1) == 1, "other samples are fresh"


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k[::-1],
        lambda k: k[:200],
        lambda k: np.concatenate([k[:30], samples(500, 9)]),
        lambda k: np.concatenate([k, k]),
    ],
)
def test_order_parts_and_mixtures_are_the_same_test(change, files: list[Path]) -> None:
    keys = samples()
    assert number(keys, files, 1) == 1
    assert number(change(keys), files, 2) == 2


def test_the_same_model_on_another_part_of_the_test_is_another_try(files: list[Path]) -> None:
    keys = samples()
    parts = [keys[:200], keys[50:250], keys[100:]]
    assert [number(part, files, 1) for part in parts] == [1, 2, 3]


def test_one_chance_sample_in_common_is_no_reuse(files: list[Path]) -> None:
    keys = samples()
    number(keys, files, 1)
    assert number(np.concatenate([samples(400, 5), keys[:1]]), files, 2) == 1


def test_it_outlives_the_process_and_damage(files: list[Path], tmp_path: Path) -> None:
    keys = samples()
    code = (
        "import sys, numpy as np; from pathlib import Path; from slimline.measure import ledger;"
        "print(ledger.use(np.load(sys.argv[1]), *map(Path, sys.argv[2:]), 'accuracy').number)"
    )
    np.save(tmp_path / "k.npy", keys)

    def start(model: int) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path / "k.npy"), str(files[0]), str(files[model])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    jobs = [start(m) for m in (1, 2, 3, 4)]
    assert sorted(int(job.communicate()[0]) for job in jobs) == [1, 2, 3, 4], "side by side, each its own number"
    folder = Path(os.environ["SLIMLINE_STATE"]) / "certificates"
    with (folder / "uses.jsonl").open("ab") as file:
        file.write(b'{"samples": "../../x", "model": 3}\n[[[\n\xff\n{"samples": "ab')
    assert [number(keys, files, 5), number(keys, files, 5)] == [5, 5]
    for file in (folder / "samples").iterdir():
        file.write_bytes(b"no array")
    assert number(keys, files, 5) == 5


def folder() -> Path:
    return Path(os.environ["SLIMLINE_STATE"]) / "certificates"


def cut_line(state: Path) -> None:
    file = state / "uses.jsonl"
    file.write_bytes(file.read_bytes()[:-30])


def flipped_bit(state: Path) -> None:
    for file in (state / "samples").iterdir():
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        file.write_bytes(raw)


DAMAGE = {
    "a line is cut": cut_line,
    "a line is of other types": lambda state: (state / "uses.jsonl").write_text(
        '{"samples": 1, "model": [], "use": {}}'
    ),
    "no line is left": lambda state: (state / "uses.jsonl").write_bytes(b""),
    "all lines are gone": lambda state: (state / "uses.jsonl").unlink(),
    "a bit of the samples": flipped_bit,
    "the samples are cut": lambda state: [f.write_bytes(f.read_bytes()[:100]) for f in (state / "samples").iterdir()],
    "the samples are gone": lambda state: [f.unlink() for f in (state / "samples").iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record_is_kept_and_every_certificate_says_so(damage, files, caplog) -> None:
    keys = samples()
    part = keys[:200]
    assert [ledger.use(keys, files[0], files[m], "accuracy").note for m in (1, 2)] == ["", ""]
    before = {f.name: f.read_bytes() for f in folder().rglob("*") if f.is_file()}
    damage(folder())
    damaged = {f.read_bytes() for f in folder().rglob("*") if f.is_file()} - set(before.values()) - {b""}
    with caplog.at_level("WARNING", "slimline"):
        used = [ledger.use(part, files[0], files[m], "accuracy") for m in (3, 4, 3)]
    assert [u.number for u in used] == [used[0].number, used[0].number + 1, used[0].number]
    assert all(u.note.startswith("The record of earlier certificates is damaged") for u in used)
    assert [str(folder()) in r.getMessage() for r in caplog.records] == [True], "said once"
    assert damaged <= {f.read_bytes() for f in (folder() / "damaged").iterdir()}
    assert "damaged" in ledger.use(samples(seed=1), files[0], files[1], "accuracy").note


def test_a_set_whose_uses_are_forgotten_counts_as_used(files: list[Path]) -> None:
    keys = samples()
    assert [number(keys, files, m) for m in (1, 2)] == [1, 2]
    (folder() / "uses.jsonl").write_bytes(b"")
    assert [number(keys[:200], files, m) for m in (3, 4)] == [2, 3]


def test_a_kill_between_entry_and_samples_is_no_damage(files: list[Path]) -> None:
    keys = samples()
    assert number(keys, files, 1) == 1
    for file in (folder() / "samples").iterdir():
        file.unlink()
    assert ledger.use(keys, files[0], files[1], "accuracy") == ledger.Use(1)
    assert ledger.use(keys[:200], files[0], files[2], "accuracy") == ledger.Use(2)


@pytest.mark.parametrize("how", ["empty", "file"])
def test_without_a_place_to_write_the_process_remembers_and_says_so(how, files, tmp_path, monkeypatch) -> None:
    if how == "file":
        (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMLINE_STATE", "" if how == "empty" else str(tmp_path / "file"))
    keys = samples(seed=7 if how == "empty" else 8)
    assert [number(keys, files, m) for m in (1, 2, 2, 1)] == [1, 2, 2, 1]
    note = ledger.use(keys, files[0], files[1], "accuracy").note
    assert note.startswith("Earlier certificates on these samples are known only of this process")
