"""torch.compile over the blocks of a model."""

import torch

from trinity.config.run import RuntimeConfig
from trinity.model.transformer import Transformer


def compile_blocks(model: Transformer, runtime: RuntimeConfig, device: torch.device) -> None:
    """Compile each block where `runtime.compile` says so and the model runs on a GPU; the CPU runs eagerly."""
    if not (runtime.compile and device.type == "cuda"):
        return
    # All blocks share one code object: local and global, dense and sparse, with and without gradients, each shape of an
    # evaluation. Past the limit (8 by default) a block runs uncompiled, with no more than a warning.
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile()
