"""Experiment: everything that a run depends on, from a preset (TOML), from overrides, or from Python."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
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

from fedcore import method as methods
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

KINDS = (
    "method",
    "model",
    "partition",
    "participation",
)  # sections whose keys depend on their name
ALTERNATIVES = (  # one of two
    ("local.epochs", "local.steps"),
    ("participation.cohort", "participation.fraction"),
    ("links.downlink.variance", "links.downlink.snr_db"),
    ("links.uplink.variance", "links.uplink.snr_db"),
)
ROOT = Path(__file__).resolve().parent.parent


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
        description="clients in one batch, 1 = one after another; default: vectorised measures, ray 1",
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
        description="grid: seconds for which a round waits for a client that went away in it, to ask it again",
    )
    min_clients: int | None = Field(
        None,
        ge=1,
        description="grid: nodes that must be there for a round to start; default: all, for 120 s, and then any",
    )
    report_goal: int | None = Field(
        None,
        ge=1,
        description="grid: a round ends with this many reports; ask more clients than that to over-sample",
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
        description="clients of a round whose updates are kept, drawn from the cohort; 0 = none",
    )
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="rounds in which they are kept, from 1 on; default: first and last",
    )


class Experiment(_Section):
    """All settings of one run. Frozen; disagreements are refused here, not in round 40."""

    method: SerializeAsAny[MethodSettings] = Field(
        description="the method by name, and its settings"
    )
    task: str = Field(
        "digits",
        description='digits, fashion-mnist, cifar10, least-squares, or your own "package.module:make_task"',
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
        description="share of each client's examples kept for its own evaluation, in [0, 1)",
    )
    proxy: int = Field(
        0,
        ge=0,
        description="labelled examples that the server holds itself, class-balanced; no client has them",
    )
    options: dict[str, Any] = Field({}, description="for your own task, as it pleases")
    model: ModelSettings = Mlp()
    lowrank: LowRank = LowRank()
    initial: Path | None = Field(
        None,
        description="run directory, or .safetensors file, whose parameters the model starts with",
    )
    partition: PartitionSettings = Dirichlet()
    local: LocalSettings = LocalSettings()
    participation: ParticipationSettings = Uniform()
    defence: DefenceSettings = DefenceSettings()
    links: LinksSettings = LinksSettings()
    min_reports: int = Field(
        1,
        ge=0,
        description="a round with fewer reports leaves the server as it was; 0: the method decides",
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
        if not isinstance(value.get("name"), str):
            raise ValueError(
                'expected the name of a method, e.g. method.name = "fedavg"'
            )
        return methods.settings_of(methods.load(value["name"])).model_validate(
            dict(value)
        )

    @field_validator("model", "partition", "participation", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        """A section without a name is of the default kind."""
        default = cls.model_fields[str(info.field_name)].default
        return {"name": default.name, **value} if isinstance(value, Mapping) else value

    def build_task(self) -> Task:
        """The task that `task` names. Raises SettingsError when it cannot be built."""
        from fedcore.tasks import build_task

        return build_task(self)

    def build_method(self) -> Method[Any]:
        return methods.load(self.method.name)(self.method, self.finetune)

    def to_toml(self) -> str:
        """The resolved settings, as a preset that loads to an equal Experiment."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    @classmethod
    def load(
        cls, preset: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
    ) -> Experiment:
        """From a TOML file and `key=value` overrides. Raises SettingsError with one line for every fault."""
        return cls.parse(read_preset(preset), overrides, source=str(preset))

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        overrides: Sequence[str] | Mapping[str, Any] = (),
        source: str = "settings",
    ) -> Experiment:
        """From nested settings, and overrides by dotted key."""
        merged: dict[str, Any] = _copy(values)
        pairs = list(
            overrides.items()
            if isinstance(overrides, Mapping)
            else (_assignment(text) for text in overrides)
        )
        given = {key for key, _ in pairs}
        for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
            if (
                one in given and other not in given
            ):  # given here, it replaces the other of the preset
                _drop(merged, other)
        # A kind first: choosing another method or model drops the settings of the one before.
        for key, value in sorted(
            pairs,
            key=lambda pair: (
                not (
                    pair[0].removesuffix(".name") in KINDS and isinstance(pair[1], str)
                )
            ),
        ):
            _set(merged, key, value)
        try:
            return cls.model_validate(merged)
        except ValidationError as e:
            raise SettingsError(explain(e, cls, source, merged)) from e


