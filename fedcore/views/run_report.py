"""report.html: a run in one file that opens anywhere, without network or scripts."""

from __future__ import annotations

import json
import logging
import math
import shlex
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from fedcore import __version__
from fedcore.errors import FedcoreError
from fedcore.privacy import describe
from fedcore.rounds import canary_bound
from fedcore.rounds.example_privacy import described
from fedcore.rounds.history import History
from fedcore.rounds.tally import first_clients
from fedcore.rounds.trouble import FAILING, LONG, Trouble
from fedcore.rounds.watch import clients_text
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.memory import size_text
from fedcore.views.evaluation_table import evaluation_table
from fedcore.views.figures import STYLE
from fedcore.views.page import Fact, render
from fedcore.views.run_figures import partition_text, sections
from fedcore.views.run_record import RunRecord, read_run
from fedcore.views.secret_text import secret_text
from fedcore.views.text import (
    count_text,
    direction_text,
    rate_text,
    time_text,
    value_text,
)
from fedcore.views.time_figures import heard_table
from fedcore.views.time_text import time_facts, time_sentences

__all__ = ["write_or_note", "write_report"]

log = logging.getLogger("fedcore")

TROUBLES = 20  # clients in the table of those that gave trouble
IMAGE_TASKS = ("digits", "fashion-mnist", "cifar10")
BUNDLED_TASKS = (*IMAGE_TASKS, "shakespeare", "texts")  # their model is a setting
CLIENT_PARTS = ("mean", "p10", "p90")  # of a spread over clients, in tables


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` of a run, finished or not, and return its path.

    A missing or damaged environment.json or clients.parquet, or data that is not at
    hand, costs its part of the page. Raises SettingsError for a folder that is no run
    directory, and for damaged settings or metrics; Unwritable where the page cannot be
    written.
    """
    run = read_run(Path(run_dir))
    file = run.folder / "report.html"
    content = _page(run).encode()
    write_atomically(file, content)
    return file


def write_or_note(run_dir: Path | str) -> Path | None:
    """Write the report at the end of a run; where that fails, log how to try again.

    The run is done and saved, so no exception may end it now.
    """
    try:
        return write_report(run_dir)
    except Exception as error:
        reason = str(error)
        if not isinstance(error, FedcoreError):
            reason = f"{type(error).__name__}: {error}"
        again = f"fedcore report {run_dir}"
        log.warning("no report (%s); try again with: %s", reason, again)
        log.debug("the report failed", exc_info=error)
        return None


def _page(run: RunRecord) -> str:
    settings = run.settings
    status = "finished"
    if not run.is_done:
        status = f"unfinished: {len(run.history)} of {settings['rounds']} rounds"
    environment = []
    for key, value in run.environment.items():
        environment.append((key, "-" if value is None else value))
    with rc_context(STYLE):
        drawn = sections(run)
    return render(
        "report",
        title=f"{settings['method']['name']} on {settings['task']}",
        done=run.is_done,
        status=status,
        reference=run.federation.reference,
        summary=summary(run),
        notes=run.notes,
        facts=_facts(run),
        sections=drawn,
        seed=settings["seed"],
        command=_command(run),
        sha256=run.params_sha256(),
        dropped=_dropped(run),
        troubles=_troubles(run.troubles),
        num_troubles=len(run.troubles),
        heard=heard_table(run),
        evaluations=evaluation_table(run),
        samples=_samples(run.history),
        config=(run.folder / "config.toml").read_text(),
        environment=environment,
        version=__version__,
        folder=run.folder,
    )


# Words


def summary(run: RunRecord) -> str:
    """The run in a paragraph."""
    if len(run.history) == 0:
        return f"{_training_text(run)}. No round is done yet."
    sentences = [
        f"{_training_text(run)}. {_cohort_text(run)}",
        _attack_text(run.settings.get("adversary", {})),
        _rule_text(run.settings.get("aggregation", {})),
        _sums_text(run),
        _test_text(run),
        _clients_text(run),
        _tuned_text(run),
        *_requests_text(run),
        *time_sentences(run),
    ]
    return " ".join(filter(None, sentences))


def _training_text(run: RunRecord) -> str:
    settings = run.settings
    has_images = settings["task"] in IMAGE_TASKS
    model = ""
    if settings["task"] in BUNDLED_TASKS and "name" in settings.get("model", {}):
        model = f" ({settings['model']['name']})"
    trained = f"a model{model}"
    rank = settings.get("lora", {}).get("rank")
    if rank:
        trained = f"adapters of rank {rank} on a frozen model{model}"
    text = f"{settings['method']['name']} trained {trained} on {settings['task']}"
    population = run.federation.population
    if population:
        text += f", whose examples are spread over {population:,} clients"
        if has_images and "partition" in settings:
            text += f" ({partition_text(settings['partition'])})"
    return text


def _cohort_text(run: RunRecord) -> str:
    cohorts = [row["cohort"] for row in run.history]
    least, most = min(cohorts), max(cohorts)
    number = f"{least:,}" if least == most else f"Between {least:,} and {most:,}"
    verb = "was" if least == most == 1 else "were"
    num_rounds = len(cohorts)
    rounds = "the one round" if num_rounds == 1 else f"each of {num_rounds:,} rounds"
    # The number of all clients is not known for a task of the user's own.
    who = "client" if least == most == 1 else "clients"
    if run.federation.population:
        who = "of them"
    return f"{number} {who} {verb} asked in {rounds}."


def _attack_text(adversary: dict[str, Any]) -> str:
    """Who is malicious in a simulation."""
    attack, clients = adversary.get("attack", "none"), adversary.get("clients")
    if attack == "none":
        return ""
    who = f"{100 * adversary.get('fraction', 0):.3g} % of the clients"
    if clients:
        who = clients_text(first_clients(clients), len(clients))
    start = adversary.get("start", 1)
    since = f" from round {start} on" if start > 1 else ""
    return f"Simulated attackers{since}: {attack} by {who}."


def _rule_text(aggregation: dict[str, Any]) -> str:
    """What takes the place of the mean."""
    rule, before = aggregation.get("rule", "mean"), aggregation.get("before", "none")
    if (rule, before) == ("mean", "none"):
        return ""
    text = f"The server takes {rule}"
    if before != "none":
        text += f" after {before}"
    if "byzantine" in aggregation:
        text += f", with f = {aggregation['byzantine']}"
    elif "fraction" in aggregation:
        text += f", with f = {100 * aggregation['fraction']:.3g} % of the clients asked"
    return f"{text}."


def _sums_text(run: RunRecord) -> str:
    """What the server could read, where that was sums alone."""
    text = secret_text(run.history, run.settings.get("engine", {}).get("name", ""))
    return f"The server could read {text}." if text else ""


def _test_text(run: RunRecord) -> str:
    history, measure = run.history, run.measure
    reached, loss = history.last(f"test_{measure}"), history.last("test_loss")
    if reached is None:
        measured = history.last("client_loss") or history.last(f"client_{measure}")
        return "It has not been evaluated yet." if measured is None else ""
    model = "The server's model"
    if run.federation.is_personal:
        model = "With the server's parameters alone a client that never took part"
    named = direction_text(measure, run.is_higher_better)
    text = f"{model} reaches {value_text(measure, reached)} test {named}"
    if measure != "loss" and loss is not None:
        text += f" (loss {loss:.4g})"
    before = history.baseline.get(f"test_{measure}")
    if before is not None:
        text += f", from {value_text(measure, before)} before the first round"
    return f"{text}."


def _clients_text(run: RunRecord) -> str:
    clients = run.history.last(f"client_{run.measure}") or {}
    values = [clients.get(part) for part in CLIENT_PARTS]
    if None in values:
        return ""
    mean, low, high = (value_text(run.measure, value) for value in values)
    text = (
        f"Clients differ: on their own examples the mean {run.measure} is {mean}, "
        f"a tenth of them are at {low} or below and a tenth at {high} or above."
    )
    worst = clients.get("worst_tenth")
    if worst is not None:
        text += f" The worst tenth has {value_text(run.measure, worst)} on average."
    return text


def _tuned_text(run: RunRecord) -> str:
    tuned = run.history.last(f"finetuned_{run.measure}") or {}
    mean, worst = tuned.get("mean"), tuned.get("worst_tenth")
    if mean is None or worst is None:
        return ""
    return (
        "After fine-tuning on each client the mean is "
        f"{value_text(run.measure, mean)}, and that of the worst tenth "
        f"{value_text(run.measure, worst)}."
    )


def _requests_text(run: RunRecord) -> list[str]:
    """Sentences on requests that failed, late answers and skipped rounds."""
    history = run.history
    sentences = []
    asked, lost = history.total("cohort"), sum(history.dropped().values())
    if lost:
        sentences.append(
            f"Of {asked:,.0f} requests to clients, {lost:,} brought no usable update."
        )
    elif history.total("reports"):
        sentences.append(
            f"All {asked:,.0f} requests to clients brought a usable update."
        )
    last = history.rows[-1]
    if last.get("failing"):
        who = clients_text(
            [entry["client"] for entry in last["failing"]], last["num_failing"]
        )
        sentences.append(
            f"Failing at the end, left out {FAILING} times in a row or more: {who}."
        )
    late = history.total("late_answers")
    if late:
        answers = f"{late:,} answer{'s' if late > 1 else ''}"
        sentences.append(
            f"{answers} came after the round had ended, and changed nothing."
        )
    skipped = history.total("skipped")
    if skipped:
        rounds = f"{skipped} round{'s' if skipped > 1 else ''}"
        sentences.append(f"{rounds} had too few reports and left the model as it was.")
    return sentences


def _command(run: RunRecord) -> str:
    """The command that repeats the run."""
    file = str(run.folder / "config.toml")
    if run.settings.get("engine", {}).get("name") == "grid":
        preset = shlex.quote(f"preset={json.dumps(file)}")
        return f"flwr run . --run-config {preset}"
    return f"fedcore run {shlex.quote(file)}"


# Facts in boxes


def _facts(run: RunRecord) -> list[Fact]:
    facts = [_test_fact(run)]
    clients = run.history.last(f"client_{run.measure}")
    if clients:
        fact = _clients_fact(run, clients)
        # What clients get is what counts where they have models of their own.
        facts.insert(0 if run.federation.is_personal else 1, fact)
    return [*facts, *_cost_facts(run)]


def _test_fact(run: RunRecord) -> Fact:
    key = f"test_{run.measure}"
    row = run.history.last_row(key)
    value = value_text(run.measure, row.get(key))
    if not row:
        return Fact("test result", value, "not evaluated yet")
    detail = f"after round {row['round']}"
    if run.measure != "loss" and row.get("test_loss") is not None:
        detail += f", loss {row['test_loss']:.4g}"
    before = run.history.baseline.get(key)
    if before is not None:
        detail += f"; {value_text(run.measure, before)} before"
    if run.federation.is_personal:
        return Fact("unseen client", value, f"on the test set {detail}")
    return Fact(f"test {run.measure}", value, detail)


def _clients_fact(run: RunRecord, clients: dict[str, Any]) -> Fact:
    low = value_text(run.measure, clients.get("p10"), 0)
    high = value_text(run.measure, clients.get("p90"), 0)
    mean = value_text(run.measure, clients.get("mean"))
    if run.federation.is_personal:
        detail = f"on average; 10th to 90th percentile {low} to {high}"
        return Fact("single clients", mean, detail)
    detail = f"10th to 90th percentile, mean {mean}"
    return Fact("single clients", f"{low} to {high}", detail)


def _cost_facts(run: RunRecord) -> list[Fact]:
    """Rounds, bytes, privacy and time."""
    history, population = run.history, run.federation.population
    rounds = f"{len(history):,}"
    if not run.is_done:
        rounds += f" of {run.settings['rounds']:,}"
    cohort = count_text(history.total("cohort") / max(len(history), 1))
    of_population = f" of {population:,}" if population else ""
    down, up = history.total("bytes_down"), history.total("bytes_up")
    directions = f"{size_text(down)} down, {size_text(up)} up"
    facts = [
        Fact("rounds", rounds, f"{cohort}{of_population} clients each"),
        Fact("sent", size_text(down + up), directions),
    ]
    spent = history.last("privacy")
    if spent:
        facts.append(Fact("privacy", *describe(spent)))
    if of_examples := history.last("privacy_examples"):
        facts.append(Fact("privacy of examples", *described(of_examples)))
    found = history.last("canaries")
    if found:
        facts.append(Fact("measured by canaries", *canary_bound.describe(found)))
    clock = time_facts(run)
    facts += clock
    seconds = history.total("seconds") + history.total("evaluation_s")
    speed = f"{rate_text(history.clients_per_second)} clients a second"
    name = "computer's time" if clock else "time"
    facts.append(Fact(name, time_text(seconds), f"{speed} without evaluation"))
    return facts


# Tables


def _dropped(run: RunRecord) -> list[tuple[str, str, str]]:
    """(reason, requests, share of all requests), the most frequent first."""
    asked = max(run.history.total("cohort"), 1)
    table = []
    for reason, requests in run.history.dropped().most_common():
        table.append((reason, f"{requests:,}", f"{requests / asked:.1%}"))
    return table


def _troubles(troubles: list[Trouble]) -> list[list[str]]:
    """The first clients that gave trouble, a row each, the head first; else empty.

    Columns that say nothing of any client are left out.
    """
    if not troubles:
        return []
    head = ["client", "rounds asked", "left out", "in a row", "last reason"]
    has_clipped = any(trouble.clipped for trouble in troubles)
    has_capped = any(trouble.capped for trouble in troubles)
    has_weights = any(not math.isnan(trouble.weight) for trouble in troubles)
    head += ["clipped"] * has_clipped + ["examples capped"] * has_capped
    has_lengths = any(trouble.norm_ratio > LONG for trouble in troubles)
    head += ["weight, of the mean"] * has_weights
    head += ["norm, of the median"] * has_lengths
    table = [head]
    for trouble in troubles[:TROUBLES]:
        streak = f"{trouble.streak:,}"
        if trouble.streak >= FAILING:
            streak += ", failing"
        row = [str(trouble.client), f"{trouble.rounds:,}", f"{trouble.left_out:,}"]
        row += [streak, trouble.reason or "-"]
        row += [f"{trouble.clipped:,}"] * has_clipped
        row += [f"{trouble.capped:,}"] * has_capped
        row += [_times(trouble.weight)] * has_weights
        row += [_times(trouble.norm_ratio)] * has_lengths
        table.append(row)
    return table


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _samples(history: History) -> list[tuple[str, str]]:
    """(when, text) of what the model wrote before and after the run."""
    samples = []
    for row in history.evaluations:
        if isinstance(row.get("sample"), str):
            number = row["round"]
            when = f"after round {number}" if number else "before the first round"
            samples.append((when, row["sample"]))
    return samples
