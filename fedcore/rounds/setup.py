"""The parts of a run, made in an order that matters, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedcore import engines, privacy, trees
from fedcore.clock.settings import goal_of
from fedcore.engines.base import Engine, Work
from fedcore.messages.secure.sending import Noising, Sending
from fedcore.messages.secure.terms import settings_digest
from fedcore.method import Method
from fedcore.rounds import hostile, refusals
from fedcore.rounds.canaries import Canaries, canaries_of
from fedcore.rounds.doors import Receiving
from fedcore.rounds.noise import distributed_noise, mechanism_of
from fedcore.rounds.participation import Process
from fedcore.rounds.result import params_sha256
from fedcore.rounds.schedule_checks import refuse_schedule
from fedcore.rounds.schedules import timing_of
from fedcore.rounds.secret import SecretSums
from fedcore.rounds.secret_checks import refuse_secret, refuse_telling_skips
from fedcore.rounds.timing import Timing
from fedcore.split import split
from fedcore.statistics import refuse_shared, statistic_names
from fedcore.storage.faults import writing
from fedcore.storage.rows import StateStore
from fedcore.types import Params

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.task import Task

MakeEngine = Callable[[Work], Engine]


class Start(NamedTuple):
    """The parameters that a run was given to start from, where it was given some."""

    source: Path
    sha256: str


class Parts(NamedTuple):
    """Everything that a run computes with."""

    task: Task  # on the engine's device
    method: Method[Any]
    process: Process
    rates: Tensor | None  # p_i, float64 [population], where they are known
    mechanism: privacy.Mechanism | None
    params: Params  # initial, on the CPU
    start: Start | None
    work: Work
    engine: Engine
    memory: StateStore  # rows that the server keeps of single clients
    receiving: Receiving
    canaries: Canaries | None  # planted to measure what the run gives away
    timing: Timing

    @property
    def stores(self) -> dict[str, StateStore]:
        """Rows of single clients, by the name of their part of a checkpoint."""
        stores = {"memory": self.memory}
        if self.engine.states is not None:
            stores["clients"] = self.engine.states
        return stores | self.timing.stores()


def prepare(
    experiment: Experiment,
    folder: Path,
    make_engine: MakeEngine | None,
    note: Callable[[str], None],
) -> Parts:
    """The parts of a run in `folder`.

    Raises SettingsError for everything that can be found wrong; what the user should
    know goes to `note`.
    """
    task = experiment.build_task()
    _note_population(experiment, task, note)
    params = task.init_params()  # on the CPU, where rows of clients are kept
    if make_engine is None:
        refusals.refuse_nothing_to_train_on(task)
        task.to(engines.task_device(experiment.engine))
    task.check()
    method = experiment.build_method()
    process = _process(experiment, task, method, note)
    mechanism = refusals.noise_mechanism(experiment, method, process)
    if experiment.finetune.epochs:
        # Refused now, not after the last round.
        split(params, experiment.finetune.parts)
    work = work_of(experiment, task, method)
    work.adversary.refuse(method, experiment.method.name)
    hostile.refuse(experiment, work, process, note)
    refuse_secret(experiment, work, process, params, note)
    refuse_telling_skips(experiment, mechanism, process, task.population)
    work, mechanism = _with_noise(experiment, work, process, params, mechanism, note)
    if statistic_names(task.model):
        server = method.init_server(params, task.population)
        refuse_shared(task.model, server.params)
    client_row, memory_row = work.first_state(params), method.init_memory(params)
    ram = _ram_of_a_store(experiment, [client_row, memory_row])
    clients = StateStore(client_row, ram, partial(_spill, folder, "clients"))
    if make_engine is None:
        engine = engines.make(experiment.engine, work, clients)
    else:
        engine = make_engine(work)
    advice = method.check(task, process.largest)
    if advice:
        note(advice)
    spill = partial(_spill, folder, "memory")
    timing = timing_of(experiment, work, engine, params, partial(_spill, folder))
    return Parts(
        task=task,
        method=method,
        process=process,
        rates=_arrival_rates(experiment, process),
        mechanism=mechanism,
        params=params,
        start=_start(experiment, params),
        work=work,
        engine=engine,
        memory=StateStore(memory_row, ram, spill, task.device),
        receiving=_receiving(experiment, work, process, folder),
        canaries=canaries_of(experiment, work, mechanism),
        timing=timing,
    )


def _process(
    experiment: Experiment,
    task: Task,
    method: Method[Any],
    note: Callable[[str], None],
) -> Process:
    """The participation process. Raises SettingsError where no round would go well."""
    refusals.refuse_training(experiment, task, method)
    process = refusals.participation_process(experiment, task)
    refuse_schedule(experiment, task, method, process, note)
    refusals.refuse_unknown_rates(experiment, method, process)
    return process


def _with_noise(
    experiment: Experiment,
    work: Work,
    process: Process,
    params: Params,
    mechanism: privacy.Mechanism | None,
    note: Callable[[str], None],
) -> tuple[Work, privacy.Mechanism | None]:
    """The work of clients that add noise to secure sums, and its mechanism.

    As they were where clients add none. Raises SettingsError.
    """
    noising = distributed_noise(experiment, work, process, params, note)
    if noising is None:
        return work, mechanism
    noisy = work_of(experiment, work.task, work.method, noising)
    return noisy, mechanism_of(noising)


def work_of(
    experiment: Experiment,
    task: Task,
    method: Method[Any],
    noising: Noising | None = None,
    draws_secretly: bool = False,
) -> Work:
    """The work of the clients of an experiment, as its settings have it.

    With `noising` they add noise to what is summed in secret. With `draws_secretly`
    DP-SGD draws from the operating system, and not from the run's seed.
    """
    sending, rules = None, experiment.aggregation
    if rules.secure:
        agreed = agreed_by(experiment)
        sending = Sending(method, task, rules, experiment.seed, noising, agreed)
    return Work(
        task,
        method,
        experiment.local,
        experiment.seed,
        experiment.links,
        experiment.defence,
        experiment.adversary,
        rounds=experiment.rounds,
        sending=sending,
        draws_secretly=draws_secretly,
    )


def agreed_by(experiment: Experiment) -> bytes:
    """What stands for the settings that all clients of a secure sum have to have."""
    return settings_digest(experiment.model_dump(mode="json"))


def _receiving(
    experiment: Experiment, work: Work, process: Process, folder: Path
) -> Receiving:
    """The server's treatment of messages, or of their sums alone."""
    receiving = hostile.receiving(experiment, work, partial(_spill, folder, "rows"))
    if work.sending is None:
        return receiving
    secret = SecretSums(work.sending, experiment.secure, process.largest)
    remedy = "without the clients that are at fault"  # a rule would have to see them
    if work.method.differences and experiment.aggregation.clip is None:
        remedy = "with a bound on messages: aggregation.clip"
    return receiving._replace(secret=secret, remedy=remedy)


