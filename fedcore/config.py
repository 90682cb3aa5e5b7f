"""Experiment: everything that a run depends on, from a preset, overrides or Python."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence, Set
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
)

import fedcore
from fedcore import method as methods
from fedcore.config_errors import explain
from fedcore.data.federated import LocalSettings
from fedcore.data.partition import Dirichlet, PartitionSettings
from fedcore.errors import SettingsError
from fedcore.messages.defence import DefenceSettings
from fedcore.messages.links import LinksSettings
from fedcore.method import FinetuneSettings, Method, MethodSettings
from fedcore.models import LowRank, Mlp, ModelSettings
from fedcore.rounds.participation import ParticipationSettings, Uniform

if TYPE_CHECKING:
    from fedcore.task import Task

__all__ = [
    "KINDS",
    "AuditSettings",
    "CheckpointSettings",
    "EngineSettings",
    "EvaluationSettings",
    "Experiment",
    "read_preset",
]

# Sections whose keys depend on their name.
KINDS = ("method", "model", "partition", "participation")
# Of these pairs of keys one replaces the other.
ALTERNATIVES = (
    ("local.epochs", "local.steps"),
    ("participation.cohort", "participation.fraction"),
    ("links.downlink.variance", "links.downlink.snr_db"),
    ("links.uplink.variance", "links.uplink.snr_db"),
)


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
    round_timeout: float = Field(
        3600.0,
        gt=0,
        description="grid: seconds after which a round goes on without late clients",
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
    report_goal: int | None = Field(
        None,
        ge=1,
        description="grid: a round ends with this many reports; "
        "ask more clients than that to over-sample",
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


class Experiment(_Section):
    """All settings of one run. Frozen; what disagrees is refused when they load."""

    method: SerializeAsAny[MethodSettings] = Field(
        description="the method by name, and its settings"
    )
    task: str = Field(
        "digits",
        description="digits, fashion-mnist, cifar10, least-squares, "
        'or your own "package.module:make_task"',
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
        description="folder of the data set's files, where it is not in a usual place",
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

    @field_validator("model", "partition", "participation", mode="before")
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

        return build_task(self)

    def to_toml(self) -> str:
        """The resolved settings, as a preset that loads to an equal Experiment."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    @classmethod
    def load(
        cls, preset: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
    ) -> Experiment:
        """The settings of a TOML file, or of a method's preset by its name.

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
        overrides: Sequence[str] | Mapping[str, Any] = (),
        source: str = "settings",
    ) -> Experiment:
        """The settings in a nested dict, and overrides as `load` takes them.

        `source` is what error messages call the dict. Raises SettingsError with one
        line for every fault.

        >>> experiment = Experiment.parse({"method": "fedavg"}, {"local.steps": 5})
        >>> experiment.local.steps
        5
        """
        merged: dict[str, Any] = _copy(values)
        if isinstance(overrides, Mapping):
            pairs = list(overrides.items())
        else:
            pairs = [_assignment(text) for text in overrides]
        _drop_replaced(merged, dict(pairs).keys())
        # A kind first: another method or model drops the settings of the one before.
        for key, value in sorted(pairs, key=lambda pair: not _chooses_kind(*pair)):
            _set(merged, key, value)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            settings = _settings_of_method(merged.get("method"))
            raise SettingsError(explain(error, cls, source, settings)) from error


def read_preset(preset: str | Path) -> dict[str, Any]:
    """The values of a TOML file. Raises SettingsError when it is missing or no TOML.

    The file is looked for as given and among those that come with fedcore. A bare name
    is that of a bundled preset, or else of one in ./strategies/.
    """
    file = _preset_file(str(preset))
    if file is None:
        presets = _bundled_presets()
        hint = "expected a TOML file, e.g. strategies/fedavg.toml"
        for nearest in difflib.get_close_matches(str(preset), presets, 1):
            hint = f"did you mean {nearest}?"
        raise SettingsError(f"{preset}: there is no such preset; {hint}")
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{preset} is not valid TOML: {error}") from error


def _preset_file(preset: str) -> Path | None:
    """The file of a preset: of a path the user's first, of a name the bundled one."""
    by_name = f"strategies/{preset}.toml"
    is_path = preset.endswith(".toml") or Path(preset).name != preset
    if is_path:
        places = [Path(preset), *_bundled(preset)]
    else:
        places = [*_bundled(by_name), Path(by_name), Path(preset)]
    for file in places:
        if file.is_file():
            return file
    return None


def _bundled(path: str) -> list[Path]:
    """Places of a file that comes with fedcore.

    One in what is installed, two in the source tree.
    """
    return [Path(folder) / path for folder in fedcore.__path__]


def _bundled_presets() -> list[str]:
    """The paths of the methods' presets, as a user types them."""
    paths = []
    for folder in _bundled("strategies"):
        paths += [f"strategies/{file.name}" for file in folder.glob("*.toml")]
    return sorted(paths)


def _settings_of_method(section: Any) -> type[MethodSettings] | None:
    """The settings class of the method that a section names; None without a name."""
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return None
    return methods.settings_of(methods.load(section["name"]))


def _assignment(text: str) -> tuple[str, Any]:
    """(dotted key, value) of `key=value`; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(
            f'--set "{text}": expected key=value, e.g. --set participation.cohort=10'
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _chooses_kind(key: str, value: Any) -> bool:
    """Whether an override names the kind of a section."""
    return key.removesuffix(".name") in KINDS and isinstance(value, str)


def _drop_replaced(values: dict[str, Any], given: Set[str]) -> None:
    """Drop what an override replaces: of two alternatives, the one not `given`."""
    for one, other in ALTERNATIVES:
        if one in given and other not in given:
            _drop(values, other)
        if other in given and one not in given:
            _drop(values, one)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "method":
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise SettingsError(
                f'--set {key}: "{section}" is a value, not a section; '
                f"set {section} itself"
            )
        values = inner
    if last == "name" and key.removesuffix(".name") in KINDS:
        default = Experiment.model_fields[sections[0]].default
        if values.get("name", getattr(default, "name", None)) != value:
            values.clear()
    values[last] = value


def _drop(values: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(last, None)


def _copy(values: Any) -> Any:
    """The same values, with dicts of their own."""
    if not isinstance(values, Mapping):
        return values
    return {key: _copy(value) for key, value in values.items()}


def _without_none(values: Any) -> Any:
    """The same values without those that are None, which TOML does not have."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        if value is not None:
            kept[key] = _without_none(value)
    return kept
