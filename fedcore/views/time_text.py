"""The time of a run by its own clock, in words for its report."""

from __future__ import annotations

from fedcore.rounds.slow_clients import group
from fedcore.rounds.time_summary import clock_kind, time_summary
from fedcore.views.page import Fact
from fedcore.views.run_record import RunRecord
from fedcore.views.text import share_text, time_text, value_text

__all__ = ["time_facts", "time_sentences"]


def time_facts(run: RunRecord) -> list[Fact]:
    """The time by the run's own clock; none without one."""
    time = time_summary(run.history)
    if not time:
        return []
    each = time_text(time["time_s"] / len(run.history))
    detail = f"{time['time_s']:,.6g} s, {each} a round"
    if time.get("idle"):
        detail += f"; clients idle {share_text(time['idle'])}"
    kind = clock_kind(run.settings)
    facts = [Fact(f"{kind} time", time_text(time["time_s"]), detail)]
    if run.heard is not None:
        slow = group(run.heard, (8, 10), run.clients, run.measure)
        detail = "of the updates that were used"
        if slow.measure is not None:
            detail += f"; {run.measure} {value_text(run.measure, slow.measure)}"
        facts.append(Fact("slowest fifth", share_text(slow.arrivals), detail))
    return facts


def time_sentences(run: RunRecord) -> list[str]:
    """What the clock tells of the run; nothing without one."""
    time = time_summary(run.history)
    if not time:
        return []
    spent = time_text(time["time_s"])
    sentences = [f"The run took {spent} of {clock_kind(run.settings)} time."]
    if time.get("idle"):
        share = share_text(time["idle"])
        sentences.append(f"Clients that were to work were idle for {share} of it.")
    if time.get("wasted_share"):
        share = share_text(time["wasted_share"])
        sentences.append(f"Of the clients' work {share} came to nothing.")
    if "staleness" in time:
        mean, most = time["staleness"]["mean"], time["staleness"]["max"]
        sentences.append(
            f"Updates were {mean:.3g} versions of the model behind on average, {most} "
            "at most."
        )
    if run.heard is not None:
        sentences.append(_slow_text(run))
    return sentences


def _slow_text(run: RunRecord) -> str:
    """The slowest fifth of the clients in a sentence."""
    assert run.heard is not None
    slow = group(run.heard, (8, 10), run.clients, run.measure)
    text = (
        "The slowest fifth of the clients sent "
        f"{share_text(slow.arrivals)} of the updates that were used"
    )
    if slow.measure is not None:
        reached = value_text(run.measure, slow.measure)
        text += f", and the model's {run.measure} is {reached} for them on average"
    return f"{text}."
