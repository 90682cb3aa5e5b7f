"""The audit, cell by cell: get the observations, run every attack, score its results.

Cells are independent of each other. Each that is done is a file of its own, so that an
audit that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit.attacks.base import Progress, Reconstruction, lacking, settings_of
from fedcore.audit.attacks.labels import recover
from fedcore.audit.attacks.tokens import present
from fedcore.audit.cells import Cell, Observer, Prepared
from fedcore.audit.inspection import inspect_model
from fedcore.audit.observe import CPU, Observation, Subject, alignment, moved
from fedcore.audit.plan import IMAGE_ATTACKS, Plan
from fedcore.audit.results import SCHEMA, Audit, CellResult, Mode
from fedcore.audit.scoring import Findings, Scoring, summarise
from fedcore.config import Experiment
from fedcore.errors import FedcoreError
from fedcore.rounds import loop
from fedcore.rounds.signals import signals
from fedcore.storage.checkpoint import write_atomically
from fedcore.task import Task

PROBES = 1000  # public examples for the sign of an update


class Stopped(Exception):
    """The user asked to stop before the cell had anything to keep."""


def examine(
    mode: Mode,
    experiment: Experiment,
    cells: Sequence[Cell],
    plan: Plan,
    out: Path,
    observer: Observer,
) -> Audit:
    """Attack and score every cell of which `out` does not hold the results already.

    SIGINT ends it early: the audit of the cells that are done is returned, with
    `interrupted` set. A cell that cannot be made is left out, noted and named in
    `failed`. Raises the SettingsError or RunError of the last cell where none could be
    made.
    """
    plan.check()
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    out.chmod(0o700)
    begin, stop = time.perf_counter(), threading.Event()
    done: list[CellResult] = []
    failed: dict[str, str] = {}
    with signals(stop):
        for number, cell in enumerate(cells):
            observer.cell(number, len(cells), cell.name)
            try:
                done.append(_read_or_attack(cell, plan, out, observer, stop))
            except (Stopped, loop.Interrupted):
                stop.set()
            except FedcoreError as error:
                if not done and number == len(cells) - 1:
                    raise
                failed[cell.name] = str(error)
                observer.note(f"{cell.name} is left out: {error}")
            if stop.is_set():
                break
    warnings = dict.fromkeys(line for cell in done for line in cell["warnings"])
    return Audit(
        mode,
        experiment.model_dump(mode="json"),
        _described(plan),
        done,
        list(warnings),
        stop.is_set(),
        datetime.now(UTC).isoformat(timespec="seconds"),
        round(time.perf_counter() - begin, 1),
        failed,
    )


def _described(plan: Plan) -> dict[str, Any]:
    """The plan as audit.json has it."""
    return {
        "attacks": list(plan.attacks),
        "budget": plan.budget,
        "labels": plan.labels,
        "clients": plan.clients,
        "seed": plan.seed,
        "settings": plan.all_settings(),
    }


def _read_or_attack(
    cell: Cell, plan: Plan, out: Path, observer: Observer, stop: threading.Event
) -> CellResult:
    """The cell's results: from its file, or by attacking it, and then into its file."""
    file = out / "cells" / f"{_key(cell, plan)}.json"
    if file.exists():
        kept: CellResult = json.loads(file.read_text())
        return kept
    result = _attack_and_score(cell, plan, observer, stop)
    if not result["interrupted"]:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(result).encode())
    return result


