"""Damage to JSON files, drawn by a seed: of their values, of their structure and of their bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**18, 0.5, -1e-320, 1e99, 1e308, float("nan"),
    float("inf"), -float("inf"), "", "0", "NaN", "1e5", "x" * 5000, "\x1b[2J\x07", "\u202edrow", "\ud800", "\x00",
    "<script>", "{{ 7 }}", "😀:m:[bold]", [], [[]], {}, {"": None}, [None], [0] * 50, {"a": {"b": [1, {"c": None}]}},
    "2026-13-45T99:99:99+00:00",
)  # fmt: skip


def mutate(document: Any, rng: random.Random) -> bytes:
    """The text of `document` after one to four injuries."""
    damaged = copy.deepcopy(document)
    for _ in range(rng.randint(1, 4)):
        place = _somewhere(damaged, rng)
        if place is None:
            break
        holder, key = place
        action = rng.choice(("replace", "replace", "remove", "rename", "swap", "repeat", "scale", "wrap"))
        value = holder[key]
        if action == "replace":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[rng.choice(("", "schema", "x" * 200, "\x1b", f"{key}2"))] = holder.pop(key)
        elif action == "swap" and (other := _somewhere(damaged, rng)) is not None:
            holder[key] = copy.deepcopy(other[0][other[1]])
        elif action == "repeat" and isinstance(value, list):
            holder[key] = value * rng.choice((0, 2, 20))
        elif action == "scale" and isinstance(value, int | float) and not isinstance(value, bool):
            holder[key] = value * rng.choice((-1, 0, 1e-300, 1e30, 10**40))
        elif action == "wrap":
            holder[key] = [value]
    text = json.dumps(damaged)
    if rng.random() < 0.3:
        text = _torn(text, rng)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and raw:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    return raw


def _somewhere(document: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A holder and a key in it, each level as likely as the next."""
    place: tuple[Any, Any] | None = None
    current = document
    while isinstance(current, dict | list) and current and (place is None or rng.random() < 0.8):
        key = rng.choice(list(current)) if isinstance(current, dict) else rng.randrange(len(current))
        place, current = (current, key), current[key]
    return place


def _torn(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text[:at],
            text[at:],
            text[:at] + rng.choice(("{", "]", ",", '"', "\n", "9" * 5000, "-", "1e999", "Infinity")) + text[at:],
            text.replace(":", ": " + "9" * 5000 + ",", 1),
            text.replace("null", "[" * 2000 + "]" * 2000, 1),
            text.replace("null", "[" * 100_000, 1),
            "\ufeff" + text,
            "",
        )
    )
