"""What lies where in a run directory."""

from __future__ import annotations

JOURNAL = "journal.jsonl"
RECIPE = "recipe.yaml"
REPORT = "report.json"
LOCK = ".lock"
STAGES = "stages"
WORK = ".work"
DURATIONS = f"{WORK}/durations.jsonl"
