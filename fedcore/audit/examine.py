"""The audit, from cells to verdicts: get the observations of a cell, run every attack, score what came back; resumable.

A cell is one setting under audit: a combination of a sweep (local epochs, batch size, examples), a defence with the run that it was
switched on in, or a captured round of a run. Cells are independent; each that is done is a file of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from fedcore import __version__
from fedcore.audit import metrics
from fedcore.audit.attacks import membership as members
from fedcore.audit.attacks.analytic import Analytic
from fedcore.audit.attacks.base import (
    Attack,
    Progress,
    Reconstruction,
    lacking,
    settings_of,
)
from fedcore.audit.attacks.dlfa import DLFA
from fedcore.audit.attacks.dlg import DLG
from fedcore.audit.attacks.idlg import IDLG
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.labels import recover
from fedcore.audit.attacks.sme import SME
from fedcore.audit.inspection import inspect_model
from fedcore.audit.observe import (
    Observation,
    Subject,
    Truth,
    aggregate,
    alignment,
    captured,
    moved,
    observation,
    public,
    simulate,
    truth_of,
)
from fedcore.config import Experiment
from fedcore.errors import FedcoreError, SettingsError
from fedcore.rng import rng, seed_of
from fedcore.rounds import loop
from fedcore.rounds.rundir import read_history, stored
from fedcore.rounds.signals import signals
from fedcore.storage.checkpoint import write_atomically
from fedcore.task import Task
from fedcore.tasks import build_task

SCHEMA = 1
IMAGE_ATTACKS: dict[str, type[Attack[Any]]] = {
    "sme": SME,
    "ig": IG,
    "dlg": DLG,
    "idlg": IDLG,
    "dlfa": DLFA,
    "analytic": Analytic,
}
ATTACKS = (*IMAGE_ATTACKS, "labels", "membership")
DEFAULT_ATTACKS = ("sme", "ig", "analytic", "labels", "membership")
Budget = Literal["quick", "standard", "thorough", "paper"]
# IG in the loop that SME's authors compare with; "paper" is every attack in its paper's own settings.
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "sme": {"iterations": 300},
        "ig": {"iterations": 300, "lr": 1.0, "tv": 0.01},
        "dlg": {"iterations": 50},
        "idlg": {"iterations": 50},
        "dlfa": {"iterations": 100},
    },
    "standard": {
        "sme": {"iterations": 1000, "restarts": 2},
        "ig": {"iterations": 1000, "restarts": 2, "lr": 1.0, "tv": 0.01},
        "dlg": {"iterations": 150},
        "idlg": {"iterations": 150},
        "dlfa": {"iterations": 200},
    },
    "thorough": {
        "sme": {"iterations": 4000, "restarts": 4},
        "ig": {"iterations": 4000, "restarts": 4, "lr": 1.0, "tv": 0.01},
        "dlg": {},
        "idlg": {},
        "dlfa": {},
    },
    "paper": {},
}
# Each against what it costs in accuracy: the settings that a run can switch on.
PANEL = (
    "none",
    "clip=0.2",
    "clip=0.2 noise_multiplier=0.002",
    "clip=0.2 noise_multiplier=0.01",
    "top_k=0.1",
    "bits=4",
    "local.batch_size=12",
    "local.epochs=20",
    "secagg=4",
    'method.name=fedsim method.personal=["input"]',
    'method.name=fedsim method.personal=["output"]',
)
CPU = torch.device("cpu")
PICTURED = 4  # clients of a cell whose images are shown
SHOWN = 8  # images of a client that are shown
PROBES = 1000  # public examples for the sign of an update


@dataclass(frozen=True)
class Plan:
    """What is done to every cell."""

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # settings of attacks, over the budget's
    budget: Budget = "quick"
    labels: Literal["recovered", "oracle", "soft"] = "recovered"
    truth: bool = True  # score against the clients' data, where the simulation has it
    flip: bool = (
        False  # what came up is global minus local: never guessed, only warned of
    )
    images: bool = True  # show images in the report
    clients: int = 4  # of a cell
    seed: int = 0

    def settings(self, attack: str) -> dict[str, Any]:
        """Of one attack by optimisation or formula. Raises SettingsError for what it does not know."""
        values = {
            **BUDGETS[self.budget].get(attack, {}),
            **self.options.get(attack, {}),
        }
        try:
            return (
                settings_of(IMAGE_ATTACKS[attack]).model_validate(values).model_dump()
            )
        except ValidationError as e:
            fault = e.errors()[0]
            known = ", ".join(settings_of(IMAGE_ATTACKS[attack]).model_fields)
            key = ".".join([attack, *map(str, fault["loc"])])
            raise SettingsError(
                f"--option {key} = {fault['input']!r}: {fault['msg'].lower()}; {attack} knows {known}"
            ) from e

    def check(self) -> None:
        """Raises SettingsError for attacks and options that do not exist."""
        for name in (*self.attacks, *self.options):
            if name not in ATTACKS:
                raise SettingsError(
                    f'attack "{name}": there is no such attack; known: {", ".join(ATTACKS)}'
                )
        for name in self.options:
            if name not in IMAGE_ATTACKS:
                raise SettingsError(
                    f'--option {name}: the attack "{name}" has no settings'
                )
        for name in self.attacks:
            if name in IMAGE_ATTACKS:
                self.settings(name)


class Prepared(NamedTuple):
    """What a cell is about, ready to be attacked."""

    subjects: list[Subject]
    task: Task
    accuracy: float | None = (
        None  # of the run's model on the test set, as last measured
    )
    client_accuracy: float | None = (
        None  # mean over clients, of the model that each uses
    )
    personal: bool = False  # whether clients have models of their own
    privacy: dict[str, Any] | None = None  # what an accountant says of the run
    device: torch.device = CPU  # where attacks run


@dataclass(frozen=True)
class Cell:
    """One setting under audit."""

    name: str
    factors: dict[str, Any]
    prepare: Callable[[Observer], Prepared]
    identity: Any  # everything else that its result depends on (JSON)


class Observer(Protocol):
    """Is told how the audit goes on; and runs that it trains report to it as any run does."""

    def cell(self, number: int, cells: int, name: str) -> None: ...
    def progress(self, share: float, what: str, objective: float | None) -> None: ...
    def note(self, message: str) -> None: ...
    def training(self) -> loop.Observer: ...


class Stopped(Exception):
    """The user asked to stop; what is done is kept."""


def sweep(
    e: Experiment,
    plan: Plan,
    epochs: Sequence[int],
    batches: Sequence[int],
    examples: Sequence[int],
) -> list[Cell]:
    """Synthetic first rounds of the experiment, for every combination of the three."""
    cells = []
    for E, B, N in itertools.product(epochs, batches, examples):
        changed = e.model_copy(
            update={
                "local": e.local.model_copy(
                    update={"epochs": E, "batch_size": B, "steps": None}
                )
            }
        )

        def prepare(
            observer: Observer, e: Experiment = changed, N: int = N
        ) -> Prepared:
            task = build_task(e)
            return Prepared(simulate(e, task, plan.clients, N), task, device=_device(e))

        factors = {
            "epochs": E,
            "batch_size": B,
            "examples": N,
            "local_steps": E * math.ceil(N / B),
        }
        cells.append(
            Cell(
                f"{E} epoch{'s' * (E > 1)}, batches of {B}, {N} example{'s' * (N > 1)}",
                factors,
                prepare,
                changed.model_dump(mode="json"),
            )
        )
    return cells


def rounds_of(run_dir: Path, plan: Plan) -> tuple[Experiment, list[Cell]]:
    """The captured rounds of a run, finished or running. Raises SettingsError when there are none."""
    e = Experiment.parse(stored(run_dir), source=str(run_dir / "config.toml"))
    found = captured(run_dir)

    def cell(t: int) -> Cell:
        def prepare(observer: Observer) -> Prepared:
            return _captured(e, run_dir, plan, t, 1)

        return Cell(
            f"round {t}",
            {"round": t},
            prepare,
            [e.model_dump(mode="json"), [x.client for x in found if x.round == t]],
        )

    return e, [cell(t) for t in sorted({x.round for x in found})]


def _captured(
    e: Experiment, run_dir: Path, plan: Plan, t: int, together: int
) -> Prepared:
    """The clients captured in round t; of each, the exchange that tells of a round, and all earlier ones for membership."""
    task = build_task(e)
    method, known = e.build_method(), public(e, task)
    by_client: dict[int, list[Observation]] = {}
    for x in captured(run_dir):
        if x.round <= t and x.num_examples > 0:
            by_client.setdefault(x.client, []).append(observation(method, known, x))
    chosen = [(i, own) for i, own in sorted(by_client.items()) if own[-1].round == t][
        : plan.clients * together
    ]
    subjects = [
        Subject(own[-1], truth_of(task, i), tuple(own[:-1])) for i, own in chosen
    ]
    if together > 1:
        groups = [
            subjects[i : i + together]
            for i in range(0, len(subjects) - together + 1, together)
        ]
        if not groups:
            raise SettingsError(
                f"secagg={together}: round {t} has {len(subjects)} captured clients, expected at least {together}"
            )
        subjects = [aggregate(group) for group in groups]
    rows = read_history(run_dir, _rounds_done(run_dir))
    privacy = next(
        (row["privacy"] for row in reversed(rows) if row.get("privacy") is not None),
        None,
    )
    accuracy = next(
        (
            row["test_accuracy"]
            for row in reversed(rows)
            if row.get("test_accuracy") is not None
        ),
        None,
    )
    own = next(
        (
            row["client_accuracy"]["mean"]
            for row in reversed(rows)
            if row.get("client_accuracy")
        ),
        None,
    )
    return Prepared(
        subjects, task, accuracy, own, method.personalises(), privacy, _device(e)
    )


def _device(e: Experiment) -> torch.device:
    """A run that was trained on a GPU can be audited without one."""
    return torch.device(
        "cuda" if e.engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    )


def _rounds_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def defences(e: Experiment, plan: Plan, wanted: Sequence[str], out: Path) -> list[Cell]:
    """For each defence a run of the experiment with it, trained to its end, and the clients captured in its first round.

    A defence is settings as in --set, separated by spaces: "clip=1 noise_multiplier=0.01" (of the section `defence`),
    "local.epochs=5", "method.name=fedsim"; "secagg=M": only the mean of M clients is seen; "none". Raises SettingsError.
    """
    cells = []
    for text in dict.fromkeys(
        itertools.chain.from_iterable(PANEL if w == "panel" else (w,) for w in wanted)
    ):
        pairs = dict(
            _pair(text, word)
            for word in (
                [] if text == "none" else re.split(r"\s+(?=[\w.]+=)", text.strip())
            )
        )
        together = int(pairs.pop("secagg", 1))
        keep = {"audit.capture": str(plan.clients * together), "audit.rounds": "[1]"}
        changed = Experiment.parse(
            e.model_dump(mode="json", exclude_none=True),
            [f"{k}={v}" for k, v in (pairs | keep).items()],
            text,
        )
        _check(changed)
        folder = out / "runs" / hashlib.sha256(text.encode()).hexdigest()[:12]

        def prepare(
            observer: Observer,
            e: Experiment = changed,
            folder: Path = folder,
            together: int = together,
        ) -> Prepared:
            begun = (folder / "config.toml").exists()
            loop.run(
                e,
                out=None if begun else folder,
                resume=folder if begun else None,
                observer=observer.training(),
            )
            return _captured(e, folder, plan, 1, together)

        cells.append(
            Cell(
                text,
                {"defence": text},
                prepare,
                [changed.model_dump(mode="json"), together],
            )
        )
    return cells


def _check(e: Experiment) -> None:
    """Raises SettingsError for what a run of it would find at its start: before the first of several runs trains."""
    task, method = build_task(e), e.build_method()
    params = task.init_params()
    method.init_server(params, task.population)
    method.init_client(params)


def _pair(text: str, word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or (key == "secagg" and not (value.isdigit() and int(value) > 0)):
        raise SettingsError(
            f'--defence "{text}": found "{word}", expected key=value, e.g. clip=1, local.epochs=5, secagg=4, or none'
        )
    return (
        key
        if "." in key or key == "secagg" or key in Experiment.model_fields
        else f"defence.{key}",
        value,
    )


@dataclass
class Audit:
    """What an audit found; `audit.json` is this."""

    mode: str
    experiment: dict[str, Any]
    plan: dict[str, Any]
    cells: list[dict[str, Any]]
    warnings: list[str]
    interrupted: bool
    created: str
    seconds: float
    failed: dict[str, str] = field(
        default_factory=dict
    )  # cells that could not be made: why

    def to_dict(self) -> dict[str, Any]:
        """JSON without pictures."""
        cells = [
            {key: value for key, value in cell.items() if key != "pictures"}
            for cell in self.cells
        ]
        facts = {
            "schema": SCHEMA,
            "tool_version": __version__,
            "mode": self.mode,
            "experiment": self.experiment,
            "plan": self.plan,
        }
        rest: dict[str, Any] = {
            "failed": self.failed,
            "warnings": self.warnings,
            "interrupted": self.interrupted,
            "created": self.created,
            "seconds": self.seconds,
        }
        return {
            **facts,
            "view": "client_update",
            "cells": cells,
            "worst": self.worst,
            **rest,
        }

    @property
    def judged_by(self) -> str:
        """Whose accuracy is set against privacy: where a method personalises, the clients' own models in every cell."""
        return (
            "client_accuracy"
            if any(cell["personal"] for cell in self.cells)
            else "accuracy"
        )

    @property
    def worst(self) -> dict[str, Any]:
        """The highest input leakage over cells and clients, for --fail-above; null where nothing was scored."""
        scored = [
            (c["input_leakage"], cell["name"], c["client"])
            for cell in self.cells
            for c in cell["clients"]
            if c["grade"]
        ]
        if not scored:
            return {"input_leakage": None, "cell": None, "client": None}
        value, name, client = max(scored)
        return {"input_leakage": value, "cell": name, "client": client}


