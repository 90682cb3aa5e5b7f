"""Tensors in memory that two processes see.

The end of a line that sends tensors owns the segment of memory in which they lie, and
uses it again for what it sends later; the other end tells, with its next message, which
segments it has read.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Bytes, as PyTorch aligns its own memory: where numbers lie must not change what is
# computed from them.
ALIGNED = 64
SPARE = 4  # segments that are kept for what is sent next


class Place(NamedTuple):
    """The place of a tensor in a segment."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_one_row: bool  # all its rows are one, which is there once


class Layout(NamedTuple):
    """Places one after another."""

    places: list[Place]
    size: int  # bytes that they take

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Layout:
        places: list[Place] = []
        end = 0
        for x in tensors:
            is_one_row = x.ndim > 0 and len(x) > 1 and x.stride(0) == 0
            places.append(Place(end, tuple(x.shape), x.dtype, is_one_row))
            nbytes = x.nbytes // len(x) if is_one_row else x.nbytes
            end += -(-nbytes // ALIGNED) * ALIGNED
        return cls(places, end)


class Segment:
    """Memory that several processes see, until no tensor lies in it in any of them."""

    def __init__(self, number: int, size: int, file: int | None = None) -> None:
        """A new one; or, with `file`, one that another process made."""
        self.number = number
        self.size = size
        self.file = os.memfd_create("fedcore") if file is None else file
        if file is None:
            os.ftruncate(self.file, max(size, 1))
        self._map = mmap.mmap(self.file, max(size, 1))

    def bytes(self) -> np.ndarray:
        """A new array of all of it, which lives as long as the tensors made of it."""
        return np.frombuffer(self._map, dtype=np.uint8)

    def write(self, places: list[Place], tensors: list[Tensor]) -> None:
        targets = tensors_in(self.bytes(), places)
        for target, place, x in zip(targets, places, tensors, strict=True):
            if place.is_one_row:
                target[:1].copy_(x[:1])
            else:
                target.copy_(x)

    def close(self) -> None:
        """Close the file: no further process will get it."""
        os.close(self.file)


def tensors_in(memory: np.ndarray, places: list[Place]) -> list[Tensor]:
    """The tensors at these places; views."""
    everything = torch.from_numpy(memory)
    tensors = []
    for offset, shape, dtype, is_one_row in places:
        rows = (1, *shape[1:]) if is_one_row else shape
        flat = everything[offset : offset + math.prod(rows) * dtype.itemsize]
        tensors.append(flat.view(dtype).view(rows).expand(shape))
    return tensors


class Lent:
    """The segments of this end of a line."""

    def __init__(self, first: int) -> None:
        """Segments are numbered from `first` on."""
        self._next = first
        self._lent: dict[int, Segment] = {}
        self._spare: list[Segment] = []
        self._dropped: list[int] = []

    def take(self, size: int) -> tuple[Segment, bool]:
        """A segment of at least `size` bytes to write to, and whether it is new."""
        while self._spare:
            segment = self._spare.pop()
            if segment.size >= size:
                self._lent[segment.number] = segment
                return segment, False
            self._dropped.append(segment.number)
        segment = Segment(self._next, size)
        self._next += 1
        self._lent[segment.number] = segment
        return segment, True

    def give_back(self, numbers: list[int]) -> None:
        """The other end has read these; those of other owners are left out."""
        for number in numbers:
            segment = self._lent.pop(number, None)
            if segment is None:
                continue
            if len(self._spare) < SPARE:
                self._spare.append(segment)
            else:
                self._dropped.append(number)

    def take_dropped(self) -> list[int]:
        """Segments that the other end can forget, each told once."""
        dropped, self._dropped = self._dropped, []
        return dropped


class Borrowed:
    """The segments of the other end, as this end sees them."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._read: list[int] = []

    def add(self, segment: Segment) -> None:
        self._segments[segment.number] = segment

    def drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._segments[number]

    def read(self, number: int, places: list[Place]) -> list[Tensor]:
        """Tensors of a segment; it counts as read once none of them is left."""
        memory = self._segments[number].bytes()
        tensors = tensors_in(memory, places)
        weakref.finalize(memory, self._read.append, number).atexit = False
        return tensors

    def take_read(self) -> list[int]:
        """Segments in which no tensor lies any more, each told once."""
        numbers = self._read[:]
        del self._read[: len(numbers)]
        return numbers