def _key(cell: Cell, plan: Plan) -> str:
    """The name of the cell's file: everything that its results depend on."""
    depends_on = [
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
        plan.all_settings(),
    ]
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _attack_and_score(
    cell: Cell, plan: Plan, observer: Observer, stop: threading.Event
) -> CellResult:
    """One cell's part of audit.json, and its pictures."""
    begin = time.perf_counter()
    prepared = cell.prepare(observer)
    if stop.is_set():
        raise Stopped
    subjects = prepared.subjects
    if plan.flip:
        subjects = [_flipped(subject) for subject in subjects]
    warnings = _warnings(subjects, prepared.task)
    subjects = [_granted(subject, plan) for subject in subjects]
    findings = _attack(subjects, plan, prepared, observer, stop)
    left_out = _left_out(findings)
    for line in left_out:
        observer.note(f"{cell.name}: {line}")
    warnings += left_out
    clients, pictures = Scoring(plan, prepared.task, subjects, findings).clients()
    return {
        "name": cell.name,
        "factors": cell.factors,
        "accuracy": prepared.accuracy,
        "client_accuracy": prepared.client_accuracy,
        "personal": prepared.personal,
        "privacy": prepared.privacy,
        "clients": clients,
        "summary": summarise(clients),
        "attack_seconds": findings.seconds,
        "warnings": warnings,
        "interrupted": stop.is_set(),
        "pictures": pictures if plan.images else [],
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _left_out(findings: Findings) -> list[str]:
    """A line about each thing that was not tried, and about labels if not recovered."""
    lines = []
    for why in list(findings.unlabelled.values())[:1]:
        then = ", and optimised with the inputs" if findings.images else ""
        what = "tokens" if findings.is_text else "labels"
        lines.append(f"{what} were not recovered{then}: {why}")
    for name, why in findings.failed.items():
        lines.append(f"{name} was not run: {why}")
    return lines


def _flipped(subject: Subject) -> Subject:
    """The client, where its messages were global minus local."""
    before = tuple(observation.flipped() for observation in subject.before)
    return subject._replace(seen=subject.seen.flipped(), before=before)


def _granted(subject: Subject, plan: Plan) -> Subject:
    """The client with no more truth than the plan grants to attacks and to scores."""
    has_classes = subject.seen.public.classes is not None
    if plan.labels == "oracle" and subject.truth is not None and has_classes:
        seen = replace(subject.seen, labels=subject.truth.y)
        subject = subject._replace(seen=seen)
    return subject if plan.truth else subject._replace(truth=None)


def _warnings(subjects: Sequence[Subject], task: Task) -> list[str]:
    """Suspicions about updates and about models, each once."""
    seen = [subject.seen for subject in subjects]
    about_models: dict[str, None] = {}
    for observation in seen:
        about_models |= dict.fromkeys(inspect_model(observation))
    return doubts(seen, task) + list(about_models)


def doubts(seen: Sequence[Observation], task: Task) -> list[str]:
    """A warning where updates point against the gradient of public data."""
    if len(task.data.test.y) == 0:
        return []
    x, y = trees.to(trees.at(tuple(task.data.test), slice(PROBES)), CPU)
    cosines = {observation.client: alignment(observation, x, y) for observation in seen}
    against = {client: value for client, value in cosines.items() if value <= 0}
    if not against:
        return []
    client = min(against, key=lambda client: against[client])
    return [
        f"the updates of {len(against)} of {len(seen)} clients point against the "
        f"gradient of public data (client {client}: cosine {against[client]:.2f}): did "
        "they send global minus local, or noise, or is their data unlike the public "
        "one? The sign is never guessed; --flip turns it round"
    ]


def _attack(
    subjects: Sequence[Subject],
    plan: Plan,
    prepared: Prepared,
    observer: Observer,
    stop: threading.Event,
) -> Findings:
    """Run the attacks of the plan on what is seen of the clients, and nothing else."""
    seen = [subject.seen for subject in subjects]
    findings = _labels(seen, plan)
    there = moved(seen, prepared.device)
    names = plan.image_attacks
    for number, name in enumerate(names):
        if stop.is_set():
            break
        lacks = [lacking(IMAGE_ATTACKS[name].needs, o) for o in seen]
        reasons = [reason for reason in lacks if reason is not None]
        if reasons:
            findings.failed[name] = reasons[0]
            continue
        progress = _progress(observer, stop, name, number, len(names))
        begin = time.perf_counter()
        found = _run(name, there, findings.labels, plan, progress)
        findings.seconds[name] = round(time.perf_counter() - begin, 2)
        if isinstance(found, str):
            findings.failed[name] = found
        else:
            findings.images[name] = found
    return findings


def _labels(seen: Sequence[Observation], plan: Plan) -> Findings:
    """Labels for the attacks, recovered where the plan asks for it; tokens of text."""
    findings = Findings([None] * len(seen), {})
    findings.is_text = any(o.public.vocabulary is not None for o in seen)
    if plan.labels == "soft" and not findings.is_text:
        return findings
    for i, observation in enumerate(seen):
        try:
            if observation.public.vocabulary is None:
                findings.labels[i] = recover(observation, plan.seed)
            else:
                findings.tokens[i] = present(observation)
        except ValueError as error:
            findings.unlabelled[i] = str(error)
    return findings


def _run(
    name: str,
    seen: Sequence[Observation],
    labels: Sequence[Tensor | None],
    plan: Plan,
    progress: Progress,
) -> list[Reconstruction] | str:
    """One attack on all clients; or why it cannot be run."""
    kind = IMAGE_ATTACKS[name]
    attack = kind(settings_of(kind)(**plan.settings(name)))
    try:
        found = attack.reconstruct(seen, labels, plan.seed, progress)
        return [reconstruction.cpu() for reconstruction in found]
    except ValueError as error:
        return str(error)
    except torch.OutOfMemoryError:
        return (
            "the GPU has too little memory for it; audit fewer clients at once, "
            "or set engine.device to cpu"
        )
    except (RuntimeError, IndexError, TypeError) as error:
        # Attacks differentiate the model twice, at inputs that no data set has.
        reason = " ".join(str(error).split())[:200]
        return f"the model cannot be attacked so ({type(error).__name__}: {reason})"


def _progress(
    observer: Observer, stop: threading.Event, name: str, number: int, attacks: int
) -> Progress:
    def progress(done: float, objective: float | None) -> bool:
        observer.progress((number + done) / attacks, name, objective)
        return not stop.is_set()

    return progress
