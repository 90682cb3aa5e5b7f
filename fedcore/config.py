"""Experiment: everything that a run depends on, from a preset, overrides or Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedcore import methods
from fedcore.clock.settings import ClockSettings, ScheduleSettings, Synchronous
from fedcore.data.partition import Dirichlet, PartitionSettings
from fedcore.data.text.settings import TextSettings
from fedcore.errors import SettingsError
from fedcore.escapes import shortened
from fedcore.local_settings import LocalSettings
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.messages.aggregation.settings import AggregationSettings
from fedcore.messages.defence import DefenceSettings
from fedcore.messages.links import LinksSettings
from fedcore.messages.secure.settings import SecureSettings
from fedcore.method import FinetuneSettings, Method, MethodSettings
from fedcore.models import LoraSettings, LowRank, Mlp, ModelSettings
from fedcore.rounds.participation import ParticipationSettings, Uniform
from fedcore.settings.extremes import plain, refuse_extremes
from fedcore.settings.faults import Origin, Schema, explain, shown
from fedcore.settings.overrides import Override, merged, read_overrides, refuse_depth
from fedcore.settings.presets import read_preset

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = [
    "AuditSettings",
    "CheckpointSettings",
    "EngineSettings",
    "EvaluationSettings",
    "Experiment",
    "read_preset",
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EngineSettings(_Section):
    """Where client functions run."""

    name: Literal["sequential", "vectorised", "ray", "grid"] = "vectorised"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one"
    )
    chunk: int | None = Field(
        None,
        ge=1,
        description="clients in one batch, 1 = one after another; "
        "default: vectorised measures, ray 1",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="ray: number of workers; default: one a core, or one a GPU share",
    )
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        description="ray: share of a GPU a worker holds, e.g. 0.25; on cuda default 1",
    )
    rejoin_timeout: float = Field(
        0.0,
        ge=0,
        description="grid: seconds for which a round waits for a client that "
        "went away in it, to ask it again",
    )
    min_clients: int | None = Field(
        None,
        ge=1,
        description="grid: nodes that must be there for a round to start; "
        "default: all, for 120 s, and then any",
    )
    message_limit_mb: float = Field(
        512.0,
        gt=0,
        description="grid: most that one message may hold, in MB (10^6 bytes)",
    )


class EvaluationSettings(_Section):
    """What is measured, and when."""

    every: int = Field(
        5,
        ge=1,
        description="rounds between evaluations; the last round is always evaluated",
    )
    every_s: float | None = Field(
        None,
        ge=1e-6,
        description="simulated seconds between evaluations, instead of `every`: the "
        "first round that ends at or after each multiple of it",
    )
    clients: int = Field(
        1000,
        ge=0,
        description="clients whose own metrics are measured, drawn once; 0 = none",
    )


class CheckpointSettings(_Section):
    """When a run can be taken up again."""

    seconds: float = Field(
        30.0,
        ge=0,
        description="least time between two checkpoints; 0 = after every round",
    )
    state_ram_gb: float = Field(
        4.0,
        gt=0,
        description="client state held in memory, in GB; the rest is in mapped files",
    )
    keep: int = Field(
        3,
        ge=1,
        description="checkpoints that stay: the last ones, and beside them the best "
        "by test loss",
    )
    jump: float = Field(
        3.0,
        gt=1,
        description="factor between the test losses of two evaluations in a row from "
        "which on the run says so, and names the clients that reported in between",
    )
    stop_on_jump: bool = Field(
        False, description="whether such a jump ends the run, with exit status 1"
    )


class AuditSettings(_Section):
    """What is kept of a run for `fedcore audit`."""

    capture: int = Field(
        0,
        ge=0,
        description="clients of a round whose updates are kept, drawn from the "
        "cohort; 0 = none",
    )
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="rounds in which they are kept, from 1 on; default: first and last",
    )
    canaries: int = Field(
        0,
        ge=0,
        description="k, clients beside the population that send a random direction of "
        "the clip norm, from which a run's real epsilon is estimated; 0 = none",
    )


class Experiment(_Section):
    """All settings of one run. Frozen; what disagrees is refused when they load.

    `Experiment(method="fedavg")` has the defaults below, which are the same for every
    method. `Experiment.load("fedavg")` has what strategies/fedavg.toml says, the
    settings that its documentation and its results are about, and these defaults
    for the rest. Raises SettingsError with one line for every fault.

    >>> Experiment(method="fedavg").rounds, Experiment.load("fedavg").rounds
    (30, 40)
    """

    method: SerializeAsAny[MethodSettings] = Field(
        description="the method by name, and its settings"
    )
    task: str = Field(
        "digits",
        description="digits, fashion-mnist, cifar10, shakespeare, texts, "
        'least-squares, or your own "package.module:make_task"; from Python also the '
        "function",
    )
    rounds: int = Field(30, ge=1, description="T, rounds")
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    population: int | None = Field(
        None,
        ge=1,
        description="N, clients; default: the natural clients of the data, or 100",
    )
    data_folder: Path | None = Field(
        None,
        description="folder of the data set's files, where it is not in a usual place; "
        "of texts also a file",
    )
    holdout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of each client's examples kept for its own evaluation, "
        "in [0, 1)",
    )
    proxy: int = Field(
        0,
        ge=0,
        description="labelled examples that the server holds itself, class-balanced; "
        "no client has them",
    )
    options: dict[str, Any] = Field({}, description="for your own task, as it pleases")
    model: ModelSettings = Mlp()
    lowrank: LowRank = LowRank()
    lora: LoraSettings = LoraSettings()
    text: TextSettings = TextSettings()
    base: Path | None = Field(
        None,
        description="folder that `fedcore pretrain` wrote: the weights that the model "
        "starts with, and the tokenizer",
    )
    initial: Path | None = Field(
        None,
        description="run directory, or .safetensors file, whose parameters the model "
        "starts with",
    )
    partition: PartitionSettings = Dirichlet()
    local: LocalSettings = LocalSettings()
    participation: ParticipationSettings = Uniform()
    defence: DefenceSettings = DefenceSettings()
    links: LinksSettings = LinksSettings()
    aggregation: AggregationSettings = AggregationSettings()
    secure: SecureSettings = SecureSettings()
    adversary: AdversarySettings = AdversarySettings()
    clock: ClockSettings = ClockSettings()
    schedule: ScheduleSettings = Synchronous()
    min_reports: int = Field(
        1,
        ge=0,
        description="a round with fewer reports leaves the server as it was; "
        "0: the method decides",
    )
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    audit: AuditSettings = AuditSettings()

    if not TYPE_CHECKING:

        def __new__(cls, *values: object, **_: object) -> Experiment:
            if values:
                raise SettingsError(
                    f"Experiment({shown(values[0])}): expected settings by name, "
                    'Experiment(method="fedavg"), or Experiment.load("fedavg")'
                )
            return super().__new__(cls)

        def __setattr__(self, name: str, value: object) -> None:
            raise SettingsError(
                f"{name} = {shown(value)}: an Experiment does not change; make "
                f'another: experiment = experiment.model_copy(update={{"{name}": ...}})'
            )

    @model_validator(mode="wrap")
    @classmethod
    def _explained(
        cls, values: Any, handler: Callable[[Any], Experiment], info: ValidationInfo
    ) -> Experiment:
        """Faults as a SettingsError, in the words of the user."""
        origin = info.context if isinstance(info.context, Origin) else Origin()
        if isinstance(values, Mapping):
            refuse_depth(values, origin.source)
            values = plain(values)
        try:
            experiment = handler(values)
        except ValidationError as error:
            given = values if isinstance(values, Mapping) else {}
            # Without the chain: what pydantic says is in the message.
            lines = explain(error, Schema(cls, given), origin)
            raise SettingsError(lines) from None
        refuse_extremes(experiment, origin)
        return experiment

    @field_validator("task", mode="before")
    @classmethod
    def _named_function(cls, value: Any) -> Any:
        """A function by the name under which it can be found again."""
        from fedcore.users import name_of

        return name_of(value) if callable(value) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method_settings(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        settings = _settings_of_method(value)
        if settings is None:
            raise ValueError(
                'expected the name of a method, e.g. method.name = "fedavg"'
            )
        return settings.model_validate(dict(value))

    @field_validator("model", "partition", "participation", "schedule", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        """A section without a name is of the default kind."""
        if not isinstance(value, Mapping):
            return value
        default = cls.model_fields[str(info.field_name)].default
        return {"name": default.name, **value}

    def build_method(self) -> Method[Any]:
        """The method, with its settings."""
        return methods.load(self.method.name)(self.method, self.finetune)

    def build_task(self) -> Task:
        """The task: data spread over clients, model, loss and metrics, on the CPU.

        Raises SettingsError where these settings and the data do not fit.

        >>> experiment = Experiment.parse({"method": "fedavg", "population": 20})
        >>> experiment.build_task().population
        20
        """
        from fedcore.tasks import build_task

        try:
            return build_task(self)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                reason = str(error)[-120:] or "not enough memory"
                raise SettingsError(
                    f'task = "{self.task}": {reason}; lower population, the sizes of '
                    "the model, or those in options"
                ) from error
            raise

    def to_toml(self) -> str:
        """The resolved settings, as a preset that loads to an equal Experiment."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    @classmethod
    def load(
        cls,
        preset: str | Path,
        overrides: Sequence[str | Override] | Mapping[str, Any] = (),
    ) -> Experiment:
        """The settings of a TOML file, or of a method's preset by its name.

        `load("fedavg")` has what strategies/fedavg.toml says; `Experiment(
        method="fedavg")` has none of it, and the defaults of `Experiment` alone.

        `overrides` are `key=value`, as `--set` takes them, or values by dotted key.
        Raises SettingsError with one line for every fault.

        >>> experiment = Experiment.load("fedprox", ["method.mu=0.5", "rounds=3"])
        >>> experiment.method.mu, experiment.rounds
        (0.5, 3)
        """
        return cls.parse(read_preset(preset), overrides, source=str(preset))

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        overrides: Sequence[str | Override] | Mapping[str, Any] = (),
        source: str = "settings",
    ) -> Experiment:
        """The settings in a nested dict, and overrides as `load` takes them.

        `source` is what error messages call the dict. Raises SettingsError with one
        line for every fault.

        >>> experiment = Experiment.parse({"method": "fedavg"}, {"local.steps": 5})
        >>> experiment.local.steps
        5
        """
        if not isinstance(values, Mapping):
            raise SettingsError(
                f"{source}: {shown(values)} is no section; expected a dict of settings"
            )
        refuse_depth(values, source)
        given = read_overrides(overrides)
        for override in given:
            name = override.written or override.key
            refuse_depth([override.key.split("."), override.value], shortened(name))
        settings = merged(plain(values), given, cls)
        return cls.model_validate(settings, context=Origin(source, given))

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Experiment:
        """The experiment with other settings, whole sections or values by dotted key.

        Raises SettingsError with one line for every fault.

        >>> experiment = Experiment(method="fedavg")
        >>> experiment.model_copy(update={"local.epochs": 3}).local.epochs
        3
        """
        if not update:
            return super().model_copy(deep=deep)
        return self.parse(plain(self), update, source="model_copy")


def _settings_of_method(section: Any) -> type[MethodSettings] | None:
    """The settings class of the method that a section names; None without a name."""
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return None
    return methods.settings_of(methods.load(section["name"]))


def _without_none(values: Any) -> Any:
    """The same values without those that are None, which TOML does not have."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        if value is not None:
            kept[key] = _without_none(value)
    return kept
