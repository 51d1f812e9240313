"""Tokens that travel to their experts and back: against all experts in one place, for any routing."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from processes import run
from trinity.model.linear import FeedForward
from trinity.model.moe import Experts, dispatch_local
from trinity.parallel.expert import AllToAll, ExpertParallel

D, F, E, K, N = 8, 16, 8, 2, 12


def experts(seed: int) -> Experts:
    torch.manual_seed(seed)
    found = Experts(E, D, F)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3)
    return found


def routings(rank: int) -> dict[str, Tensor]:
    """[N, K] experts of each token: whatever a router may ask for."""
    draws = torch.Generator().manual_seed(rank)
    any_two = torch.stack([torch.randperm(E, generator=draws)[:K] for _ in range(N)])
    return {
        "any": any_two,
        "all to one": torch.tensor([[5, 2]]).expand(N, K).contiguous(),
        "all to one rank": any_two % 2,
        "none to the last ranks": any_two % 3,
        "own tokens go nowhere near": torch.full((N, 1), (rank + 3) % E).repeat(1, K) + torch.arange(K) * 0,
    }


def work(rank: int) -> None:
    ranks = dist.get_world_size()
    assert dist.group.WORLD is not None
    dispatch = ExpertParallel(AllToAll(dist.group.WORLD))
    torch.manual_seed(3)
    shared = FeedForward(D, F, "reference")
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.normal_(std=0.3)
    here = E // ranks
    for number, (name, indices_Nk) in enumerate(routings(rank).items()):
        draws = torch.Generator().manual_seed(100 * number + rank)
        tokens = 0 if name == "any" and rank == ranks - 1 else N  # a rank may even have no token
        indices_Nk = indices_Nk[:tokens]
        x_ND = torch.randn(tokens, D, generator=draws, requires_grad=True)
        weights_Nk = torch.rand(tokens, K, generator=draws, requires_grad=True)
        d_ND = torch.randn(tokens, D, generator=draws)
        whole, own = experts(number), Experts(here, D, F)
        with torch.no_grad():
            for part, full in zip(own.parameters(), whole.parameters(), strict=True):
                part.copy_(full[rank * here : (rank + 1) * here])
        found, expected = [], []
        for results, dispatcher, module in ((expected, dispatch_local, whole), (found, dispatch, own)):
            y_ND = dispatcher(x_ND, indices_Nk, weights_Nk, module, shared)
            inputs = (x_ND, weights_Nk, *shared.parameters(), *module.parameters())
            results += [y_ND, *torch.autograd.grad(y_ND, inputs, d_ND)]
        for full in expected[-2:]:
            dist.all_reduce(full)  # each rank's tokens give a gradient to every expert
        expected[-2:] = [full[rank * here : (rank + 1) * here] for full in expected[-2:]]
        for at, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, msg=lambda m, n=name, k=at: f"{n}, {k}: {m}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_travelling_tokens_compute_what_staying_ones_do(ranks: int) -> None:
    run(work, ranks)
