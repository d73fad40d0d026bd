"""What the sweeps over model zoos share: one model in one fresh process, and the table of all of them.

A model counts as *covered* when it is captured, pruned at 30 % of every unit by L2 norm (with ``factors="all"`` where
the default leaves too much, which the table says), loses at least 25 % of its trained parameters, computes as the
removed model what the masked one computes (largest difference over largest output ≤ 1e-4, on another batch than the
one it was captured with), saves and loads equal, and takes a training step (not asked of ONNX files).
*Exported* says whether the artifact that `slimline.export` writes of the pruned model answers in its runtime as the
model does, with all outputs, on the example and on random inputs, at several batch sizes where any goes; a dash is "not
measured".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RATIO, LESS, TOLERANCE = 0.3, 0.25, 1e-4
TIMEOUT = 3600
_COLUMNS = (
    "model", "covered", "exported and equal in the runtime", "error", "parameters", "MACs", "operators", "load s",
    "plan s", "why not, or what is frozen",
)  # fmt: skip
_EXPORTED = {True: "yes", False: "no", None: "–"}


@dataclass(frozen=True)
class Case:
    """A model of a zoo.

    Attributes
    ----------
    make : gives the module and its example inputs, tensors of batch 2.
    parts : names of the submodules to compress where the model does not export whole.
    targets : what a model by parts trains towards, its second argument, to answer losses.
    """

    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    parts: tuple[str, ...] = ()
    targets: Callable[[], Any] | None = None


def main(
    zoo: str,
    cases: Mapping[str, Case],
    skipped: Mapping[str, str],
    doc: str | None,
    examine: Callable[[Case], dict[str, Any]] | None = None,
    order: Callable[[Iterable[str]], Sequence[str]] = tuple,
) -> None:
    """Sweep `cases`, or those named on the command line, into ``results/zoo_ZOO.{json,md}``; other rows stay.

    `examine` gives the row of a case; by default that of a torch model, whole or by its parts. `order` says which
    are run first; the table is in the order of `cases`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to run (default: all)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="leave out the models that are covered already")
    args = parser.parse_args()
    if args.one:
        case = cases[args.names[0]]
        examine = examine or (check_parts if case.parts else check)
        print(json.dumps(examine(case)))
        return
    path = HERE / f"results/zoo_{zoo}.json"
    for name in args.names or order(cases):
        if not (args.resume and _rows(path).get(name, {"covered": False})["covered"]):
            row = {"model": name, "exported": None, **_fresh(name), "parts": list(cases[name].parts)}
            print(_line(row), flush=True)
            rows = {**_rows(path), name: row}  # read anew: several sweeps may share the work
            pending = dict.fromkeys((name for name in cases if name not in rows), "not yet")
            _write(path, [rows[name] for name in cases if name in rows], {**skipped, **pending})


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured so far, by model."""
    return {r["model"]: r for r in json.loads(path.read_text())["rows"]} if path.exists() else {}


def _fresh(name: str) -> dict[str, Any]:
    """`check` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, sys.argv[0], "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        return {"covered": False, "failure": f"took longer than {TIMEOUT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return {"covered": False, "failure": last[:300]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def pruned(model: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The plan at 30 %, the removed and the masked model, and what the row says of them."""
    import slimline as sl

    start = time.perf_counter()
    for factors in ("largest", "all"):
        plan = sl.plan(model, sl.ChannelPruning(ratio=RATIO, criterion="l2", factors=factors))
        if plan.parameters <= (1 - LESS) * plan.graph.size:
            break
    planned = time.perf_counter()
    small, masked = plan.apply(model), plan.mask(model)
    return (
        plan,
        small,
        masked,
        {
            "factors": factors,
            "seconds_to_plan": round(planned - start, 1),
            "seconds_to_prune": round(time.perf_counter() - planned, 1),
            "operators": len(plan.graph.nodes),
            "parameters": plan.graph.size,
            "less": 1 - plan.parameters / plan.graph.size,
            "macs_less": 1 - plan.macs / max(plan.summary()["macs"]["before"], 1),
            "units": len(plan.units.units),
            "frozen": [f"{f.name} {f.size}: {f.reason}" for f in plan.units.frozen],
        },
    )


def exported(*models: Any) -> dict[str, Any]:
    """Whether the artifacts of these models equal them in the runtime, and why not; the gate of `sl.export` says so."""
    import slimline as sl

    start = time.perf_counter()
    failure = ""
    try:
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                sl.export(model, model.usual_target, folder)
    except sl.SlimlineError as e:
        failure = str(e)[:300]
    seconds = round(time.perf_counter() - start, 1)
    return {"exported": not failure, "export_failure": failure, "seconds_to_export": seconds}


def check(case: Case) -> dict[str, Any]:
    """Everything that is asked of one model."""
    import torch

    import slimline as sl

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, example = case.make()
    module.eval()
    _unsettle(module)
    row: dict[str, Any] = {"covered": False, "failure": ""}
    clock = time.perf_counter()
    try:
        model = sl.load(module, example)
    except sl.SlimlineError as e:
        return {**row, "failure": str(e)}
    row["seconds_to_load"] = round(time.perf_counter() - clock, 1)
    plan, small, masked, facts = pruned(model)
    row |= facts
    batch = _another(model.example, model.native.fixed_batch is not None)
    row["any_batch"] = model.native.fixed_batch is None
    before, removed, zeroed = (_outputs(m.native, batch) for m in (model, small, masked))
    row["error"] = _difference(removed, zeroed)
    row["moved"] = _difference(before, zeroed)
    row["exact"] = row["error"] <= TOLERANCE
    counted = sum(p.numel() for p in small.native.parameters())
    row["counted"] = counted == plan.parameters
    row["saved"] = _saves(small, batch)
    row["trained"] = _trains(small.native, batch, model.native)
    return verdict(row | exported(small))


def check_parts(case: Case) -> dict[str, Any]:
    """The same of a model by parts: masked and removed are compared part by part, since choosing boxes is no
    continuous function; and the whole module, with the small parts in it, has to run, save, load and train."""
    import torch

    import slimline as sl

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, example = case.make()
    module.eval()
    _unsettle(module)
    clock = time.perf_counter()
    try:
        model = sl.load(module, example, parts=case.parts)
    except sl.SlimlineError as e:
        return {"covered": False, "failure": str(e)}
    row: dict[str, Any] = {"covered": False, "failure": "", "seconds_to_load": round(time.perf_counter() - clock, 1)}
    clock = time.perf_counter()
    for factors in ("largest", "all"):
        plan = sl.plan(model, sl.ChannelPruning(ratio=RATIO, criterion="l2", factors=factors))
        gone = sum(p.graph.size - p.parameters for p in plan.plans.values())
        if gone >= LESS * model.size:
            break
    plans = list(plan.plans.values())
    before = sum(p.summary()["macs"]["before"] for p in plans)
    row |= {
        "factors": factors,
        "seconds_to_plan": round(time.perf_counter() - clock, 1),
        "operators": sum(len(p.graph.nodes) for p in plans),
        "parameters": model.size,
        "less": gone / model.size,
        "macs_less": 1 - sum(p.macs for p in plans) / max(before, 1),
        "units": sum(len(p.units.units) for p in plans),
        "frozen": [f"{f.name} {f.size}: {f.reason}" for p in plans for f in p.units.frozen],
    }
    small, masked = plan.apply(model), plan.mask(model)
    row["error"], row["moved"] = 0.0, 0.0
    for name in case.parts:
        batch = _another(model.parts[name].example, model.parts[name].native.fixed_batch is not None)
        whole, removed, zeroed = (_outputs(m.parts[name].native, batch) for m in (model, small, masked))
        row["error"] = max(row["error"], _difference(removed, zeroed))
        row["moved"] = max(row["moved"], _difference(whole, zeroed))
    row |= exported(*(small.parts[name] for name in case.parts))
    row["exact"] = row["error"] <= TOLERANCE
    row["counted"] = sum(p.numel() for p in small.native.parameters()) == model.size - gone
    answers = _outputs(small.native, example)
    row["whole_error"] = _difference(_outputs(model.native, example), _outputs(module, example))
    with tempfile.TemporaryDirectory() as folder:
        again = _outputs(sl.load(case.make()[0].eval(), parts=small.save(Path(folder) / "small")).native, example)
    row["saved"] = all(torch.equal(a, b) for a, b in zip(answers, again, strict=True))
    student = small.native.train()
    torch.manual_seed(0)
    sum(student(*example, case.targets() if case.targets else None).values()).backward()
    row["trained"] = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())
    start = [p.detach().clone() for p in student.parameters()]
    torch.optim.SGD(student.parameters(), 1e-4).step()
    row["trained"] &= any(not torch.equal(p, q) for p, q in zip(student.parameters(), start, strict=True))
    return verdict(row)


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with what is missing."""
    row["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    missing = [what for what in ("exact", "counted", "saved", "trained") if not row[what]]
    if row["less"] < LESS:
        missing.append(f"{LESS:.0%} less parameters")
    if not row["moved"] > 1e-3:
        missing.append("moved")
    if row.get("whole_error", 0.0) > TOLERANCE:
        missing.append("the user's module once it is put together")
    row["failure"] = f"not {', '.join(missing)}" if missing else ""
    row["covered"] = not missing
    return row


def _unsettle(module: Any) -> None:
    """Norms whose statistics and affine parameters are not 0 and 1, and no matrix of zeros, such as the head that a
    fresh vision transformer has, so that exactness means something."""
    import torch
    from torch import nn

    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1 and not bool(p.any()):
                p.normal_(0, 0.02)
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.7, 1.4)
            if hasattr(m, "weight") and "norm" in type(m).__name__.lower() and isinstance(m.weight, torch.Tensor):
                m.weight.uniform_(0.7, 1.3)
                if isinstance(getattr(m, "bias", None), torch.Tensor):
                    m.bias.normal_(0, 0.1)


def _another(example: tuple[np.ndarray, ...], fixed: bool) -> tuple[Any, ...]:
    """Other numbers, and one more sample unless the model only takes as many as it has."""
    import torch

    rng = np.random.default_rng(1)
    rows = len(example[0])
    changed = []
    for x in example:
        more = np.resize(x, (rows + 1, *x.shape[1:])) if len(x) == rows and not fixed else x
        changed.append(more + rng.normal(0, 0.3, more.shape).astype(x.dtype) if x.dtype.kind == "f" else more)
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in changed)


def _outputs(native: Any, batch: tuple[Any, ...]) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        leaves = pytree.tree_leaves(native(*batch))
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def _difference(left: list[Any], right: list[Any]) -> float:
    """The largest difference of any output, over the largest number of that output."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_floating_point() and a.numel():
            a, b = a.double(), b.double()
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def _saves(small: Any, batch: tuple[Any, ...]) -> bool:
    import torch

    import slimline as sl

    with tempfile.TemporaryDirectory() as folder:
        again = sl.load(small.save(Path(folder) / "small.pt2"))
    both = zip(_outputs(again.native, batch), _outputs(small.native, batch), strict=True)
    return all(torch.equal(a, b) for a, b in both)


def _trains(native: Any, batch: tuple[Any, ...], dense: Any) -> bool:
    """One step of gradient descent reaches every parameter that one of `dense` does, and moves the outputs."""
    import torch

    student, before = _stepped(native, batch), _stepped(dense, batch)
    torch.optim.SGD(student.parameters(), 1e-3).step()
    moved = any(not torch.equal(p, q) for p, q in zip(student.parameters(), native.parameters(), strict=True))
    return moved and _reached(student) == _reached(before)


def _stepped(native: Any, batch: tuple[Any, ...]) -> Any:
    """A copy in training, with the gradients of the mean square of its outputs."""
    import copy

    import torch
    from torch.utils import _pytree as pytree

    student = copy.deepcopy(native).train()
    torch.manual_seed(0)
    outputs = [x for x in pytree.tree_leaves(student(*batch)) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum(x.float().square().mean() for x in outputs).backward()
    return student


def _reached(student: Any) -> set[str]:
    """Names of the parameters with a finite gradient."""
    import torch

    return {n for n, p in student.named_parameters() if p.grad is not None and bool(torch.isfinite(p.grad).all())}


def _line(row: Mapping[str, Any]) -> str:
    if "less" not in row:
        return f"{row['model']:28} FAILED  {row['failure']}"
    reasons = sorted({f.partition(": ")[2] for f in row["frozen"]} - {"the model's output"})
    return (
        f"{row['model']:28} {'ok' if row['covered'] else 'FAILED':7} exported {_EXPORTED[row.get('exported')]}  "
        f"error {row['error']:.1e}  parameters -{row['less']:.0%}  "
        f"load {row['seconds_to_load']} s  plan {row['seconds_to_plan']} s  {row['failure']}"
        + "".join(f"\n{'':28}   frozen: {r}" for r in reasons)
    )


def _write(path: Path, rows: list[dict[str, Any]], skipped: Mapping[str, str]) -> None:
    from slimline.measure import environment

    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows, "skipped": dict(skipped)}, indent=1))
    path.with_suffix(".md").write_text(markdown(path.stem, rows, skipped))


def markdown(name: str, rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> str:
    """The table of a sweep; what was not measured is a dash."""
    covered = sum(r["covered"] for r in rows)
    asked = [r["exported"] for r in rows if r.get("exported") is not None]
    lines = [
        f"# {name}: {covered} of {len(rows)} covered",
        "",
        f"Exported and equal in the runtime: {f'{sum(asked)} of {len(asked)}' if asked else 'not measured'}.",
        "",
        (__doc__ or "").partition("\n\n")[2].replace("\n", " ").strip(),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for r in rows:
        if "less" not in r:
            lines.append(f"| {r['model']} | no | – | | | | | | | {r['failure']} |")
            continue
        reasons = sorted({f.partition(": ")[2] for f in r["frozen"]} - {"the model's output"})
        parts = f"parts: {', '.join(r['parts'])}" if r["parts"] else ""
        factors = "factors=all" if r["factors"] == "all" else ""
        wrong = f"export: {r['export_failure']}" if r.get("export_failure") else ""
        remarks = "; ".join(filter(None, [r["failure"], wrong, factors, parts, *reasons]))
        lines.append(
            f"| {r['model']} | {'yes' if r['covered'] else 'no'} | {_EXPORTED[r.get('exported')]} | "
            f"{r['error']:.0e} | −{r['less']:.0%} | −{r['macs_less']:.0%} | {r['operators']} | "
            f"{r['seconds_to_load']} | {r['seconds_to_plan']} | {remarks} |"
        )
    if skipped:
        lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in skipped.items())]
    return "\n".join(lines) + "\n"
