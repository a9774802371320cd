"""Tokens in one growing piece of memory: appending and dropping the oldest copies nothing that stays."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class _Buffer:
    """Memory that several :class:`Tokens` look into: [B, capacity, ...], of which ``used`` are written.

    Tokens before ``floor`` have been overwritten since; ``kept`` says that nothing may be, as someone else looks on.
    ``moved`` counts the bytes that were copied from one place to another. ``most`` tokens will come, where it is known.
    """

    memory: Tensor
    used: int = 0
    floor: int = 0
    kept: bool = False
    moved: int = 0
    most: int = 0


class StaleError(RuntimeError):
    """The cache of a state was continued elsewhere and has lost what this state needs."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens ``start`` to ``stop`` of a buffer. Immutable: growing gives new ones that share the memory.

    The newest of a line appends in place; an older one that is continued as well takes a copy first.
    """

    buffer: _Buffer
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Tensor, most: int = 0) -> Tokens:
        """Tokens [B, T, ...], copied when they grow: to memory for ``most``, where it is known how many will come."""
        return cls(_Buffer(tensor, tensor.shape[1], kept=True, most=most), 0, tensor.shape[1])

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tensor(self) -> Tensor:
        """[B, T, ...], a view.

        Raises:
            StaleError: when they were overwritten.
        """
        if self.start < self.buffer.floor:
            raise StaleError(
                "the cache of this state was continued and evicted elsewhere; take rollout.fork(state) before a state "
                "is advanced twice"
            )
        memory = self.buffer.memory
        if len(memory) == 1:  # as a tensor of its own has them: compiled graphs are made for strides
            return memory[0, self.start : self.stop].unsqueeze(0)
        return memory[:, self.start : self.stop]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind the tokens, what waits for more included; of memory taken for all, what is used.

        What a CPU has not written to yet takes no memory there.
        """
        memory = self.buffer.memory
        count = self.buffer.used if memory.shape[1] == self.buffer.most else memory.shape[1]
        return memory[:, :count].numel() * memory.element_size()

    def fork(self) -> Tokens:
        """The same, which stays readable whatever becomes of others that share the memory."""
        self.buffer.kept = True
        return self

    def appended(self, new: Tensor) -> Tokens:
        """With tokens [B, n, ...] at the end."""
        count, buffer = new.shape[1], self.buffer
        if self.stop != buffer.used or self.stop + count > buffer.memory.shape[1]:
            return self._moved(count)._written(new)
        return self._written(new)

    def _written(self, new: Tensor) -> Tokens:
        stop = self.stop + new.shape[1]
        # Not counted as a write to the tensors that were handed out: none of them reaches so far.
        self.buffer.memory.data[:, self.stop : stop] = new
        self.buffer.used = stop
        return dataclasses.replace(self, stop=stop)

    def _moved(self, room: int) -> Tokens:
        """A copy with room for all that will come, or else for half as many tokens again, and for ``room`` more."""
        live, most = self.tensor, self.buffer.most
        least = live.shape[1] + room
        capacity = most if most >= least else least + live.shape[1] // 2
        memory = live.new_empty((live.shape[0], capacity, *live.shape[2:]))
        memory[:, : live.shape[1]] = live
        moved = self.buffer.moved + live.numel() * live.element_size()
        return Tokens(_Buffer(memory, live.shape[1], moved=moved, most=most), 0, live.shape[1])

    def without(self, first: int, last: int, before: Tensor | None = None) -> Tokens:
        """Without the tokens ``first`` to ``last``, of which those before are moved up, and no others.

        Args:
            first: number of leading tokens that stay.
            last: end of those that go.
            before: the leading tokens as they are to be from now on [B, first, ...]; None: as they are.
        """
        if not first:
            return dataclasses.replace(self, start=self.start + last)
        start = self.start + last - first
        lead = self.tensor[:, :first].clone() if before is None else before
        if self.buffer.kept or self.stop != self.buffer.used:
            rest = dataclasses.replace(self, start=self.start + last)
            copied = Tokens.of(lead).appended(rest.tensor)
            copied.buffer.moved += self.buffer.moved + rest.tensor.numel() * rest.tensor.element_size()
            return copied
        self.buffer.memory[:, start : start + first] = lead
        self.buffer.moved += lead.numel() * lead.element_size()
        self.buffer.floor = start
        return dataclasses.replace(self, start=start)


def rest_of(tokens: Tokens, count: int) -> Tokens:
    """Without the first ``count`` tokens, in memory of their own, so that the old memory can go."""
    rest = tokens.tensor[:, count:].clone()
    moved = tokens.buffer.moved + rest.numel() * rest.element_size()
    return Tokens(_Buffer(rest, rest.shape[1], moved=moved), 0, rest.shape[1])


def joined(pieces: list[Tensor]) -> Tensor:
    """Pieces [B, T_i, ...] one after the other; one piece is not copied."""
    full = [piece for piece in pieces if piece.shape[1]]
    if len(full) < 2:
        return full[0] if full else pieces[0]
    return torch.cat(full, dim=1)
