"""The evaluations of a run as a table: measures of the test set, and over clients."""

from __future__ import annotations

from fedcore.rounds.time_summary import clock_kind
from fedcore.storage.memory import size_text
from fedcore.views.comparison import CLIENT_PARTS
from fedcore.views.figures import thin
from fedcore.views.run_record import RunRecord
from fedcore.views.text import value_text

__all__ = ["evaluation_table"]


def evaluation_table(run: RunRecord) -> list[list[str]]:
    """A row for each evaluation, the head first; empty without one."""
    tests, clients = set(), set()
    prefixes = ("test_", *(f"{name}_" for name in run.history.extra_tests))
    for row in run.history:
        for key, value in row.items():
            if key.startswith(prefixes):
                tests.add(key)
            elif key.startswith("client_") and isinstance(value, dict):
                clients.add(key)
    order = list(run.history.measures)

    def place(key: str) -> tuple[int, str, bool, str]:
        kind, _, name = key.partition("_")
        number = order.index(name) if name in order else len(order)
        return number, name, kind != "test", kind

    times = run.history.times
    head = ["round", "sent"]
    if times is not None:
        head.append(f"{clock_kind(run.settings)} time")
    for key in sorted(tests, key=place):
        head.append(key.replace("_", " "))
    for key in sorted(clients, key=place):
        name = key.replace("_", " ")
        head += [f"{name} {part}" for part in CLIENT_PARTS]
    sent = run.history.sent()
    rows = run.history.evaluations
    evaluated = [row for row in rows if row.keys() & (tests | clients)]
    body = []
    for row in thin(evaluated):
        line = [str(row["round"]), size_text(float(sent[row["round"]]))]
        if times is not None:
            line.append(f"{times[row['round']]:,.7g} s")
        for key in sorted(tests, key=place):
            line.append(value_text(key.partition("_")[2], row.get(key), 2))
        for key in sorted(clients, key=place):
            measure, spread = key.removeprefix("client_"), row.get(key) or {}
            line += [value_text(measure, spread.get(part), 2) for part in CLIENT_PARTS]
        body.append(line)
    return [head, *body] if body else []
