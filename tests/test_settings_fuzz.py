"""Settings of any kind: the right value, or a SettingsError that names the key."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedcore import methods
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.settings.faults import Schema
from tests.helpers import slow

FUZZ = settings(derandomize=True, database=None, max_examples=150)
MORE = settings(derandomize=True, database=None, max_examples=6000)

# Settings with a kind of every section that has kinds.
KINDS: list[dict[str, Any]] = [
    {"method": {"name": name}, **sections}
    for name in ("fedavg", "fedopt", "fedsim", "fedlaw", "admm")
    for sections in (
        {},
        {"participation": {"name": "markov"}, "partition": {"name": "shards"}},
        {"model": {"name": "vit"}, "partition": {"name": "pathological"}},
        {"model": {"name": "resnet"}, "partition": {"name": "size_skew"}},
        {"model": {"name": "cnn"}, "participation": {"name": "cyclic"}},
    )
]
WORDS = """nan inf -inf 1e400 0x10 1_000 true None null [ { " \\ ''' 2020-01-01"""
SPELLED = st.sampled_from(
    ["", *WORDS.split(), "1" * 5000, "[" * 5000, "a\nrounds = 7", "1 # 2"]
)
WHOLE = [0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**70, 10**30, 10**4000]
REAL = [-0.0, 5e-324, 1e-300, 1e38, 1e300, 1e308, math.nan, math.inf, -math.inf]
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([*WHOLE, *REAL]))
TEXTS = st.one_of(
    st.text(max_size=8),
    SPELLED,
    st.sampled_from(
        ["\0", "\ud800", "a" * 300, "/" + "b/" * 3000, "\x1b[31m", "\ufeff"]
    ),
)
LEAVES = st.one_of(NUMBERS, TEXTS, st.none(), st.booleans(), st.binary(max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3
        ),
        st.tuples(inner),
    ),
    max_leaves=5,
)
KEYS = sorted(
    {key for kind in KINDS for key in Schema(Experiment, kind).descriptions()}
)


def value_at(experiment: Experiment, key: str) -> Any:
    value: Any = experiment
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def is_same(kept: Any, given: Any) -> bool:
    """Whether a setting has the value that was given, in the type of the setting."""
    if isinstance(given, bytes):
        given = given.decode()
    if isinstance(kept, tuple | list) and isinstance(given, tuple | list):
        pairs = zip(kept, given, strict=False)
        return len(kept) == len(given) and all(is_same(*pair) for pair in pairs)
    if isinstance(kept, dict) and isinstance(given, dict):
        return kept.keys() == given.keys() and all(
            is_same(kept[key], given[key]) for key in kept
        )
    if isinstance(kept, tuple) and len(kept) == 1 and isinstance(given, str):
        return is_same(kept[0], given)  # a pattern alone
    if isinstance(kept, Path):
        return str(kept) == str(Path(given))
    if isinstance(kept, bool):
        return (
            kept == given
            or str(given).lower() in ("1", "0", "on", "off", "t", "f")
            or (str(given).lower() in ("true", "false", "y", "n", "yes", "no"))
        )
    if isinstance(kept, float) or (isinstance(given, str | bytes) and kept is not None):
        return (is_number(given) and float(kept) == float(given)) or kept == given
    return bool(kept == given) or str(kept) == str(given)


def made(kind: dict[str, Any], overrides: Any) -> Experiment | str:
    """The experiment, or the message of the refusal."""
    try:
        return Experiment.parse(kind, overrides)
    except SettingsError as error:
        return str(error)


def refuse_change(experiment: Experiment, what: str) -> None:
    again = Experiment.parse(tomllib.loads(experiment.to_toml()))
    assert again == experiment, f"{what} is written as another value"


def check(kind: dict[str, Any], key: str, value: Any) -> None:
    """The right value, which can be written and read again, or the key's name."""
    experiment = made(kind, {key: value})
    if isinstance(experiment, str):
        assert key in experiment or key.partition(".")[0] in experiment, experiment
        assert all(len(line) < 1000 for line in experiment.splitlines())
        return
    kept = value_at(experiment, key)
    assert is_same(kept, value), f"{key} = {value!r} became {kept!r}"
    refuse_change(experiment, f"{key} = {value!r}")


