"""States on a device: right after a replay, whole after a crash, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fedcore.client.device import Device
from fedcore.client.store import StateError, Store

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.messages.moment import Moment

INITIAL = {"c": torch.zeros(3), "n": torch.tensor(0)}


def state(x: float) -> dict[str, Any]:
    return {"c": torch.full((3,), float(x)), "n": torch.tensor(int(x))}


def assert_is(found: Any, expected: Any) -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True)
    ), found


def test_work_starts_from_the_newest_state_older_than_it(tmp_path: Path) -> None:
    store = Store(tmp_path, "f", "s")
    assert_is(store.load(1, Moment(4, 0), INITIAL), INITIAL)
    store.save(1, Moment(4, 0), state(1), safe=4)
    assert_is(
        store.load(1, Moment(4, 1), INITIAL), state(1)
    )  # the second work of one round
    store.save(1, Moment(4, 1), state(2), safe=4)
    store.save(1, Moment(9, 0), state(3), safe=9)
    again = Store(tmp_path, "f", "s")  # after a restart
    assert_is(again.load(1, Moment(12, 0), INITIAL), state(3))
    assert_is(again.load(2, Moment(12, 0), INITIAL), INITIAL)
    assert_is(
        again.load(1, Moment(9, 0), INITIAL), state(2)
    )  # the server was set back, and asks again


def test_a_replayed_round_takes_the_place_of_what_came_after_it(tmp_path: Path) -> None:
    store = Store(tmp_path, "f", "s")
    for t in (0, 1, 2):
        store.save(0, Moment(t, 0), state(t), safe=0)
    assert_is(store.load(0, Moment(0, 0), INITIAL), INITIAL)  # its first work, again
    store.save(0, Moment(1, 0), state(7), safe=0)
    assert_is(store.load(0, Moment(5, 0), INITIAL), state(7))


def test_states_that_cannot_be_asked_for_again_are_gone(tmp_path: Path) -> None:
    store = Store(tmp_path, "f", "s")
    for t in range(50):
        store.save(0, Moment(t, 0), state(t), safe=t)
    assert len(list((tmp_path / "s" / "client-0").iterdir())) == 2
    with pytest.raises(StateError, match="set back to an older copy"):
        store.load(0, Moment(10, 0), INITIAL)


@pytest.mark.parametrize(
    ("federation", "series", "client", "said"),
    [
        ("other", "s", 0, "federation 'f'"),
        ("f", "other", 0, "series 's'"),
        ("f", "s", 5, "client '0'"),
    ],
)
def test_the_state_of_another_is_refused_by_name(
    federation: str, series: str, client: int, said: str, tmp_path: Path
) -> None:
    Store(tmp_path, "f", "s").save(0, Moment(0, 0), state(1), safe=0)
    place = tmp_path / series / f"client-{client}"
    place.parent.mkdir(exist_ok=True)
    if place != tmp_path / "s" / "client-0":
        (tmp_path / "s" / "client-0").rename(place)
    with pytest.raises(StateError, match=rf"000000-00.safetensors belongs to {said}"):
        Store(tmp_path, federation, series).load(client, Moment(1, 0), INITIAL)


def test_damage_and_another_model_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path, "f", "s")
    store.save(0, Moment(0, 0), state(1), safe=0)
    with pytest.raises(StateError, match="does not fit this method and model"):
        store.load(0, Moment(1, 0), {"c": torch.zeros(4), "n": torch.tensor(0)})
    (file,) = (tmp_path / "s" / "client-0").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        store.load(0, Moment(1, 0), INITIAL)


def test_a_directory_belongs_to_one_client_of_one_federation_and_one_process(
    tmp_path: Path,
) -> None:
    device = Device(tmp_path / "d", "f", 0)
    with pytest.raises(SettingsError, match="another client runs in it"):
        Device(tmp_path / "d", "f", 0)
    device._lock.close()
    with pytest.raises(
        SettingsError, match="belongs to federation f, and this is federation g"
    ):
        Device(tmp_path / "d", "g", 0)
    with pytest.raises(
        SettingsError, match="belongs to client 0, and this is client 1"
    ):
        Device(tmp_path / "d", "f", 1)
