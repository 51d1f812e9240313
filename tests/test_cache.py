"""The hybrid cache: bytes by the formula of the settings, rings, reuse of blocks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config import ModelConfig
from trinity.infer.cache import BlockPool, Cache

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=5,
    num_dense_layers=1,
    dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=16,
    expert_dim=8,
    num_experts=4,
    experts_per_token=2,
    window=12,
    max_positions=256,
)
CPU = torch.device("cpu")


def test_bytes_equal_the_formula_at_block_granularity() -> None:
    for length in (1, 4, 11, 12, 13, 100, 256):
        cache = Cache(CONFIG, 2, device=CPU, dtype=torch.bfloat16, block=4)
        for slot in range(2):
            cache.grow(slot, length)
        rounded = -(-length // 4) * 4
        assert cache.used_bytes == CONFIG.kv_cache_bytes(rounded, batch=2)
        cache.release(0)
        assert cache.used_bytes == CONFIG.kv_cache_bytes(rounded)
        cache.release(1)
        assert cache.used_bytes == 0


def test_a_window_that_is_no_multiple_of_the_block_costs_at_most_one_block() -> None:
    cache = Cache(CONFIG, 1, device=CPU, dtype=torch.float32, block=8)
    cache.grow(0, 256)
    more = 4 * (16 - 12) * 2 * 2 * 8 * 4  # local layers, keys, K and V, G, K, bytes
    assert cache.used_bytes == CONFIG.kv_cache_bytes(256, bytes_per_value=4) + more


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_pool_gives_back_what_was_written_last_in_any_interleaving(data: st.DataObject) -> None:
    ring = data.draw(st.sampled_from([None, 5, 8, 12]))
    block = data.draw(st.sampled_from([1, 3, 4]))
    pool = BlockPool(1, CONFIG, 3, block, ring, CPU, torch.float32)
    lengths = [0, 0, 0]
    for slot in data.draw(st.lists(st.integers(0, 2), max_size=60)):
        if lengths[slot] > 20:
            pool.release(slot)
            lengths[slot] = 0
            continue
        pool.grow(slot, lengths[slot] + 1)
        place = pool.places(torch.tensor([slot]), torch.tensor([lengths[slot]]))
        value = torch.full((1, 2, 8), 100.0 * slot + lengths[slot])
        pool.write(0, place, value, -value)
        lengths[slot] += 1
    used = torch.tensor(lengths)
    k, v = pool.gather(0, pool.table(torch.arange(3), max(lengths)))
    positions = pool.positions(used, max(lengths))
    for slot, length in enumerate(lengths):
        held = positions[slot] >= 0
        oldest = 0 if pool.ring_blocks is None else max(0, length - pool.ring_blocks * block)
        assert sorted(positions[slot][held].tolist()) == list(range(oldest, length))
        expected = 100.0 * slot + positions[slot][held]
        assert torch.equal(k[slot][held], expected[:, None, None].expand(-1, 2, 8))
        assert torch.equal(v[slot][held], -k[slot][held])