def _note_population(
    experiment: Experiment, task: Task, note: Callable[[str], None]
) -> None:
    """Say where the task's own number of clients wins."""
    if experiment.population not in (None, task.population):
        note(
            f'the task "{experiment.task}" has {task.population} clients, which count: '
            f"population = {experiment.population} does not apply"
        )


def _arrival_rates(experiment: Experiment, process: Process) -> Tensor | None:
    """How often each client's update arrives: it takes part, and does not drop out."""
    schedule = experiment.schedule
    is_selective = goal_of(schedule) is not None or experiment.clock.windows is not None
    is_selective |= getattr(schedule, "deadline_s", None) is not None
    if process.rates is None or is_selective:
        return None  # who takes part need not arrive
    return torch.from_numpy(process.rates * (1 - experiment.participation.dropout))


def starts_trained(experiment: Experiment) -> bool:
    """Whether the model's first weights are those of an earlier training."""
    path = getattr(experiment.model, "path", None)
    return any(file is not None for file in (experiment.base, experiment.initial, path))


def _start(experiment: Experiment, params: Params) -> Start | None:
    if experiment.initial is None:
        return None
    return Start(experiment.initial, params_sha256(params))


def _ram_of_a_store(experiment: Experiment, rows: list[Any]) -> int:
    """Bytes for each store that keeps anything."""
    used = sum(trees.nbytes(row) > 0 for row in rows)
    return int(experiment.checkpoint.state_ram_gb * 1e9) // max(used, 1)


def _spill(run_dir: Path, name: str) -> Path:
    """Where a store's mapped files go.

    No method: a store that knew its loop would keep a finished run in memory.
    """
    folder = run_dir / "state" / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
