"""Which part of a named tensor a rank holds."""

from typing import NamedTuple

from torch import Tensor


class Slice(NamedTuple):
    """A box inside a whole tensor; an empty one has a size of 0 somewhere."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Slice":
        shape = tuple(tensor.shape)
        return cls(shape, (0,) * len(shape), shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """To index the whole with."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))

    def of(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor, as a view."""
        assert tuple(whole.shape) == self.shape, f"{tuple(whole.shape)} is not {self.shape}"
        return whole[self.box]

    def overlap(self, other: "Slice") -> "Slice | None":
        """What two parts of one tensor have in common."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Slice(self.shape, start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def inside(self, outer: "Slice") -> tuple[slice, ...]:
        """To index the tensor of `outer`, which contains this part, with."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.size, strict=True))


def chunk(length: int, parts: int, number: int) -> range:
    """Part `number` of `range(length)` cut as `torch.chunk` and FSDP do: equal parts, the last ones short or empty."""
    each = -(-length // parts)
    return range(min(length, number * each), min(length, (number + 1) * each))
