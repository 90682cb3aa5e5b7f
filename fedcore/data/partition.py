"""Partitions: the training rows that each client holds.

Flower's partitioners, made quick, cached, and clear about what cannot be.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedcore.data.labels import classes_of, counted, groups_of
from fedcore.errors import SettingsError
from fedcore.rng import rng, seed_of
from fedcore.storage import cache

# A partition that still fails its own conditions after this counts as impossible.
SECONDS = 5.0
# Part of the cache key; raise it when the code below would spread rows otherwise.
FORMAT = 1


class Partition(NamedTuple):
    """Client i holds rows `order[offsets[i]:offsets[i + 1]]`."""

    order: np.ndarray  # int64 row numbers, grouped by client
    offsets: np.ndarray  # int64 [population + 1]


def carve(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the server, rows that are left for clients), int64 and ascending.

    The former are `size` rows, as even over the classes as that divides; `labels`
    integers [n]. Raises SettingsError when a class has too few.

    >>> proxy, pool = carve(np.array([0, 0, 0, 1, 1, 1]), size=2, seed=0)
    >>> len(proxy), len(pool)
    (2, 4)
    """
    if size == 0:
        return np.empty(0, dtype=np.int64), np.arange(len(labels))
    draw = rng(seed, "proxy set")
    classes = np.unique(labels)
    wanted = np.full(len(classes), size // len(classes))
    wanted[draw.permutation(len(classes))[: size % len(classes)]] += 1
    taken = []
    for label, number in zip(classes, wanted, strict=True):
        rows = np.flatnonzero(labels == label)
        if number >= len(rows):
            raise SettingsError(
                f"proxy = {size}: takes {number} examples of class {label}, which has "
                f"{len(rows)} in the training pool, and clients need some too: lower it"
            )
        taken.append(draw.choice(rows, number, replace=False, shuffle=False))
    proxy = np.sort(np.concatenate(taken))
    return proxy, np.delete(np.arange(len(labels)), proxy)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    by_class: ClassVar[bool] = False  # labels decide; else only their number counts
    least: ClassVar[int] = 1  # examples that every client must get
    complete: ClassVar[bool] = True  # every row is with some client

    def split(
        self,
        labels: Any,
        groups: Any | None,
        population: int | None,
        seed: int,
    ) -> Partition:
        """Spread rows with these labels over a population.

        The same way for the same seed; a client's rows are ascending. `labels` are the
        classes [n], numbers or names; where the partition does not look at classes, any
        targets [n, ...]. `groups` is the natural client of each row [n], or None;
        `population` counts clients: the partition "natural" has those of the data,
        whatever it says. Arrays, lists, tables and tensors do. Raises SettingsError
        when it cannot be done, within seconds.

        >>> part = Iid().split(np.array([0, 1] * 10), None, population=4, seed=0)
        >>> np.diff(part.offsets)
        array([5, 5, 5, 5])
        """
        column = classes_of(labels) if self.by_class else counted(labels)
        if groups is not None:
            groups = groups_of(groups, len(column))
        column, population = self._told_apart_by(column, groups, population)
        if not 1 <= population <= len(column):
            raise SettingsError(
                f"population = {population}: must be in [1, {len(column)}], "
                "the number of training examples"
            )
        key = self._cache_key(column, population, seed)
        arrays = cache.load(key)
        if arrays is None:
            # Rows are shuffled first: some partitioners cut the data as it comes.
            shuffled = rng(seed, "partition").permutation(len(column))
            parts = self._parts(column[shuffled], population, seed)
            rows = [np.sort(shuffled[part]) for part in parts]
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            arrays = {"order": np.concatenate(rows), "offsets": offsets}
            cache.save(key, **arrays)
        return self._checked(Partition(arrays["order"], arrays["offsets"]), len(column))

    def _cache_key(self, column: np.ndarray, population: int, seed: int) -> str:
        settings = self.model_dump(mode="json")
        digest = hashlib.sha256(column.tobytes()).hexdigest()
        tool = version("flwr-datasets")
        return cache.key_of(
            "partition", [FORMAT, settings, population, seed, digest, tool]
        )

    def _told_apart_by(
        self, labels: np.ndarray, groups: np.ndarray | None, population: int | None
    ) -> tuple[np.ndarray, int]:
        """The integers [n] that the partitioner looks at, and the number of clients."""
        if population is None:
            raise SettingsError(
                f'population is missing: the partition "{self.name}" needs the number '
                "of clients"
            )
        if isinstance(population, bool) or not isinstance(population, int | np.integer):
            raise SettingsError(
                f"population = {population!r}: expected a whole number of clients"
            )
        return labels, int(population)

    def _parts(
        self, labels: np.ndarray, population: int, seed: int
    ) -> list[np.ndarray]:
        """Row numbers of every client, as Flower's partitioner assigns them."""
        partitioner = self._partitioner(labels, population, seed)
        # Takes seconds, as flwr_datasets does: only when the cache has no answer.
        import datasets

        columns = {"label": labels, "row": np.arange(len(labels))}
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        try:
            with _stopped_after(SECONDS):
                partitioner.load_partition(0)
        except ValueError as error:
            reason = str(error).split(". ")[0]
            raise self._error(
                f"{len(labels)} examples over {population} clients: {reason}; "
                f"{self._advice()}"
            ) from error
        # The whole assignment at once, since load_partition copies client by client. It
        # counts rows of the partitioner's own dataset, which the shard partitioner has
        # sorted: hence the column of row numbers.
        row = partitioner.dataset.with_format("numpy")["row"][:]
        assigned = partitioner._partition_id_to_indices
        return [row[np.asarray(assigned[i], dtype=np.int64)] for i in range(population)]

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        raise NotImplementedError

    def _checked(self, part: Partition, n: int) -> Partition:
        sizes = np.diff(part.offsets)
        few = int((sizes < self.least).sum())
        if few:
            raise self._error(
                f"{few} of {len(sizes)} clients get fewer than {self.least} examples; "
                f"{self._advice()}"
            )
        assert np.bincount(part.order, minlength=n).max() == 1, (
            f'partition "{self.name}" gives a row to two clients'
        )
        if self.complete and len(part.order) < n:
            raise self._error(
                f"{n - len(part.order)} of {n} examples go to no client; "
                "raise the population"
            )
        return part

    def _error(self, problem: str) -> SettingsError:
        settings = self.model_dump(exclude={"name"})
        given = ", ".join(f"{key} = {value}" for key, value in settings.items())
        title = f'partition "{self.name}"'
        if given:
            title += f" ({given})"
        return SettingsError(f"{title}: {problem}")

    def _advice(self) -> str:
        return "lower the population"


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Inside, a partitioner that tries in vain for so long raises ValueError.

    Without its warnings and its progress bar.
    """
    deadline = time.monotonic() + seconds

    def stop_when_late(*_: Any, **__: Any) -> None:
        # They warn at every failed try; a hopeless one can be stopped there.
        if time.monotonic() > deadline:
            raise ValueError(f"not found within {seconds:g} s")

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        warnings.showwarning = stop_when_late
        yield


class Iid(_Settings):
    """Rows at random, in equal numbers."""

    name: Literal["iid"] = "iid"

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        cuts = np.arange(population + 1) * len(labels) // population
        return SizePartitioner(np.diff(cuts).tolist())


class Dirichlet(_Settings):
    """Each class is spread over the clients by one draw of Dirichlet(alpha).

    Yurochkin et al. 2019; Hsu et al. 2019.
    """

    name: Literal["dirichlet"] = "dirichlet"
    by_class: ClassVar[bool] = True
    least: ClassVar[int] = 0  # min_size is the partitioner's own condition
    alpha: float = Field(
        0.3,
        gt=0,
        description="concentration; small = each client few classes, large = IID",
    )
    min_size: int = Field(
        1,
        ge=0,
        description="examples that every client gets at least; 0 allows clients "
        "without data",
    )

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import DirichletPartitioner

        return DirichletPartitioner(
            population,
            "label",
            self.alpha,
            min_partition_size=self.min_size,
            seed=seed_of(seed, "dirichlet"),
        )

    def _advice(self) -> str:
        return (
            f"in every draw some client gets fewer than {self.min_size} examples: "
            "raise partition.alpha, lower the population, or lower partition.min_size "
            "(0 allows empty clients)"
        )


class Shards(_Settings):
    """Rows sorted by class are cut in shards of equal size, as many for every client.

    McMahan et al. 2017. Rows that are left when n does not divide by the number of
    shards are with no client.
    """

    name: Literal["shards"] = "shards"
    by_class: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    per_client: int = Field(
        2, ge=1, description="shards a client; 1 or 2 = few classes each, many = IID"
    )

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        shards = population * self.per_client
        if shards > len(labels):
            raise self._error(
                f"{population} clients need {shards} shards of {len(labels)} examples; "
                f"{self._advice()}"
            )
        from flwr_datasets.partitioner import ShardPartitioner

        return ShardPartitioner(
            population,
            "label",
            num_shards_per_partition=self.per_client,
            seed=seed_of(seed, "shards"),
        )


class Pathological(_Settings):
    """Every client has examples of exactly this many classes, drawn at random.

    A class is shared equally by those that have it (Li et al. 2022).
    """

    name: Literal["pathological"] = "pathological"
    by_class: ClassVar[bool] = True
    classes: int = Field(2, ge=1, description="classes a client")

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        number = len(np.unique(labels))
        if self.classes > number:
            raise SettingsError(
                f"partition.classes = {self.classes}: the data has {number} classes; "
                "set at most that"
            )
        from flwr_datasets.partitioner import PathologicalPartitioner

        # As in the paper, client i has class i mod number and others by chance, so that
        # from `number` clients on no class is left out. Its draws with rejection never
        # end well when all classes are wanted.
        mode: Any = "deterministic" if self.classes == number else "first-deterministic"
        return PathologicalPartitioner(
            population,
            "label",
            self.classes,
            class_assignment_mode=mode,
            seed=seed_of(seed, "pathological"),
        )

    def _advice(self) -> str:
        return "lower the population or partition.classes"


class SizeSkew(_Settings):
    """Rows at random, in numbers drawn from a log-normal law: few large, many small."""

    name: Literal["size_skew"] = "size_skew"
    sigma: float = Field(
        1.0, ge=0, description="standard deviation of log size; 0 = equal sizes"
    )

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        log_size = self.sigma * rng(seed, "sizes").standard_normal(population)
        share = np.cumsum(np.exp(log_size - log_size.max()))
        share /= share[-1]
        # One example each, the rest by the law; 1e-9, since 3 may come as 2.99...
        cuts = np.floor(share * (len(labels) - population) + 1e-9).astype(np.int64)
        return SizePartitioner((1 + np.diff(cuts, prepend=0)).tolist())


class Natural(_Settings):
    """The clients that the data itself names: writers, speakers, devices."""

    name: Literal["natural"] = "natural"

    def _told_apart_by(
        self, labels: np.ndarray, groups: np.ndarray | None, population: int | None
    ) -> tuple[np.ndarray, int]:
        if groups is None:
            raise SettingsError(
                'partition.name = "natural": this data set names no clients; '
                "choose another partition"
            )
        names, client = np.unique(groups, return_inverse=True)
        return client.astype(np.int64), len(names)

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import NaturalIdPartitioner

        return NaturalIdPartitioner("label")


class Own(_Settings):
    """Every row with one client: the data that a device has are its own.

    Not for presets: a device puts it in the place of the run's partition.
    """

    name: Literal["own"] = "own"
    client: int = Field(ge=0, description="the client whose data these are")

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        population: int | None,
        seed: int,
    ) -> Partition:
        """All rows for the client, none for the others.

        Raises SettingsError when the population has no such client.

        >>> part = Own(client=1).split(np.zeros(600), None, population=3, seed=0)
        >>> np.diff(part.offsets)
        array([  0, 600,   0])
        """
        clients = self.client + 1 if population is None else population
        if self.client >= clients:
            raise SettingsError(
                f"--id {self.client}: the run's clients are 0 to {clients - 1}; "
                "give this device one of these numbers"
            )
        sizes = np.zeros(clients, dtype=np.int64)
        sizes[self.client] = len(labels)
        return Partition(np.arange(len(labels)), np.append(0, np.cumsum(sizes)))


PartitionSettings = Annotated[
    Iid | Dirichlet | Shards | Pathological | SizeSkew | Natural,
    Field(discriminator="name"),
]
