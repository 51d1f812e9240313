"""Three views of the same ranks: who gets which rows, who shares which weights.

    data     (replicate, dp, cp)       rows are split over replicate and dp, a row's tokens over cp
    dense    (replicate, fsdp)         weights outside the experts; fsdp = dp * cp
    sparse   (replicate, efsdp, ep)    weights of the experts; efsdp = dp * cp / ep

The last dimension of each is made of neighbouring ranks, so a token's exchange with its experts stays inside a host
where ep divides the host's GPUs, and replicas are the farthest apart.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trinity.config.parallel import ParallelConfig, ParallelSizes, parallel_sizes


@dataclass(frozen=True)
class Meshes:
    """The meshes of a run, and this rank's place in them."""

    sizes: ParallelSizes
    data: DeviceMesh
    dense: DeviceMesh
    sparse: DeviceMesh

    @property
    def data_rank(self) -> int:
        """Which rows this rank gets, from 0 to data_size - 1; ranks of one context group get the same."""
        return self.data.get_local_rank("replicate") * self.sizes.shard + self.data.get_local_rank("dp")

    @property
    def data_size(self) -> int:
        return self.sizes.data

    @property
    def context_rank(self) -> int:
        return self.data.get_local_rank("cp")

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Ranks that share a row's tokens."""
        return self.data.get_group("cp")

    @property
    def expert_rank(self) -> int:
        return self.sparse.get_local_rank("ep")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """Ranks that share the experts of a layer."""
        return self.sparse.get_group("ep")

    @property
    def shard_rank(self) -> int:
        return self.dense.get_local_rank("fsdp")

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """Ranks that share the weights of one replica, experts included."""
        return self.dense.get_group("fsdp")

    @property
    def replica(self) -> int:
        """Which copy of the model this rank holds a part of."""
        return self.dense.get_local_rank("replicate")


def build_meshes(settings: ParallelConfig, world_size: int, device_type: str) -> Meshes:
    """The meshes over all ranks of the default process group, which must have `world_size`; a collective.

    Raises UsageError for sizes that do not fit together (`config.parallel_sizes`).
    """
    sizes = parallel_sizes(settings, world_size)
    data = init_device_mesh(
        device_type, (sizes.replicate, sizes.shard, sizes.context), mesh_dim_names=("replicate", "dp", "cp")
    )
    dense = init_device_mesh(device_type, (sizes.replicate, sizes.fsdp), mesh_dim_names=("replicate", "fsdp"))
    sparse = init_device_mesh(
        device_type, (sizes.replicate, sizes.efsdp, sizes.expert), mesh_dim_names=("replicate", "efsdp", "ep")
    )
    return Meshes(sizes, data, dense, sparse)
