"""Seconds and bytes of secure sums, client by client and at the server.

python -m benchmarks.secure [cohorts] [masks] [--repeat 3]
python -m benchmarks.secure cohorts --clients 256 --numbers 1000000     minutes

cohorts  whole sums with signed keys, a tenth of the clients lost after they shared
         their secrets, the dearest case: milliseconds of CPU of a client by exchange
         and with the encoding of its message, seconds of CPU of the server, and bytes
         beside the vector and the model. Medians over clients and repeats; certificates
         are known to the clients, as after a first round
masks    a million words: encoding, and masks of 64 streams
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.tables import print_head, print_row, print_table
from fedcore.messages.secure.client_session import ClientSession
from fedcore.messages.secure.masks import Mask, add_masks, size_of
from fedcore.messages.secure.primitives import derived
from fedcore.messages.secure.ring import Ring
from fedcore.messages.secure.server_session import ServerSession, Size
from tests.secure_sums import (
    DOWN,
    OURS,
    Authority,
    authority_certificate,
    client_certificate,
    der,
    identity_of,
    terms_of,
)

COHORTS = ((4, 10**4), (4, 10**6), (16, 10**6), (64, 10**4), (64, 10**6), (4, 10**7))
WORDS = 8  # of 64 bits
EXCHANGES = ("keys", "shares", "masked", "survivors", "unmask")
MEGA = 10**6

T = TypeVar("T")


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def size_in(value: Any) -> int:
    """Bytes of a field of a message, without its name."""
    if isinstance(value, list):
        return sum(size_in(entry) for entry in value)
    return len(value) if isinstance(value, bytes | str | np.ndarray) else 8


class Costs:
    """One sum, and the time that each party takes for it."""

    def __init__(self, n: int, d: int) -> None:
        self.n, self.d = n, d
        self.client_ms: dict[str, list[float]] = defaultdict(list)
        self.server_s = 0.0
        self.up: dict[int, int] = defaultdict(int)
        self.down: dict[int, int] = defaultdict(int)

    def run(self) -> None:
        """All five exchanges; every tenth client leaves before it sends its vector."""
        n, d, terms = self.n, self.d, terms_of(self.n)
        certificates = {client: der(client_certificate(client)) for client in range(n)}
        server = ServerSession(
            terms,
            DOWN,
            Size(d, WORDS),
            authority=Authority(authority_certificate(OURS)),
            certificates=certificates,
            count_word=None,
        )
        numbers = np.arange(d, dtype=np.uint32)
        words = np.arange(WORDS, dtype=np.uint64)
        sessions = {}
        for client in range(n):
            identity = identity_of(client)
            sessions[client] = ClientSession(client, terms, DOWN, (), identity)
            keys = sessions[client].keys
            answer = self._of_client(client, "keys", keys, numbers, words)
            self._of_server(server.add_keys, client, answer)
        steps = (
            (server.rosters, server.add_shares),
            (server.inboxes, server.add_masked),
            (server.survivors, server.add_signature),
            (server.requests, server.add_shares_of),
        )
        for name, (messages, add) in zip(EXCHANGES[1:], steps, strict=True):
            for client, message in self._of_server(messages).items():
                if name == "masked" and client % 10 == 1:
                    continue
                self.down[client] += sum(map(size_in, message.values()))
                ask = getattr(sessions[client], name)
                answer = self._of_client(client, name, ask, message)
                self._of_server(add, client, answer)
        self._of_server(server.total)

    def _of_client(
        self, client: int, name: str, work: Callable[..., T], *arguments: Any
    ) -> T:
        begin = time.process_time()
        answer = work(*arguments)
        self.client_ms[name].append(1e3 * (time.process_time() - begin))
        if isinstance(answer, dict):
            self.up[client] += sum(map(size_in, answer.values()))
        return answer

    def _of_server(self, work: Callable[..., T], *arguments: Any) -> T:
        begin = time.process_time()
        found = work(*arguments)
        self.server_s += time.process_time() - begin
        return found


def encoding_ms(d: int) -> float:
    """Milliseconds of CPU to encode a message of `d` numbers."""
    x = torch.randn(d, generator=torch.Generator().manual_seed(0)) * 0.01
    draws = torch.Generator().manual_seed(1)
    ring = Ring(n_max=64)
    return 1e3 * cpu_seconds(lambda: ring.encode(x, 300.0, draws))


def measure_cohorts(cohorts: list[tuple[int, int]], repeat: int) -> None:
    """Print a row for each cohort and size of message."""
    head = ["clients", "numbers", *(f"{name}, ms" for name in EXCHANGES)]
    print_head([*head, "encode, ms", "client, ms", "server, s", "up, kB", "down, kB"])
    for n, d in cohorts:
        runs = []
        for _ in range(repeat + 1):  # in the first, certificates are new
            costs = Costs(n, d)
            costs.run()
            runs.append(costs)
        runs = runs[1:]
        parts = []
        for name in EXCHANGES:
            found: list[float] = []
            for costs in runs:
                found += costs.client_ms[name]
            parts.append(statistics.median(found))
        parts.append(statistics.median(encoding_ms(d) for _ in range(repeat)))
        server = statistics.median(costs.server_s for costs in runs)
        up, down = max(runs[0].up.values()), max(runs[0].down.values())
        cells = [f"{part:.1f}" for part in [*parts, sum(parts)]]
        bytes_ = [f"{up / 1e3:.1f}", f"{down / 1e3:.1f}"]
        print_row([str(n), f"{d:,}", *cells, f"{server:.3f}", *bytes_])
    print()


def measure_masks(repeat: int) -> None:
    """Print the time of a million words."""
    vector = np.zeros(size_of(MEGA, WORDS), np.uint8)
    masks = [Mask(derived(b"key", "benchmark", i), i % 2 == 0) for i in range(64)]

    def milliseconds(work: Callable[[], Any]) -> str:
        seconds = statistics.median(cpu_seconds(work) for _ in range(repeat))
        return f"{1e3 * seconds:.1f}"

    encoding = statistics.median(encoding_ms(MEGA) for _ in range(repeat))
    rows = [
        ["encode", f"{encoding:.1f}"],
        ["1 mask", milliseconds(lambda: add_masks(vector, MEGA, masks[:1]))],
        ["64 masks", milliseconds(lambda: add_masks(vector, MEGA, masks))],
    ]
    print_table(["a million words", "ms"], rows)


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("parts", nargs="*", metavar="PART", help="cohorts, masks")
    parser.add_argument("--clients", type=int, help="of one cohort")
    parser.add_argument("--numbers", type=int, default=MEGA, help="of its messages")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.parts or ["masks", "cohorts"]
    if unknown := set(parts) - {"cohorts", "masks"}:
        parser.error(f"no part {', '.join(sorted(unknown))}: cohorts, masks")
    torch.set_num_threads(1)
    if "masks" in parts:
        measure_masks(arguments.repeat + 4)
    if "cohorts" in parts:
        cohorts = list(COHORTS)
        if arguments.clients:
            cohorts = [(arguments.clients, arguments.numbers)]
        measure_cohorts(cohorts, arguments.repeat)


if __name__ == "__main__":
    main()
