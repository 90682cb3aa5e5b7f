"""Updates that a run keeps for an audit: one file a round in `captures/` of the run.

They are kept as the server gets them: after the client's defences and the channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.method import Method
from fedcore.reports import Reports
from fedcore.rng import rng
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import writing
from fedcore.storage.tensors import read_tensors
from fedcore.types import ClientFunction, Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment

FOLDER = "captures"


class Exchange(NamedTuple):
    """One client's part in one exchange, as the server had it."""

    round: int  # from 1 on
    client: int
    function: str  # of the method, by name
    w0: Params  # what the client started from, by the names that went down
    delta: Params  # local minus global, by the names that came up
    num_examples: int


def exchanges(
    method: Method[Any],
    t: int,
    fn: ClientFunction,
    down: Tree,
    reports: Reports,
    clients: frozenset[int],
) -> Iterator[Exchange]:
    """The exchanges of `clients` among these reports of round t, from 0 on.

    A message that holds no change of parameters gives none.
    """
    for row, client in enumerate(reports.clients.tolist()):
        if client not in clients:
            continue
        exchanged = method.exchanged(down, trees.at(reports.up, row))
        if exchanged is None:
            continue
        w0, delta = (trees.map(_copied, side) for side in exchanged)
        num_examples = int(reports.num_examples[row])
        yield Exchange(t + 1, client, fn.__name__, w0, delta, num_examples)


def _copied(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()


class Captures:
    """Keeps the updates of `audit.capture` clients in the rounds of `audit.rounds`."""

    def __init__(
        self, run_dir: Path, experiment: Experiment, method: Method[Any]
    ) -> None:
        settings = experiment.audit
        self.method = method
        self._folder = run_dir / FOLDER
        self._seed = experiment.seed
        self._most = settings.capture
        self._rounds = frozenset(settings.rounds or (1, experiment.rounds))
        self._clients = frozenset[int]()  # of this round
        self._exchanges: list[Exchange] = []  # of this round

    def begin(self, t: int, cohort: Tensor) -> None:
        """Choose the clients of round t, from 0 on.

        The order among all clients is drawn once, so that a client met before is
        chosen again.
        """
        self._exchanges = []
        self._clients = frozenset()
        if self._most and t + 1 in self._rounds:
            ordered = sorted(cohort.tolist(), key=self._place)
            self._clients = frozenset(ordered[: self._most])

    def _place(self, client: int) -> float:
        return rng(self._seed, "audit", client).random()

    @property
    def wanted(self) -> bool:
        """Whether updates of this round are kept."""
        return bool(self._clients)

    def add(self, t: int, fn: ClientFunction, down: Tree, reports: Reports) -> None:
        if self.wanted:
            self._exchanges += exchanges(
                self.method, t, fn, down, reports, self._clients
            )

    def end(self, t: int) -> str | None:
        """Write the round's file; the note to the user where nothing was captured."""
        if not self.wanted:
            return None
        if not self._exchanges:
            return (
                f"round {t + 1}: nothing captured for an audit: the chosen clients "
                "sent no change of parameters"
            )
        with writing(self._folder):
            self._folder.mkdir(mode=0o700, exist_ok=True)
        file = self._folder / f"round-{t + 1:06d}.safetensors"
        write_atomically(file, _pack(self._exchanges))
        self._exchanges = []
        return None


def captured(run_dir: Path) -> list[Exchange]:
    """All exchanges kept in a run directory, in the order of rounds.

    Raises SettingsError where there are none, or where a file is damaged.
    """
    files = sorted((run_dir / FOLDER).glob("round-*.safetensors"))
    if not files:
        raise SettingsError(
            f"{run_dir} holds no captured updates: run it with --set audit.capture=N, "
            "N clients a round"
        )
    kept: list[Exchange] = []
    for file in files:
        try:
            kept += _unpack(file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{file} is damaged ({error}): remove it, or run again with "
                "audit.capture"
            ) from error
    return kept


def _pack(kept: Sequence[Exchange]) -> bytes:
    """Parameters that went down once a function, those that came up once a client.

    The rest is JSON in the file's header.
    """
    tensors: dict[str, Tensor] = {}
    headers: list[dict[str, Any]] = []
    for exchange in kept:
        header = exchange._asdict()
        down, up = _prefixes(header)
        for name, value in header.pop("w0").items():
            tensors[down + name] = value.contiguous()
        for name, value in header.pop("delta").items():
            tensors[up + name] = value.contiguous()
        headers.append(header)
    return save(tensors, {"exchanges": json.dumps(headers)})


def _unpack(file: Path) -> list[Exchange]:
    tensors, metadata = read_tensors(file)
    headers = json.loads(metadata["exchanges"])
    kept = []
    for header in headers:
        down, up = _prefixes(header)
        w0, delta = _below(tensors, down), _below(tensors, up)
        kept.append(Exchange(**header, w0=w0, delta=delta))
    return kept


def _prefixes(header: dict[str, Any]) -> tuple[str, str]:
    """Beginnings of the names of what went down and came up in an exchange."""
    function, client = header["function"], header["client"]
    return f"{function}/down/", f"{function}/up/{client}/"


def _below(tensors: Params, prefix: str) -> Params:
    below = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            below[name.removeprefix(prefix)] = value
    return below