def examine(
    mode: str,
    e: Experiment,
    cells: Sequence[Cell],
    plan: Plan,
    out: Path,
    observer: Observer,
) -> Audit:
    """Attack and score every cell, those that `out` already holds the results of excepted.

    SIGINT ends it early: what is done is returned, `interrupted`. A cell that cannot be made is left out, noted and named in
    `failed`. Raises the SettingsError or RunError of the last when none could be made.
    """
    plan.check()
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    out.chmod(0o700)
    begin, stop = time.perf_counter(), threading.Event()
    done: list[dict[str, Any]] = []
    warnings: list[str] = []
    failed: dict[str, str] = {}
    with signals(stop):
        for number, cell in enumerate(cells):
            observer.cell(number, len(cells), cell.name)
            file = out / "cells" / f"{_key(cell, plan)}.json"
            try:
                found = json.loads(file.read_text()) if file.exists() else None
                if found is None:
                    found = _examine(cell, plan, observer, stop)
                    if not found["interrupted"]:
                        file.parent.mkdir(exist_ok=True)
                        write_atomically(file, json.dumps(found).encode())
            except (Stopped, loop.Interrupted):
                stop.set()
                break
            except FedcoreError as error:
                if not done and number == len(cells) - 1:
                    raise
                failed[cell.name] = str(error)
                observer.note(f"{cell.name} is left out: {error}")
                continue
            done.append(found)
            warnings += [w for w in found["warnings"] if w not in warnings]
            if stop.is_set():
                break
    asked: dict[str, Any] = {
        "attacks": list(plan.attacks),
        "budget": plan.budget,
        "labels": plan.labels,
        "clients": plan.clients,
        "seed": plan.seed,
    }
    asked["settings"] = {
        name: plan.settings(name) for name in plan.attacks if name in IMAGE_ATTACKS
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = round(time.perf_counter() - begin, 1)
    return Audit(
        mode,
        e.model_dump(mode="json"),
        asked,
        done,
        warnings,
        stop.is_set(),
        created,
        seconds,
        failed,
    )


def _key(cell: Cell, plan: Plan) -> str:
    facts = [
        SCHEMA,
        cell.factors,
        cell.identity,
        plan.seed,
        plan.clients,
        plan.labels,
        plan.truth,
        plan.flip,
        plan.images,
        list(plan.attacks),
    ]
    facts.append(
        {name: plan.settings(name) for name in plan.attacks if name in IMAGE_ATTACKS}
    )
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _examine(
    cell: Cell, plan: Plan, observer: Observer, stop: threading.Event
) -> dict[str, Any]:
    """One cell's part of audit.json, and its pictures."""
    begin = time.perf_counter()
    prepared = cell.prepare(observer)
    subjects, task = prepared.subjects, prepared.task
    if stop.is_set():
        raise Stopped
    if plan.flip:
        subjects = [
            s._replace(
                seen=s.seen.flipped(), before=tuple(o.flipped() for o in s.before)
            )
            for s in subjects
        ]
    warnings = _doubts([s.seen for s in subjects], task)
    warnings += dict.fromkeys(line for s in subjects for line in inspect_model(s.seen))
    if plan.labels == "oracle":
        subjects = [
            s._replace(seen=replace(s.seen, labels=s.truth.y))
            if s.truth is not None
            else s
            for s in subjects
        ]
    if not plan.truth:
        subjects = [s._replace(truth=None) for s in subjects]
    seen = [s.seen for s in subjects]
    known: list[Tensor | None] = []
    unknown: dict[int, str] = {}
    for i, o in enumerate(seen):
        try:
            known.append(None if plan.labels == "soft" else recover(o, plan.seed))
        except ValueError as error:
            known.append(None)
            unknown[i] = str(error)
    if unknown:
        warnings.append(
            f"labels are not recovered, and optimised with the images: {next(iter(unknown.values()))}"
        )
    there = moved(seen, prepared.device)
    found: dict[str, list[Reconstruction]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    wanted = [name for name in plan.attacks if name in IMAGE_ATTACKS]
    for number, name in enumerate(wanted):
        if stop.is_set():
            break
        attack = IMAGE_ATTACKS[name](
            settings_of(IMAGE_ATTACKS[name])(**plan.settings(name))
        )
        why = next((reason for o in seen if (reason := lacking(attack.needs, o))), None)
        if why is not None:
            failed[name] = why
            continue
        started = time.perf_counter()
        try:
            watch = _watch(observer, stop, name, number, len(wanted))
            found[name] = [
                r.cpu() for r in attack.reconstruct(there, known, plan.seed, watch)
            ]
        except ValueError as error:
            failed[name] = str(error)
        except torch.OutOfMemoryError:
            failed[name] = (
                "the GPU has too little memory for it; audit fewer clients at once, or set engine.device to cpu"
            )
        seconds[name] = round(time.perf_counter() - started, 2)
    scored = _Scoring(plan, task, subjects, known, unknown, found, failed)
    clients = [scored.client(i) for i in range(len(subjects))]
    result: dict[str, Any] = {
        "name": cell.name,
        "factors": cell.factors,
        "accuracy": prepared.accuracy,
        "client_accuracy": prepared.client_accuracy,
        "personal": prepared.personal,
        "privacy": prepared.privacy,
        "clients": clients,
        "summary": _summary(clients),
        "attack_seconds": seconds,
        "warnings": warnings
        + [f"{name} was not run: {why}" for name, why in failed.items()],
        "interrupted": stop.is_set(),
        "pictures": scored.pictures if plan.images else [],
        "seconds": round(time.perf_counter() - begin, 2),
    }
    return result


def _doubts(seen: Sequence[Observation], task: Task) -> list[str]:
    """A warning where updates point against the gradient of public data."""
    x, y = (v[:PROBES].cpu() for v in task.data.test)
    against = {o.client: cosine for o in seen if (cosine := alignment(o, x, y)) <= 0}
    if not against:
        return []
    client, cosine = min(against.items(), key=lambda item: item[1])
    return [
        f"the updates of {len(against)} of {len(seen)} clients point against the gradient of public data (client {client}: "
        f"cosine {cosine:.2f}): did they send global minus local, or noise, or is their data unlike the public one? "
        "The sign is never guessed; --flip turns it round"
    ]


def _watch(
    observer: Observer, stop: threading.Event, name: str, number: int, attacks: int
) -> Progress:
    def progress(done: float, objective: float | None) -> bool:
        observer.progress((number + done) / attacks, name, objective)
        return not stop.is_set()

    return progress


class _Scoring:
    """Metrics of one cell; the only part of the audit that holds truths beside reconstructions."""

    def __init__(
        self,
        plan: Plan,
        task: Task,
        subjects: Sequence[Subject],
        labels: Sequence[Tensor | None],
        unknown: Mapping[int, str],
        found: Mapping[str, Sequence[Reconstruction]],
        failed: Mapping[str, str],
    ) -> None:
        self.plan, self.task, self.subjects, self.labels, self.unknown = (
            plan,
            task,
            subjects,
            labels,
            unknown,
        )
        self.found, self.failed = found, failed
        self.public_x, self.public_y = (v.cpu() for v in task.data.test)
        self.pictures: list[dict[str, Any]] = []

    def client(self, i: int) -> dict[str, Any]:
        """One client's part of audit.json."""
        (o, truth, _), pixels = self.subjects[i], self.task.pixels
        change = math.sqrt(
            sum(float(x.double().square().sum()) for x in o.delta.values())
        )
        result: dict[str, Any] = {
            "client": o.client,
            "round": o.round,
            "function": o.function,
            "num_examples": o.total,
            "clients_aggregated": o.clients,
            "local_steps": o.public.local_steps(o.num_examples),
            "delta_norm": change,
            "entries_seen": sum(x.numel() for x in o.delta.values()),
            "entries_of_model": sum(x.numel() for x in o.w0.values()),
            "attacks": {
                name: {"ok": False, "error": why} for name, why in self.failed.items()
            },
            "labels": self._labels(i),
            "membership": None,
            "references": {},
            "best": None,
            "input_leakage": None,
            "worst_image": None,
            "grade": None,
        }
        scores: dict[str, metrics.Score] = {}
        base: metrics.Score | None = None
        if truth is not None and pixels is not None:
            other = (
                self.subjects[(i + 1) % len(self.subjects)].truth
                if len(self.subjects) > 1
                else None
            )
            seed = seed_of(self.plan.seed, "audit reference", o.round, o.client)
            levels = metrics.references(
                truth, self.public_x, self.public_y, other, pixels, seed
            )
            base = levels["class means"]
            result["references"] = {
                name: {"psnr": _mean(s.psnr), "ssim": _mean(s.ssim)}
                for name, s in levels.items()
            }
        for name, all_found in self.found.items():
            r = all_found[i]
            facts: dict[str, Any] = {
                "ok": True,
                "iterations": r.iterations,
                "objective": _finite(r.objective),
                **r.facts,
            }
            facts["curve"] = [_finite(value) for value in r.curve]
            if r.others and pixels is not None:
                again = metrics.score(r.others[0], Truth(r.x, r.x[:, 0, 0, 0]), pixels)
                facts["agreement_of_restarts"] = _mean(again.psnr)
            if truth is not None and pixels is not None and base is not None:
                scores[name] = metrics.score(r.x, truth, pixels)
                facts |= self._image_facts(scores[name], base, truth, o.client)
            result["attacks"][name] = facts
        if scores and base is not None:
            best = max(scores, key=lambda name: float(scores[name].psnr.mean()))
            top = max(
                (result["attacks"][name] for name in scores),
                key=lambda f: max(f["R"], f["I"]),
            )
            result["best"] = {
                "attack": best,
                **{
                    k: result["attacks"][best][k]
                    for k in ("psnr", "ssim", "identification")
                },
            }
            result["input_leakage"] = 100 * max(top["R"], top["I"])
            result["worst_image"] = 100 * max(
                result["attacks"][name]["R_max"] for name in scores
            )
            result["grade"] = metrics.grade(result)
            if (
                len(self.pictures) < PICTURED
                and truth is not None
                and pixels is not None
            ):
                self.pictures.append(
                    _pictures(
                        o.client,
                        best,
                        scores[best],
                        pixels.of(truth.x.float()).clamp(0, 1),
                    )
                )
        if "membership" in self.plan.attacks and truth is not None:
            result["membership"] = self._membership(i)
        return result

    def _image_facts(
        self, s: metrics.Score, base: metrics.Score, truth: Truth, client: int
    ) -> dict[str, Any]:
        pixels = self.task.pixels
        assert pixels is not None
        found = metrics.identification(
            s,
            truth,
            self.public_x,
            pixels,
            seed_of(self.plan.seed, "audit pool", client),
        )
        perceived = metrics.lpips(s.images, pixels.of(truth.x.float()).clamp(0, 1))
        return {
            "psnr": _spread(s.psnr),
            "ssim": _spread(s.ssim),
            "mse": _mean(s.mse),
            "lpips": perceived
            if isinstance(perceived, str)
            else sum(perceived) / len(perceived),
            "above": {
                str(level): (s.psnr > level).double().mean().item()
                for level in metrics.LEVELS
            },
            "identification": found,
            "per_image_psnr": [round(value, 3) for value in s.psnr.tolist()],
            **metrics.leakage(s, base, found["top1"], found["chance"]),
        }

    def _labels(self, i: int) -> dict[str, Any] | None:
        (o, truth, _), found = self.subjects[i], self.labels[i]
        if i in self.unknown:
            return {"ok": False, "error": self.unknown[i]}
        if found is None:
            return None
        facts: dict[str, Any] = {
            "ok": True,
            "mode": "recovered" if o.labels is None else "oracle",
            "counts": torch.bincount(found, minlength=o.public.outputs).tolist(),
        }
        if truth is not None:
            facts |= metrics.label_accuracy(found, truth.y)
            guess = torch.bincount(self.public_y, minlength=o.public.outputs).double()
            even = (guess / guess.sum() * len(truth.y)).round()
            facts["chance"] = 1 - 0.5 * (
                even - torch.bincount(truth.y, minlength=len(guess))
            ).abs().sum().item() / len(truth.y)
            facts["grade"] = metrics.letter(
                max(
                    0.0,
                    (facts["accuracy"] - facts["chance"])
                    / max(1 - facts["chance"], 1e-9),
                )
            )
        return facts

    def _membership(self, i: int) -> dict[str, Any]:
        """Against as many others of each class as there are, so that the classes alone give nothing away."""
        o, truth, before = self.subjects[i]
        assert truth is not None
        if o.public.classes is None:
            return {
                "ok": False,
                "error": "the targets are no classes, by which non-members could be matched",
            }
        draw = rng(self.plan.seed, "audit candidates", o.round, o.client)
        counts = torch.bincount(truth.y, minlength=o.public.classes)
        each = max(1, min(1000, len(self.public_y)) // len(truth.y))
        rows: list[int] = []
        for label in counts.nonzero().flatten().tolist():
            own = (self.public_y == label).nonzero().flatten().numpy()
            rows += (
                draw.choice(
                    own, min(each * int(counts[label]), len(own)), replace=False
                ).tolist()
                if len(own)
                else []
            )
        if not rows:
            return {
                "ok": False,
                "error": "the test set has no example of the client's classes",
            }
        x, y = (
            torch.cat([truth.x, self.public_x[rows]]),
            torch.cat([truth.y, self.public_y[rows]]),
        )
        n = len(truth.y)
        by_score = {
            name: metrics.membership(v[:n], v[n:])
            for name, v in members.scores([*before, o], x, y).items()
        }
        best = max(by_score, key=lambda name: by_score[name]["auc"])
        value = max(0.0, 2 * by_score[best]["auc"] - 1)
        facts = {
            "ok": True,
            "best": best,
            "auc": by_score[best]["auc"],
            "exchanges": len(before) + 1,
        }
        return {**facts, "grade": metrics.letter(value), **by_score}


def _summary(clients: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the cell's clients, with 95 % intervals."""
    found: dict[str, Any] = {"attacks": {}, "references": {}, "best": None}
    names = dict.fromkeys(
        name
        for c in clients
        for name, facts in c["attacks"].items()
        if facts["ok"] and "psnr" in facts
    )
    for name in names:
        rows = [
            c["attacks"][name] for c in clients if c["attacks"].get(name, {}).get("ok")
        ]
        found["attacks"][name] = {
            "psnr": metrics.interval([row["psnr"]["mean"] for row in rows]),
            "ssim": metrics.interval([row["ssim"]["mean"] for row in rows]),
            "top1": metrics.interval([row["identification"]["top1"] for row in rows]),
            "objective": metrics.interval(
                [row["objective"] for row in rows if row["objective"] is not None]
                or [0.0]
            ),
        }
        if all("alpha" in row for row in rows):
            found["attacks"][name]["alpha"] = metrics.interval(
                [row["alpha"] for row in rows]
            )
    if found["attacks"]:
        found["best"] = max(
            found["attacks"], key=lambda name: found["attacks"][name]["psnr"]["mean"]
        )
    for name in dict.fromkeys(name for c in clients for name in c["references"]):
        rows = [c["references"][name] for c in clients if name in c["references"]]
        found["references"][name] = {
            key: sum(row[key] for row in rows) / len(rows) for key in ("psnr", "ssim")
        }
    for key, field_ in (("labels", "accuracy"), ("membership", "auc")):
        values = [c[key][field_] for c in clients if c[key] and field_ in c[key]]
        found[key] = metrics.interval(values) if values else None
    for key in ("input_leakage", "worst_image"):
        values = [c[key] for c in clients if c[key] is not None]
        found[key] = metrics.interval(values) if values else None
    return found


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _spread(values: Tensor) -> dict[str, float]:
    x = values.double()
    return {
        "mean": x.mean().item(),
        "median": x.median().item(),
        "min": x.min().item(),
        "max": x.max().item(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pictures(
    client: int, attack: str, s: metrics.Score, true: Tensor
) -> dict[str, Any]:
    """Originals and reconstructions as PNG in base64, the best first."""
    order = s.psnr.argsort(descending=True)[:SHOWN].tolist()
    pairs = [
        [_png(true[j]), _png(s.images[j]), round(float(s.psnr[j]), 1)] for j in order
    ]
    return {"client": client, "attack": attack, "pairs": pairs}


def _png(x: Tensor) -> str:
    """[C, H, W] in [0, 1]."""
    from PIL import Image

    array = (x * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
