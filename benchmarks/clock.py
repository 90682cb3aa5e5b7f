"""What simulated time costs: its parts, a round with a clock, a buffered update.

python -m benchmarks.clock [PART ...]      default: all of them
    parts, rounds, buffered

parts      durations of 1 000 clients of 1 000 000 and of one, windows, an exchange
rounds     clients that do nothing, cohort 1 000 of 1 000 000 on the synthetic task:
           a round without a clock and with one, in turns; the aim is under 5 %
buffered   Fashion-MNIST, MLP, 2 000 clients: clients a second of `vectorised` in rounds
           of 100, and in buffered updates of K = 100 with M = 1 000 at work, in turns;
           the aim is 0.7 at least

Option: --rounds N, timings of each. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.engines import EVEN, experiment, loop_for, one_round
from benchmarks.tables import print_table
from fedcore.clock.durations import Durations
from fedcore.clock.exchange import exchange
from fedcore.clock.lookalikes import lookalike_devices, lookalike_windows
from fedcore.clock.settings import ClockSettings
from fedcore.clock.windows import Windows

MANY = 1_000_000
SECOND = 1_000_000  # microseconds

SPEED = ["clock.step_s.name=lognormal", "clock.step_s.median=0.1"]
BANDWIDTH = ["clock.up_mbps.name=lognormal", "clock.up_mbps.median=5"]
CLOCK = [*SPEED, *BANDWIDTH, "clock.jitter=0.2"]


def microseconds(work: Callable[[], object], repeats: int = 200) -> float:
    """The median time of a call, after the first."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def parts() -> None:
    """Microseconds of each part, for 1 000 clients of a million and for one."""
    log_normal = {"name": "lognormal", "median": 1.0, "sigma": 1.2}
    drawn = {"step_s": log_normal, "up_mbps": log_normal, "jitter": 0.2}
    clients = np.sort(np.random.default_rng(0).choice(MANY, 1000, replace=False))
    again = np.sort(clients % 10_000)
    steps = np.full(1000, 5)
    rows: list[list[str]] = []

    def row(name: str, work: Callable[[int], object]) -> None:
        times = [microseconds(partial(work, n)) for n in (1000, 1)]
        rows.append([name, *(f"{spent:.0f}" for spent in times)])

    with tempfile.TemporaryDirectory() as folder:
        trace = lookalike_devices(Path(folder) / "devices.csv", rows=10_000)
        hours = lookalike_windows(Path(folder) / "hours.csv", clients=1000)
        own = Durations(ClockSettings.model_validate(drawn), MANY, 0)
        known = Durations(ClockSettings.model_validate(drawn), 10_000, 0)
        read = Durations(ClockSettings(trace=trace), MANY, 0)
        values = {"step_s": 1.0, "windows": hours}
        lost = Windows.of(ClockSettings.model_validate(values))
        paused = Windows.of(ClockSettings.model_validate({**values, "at_end": "pause"}))
    bytes_both = 9000, 9000
    row(
        "durations, drawn, with jitter",
        lambda n: own.of(clients[:n], 7, steps[:n], *bytes_both),
    )
    row(
        "the same of 10 000 clients, who were asked before",
        lambda n: known.of(again[:n], 7, steps[:n], *bytes_both),
    )
    row(
        "durations of a trace, without jitter",
        lambda n: read.of(clients[:n], 7, steps[:n], *bytes_both),
    )
    begin, work = np.full(1000, 23 * 3600 * SECOND), np.full(1000, 3600 * SECOND)
    row("ends of windows", lambda n: lost.ends(clients[:n], begin[:n], work[:n]))
    row("pauses", lambda n: paused.ends(clients[:n], begin[:n], work[:n]))
    taken = np.random.default_rng(1).exponential(SECOND, 1000).astype(np.int64)
    nobody = frozenset[int]()

    def ask(n: int) -> object:
        return exchange(
            clients[:n],
            taken[:n],
            deadline=SECOND,
            goal=None,
            silent=nobody,
            lost=nobody,
            finishes=True,
        )

    row("an exchange, 37 % late", ask)
    print_table(["part", "1 000 clients, us", "one, us"], rows)
    there = microseconds(lambda: lost.all_there(MANY, 0), repeats=20)
    print(f"who of {MANY:,} is there: {there:.0f} us\n")


def rounds(number: int) -> None:
    """Seconds of a no-op round without and with a clock, in turns."""
    common = [
        "method.name=benchmarks.engines:Noop",
        "task=least-squares",
        f"population={MANY}",
        "participation.cohort=1000",
    ]
    loops = {
        "no clock": loop_for(experiment(*common)),
        "clock": loop_for(experiment(*common, *CLOCK)),
        "clock, deadline": loop_for(
            experiment(*common, *CLOCK, "schedule.deadline_s=0.5")
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        one_round(loop)
    for turn in range(number):
        for name in sorted(loops, reverse=bool(turn % 2)):
            times[name].append(one_round(loops[name]))
    rows = []
    plain = statistics.median(times["no clock"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append([name, f"{median * 1e3:.1f}", f"{median / plain - 1:+.1%}"])
    print_table(["cohort 1 000 of 1 000 000", "ms a round", "more"], rows)


def buffered(number: int) -> None:
    """Clients a second of `vectorised`: synchronous rounds, and buffered updates."""
    common = ["engine.name=vectorised", "population=2000", *EVEN]
    schedule = ["schedule.name=buffered", "schedule.buffer=100"]
    schedule += ["schedule.concurrency=1000"]
    loops = {
        "rounds of 100": loop_for(experiment(*common)),
        "with a clock": loop_for(experiment(*common, *CLOCK)),
        "buffered, K = 100, M = 1 000": loop_for(
            experiment(*common, *CLOCK, *schedule)
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        for _ in range(3):  # the first update sends work to 1 000
            one_round(loop)
    for turn in range(number):
        for name in sorted(loops, reverse=bool(turn % 2)):
            speeds[name].append(100 / one_round(loops[name]))
    rows = []
    plain = statistics.median(speeds["rounds of 100"])
    for name, clients in speeds.items():
        median = statistics.median(clients)
        rows.append([name, f"{median:.0f}", f"{median / plain:.2f}"])
    print_table(["schedule", "clients/s", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["parts", "rounds", "buffered"]
    parser.add_argument("parts", nargs="*", choices=[*names, []], default=names)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if "parts" in options.parts:
        parts()
    if "rounds" in options.parts:
        rounds(options.rounds)
    if "buffered" in options.parts:
        buffered(options.rounds)


if __name__ == "__main__":
    main()
