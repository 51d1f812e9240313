"""Context parallelism against the unsplit model: outputs, statistics and every raw gradient."""

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from processes import run
from trinity.config import LossConfig, ModelConfig
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.model.transformer import Transformer
from trinity.parallel.context import split_rows
from trinity.parallel.split import RowSplit
from trinity.train.losses import Share, language_model_loss, to_device

T = 64
CPU = torch.device("cpu")


def model_config(**changes: Any) -> ModelConfig:
    shape = dict(vocab_size=61, num_layers=4, num_dense_layers=1, dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
    shape |= dict(ffn_dim=24, expert_dim=8, num_experts=4, experts_per_token=2, window=8, max_positions=T)
    # Large weights: with the usual ones attention is nearly flat and gradients of q and k drown in rounding.
    return ModelConfig.model_validate({**shape, "init_scale": 2.0, **changes})


def made_up_rows(seed: int, documents: list[list[int]]) -> Rows:
    """Rows of documents of the given lengths; what is left is padding. Targets follow in the document."""
    draws = np.random.default_rng(seed)
    rows = empty_rows(len(documents), T)
    for b, lengths in enumerate(documents):
        rows.tokens_BT[b] = draws.integers(0, 61, T)
        rows.targets_BT[b] = draws.integers(0, 61, T)
        ends = np.cumsum(lengths) - 1
        rows.targets_BT[b, ends[draws.random(len(ends)) < 0.7]] = -100
        finish_row(rows, b, [Chunk(n, 0, length) for n, length in enumerate(lengths)])
    return rows


DOCUMENTS = (
    [[64], [64]],
    [[16, 48], [1, 31, 32]],
    [[7, 1, 1, 20, 19, 16], [40, 11, 13]],
    [[50], [3, 5, 17, 30]],  # padding at the end, also of a whole chunk
    [[9], [64]],
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def compare(
    group: dist.ProcessGroup,
    order: Any,
    config: ModelConfig,
    rows: Rows,
    kernels: Any,
    recompute: Any,
    device: torch.device = CPU,
    bounds: tuple[float, float] = (1e-6, 3e-6),
) -> None:
    """One loss with gradients of whole rows here, and of parts of them over the group.

    `bounds` of relative errors: of scalars and gradients of matrices, and of gains of norms, which are sums of many
    products that nearly cancel.
    """
    loss = LossConfig(z_loss=1e-3, sequence_loss=1e-2)
    share = Share(torch.tensor(97.0, device=device), torch.tensor(120.0, device=device))
    with device:
        whole, split = (Transformer(config, kernels, recompute) for _ in range(2))
    for model in (whole, split):
        model.init_weights(3)
    expected = language_model_loss(whole, to_device(rows, device), share, loss)
    expected.loss.backward()

    layout = split_rows(split, group, order)
    part = RowSplit(layout.size, T, order).take(rows, layout.rank)
    found = language_model_loss(split, to_device(part, device), share, loss)
    found.loss.backward()

    case = f"{order}, {layout.size} ranks, window {config.window}, {rows.documents}, {kernels}, {recompute}"
    assert relative(layout.sum(found.loss), expected.loss.detach()) < bounds[0], case
    for name, value in expected.terms.items():
        total = layout.sum(found.terms[name])
        torch.testing.assert_close(total, value, rtol=2 * bounds[0], atol=bounds[0], msg=f"{name}: {case}")
    assert relative(found.mean, expected.mean) < bounds[0], case
    if device == CPU:  # elsewhere rounding may send a token to another expert
        assert torch.equal(layout.sum(found.counts_LE), expected.counts_LE), case
    for name, value in found.extremes.items():
        most = value.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        assert relative(most, expected.extremes[name]) < 2 * bounds[0], f"{name}: {case}"
    wanted = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        gradient, expected_gradient = parameter.grad, wanted[name].grad
        assert gradient is not None
        assert expected_gradient is not None
        dist.all_reduce(gradient, group=group)
        bound = bounds["norm" in name]
        error = relative(gradient, expected_gradient)
        assert error < bound, f"{name}: {error:.2e}; {case}"


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.new_group(ranks))  # a number on ranks that are not in it


def work(rank: int) -> None:
    """On four processes: groups of 2 (two of them, with rows of their own) and of 4."""
    halves, everyone = [new_group([0, 1]), new_group([2, 3])], new_group([0, 1, 2, 3])
    for number, (size, order) in enumerate(itertools.product((2, 4), ("zigzag", "contiguous"))):
        group, seed = (halves[rank // 2], 10 * (rank // 2)) if size == 2 else (everyone, 0)
        chunk = T // (size * (2 if order == "zigzag" else 1))
        windows = (5, chunk, chunk + 1, chunk + 2, 2 * chunk + 5, 100)
        for count, window in enumerate(windows):
            rows = made_up_rows(seed + count, DOCUMENTS[(number + count) % len(DOCUMENTS)])
            compare(group, order, model_config(window=window), rows, "reference", "none")
            if count % 2:
                # SDPA's exponentials have 20 bits on a CPU, and with other blocks they are rounded at other places.
                compare(group, order, model_config(window=window), rows, "fast", "block", bounds=(6e-6, 6e-6))


def test_split_rows_train_as_whole_ones() -> None:
    run(work, 4)


def work_on_gpus(rank: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    device, group = torch.device("cuda", rank), new_group(list(range(dist.get_world_size())))
    config = model_config(window=11, head_dim=16)  # FlexAttention's smallest
    for order, documents in itertools.product(("zigzag", "contiguous"), DOCUMENTS):
        rows = made_up_rows(0, documents)
        compare(group, order, config, rows, "reference", "none", device, bounds=(1e-5, 1e-5))
        # Grouped products are bfloat16 there, so the two paths round at other places.
        compare(group, order, config, rows, "fast", "block", device, bounds=(2e-2, 6e-2))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_rows_train_as_whole_ones_over_nccl(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    run(work_on_gpus, ranks, backend="nccl")