def read_preset(preset: str | Path) -> dict[str, Any]:
    """The values of a TOML file. Raises SettingsError when it is missing or no TOML."""
    # As given; in the source tree or Flower app that this is part of; or the preset of a method by its name.
    places = (Path(preset), ROOT / preset, ROOT / "strategies" / f"{preset}.toml")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = sorted(
            f"strategies/{p.name}" for p in (ROOT / "strategies").glob("*.toml")
        )
        near = difflib.get_close_matches(str(preset), known, 1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else "expected a TOML file, e.g. strategies/fedavg.toml"
        )
        raise SettingsError(f"{preset}: there is no such preset; {hint}")
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"{preset} is not valid TOML: {e}") from e


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(
            f'--set "{text}": expected key=value, e.g. --set participation.cohort=10'
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "method":
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise SettingsError(
                f'--set {key}: "{section}" is a value, not a section; set {section} itself'
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
    return (
        {k: _copy(v) for k, v in values.items()}
        if isinstance(values, Mapping)
        else values
    )


def _without_none(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _without_none(v) for k, v in values.items() if v is not None}
    return values


def explain(
    error: ValidationError,
    model: type[BaseModel],
    source: str,
    values: Mapping[str, Any],
) -> str:
    """One line a fault: the key as the user typed it, what was found, what was expected."""
    method = values.get("method", {})
    settings = (
        methods.settings_of(methods.load(method["name"]))
        if isinstance(method, Mapping) and isinstance(method.get("name"), str)
        else None
    )
    return "\n".join(
        _explain_one(dict(fault), model, source, settings) for fault in error.errors()
    )


def _explain_one(
    fault: dict[str, Any],
    model: type[BaseModel],
    source: str,
    method: type[BaseModel] | None,
) -> str:
    section, path = model, []
    choices: list[type[BaseModel]] = []
    for part in fault["loc"]:
        if choices and any(
            _tag(c) == part for c in choices
        ):  # the tag of a union is no key of the user's
            section, choices = next(c for c in choices if _tag(c) == part), []
            continue
        path.append(str(part))
        field = section.model_fields.get(str(part)) if section else None
        choices = _models_in(field.annotation) if field else []
        if len(choices) == 1:
            section = method if path == ["method"] and method else choices[0]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"{source}: unknown key {key}{_near(path[-1], list(section.model_fields), path[:-1])}"
    if fault["type"] == "missing":
        return f"{source}: {key} is missing{_described(section, path[-1])}"
    if fault["type"] == "union_tag_invalid":
        expected = fault["ctx"]["expected_tags"].replace("'", '"')
        return f'{source}: {key}.name = "{fault["ctx"]["tag"]}": expected one of {expected}'
    if fault["type"] == "union_tag_not_found":
        return f"{source}: {key}.name is missing: expected one of {', '.join(str(_tag(c)) for c in choices)}"
    message = fault["msg"].removeprefix("Value error, ")
    found = (
        f" = {fault['input']!r}"
        if not isinstance(fault["input"], Mapping | BaseModel)
        else ""
    )
    return f"{source}: {key}{found}: {message[0].lower() + message[1:]}"


def _near(name: str, known: list[str], section: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean {'.'.join([*section, near[0]])}?"
    return f"; known: {', '.join(known)}" if known else ""


def _described(section: type[BaseModel], name: str) -> str:
    field = section.model_fields.get(name)
    return f": {field.description}" if field and field.description else ""


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("name")
    return field.default if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        return [
            model
            for argument in typing.get_args(annotation)
            for model in _models_in(argument)
        ]
    return []
