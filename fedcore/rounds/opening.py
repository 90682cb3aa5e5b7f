"""A round, as it is opened: its doors, its counts, and who drops out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fedcore.rounds.canaries import Planted, PlantedRound
from fedcore.rounds.doors import Desk, OpenRound
from fedcore.rounds.participation import answering
from fedcore.rounds.saving import State
from fedcore.rounds.setup import Parts
from fedcore.rounds.tally import Tally

if TYPE_CHECKING:
    from fedcore.config import Experiment


def opened(
    experiment: Experiment,
    parts: Parts,
    desk: Desk,
    state: State,
    t: int,
    cohort: Tensor,
) -> OpenRound:
    """Round t of a run, whose doors lead to the engine of the desk.

    cohort: ids, ascending; state: what the round before has left.
    """
    members = frozenset(cohort.tolist())
    dropout, seed = experiment.participation.dropout, experiment.seed
    present = frozenset(answering(cohort, dropout, seed, t).tolist())
    hides_scalars = experiment.defence.noise_multiplier > 0
    hides_scalars |= experiment.local.dp.is_active
    r = OpenRound(
        t,
        cohort,
        parts.task.population,
        parts.task,
        parts.memory,
        seed,
        parts.rates,
        desk=desk,
        tally=Tally(set(members), hides_scalars, experiment.aggregation.secure),
        absent=members - present,
        aggregation=dict(state.aggregation),
        adversary=dict(state.adversary),
    )
    if parts.canaries is None:
        return r
    return PlantedRound(**vars(r), canaries=parts.canaries, planted=Planted())
