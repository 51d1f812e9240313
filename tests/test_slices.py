"""Of every replica, each number of each parameter lies on exactly one rank, also in layouts too large to run here."""

import pytest
import torch
import torch.distributed as dist

from layouts import config
from processes import run
from trinity.config import ParallelConfig
from trinity.model.transformer import Transformer
from trinity.parallel.mesh import build_meshes
from trinity.parallel.shard import REPLICATED, shard_model
from trinity.parallel.slices import Slice


def slices_of(rank: int, layout: dict[str, int], experts: int) -> tuple[int, dict[str, Slice]]:
    """The replica of a rank, and its part of every parameter; nothing is sent."""
    settings = config(f"model.num_experts={experts}", "model.num_layers=2")
    with torch.device("meta"):
        model = Transformer(settings.model)
    meshes = build_meshes(ParallelConfig.model_validate(layout), dist.get_world_size(), "cpu")
    return meshes.replica, shard_model(model, meshes, settings.runtime).slices


@pytest.mark.parametrize(
    ("world", "layout", "experts"),
    [
        (5, {}, 4),  # neither experts nor rows share out: uneven and empty shards
        (16, {"replicate": 2, "context": 2, "expert": 2}, 6),
    ],
)
def test_every_number_lies_on_one_rank(world: int, layout: dict[str, int], experts: int) -> None:
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for replica, slices in run(slices_of, world, layout, experts, backend="fake"):
        for name, part in slices.items():
            count = seen.setdefault((replica, name), torch.zeros(part.shape, dtype=torch.int32))
            count[part.box] += 1
    ranks = world // layout.get("replicate", 1)
    assert {replica for replica, _ in seen} == set(range(layout.get("replicate", 1)))
    for (_, name), count in seen.items():
        expected = ranks if name.endswith(REPLICATED) else 1
        assert bool((count == expected).all()), name
        if ".moe.experts." in name:
            assert count.shape[0] == experts
