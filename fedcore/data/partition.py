"""Which client holds which training rows: Flower's partitioners, made quick, cached, and clear about what cannot be."""

from __future__ import annotations

import hashlib
import time
import warnings
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedcore import cache
from fedcore.errors import SettingsError
from fedcore.rng import rng, seed_of

SECONDS = 10.0  # after which a partition counts as impossible


class Partition(NamedTuple):
    """Client i holds rows `order[offsets[i]:offsets[i + 1]]`."""

    order: np.ndarray  # int64 row numbers, grouped by client
    offsets: np.ndarray  # int64 [population + 1]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    least: ClassVar[int] = 1  # examples that every client must get

    def split(self, labels: np.ndarray, groups: np.ndarray | None, population: int | None, seed: int) -> Partition:
        """Spread rows with these labels over a population, the same way for the same seed.

        Raises SettingsError when it cannot be done, within seconds.
        """
        if population is None:
            raise SettingsError(f'population is missing: the partition "{self.name}" needs the number of clients')
        if population > len(labels):
            raise SettingsError(
                f"population = {population}: there are only {len(labels)} training examples; set a population of at most that"
            )
        digest = hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()
        facts = [self.model_dump(mode="json"), population, seed, digest, version("flwr-datasets")]
        key = cache.key_of("partition", facts)
        known = cache.load(key)
        if known is None:
            # Rows are shuffled first: some partitioners cut the data as it comes.
            shuffled = rng(seed, "partition").permutation(len(labels))
            parts = self._parts(labels[shuffled], population, seed)
            known = _flat([shuffled[part] for part in parts])
            cache.save(key, **known)
        return self._checked(Partition(known["order"], known["offsets"]), population)

    def _parts(self, labels: np.ndarray, population: int, seed: int) -> list[np.ndarray]:
        import datasets

        partitioner = self._partitioner(labels, population, seed)
        partitioner.dataset = datasets.Dataset.from_dict({"label": labels})
        deadline = time.monotonic() + SECONDS

        def too_late(message: Any, *_: Any, **__: Any) -> None:
            # The partitioners warn at every failed try; that is where a hopeless one can be stopped.
            if time.monotonic() > deadline:
                raise ValueError(str(message))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = too_late
                partitioner.load_partition(0)
        except ValueError as e:
            raise SettingsError(
                f"partition {self._settings()} of {len(labels)} examples over {population} clients: {_first(e)}{self._advice()}"
            ) from e
        rows = partitioner._partition_id_to_indices  # the whole assignment at once; load_partition copies client by client
        return [np.sort(np.asarray(rows[i], dtype=np.int64)) for i in range(population)]

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        raise NotImplementedError

    def _checked(self, part: Partition, population: int) -> Partition:
        sizes = np.diff(part.offsets)
        if sizes.min() < self.least:
            few = int((sizes < self.least).sum())
            raise SettingsError(
                f"partition {self._settings()}: {few} of {population} clients get fewer than {self.least} examples{self._advice()}"
            )
        return part

    def _settings(self) -> str:
        given = ", ".join(f"{key} = {value}" for key, value in self.model_dump().items() if key != "name")
        return f'"{self.name}"' + (f" ({given})" if given else "")

    def _advice(self) -> str:
        return "; lower the population"


class Iid(_Settings):
    """Rows at random, in equal numbers."""

    name: Literal["iid"] = "iid"

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        return SizePartitioner([int(n) for n in np.diff(np.arange(population + 1) * len(labels) // population)])


class Dirichlet(_Settings):
    """Each class is spread over the clients by one draw of Dirichlet(alpha) (Yurochkin et al. 2019; Hsu et al. 2019)."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.3, gt=0, description="concentration; small = each client few classes, large = IID")
    min_size: int = Field(1, ge=0, description="examples that every client gets at least; 0 allows clients without data")

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import DirichletPartitioner

        return DirichletPartitioner(
            population, "label", self.alpha, min_partition_size=self.min_size, seed=seed_of(seed, "dirichlet") % 2**32
        )

    def _checked(self, part: Partition, population: int) -> Partition:
        return part  # min_size is the partitioner's own condition

    def _advice(self) -> str:
        return (
            f"; raise partition.alpha, lower the population, or lower partition.min_size = {self.min_size} (0 allows empty clients)"
        )


class Shards(_Settings):
    """Rows sorted by class are cut in shards, and every client gets as many (McMahan et al. 2017)."""

    name: Literal["shards"] = "shards"
    per_client: int = Field(2, ge=1, description="shards a client")

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import ShardPartitioner

        return ShardPartitioner(population, "label", num_shards_per_partition=self.per_client, seed=seed_of(seed, "shards") % 2**32)


class Pathological(_Settings):
    """Every client has examples of exactly this many classes, drawn at random; a class is shared equally by those that have it."""

    name: Literal["pathological"] = "pathological"
    classes: int = Field(2, ge=1, description="classes a client")

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import PathologicalPartitioner

        number = len(np.unique(labels))
        if self.classes > number:
            raise SettingsError(f"partition.classes = {self.classes}: the data has {number} classes; set at most that")
        if population * self.classes < number:
            raise SettingsError(
                f"partition.classes = {self.classes} with {population} clients leaves some of {number} classes unused; raise either"
            )
        return PathologicalPartitioner(
            population,
            "label",
            self.classes,
            class_assignment_mode="first-deterministic",
            seed=seed_of(seed, "pathological") % 2**32,
        )

    def _advice(self) -> str:
        return "; lower the population or raise partition.classes"


class SizeSkew(_Settings):
    """Rows at random, in numbers drawn from a log-normal law: a few large clients and many small."""

    name: Literal["size_skew"] = "size_skew"
    sigma: float = Field(1.0, ge=0, description="standard deviation of log size; 0 = equal sizes")

    def _partitioner(self, labels: np.ndarray, population: int, seed: int) -> Any:
        from flwr_datasets.partitioner import SizePartitioner

        share = np.exp(self.sigma * rng(seed, "sizes").standard_normal(population))
        cuts = np.floor(np.cumsum(share) / share.sum() * (len(labels) - population) + 1e-9).astype(np.int64)
        return SizePartitioner([int(n) for n in 1 + np.diff(cuts, prepend=0)])  # one each, the rest by the law


class Natural(_Settings):
    """The clients that the data itself names: writers, speakers, devices."""

    name: Literal["natural"] = "natural"

    def split(self, labels: np.ndarray, groups: np.ndarray | None, population: int | None, seed: int) -> Partition:
        if groups is None:
            raise SettingsError('partition.name = "natural": this data set names no clients; choose another partition')
        number = len(np.unique(groups))
        if population not in (None, number):
            raise SettingsError(f"population = {population}: the data has {number} natural clients; leave population out")
        import datasets
        from flwr_datasets.partitioner import NaturalIdPartitioner

        partitioner = NaturalIdPartitioner("client")
        partitioner.dataset = datasets.Dataset.from_dict({"client": groups})
        partitioner.load_partition(0)
        rows = partitioner._partition_id_to_indices
        flat = _flat([np.sort(np.asarray(rows[i], dtype=np.int64)) for i in range(number)])
        return Partition(flat["order"], flat["offsets"])


PartitionSettings = Annotated[Iid | Dirichlet | Shards | Pathological | SizeSkew | Natural, Field(discriminator="name")]


def _flat(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return {"order": np.concatenate(parts).astype(np.int64), "offsets": offsets}


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
