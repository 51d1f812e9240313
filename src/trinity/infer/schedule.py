"""Who runs next: requests wait, take a slot of the cache when one is free, are prefilled in chunks, decoded together.

Arithmetic on lengths only; the engine runs the steps.
"""

from collections import deque

from trinity.infer.attention import Chunk
from trinity.infer.request import Request


class Schedule:
    """The queues of an engine with `num_slots` slots and room for `max_tokens` of prompts and answers."""

    def __init__(self, num_slots: int, max_tokens: int, prefill_chunk: int) -> None:
        self.max_tokens = max_tokens
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._prefill_chunk = prefill_chunk
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._reserved = 0
        """Tokens that the admitted requests may come to."""
        self.prefilled_last = False
        """Whether the last step read prompts."""

    def admit(self) -> list[Request]:
        """First come, first served; a request reserves its longest possible length, so that none is ever evicted.

        Returns those that were admitted.
        """
        admitted: list[Request] = []
        while self.waiting and self._free_slots and self._reserved + self.waiting[0].longest <= self.max_tokens:
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            self._reserved += request.longest
            self.prefilling.append(request)
            admitted.append(request)
        return admitted

    def prefills_next(self) -> bool:
        """Whether the next step reads prompts.

        Where both wait they take turns: a long prompt must not silence the answers that are under way.
        """
        self.prefilled_last = bool(self.prefilling) and not (self.decoding and self.prefilled_last)
        return self.prefilled_last

    def chunks(self) -> tuple[list[Request], list[Chunk]]:
        """The next part of the prompts, at most `prefill_chunk` tokens of the oldest ones together."""
        budget = self._prefill_chunk
        requests: list[Request] = []
        chunks: list[Chunk] = []
        for request in self.prefilling:
            if budget == 0:
                break
            tokens = request.prompt[request.fed : request.fed + budget]
            requests.append(request)
            chunks.append(Chunk(request.held_slot, tokens))
            budget -= len(tokens)
        return requests, chunks

    def promote(self, requests: list[Request]) -> None:
        """The prompts of `requests` are read: they are decoded from now on."""
        self.prefilling = [request for request in self.prefilling if request not in requests]
        self.decoding += requests

    def drop(self, request: Request) -> int | None:
        """Forget a request; returns the slot that it held, which is free now, unless it shall be kept."""
        for queue in (self.waiting, self.prefilling, self.decoding):
            if request in queue:
                queue.remove(request)
        return None if request.keep else self.free(request)

    def free(self, request: Request) -> int | None:
        """Take the slot from a request that is no longer in a queue."""
        slot = request.slot
        if slot is not None:
            self._reserved -= request.longest
            self._free_slots.append(slot)
            request.slot = None
        return slot

    def follow(self, before: Request, request: Request) -> bool:
        """Let `request` go on in the slot of a finished one, whose cached tokens its prompt begins with; whether it
        can."""
        fits = self._reserved - before.longest + request.longest <= self.max_tokens
        if not fits or not request.continues(before):
            return False
        self._reserved += request.longest - before.longest
        request.slot, before.slot = before.slot, None
        request.fed = before.fed
        self.prefilling.append(request)
        return True
