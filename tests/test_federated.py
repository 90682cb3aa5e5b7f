"""FederatedData: batches, epochs, held-out examples, and how much work is local."""

from __future__ import annotations

import pickle
from itertools import chain

import numpy as np
import pytest
import torch

from fedcore.data.federated import (
    EVALUATION_BATCH,
    Examples,
    FederatedData,
    LocalSettings,
)


def data(holdout: float = 0.0) -> FederatedData:
    x = torch.arange(23.0)[:, None]
    examples = Examples(x, x.clone())
    return FederatedData(
        examples, examples, np.arange(23), np.array([0, 10, 10, 13, 23]), holdout
    )


def rows_of(batches, i: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return [
        [int(v) for v, m in zip(x[:, 0], mask, strict=True) if m]
        for x, mask in zip(batches.x[i], batches.mask[i], strict=True)
    ]


def test_an_epoch_uses_every_example_of_the_client_once() -> None:
    b = data().batches(
        np.array([0, 2]), "train", LocalSettings(batch_size=4, epochs=2), 0, 5
    )
    first = rows_of(b, 0)
    assert [len(r) for r in first] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*first[:3])) == sorted(chain(*first[3:])) == list(range(10))
    assert sorted(rows_of(b, 1)[0]) == [10, 11, 12]
    assert rows_of(b, 1)[2:] == [[], [], [], []]


def test_steps_are_counted_and_reshuffled_when_the_examples_run_out() -> None:
    b = data().batches(
        np.array([0]), "train", LocalSettings(batch_size=4, steps=5), 0, 5
    )
    assert [len(r) for r in rows_of(b, 0)] == [4, 4, 2, 4, 4]


def test_batches_depend_on_seed_round_and_client_and_not_on_company() -> None:
    d, local = data(), LocalSettings(batch_size=3)
    alone = rows_of(d.batches(np.array([3]), "train", local, 0, 1), 0)
    together = rows_of(d.batches(np.array([0, 2, 3]), "train", local, 0, 1), 2)
    assert alone == together
    assert alone != rows_of(d.batches(np.array([3]), "train", local, 0, 2), 0)
    assert alone != rows_of(d.batches(np.array([3]), "train", local, 1, 1), 0)


def test_held_out_examples_are_never_trained_on() -> None:
    d = data(holdout=0.3)
    assert d.evaluated_on == "test"
    for client in (0, 2, 3):
        held, kept = set(d.rows(client, "test")), set(d.rows(client, "train"))
        assert not held & kept
        assert held | kept == set(range(d.offsets[client], d.offsets[client + 1]))
    assert d.num_examples(np.array([0, 1, 2, 3]), "test").tolist() == [3, 0, 1, 3]
    assert data().evaluated_on == "train"
    assert EVALUATION_BATCH > 1


def test_a_client_without_examples_gets_an_empty_batch() -> None:
    b = data().batches(np.array([1]), "train", LocalSettings(), 0, 0)
    assert b.mask.sum() == 0


def test_data_survives_pickling_without_a_copy_of_its_arrays() -> None:
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(data(0.2), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) >= 4
    again = pickle.loads(packed, buffers=buffers)
    assert torch.equal(again.x, data(0.2).x)
    assert np.array_equal(again.order, data(0.2).order)


@pytest.mark.parametrize("values", [{"epochs": 3, "steps": 2}, {"batch_size": 0}])
def test_local_work_that_disagrees_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        LocalSettings(**values)  # type: ignore[arg-type]
