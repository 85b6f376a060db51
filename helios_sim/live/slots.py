"""Which request lies in which slot of the KV cache. Requests that decode lie in a row from slot 0 on.

So a decode step reads the cache in place instead of gathering it. Knows numbers of requests, no text and no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence


class Slots:
    """`move(source, target, tokens, swap)` copies a slot's first tokens into another, or exchanges the two's."""

    def __init__(self, count: int, move: Callable[[int, int, int, bool], None]) -> None:
        self.count = count
        self._move = move
        self._of: dict[int, int] = {}  # request -> slot
        self._holder: dict[int, int] = {}  # slot -> request

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._of

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._of))

    def __len__(self) -> int:
        return len(self._of)

    def of(self, request_id: int) -> int:
        return self._of[request_id]

    def take(self, request_id: int) -> int:
        """The lowest free slot. RuntimeError where there is none: the server admits no more than there are."""
        slot = next((slot for slot in range(self.count) if slot not in self._holder), None)
        if slot is None:
            raise RuntimeError(f"{self.count} KV slots, all taken; request {request_id} needs one")
        self._put(request_id, slot)
        return slot

    def give(self, request_id: int) -> None:
        del self._holder[self._of.pop(request_id)]

    def clear(self) -> None:
        self._of.clear()
        self._holder.clear()

    def arrange(self, decoding: Sequence[int], cached: Mapping[int, int]) -> None:
        """Brings these requests into the slots 0 .. len(decoding) - 1, in any order, with as few moves as it takes.

        `cached`: tokens that each request has in its slot.
        """
        first = set(decoding)
        outside = [request for request in decoding if self._of[request] >= len(decoding)]
        places = [slot for slot in range(len(decoding)) if self._holder.get(slot) not in first]
        for request, slot in zip(outside, places, strict=True):
            source, other = self._of[request], self._holder.get(slot)
            tokens = max(cached[request], 0 if other is None else cached[other])
            self._move(source, slot, tokens, other is not None)
            del self._holder[source]
            if other is not None:
                self._put(other, source)
            self._put(request, slot)

    def _put(self, request_id: int, slot: int) -> None:
        self._of[request_id] = slot
        self._holder[slot] = request_id