@FUZZ
@given(st.sampled_from(KINDS), st.sampled_from(KEYS), VALUES)
@example({"method": "fedavg"}, "seed", 2**70)
@example({"method": "fedavg"}, "method.local_lr", 10**400)
@example({"method": "fedavg"}, "method.local_lr", 5e-324)
@example({"method": "fedavg"}, "options.x", math.nan)
@example({"method": "fedavg"}, "options.x", {"y": "\ud800"})
@example({"method": "fedavg"}, "data_folder", "a\0b")
@example({"method": "fedavg"}, "initial", "a" * 300)
@example({"method": "fedavg"}, "method.name", "/" + "b/" * 3000)
@example({"method": "fedavg"}, "method.name", "a b " * 2000)
@example({"method": "fedavg"}, "method.name." + "x" * 4000, 1)
@example({"method": "fedavg"}, "engine", {"a" * 5000: 1})
@example({"method": "fedavg"}, "lora.form", [])
@example({"method": "fedavg"}, "lora.form", {})
@example({"method": "fedavg"}, "options", {"": (0,)})
@example({"method": "fedavg"}, "options.x", ((1, (2,)), [(), {"y": (3,)}]))
def test_a_value_is_taken_as_it_is_or_refused_by_name(
    kind: dict[str, Any], key: str, value: Any
) -> None:
    check(kind, key, value)


@pytest.mark.slow
@MORE
@given(st.sampled_from(KINDS), st.sampled_from(KEYS), VALUES)
def test_many_values_are_taken_as_they_are_or_refused_by_name(
    kind: dict[str, Any], key: str, value: Any
) -> None:
    check(kind, key, value)


@FUZZ
@given(
    st.sampled_from(KEYS),
    st.one_of(TEXTS, st.sampled_from([str(n) for n in (-1, 7, 1e300, 2**70)])),
)
@example("rounds", "5\nseed = 3")
@example("rounds", "1" * 5000)
def test_text_after_set_is_taken_or_refused_as_it_was_written(
    key: str, text: str
) -> None:
    experiment = made({"method": "fedavg"}, [f"{key}={text}"])
    if isinstance(experiment, str):
        assert "--set" in experiment or "method.name" in experiment
        assert key.partition(".")[0] in experiment
        return
    assert experiment.seed == 0 or key == "seed"
    refuse_change(experiment, f"{key}={text}")


@FUZZ
@given(st.text(max_size=12), LEAVES)
@example("", 1)
@example(".", 1)
@example("method.", 1)
@example("rounds.x", 1)
@example("a." * 5000, 1)
@example("local", 1)
def test_a_key_that_is_none_is_refused(key: str, value: Any) -> None:
    if key.partition(".")[0] in (*Experiment.model_fields, ""):
        return
    with pytest.raises(SettingsError):
        Experiment.parse({"method": "fedavg"}, {key: value})


@FUZZ
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), VALUES, max_size=3
    )
)
def test_an_experiment_from_python_is_made_or_refused(values: dict[str, Any]) -> None:
    for make in (
        lambda: Experiment(**{"method": "fedavg"} | values),
        lambda: Experiment(method="fedavg").model_copy(update=values),
        lambda: Experiment.model_validate({"method": "fedavg"} | values),
    ):
        try:
            experiment = make()
        except SettingsError:
            continue
        refuse_change(experiment, repr(values))


@pytest.mark.parametrize("name", [slow(name) for name in methods.names()])
def test_every_setting_of_every_method_refuses_what_is_no_number(name: str) -> None:
    for key in Schema(Experiment, {"method": {"name": name}}).descriptions():
        for value in (math.nan, math.inf, 10**30, 1e300, -(2**70), "\0", object()):
            check({"method": {"name": name}}, key, value)


def test_a_number_of_thousands_of_digits_is_refused_in_few_characters() -> None:
    with pytest.raises(SettingsError, match="rounds = a number of 16610 bits"):
        Experiment(method="fedavg", rounds=10**5000)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("a." * 5_000 + "b = 1", "nested more than"),
        ("rounds = " + "1" * 5_000, "digits"),
        ("options.x = " + "{a = " * 60 + "1" + "}" * 60, "nested more than"),
    ],
)
def test_toml_that_goes_too_far_is_one_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "p.toml").write_text(f'method.name = "fedavg"\n{text}\n')
    with pytest.raises(SettingsError, match=problem) as caught:
        Experiment.load(tmp_path / "p.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
