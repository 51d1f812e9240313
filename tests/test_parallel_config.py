"""Sizes of a layout are refused by key, with sizes that would do, before anything is built."""

import pytest

from train_helpers import small_config
from trinity.base.errors import UsageError
from trinity.config import ParallelConfig, ParallelSizes, check_parallel, parallel_sizes


def test_shard_fills_the_world() -> None:
    assert parallel_sizes(ParallelConfig(), 8) == ParallelSizes(1, 8, 1, 1)
    sizes = parallel_sizes(ParallelConfig(replicate=2, expert=4, context=2), 16)
    assert sizes == ParallelSizes(2, 4, 4, 2, "zigzag")
    assert (sizes.world, sizes.fsdp, sizes.efsdp, sizes.data) == (16, 8, 2, 8)
    assert small_config("parallel.shard=auto") == small_config("parallel.shard=-1") == small_config()


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.replicate=3"], 4, r"parallel.replicate = 3 does not divide 4 processes: start a multiple of 3"),
        (["parallel.shard=2", "parallel.replicate=3"], 12, r"makes 6 processes, but 12 run.*parallel.shard=4"),
        (["parallel.expert=8"], 4, r"parallel.expert = 8 does not divide the 4 ranks.*\[1, 2, 4\]"),
        (["parallel.expert=8"], 8, r"does not divide model.num_experts = 4: use one of \[1, 2, 4\]"),
        (["parallel.context=3"], 3, r"parallel.context = 3 does not divide pretrain.seq_len = 16: use one of \[1\]"),
        (["parallel.context=4", "pretrain.seq_len=12"], 4, r"twice parallel.context = 4 does not.*one of \[1, 2\]"),
        (["data.streams=6"], 4, r"4 data-parallel ranks .* cannot share data.streams = 6: .*\[1, 2, 3, 6\]"),
    ],
)
def test_refusals_name_the_key_and_what_would_do(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_parallel(small_config(*overrides), "pretrain", world)


@pytest.mark.parametrize("value", ["parallel.shard=0", "parallel.shard=-2", "parallel.shard=many", "parallel.expert=0"])
def test_no_sizes(value: str) -> None:
    with pytest.raises(UsageError, match=value.split("=")[0]):
        small_config(value)
