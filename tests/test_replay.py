"""Router replay: given experts are taken, weighed by the scores of the model at hand, and only where they are given."""

import pytest
import torch

from stage_fixtures import tiny_config
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.router import Router
from trinity.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("none")).model
    model = Transformer(config)
    model.init_weights(3)
    return model


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_given_experts_are_weighed_by_the_scores_here(model, kernels):
    router = Router(model.config, kernels)
    torch.nn.init.normal_(router.weight)
    router.bias.normal_()
    x_ND = torch.randn(6, model.config.dim)
    own = router(x_ND)
    chosen_Nk = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    chosen_Nk[4:] = -1
    replayed = router(x_ND, chosen_Nk)
    assert torch.equal(replayed.indices_Nk[:4], chosen_Nk[:4])
    assert torch.equal(replayed.indices_Nk[4:], own.indices_Nk[4:])
    scores_Nk = (x_ND @ router.weight.T).sigmoid().gather(1, replayed.indices_Nk)
    expected_Nk = scores_Nk / scores_Nk.sum(1, keepdim=True) * model.config.route_scale
    torch.testing.assert_close(replayed.weights_Nk, expected_Nk)
    (gradient,) = torch.autograd.grad(replayed.weights_Nk[:, 0].sum(), router.weight)
    assert gradient.abs().sum() > 0


def test_replaying_what_the_engine_recorded_changes_nothing_for_the_same_model(model):
    prompts = [[5, 6, 7, 8], [9, 10]]
    engine = Engine(model, return_experts=True)
    done = engine.generate(prompts, SamplingParams(max_new_tokens=5, seed=1))
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt + completion.tokens])
        chosen = torch.from_numpy(completion.experts)[None]
        assert chosen.shape == (1, ids.shape[1] - 1, model.config.num_moe_layers, model.config.experts_per_token)
        free, replayed = (model.features(ids[:, :-1], chosen_BTLk=c) for c in (None, chosen))
        torch.testing.assert_close(replayed.x_BTD, free.x_BTD)
        assert torch.equal(replayed.routing.counts_LE, free.routing.counts_LE)


def test_replay_holds_the_experts_when_the_weights_move(model):
    """With other router weights the free pass selects others; the replayed one keeps those it was given."""
    moved = Transformer(model.config)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block in moved.blocks:
            if block.moe is not None:
                block.moe.router.weight.add_(torch.randn_like(block.moe.router.weight))
    tokens = torch.randint(0, 400, (2, 16))
    done = Engine(model, return_experts=True).generate(tokens.tolist(), SamplingParams(max_new_tokens=1, seed=0))
    chosen = torch.stack([torch.from_numpy(c.experts) for c in done])
    counts_LE = torch.stack([torch.bincount(chosen[:, :, layer].flatten().long(), minlength=4) for layer in range(3)])
    assert torch.equal(moved.features(tokens, chosen_BTLk=chosen).routing.counts_LE, counts_LE)
    assert not torch.equal(moved.features(tokens).routing.counts_LE, counts_LE)


def test_recomputation_replays_too(model):
    again = Transformer(model.config, recompute="block")
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 400, (1, 8))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(8 * 3)]).view(1, 8, 3, 2)
    gradients = []
    for one in (model, again):
        one.zero_grad()
        one.features(tokens, chosen_BTLk=chosen).x_BTD.square().sum().backward()
        moe = one.blocks[1].moe
        assert moe is not None
        assert moe.experts.down.grad is not None
        gradients.append(moe.experts.down.grad.clone())
        one.zero_grad()
    torch.testing.assert_close(*gradients)
