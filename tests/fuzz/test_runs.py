"""A journal or a recipe, mutated by a seed, is read or refused in a sentence, within bounds of time and memory."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from slimline.basics.errors import SlimlineError
from slimline.recipe import Recipe, load_recipe, presets
from slimline.recipe.recipe import parse
from slimline.run.directory import Run

SEEDS = [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 34))]
EACH = 300
ODD: list[Any] = [
    None, True, -1, 0, 1e308, "", "\0", "../../etc/passwd", "/etc/passwd", "ü" * 300, [], {}, [[]], {"a": None}, 10**30,
    "\ud800", float("nan"), float("-inf"), "os:system", ["x"] * 1000,
]  # fmt: skip
BITS = [
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system [id]", "!!binary x", "!!set ", "!!float x", "- ", ": ",
    "[" * 50, "{" * 50, "9" * 5000, "0x" + "f" * 9000, "1" + ":59" * 3000, "2001-13-45", "? [a]\n: b\n", "\t", "\0",
    "---\n", "%YAML 9.9\n", "|\n", "'", '"', "\x85", "\u2028", ".inf", ".nan", "-1", "~", "#", "!", "%", "@", "`",
]  # fmt: skip


def bytes_mutated(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randint(1, 200)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 30))
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 300)]
            case _:
                data[at:at] = rng.choice(BITS).encode("utf-8", "surrogatepass")
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def value_mutated(record: Any, rng: random.Random) -> Any:
    for _ in range(rng.randint(1, 3)):
        found = list(places(record))
        if not found:
            break
        holder, key = rng.choice(found)
        match rng.randrange(3):
            case 0:
                holder[key] = copy.deepcopy(rng.choice(ODD))  # which is damaged further in its place
            case 1:
                del holder[key]
            case _:
                other, at = rng.choice(found)
                holder[key] = json.loads(json.dumps(other[at] if isinstance(other, dict) and at in other else None))
    return record


def line(record: Any) -> bytes:
    body = json.dumps(record).encode()
    return body[:-1] + f', "check": "{sha256(body).hexdigest()[:16]}"}}\n'.encode()


def within(seconds: float, memory: int, call: Callable[[], Any]) -> Any:
    """What `call` gives, or the sentence that refuses it."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return call()
    except SlimlineError as e:
        assert str(e).strip()
        assert "\n" not in str(e)
        assert len(str(e)) < 1500
        return str(e)
    finally:
        assert time.process_time() - start < seconds
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < memory


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_journals_are_read_or_refused(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    rng = random.Random(seed)
    root = tmp_path / "r"
    with Run.create(root, presets()["balanced"].model_copy(update={"target": "onnxruntime"}), data="abc") as run:
        run.decide("fit", lambda: {"a": 1})
        run.stage("one", lambda f: (f / "model.pt2").write_bytes(b"one") and {"refused": [], "plan": {"notes": []}})
        run.write("model.pt2", b"one")
        run.finish(["recipe.yaml", "model.pt2"])
    journal = root / "journal.jsonl"
    good = journal.read_bytes()
    records = [json.loads(text) for text in good.splitlines()]
    for record in records:
        record.pop("check")

    def read() -> Run:
        with Run.open(root, lock=rng.random() < 0.5) as opened:
            assert isinstance(opened.recipe, Recipe)
            opened.verify()
            opened.due("one")
            if opened.finished:
                opened.restore()
            opened.read_recipe()
            return opened

    for _ in range(EACH):
        if rng.random() < 0.4:
            changed = bytes_mutated(good, rng)
        else:
            lines = [json.loads(json.dumps(record)) for record in records]
            at = rng.randrange(len(lines))
            lines[at] = value_mutated(lines[at], rng)
            lines += [lines[rng.randrange(len(lines))] for _ in range(rng.randrange(3))]
            changed = b"".join(line(record) if isinstance(record, dict) else b"\n" for record in lines)
        journal.write_bytes(changed)
        within(5, 300_000_000, read)
        assert {f.name for f in tmp_path.iterdir()} == {"r"}
        assert (root / "stages/one/model.pt2").read_bytes() == b"one"


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_recipes_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    texts = [recipe.dump().encode() for recipe in presets().values()]
    path = tmp_path / "r.yaml"
    for _ in range(EACH):
        path.write_bytes(bytes_mutated(rng.choice(texts), rng))
        found = within(5, 300_000_000, lambda: load_recipe(str(path)))
        if isinstance(found, Recipe):
            assert parse(found.dump()) == found


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
MERGES = "a: &a {k: v}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*{last}'] * 9)}]}}\n" for i, last in
                                    enumerate(["a", *(f"b{j}" for j in range(12))]))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("steps: &a [*a]", "aliases"),
        ("steps: " + "[" * 10_000, "levels deep"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(2, 200)), "levels deep|not YAML"),
        ("{" * 100_000, "levels deep"),
        ("steps: []\nseed: " + "9" * 5000, "cannot be read"),
        ("steps: []\nseed: 0x" + "f" * 9000, "seed of Recipe is a very large int"),
        ("steps: []\nseed: 1" + ":59" * 5000, "seed of Recipe is a very large int"),
        ("steps: []\nseed: -1", "seed of Recipe is -1"),
        ("steps: []\nseed: 2001-13-45", "cannot be read"),
        ("steps: []\nbudget: {max_latency: .inf}", "max_latency"),
        ("steps: []\nbudget: {max_latency: .nan}", "max_latency"),
        ("steps: []\n" + "x" * 900 + ": 1", "There is no field"),
        ("steps: !!python/object/apply:os.system [id]", "not YAML"),
        ("#" * 300_000, "more than 256000 characters"),
    ],
)
def test_bombs_and_depths_and_giants_are_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(SlimlineError, match=said) as caught:
        parse(text)
    assert len(str(caught.value)) < 600
