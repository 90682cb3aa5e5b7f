"""Memory that is there, for work whose need is known before it starts.

And bytes in words.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from fedcore.errors import SettingsError

CGROUP = Path("/sys/fs/cgroup")  # version 2: where a container's own limit stands


def available(device: torch.device) -> int:
    """Bytes that this process can still take on `device`.

    On the CPU in a container: of its limit, where that leaves less than the machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return int(free) + reserved - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return free
    if limit == "max":
        return free
    statistics = dict(line.split() for line in lines)
    # The kernel gives back its cache of files.
    used -= int(statistics.get("inactive_file", 0))
    return min(free, max(int(limit) - used, 0))


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes in one unit, its name) for numbers up to `largest` bytes.

    >>> byte_unit(3.2e9)
    (1000000000.0, 'GB')
    """
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= size:
            return size, name
    return 1.0, "B"


def size_text(num_bytes: float) -> str:
    """Bytes for a person.

    >>> size_text(3.2e9)
    '3.2 GB'
    """
    size, name = byte_unit(num_bytes)
    number = num_bytes / size
    return f"{number:.3g} {name}" if number < 999.5 else f"{number:,.0f} {name}"


def require(need: int, device: torch.device, what: str) -> str:
    """`what` with its size, for the user to read.

    Raises SettingsError where `need` bytes are not there.
    """
    have = available(device)
    text = f"{what}: {size_text(need)} of memory on {device.type}"
    if need > have:
        raise SettingsError(f"{text}, but {size_text(have)} are free")
    return text
