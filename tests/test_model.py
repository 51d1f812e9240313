"""What the model promises beside its numbers: buffers, initialisation, statistics, recomputation, seams, counting."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trinity.config import resolve
from trinity.config.model import ModelConfig
from trinity.model.balance import MARGIN_BINS
from trinity.model.layout import Layout, make_documents
from trinity.model.moe import Experts, dispatch_local
from trinity.model.norm import Kernels
from trinity.model.router import Documents, LayerStats, Router, Routing, routing_stats
from trinity.model.transformer import Features, Recompute, Transformer
from trinity.ops.cross_entropy import fused_cross_entropy, token_logprobs

SMALL: dict[str, Any] = {
    "vocab_size": 61, "num_layers": 4, "num_dense_layers": 1, "dim": 16, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "ffn_dim": 24, "expert_dim": 12, "num_experts": 6, "experts_per_token": 2, "route_scale": 2.0,
    "window": 5,
}  # fmt: skip
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "block")


def build(kernels: Kernels = "fast", recompute: Recompute = "none", seed: int = 0, **changes) -> Transformer:
    model = build_unset(kernels, recompute, **changes)
    model.init_weights(seed)
    return model


def build_unset(kernels: Kernels = "fast", recompute: Recompute = "none", **changes) -> Transformer:
    return Transformer(ModelConfig(**(SMALL | changes)), kernels, recompute)


def batch(rows: int = 2, seq_len: int = 24) -> Tensor:
    return torch.randint(0, 61, (rows, seq_len), generator=torch.Generator().manual_seed(3))


def routers(model: Transformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def bias_some(model: Transformer) -> None:
    for router in routers(model):
        router.bias.copy_(torch.linspace(-0.2, 0.2, router.bias.numel()))
        router.momentum.fill_(1e-4 / 3)


def test_names_and_shapes_are_those_of_the_contract() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    assert state["layers.1.attn.qkvg.weight"] == ((2 * 4 + 2 * 2) * 8, 16)
    assert state["layers.1.attn.o.weight"] == (16, 32)
    assert state["layers.0.ffn.gate_up.weight"] == (48, 16)
    assert state["layers.0.ffn.down.weight"] == (16, 24)
    assert state["layers.1.moe.experts.gate_up"] == (6, 24, 16)
    assert state["layers.1.moe.experts.down"] == (6, 16, 12)
    assert state["layers.1.moe.router.weight"] == (6, 16)
    assert state["layers.1.moe.router.bias"] == state["layers.1.moe.router.momentum"] == (6,)
    block = "attn.q_norm attn.k_norm attn_norm attn_post_norm ffn_norm ffn_post_norm moe.shared.gate_up moe.shared.down"
    expected = {f"layers.1.{name}.weight" for name in [*block.split(), "attn.qkvg", "attn.o", "moe.router"]}
    expected |= {
        f"layers.1.moe.{name}" for name in ("experts.gate_up", "experts.down", "router.bias", "router.momentum")
    }
    assert {name for name in state if name.startswith("layers.1.")} == expected
    assert {name for name in state if not name.startswith("layers.")} == {"embed.weight", "norm.weight", "head.weight"}


@pytest.mark.parametrize("move", ["bfloat16", "half", "to", "construct", "assign"])
def test_bias_and_momentum_stay_float32(move: str) -> None:
    model = build()
    bias_some(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    if move == "to":
        model = model.to(torch.bfloat16)
    elif move == "construct":
        state = model.state_dict()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = build()
        finally:
            torch.set_default_dtype(torch.float32)
        model.load_state_dict(state)
    elif move == "assign":
        narrow = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        before = {name: narrow[name].float() for name in before}
        model.load_state_dict(narrow, assign=True)
    else:
        model = getattr(model, move)()
    assert model.embed.weight.dtype in (torch.bfloat16, torch.float16)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32
        assert not buffer.requires_grad
        assert torch.equal(buffer, before[name]), "the value went through a narrower type"


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, second, other = build(seed=1), Transformer(ModelConfig(**SMALL)), build(seed=2)
    torch.manual_seed(123)
    torch.randn(7)
    second.init_weights(1)
    narrow = Transformer(ModelConfig(**SMALL)).bfloat16()
    narrow.init_weights(1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert torch.equal(parameter.bfloat16(), narrow.get_parameter(name))
        assert parameter.ndim == 1 or not torch.equal(parameter, other.get_parameter(name))


def test_initialisation_follows_the_specification() -> None:
    model = build(dim=64, num_experts=8)
    sigma = 0.5 / 64**0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.abs().max() <= 3 * sigma
            if parameter.numel() > 1000:
                assert parameter.std().item() == pytest.approx(sigma, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.5 if "post_norm" in name else 1.0)), name
    stacks = model.get_parameter("layers.1.moe.experts.gate_up")
    assert not torch.equal(stacks[0], stacks[1])
    assert build(post_norm_gain=0.125).get_parameter("layers.2.ffn_post_norm.weight")[0].item() == 0.125
    assert build(init_scale=1.0).embed.weight.std().item() == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": False}, {"attention_gate": False}, {"post_norm_gain": 2.0}, {"embed_scale": False},
        {"layer_types": ("global", "local", "local", "global")}, {"route_norm": False}, {"num_shared_experts": 0},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_switch_changes_the_result_and_both_paths_agree(change: dict[str, Any]) -> None:
    plain, fast, reference = build(), build(**change), build("reference", **change)
    tokens = batch()
    logits = fast(tokens)
    torch.testing.assert_close(logits, reference(tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain(tokens), atol=1e-3)
    assert sum(p.numel() for p in fast.parameters()) == fast.config.num_params()
    if change == {"attention_gate": False}:
        assert fast.get_parameter("layers.0.attn.qkvg.weight").shape[0] == (4 + 2 * 2) * 8


def test_the_bias_selects_and_does_not_weigh() -> None:
    router = routers(build())[0]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    before = router(x)
    router.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))
    after = router(x)
    assert (after.indices_Nk[:, 0] == 0).all()
    assert torch.equal(before.scores_NE, after.scores_NE)
    chosen = after.scores_NE.gather(1, after.indices_Nk)
    torch.testing.assert_close(after.weights_Nk, 2.0 * chosen / chosen.sum(1, keepdim=True))


def test_the_bias_has_no_part_in_any_gradient() -> None:
    """Gradients of router and input are those of the formula without a bias, on the experts that the bias selected."""
    router = routers(build())[0]
    router.bias.copy_(torch.linspace(-0.4, 0.4, 6))
    draws = torch.Generator().manual_seed(0)
    x, cotangent = torch.randn(50, 16, generator=draws, requires_grad=True), torch.randn(50, 2, generator=draws)
    routing = router(x)
    found = torch.autograd.grad((routing.weights_Nk * cotangent).sum(), [x, router.weight])
    chosen = (x @ router.weight.T).sigmoid().gather(1, routing.indices_Nk)
    weights = 2.0 * chosen / chosen.sum(1, keepdim=True)
    expected = torch.autograd.grad((weights * cotangent).sum(), [x, router.weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0
    assert "bias" not in {name.rpartition(".")[2] for name, _ in router.named_parameters()}


def naive_sequence_loss(model: Transformer, routing, segments_BT: Tensor) -> Tensor:
    """The formula of the specification, document by document."""
    k, E = model.config.experts_per_token, model.config.num_experts
    total, tokens = torch.zeros(()), 0
    shaped = [t.unflatten(0, segments_BT.shape) for t in (routing.indices_Nk, routing.scores_NE)]
    for row, segments in enumerate(segments_BT):
        for segment in segments.unique():
            if segment < 0:
                continue
            inside = segments == segment
            T = int(inside.sum())
            indices, scores = shaped[0][row, inside], shaped[1][row, inside]
            f = torch.bincount(indices.flatten(), minlength=E) * E / (k * T)
            P = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
            total, tokens = total + T * (f * P).sum(), tokens + T
    return total / tokens


def test_sequence_loss_is_that_of_each_document() -> None:
    model = build()
    bias_some(model)
    segments = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5, [0] * 20 + [1] * 4]).int()
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    stats = model.features(batch(), segments).routing
    expected = sum((naive_sequence_loss(model, routing, segments) for routing in seen), torch.zeros(()))
    torch.testing.assert_close(stats.sequence_loss, expected)
    weights = [router.weight for router in routers(model)]
    mine = torch.autograd.grad(stats.sequence_loss, weights, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_padding_is_counted_nowhere() -> None:
    model = build()
    tokens = batch(1, 24)
    padded = torch.cat([tokens, torch.full((1, 8), 7)], dim=1)
    segments = torch.tensor([[0] * 24 + [-1] * 8])
    alone, beside = model.features(tokens).routing, model.features(padded, segments).routing
    assert torch.equal(alone.counts_LE, beside.counts_LE)
    assert alone.counts_LE.sum(dim=1).tolist() == [24 * 2] * 3
    for name in ("sequence_loss", "logit_min_L", "logit_max_L", "entropy_L"):
        torch.testing.assert_close(getattr(alone, name), getattr(beside, name))
    empty = model.features(tokens, torch.full((1, 24), -1)).routing
    assert empty.counts_LE.sum() == 0
    assert empty.sequence_loss == 0


def test_static_document_numbers_give_the_same_statistics() -> None:
    """A GPU bounds the number of documents by the number of tokens instead of reading it."""
    model = build()
    routing = routers(model)[0](torch.randn(24, 16))
    document = torch.arange(24) // 10
    tight, loose = (routing_stats(routing, Documents(document, bound, None)) for bound in (3, 24))
    for a, b in zip(tight[:5], loose[:5], strict=True):
        assert torch.equal(a, b)
    assert tight.margins_EB is loose.margins_EB is None


@pytest.mark.parametrize("packed", [False, True])
def test_recomputation_changes_nothing(packed: bool) -> None:
    segments = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5, [0] * 20 + [1] * 4]) if packed else None
    results = []
    for recompute in RECOMPUTE:
        model = build(recompute=recompute)
        model.record_margins()
        calls: list[int] = []
        model.blocks[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        features = model.features(batch(), segments)
        (features.x_BTD.square().sum() + features.routing.sequence_loss).backward()
        assert len(calls) == (2 if recompute == "block" else 1)
        results.append((features, {name: p.grad for name, p in model.named_parameters()}))
    first, first_gradients = results[0]
    for second, second_gradients in results[1:]:
        assert_same_results(first, first_gradients, second, second_gradients)


def assert_same_results(
    first: Features, first_gradients: dict[str, Any], second: Features, second_gradients: dict[str, Any]
) -> None:
    assert torch.equal(first.routing.counts_LE, second.routing.counts_LE)
    assert first.routing.margins_LEB is not None
    assert second.routing.margins_LEB is not None
    assert torch.equal(first.routing.margins_LEB, second.routing.margins_LEB)
    assert torch.equal(first.x_BTD, second.x_BTD)
    for name, gradient in first_gradients.items():
        if name != "head.weight":
            torch.testing.assert_close(gradient, second_gradients[name])


def test_margins_are_histograms_of_the_tokens_that_are_not_padding() -> None:
    """Against the definition, token by token; recording them changes nothing else."""
    model, plain = build(), build()
    model.record_margins()
    for each in (model, plain):
        bias_some(each)
    segments = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5, [0] * 24])
    seen: list[Routing] = []
    for router in routers(model):
        router.register_forward_hook(lambda _, __, routing: seen.append(routing))  # pyright: ignore
    found, expected = model.features(batch(), segments), plain.features(batch(), segments)
    assert torch.equal(found.x_BTD, expected.x_BTD)
    assert torch.equal(found.routing.counts_LE, expected.routing.counts_LE)
    assert expected.routing.margins_LEB is None
    assert found.routing.margins_LEB is not None
    for margins_EB, routing, router in zip(found.routing.margins_LEB, seen, routers(model), strict=True):
        by_hand_EB = torch.zeros(6, MARGIN_BINS, dtype=torch.int64)
        low, high = router.bias.min() - 1, router.bias.max() + 1
        assert routing.scores_NE is not None
        for scores_E in routing.scores_NE.detach()[segments.flatten() >= 0]:
            cutoff = (scores_E + router.bias).sort(descending=True).values[router.experts_per_token]
            for expert, score in enumerate(scores_E):
                by_hand_EB[expert, int((cutoff - score - low) * (MARGIN_BINS / (high - low)))] += 1
        assert torch.equal(margins_EB, by_hand_EB)
    with torch.no_grad():
        assert model.features(batch(), segments).routing.margins_LEB is None


def test_recording_margins_breaks_no_graph() -> None:
    """Blocks are compiled on a GPU, where a break would leave the rest of a block uncompiled."""
    model = build()
    model.record_margins()
    bias_some(model)
    router, documents = routers(model)[0], make_documents((2, 12), torch.device("cpu"), None)

    def stats(x_ND: Tensor) -> LayerStats:
        return routing_stats(router(x_ND), documents)

    x_ND = torch.randn(24, 16)
    found, expected = torch.compile(stats, backend="aot_eager", fullgraph=True)(x_ND), stats(x_ND)
    assert expected.margins_EB is not None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_forward_leaves_no_trace_in_the_model() -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.features(batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dense_model_has_empty_statistics() -> None:
    stats = build(num_dense_layers=4).features(batch()).routing
    assert stats.counts_LE.shape == (0, 6)
    assert stats.sequence_loss == 0


def test_a_dispatcher_is_handed_in() -> None:
    model = build()
    expected = model(batch())
    seen = []

    def counting(
        x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, experts: Experts, shared: nn.Module | None
    ) -> Tensor:
        seen.append(x_ND.shape[0])
        return dispatch_local(x_ND, indices_Nk, weights_Nk, experts, shared)

    for block in model.blocks:
        if block.moe is not None:
            block.moe.dispatcher = counting
    assert torch.equal(model(batch()), expected)
    assert seen == [48, 48, 48]


def test_the_halves_around_a_cache_are_the_whole() -> None:
    """What an engine with a KV cache does, token by token, with plain softmax over the keys that each layer keeps."""
    model = build()
    tokens = batch(1, 12)
    expected = model(tokens)[0]
    caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.blocks]
    for t in range(12):
        x = model.embed_tokens(tokens[:, t : t + 1])
        positions = torch.tensor([[t]])
        for i, block in enumerate(model.blocks):
            turn = model.rotation(positions) if i % 2 else positions
            q, k, v, gate = block.attn.project(block.attn_norm(x), turn)
            caches[i].append((k, v))
            kept = caches[i][-model.config.window :] if block.kind == "local" else caches[i]
            keys, values = (torch.cat(part, dim=1).transpose(1, 2) for part in zip(*kept, strict=True))
            o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True).transpose(1, 2)
            x = x + block.attn_post_norm(block.attn.output(o, gate))
            x, stats = block.feed_forward(x)
            assert stats is None
        torch.testing.assert_close(model.head(model.norm(x))[0, 0], expected[t], atol=1e-5, rtol=1e-5)


def test_a_layout_is_made_once_and_reused() -> None:
    model = build()
    segments = torch.tensor([[0] * 7 + [1] * 17, [0] * 24])
    layout = model.layout((2, 24), segments)
    assert isinstance(layout, Layout)
    expected = model.features(batch(), segments).x_BTD
    assert torch.equal(model.features(batch(), layout=layout).x_BTD, expected)


def test_a_run_can_say_which_path_each_operation_took() -> None:
    fast, reference = (model.paths(model.layout((1, 24))) for model in (build(), build("reference")))
    assert fast["local attention"].startswith("SDPA, blocks")
    assert fast["experts"] == "loop of matrix products"
    assert all("SDPA" not in path for path in reference.values())


def test_bfloat16_stays_near_float32() -> None:
    """Every expert is selected, for otherwise rounded weights send some tokens elsewhere."""
    wide, narrow = build(experts_per_token=6), build(experts_per_token=6).bfloat16()
    tokens = batch()
    logits, rounded = wide(tokens), narrow(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (logits - rounded.float()).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_counting_agrees_with_the_published_models(name: str) -> None:
    config = resolve(name)[0].model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params()
    stacks = sum(p.numel() for n, p in model.named_parameters() if ".moe.experts." in n)
    idle = stacks * (config.num_experts - config.experts_per_token) // config.num_experts
    assert config.num_params() - idle == config.num_active_params()
    published = {"nano": 6.12e9, "mini": 26.1e9, "large": 398.6e9}[name]
    assert config.num_params() == pytest.approx(published, rel=0.005)


def test_counted_operations_agree_with_the_counter_of_torch() -> None:
    """The reference computes every score: T keys a query, where the mask leaves (T + 1) / 2 on average."""
    model = build("reference", window=64)
    config, T = model.config, 32
    layout = model.layout((1, T))
    with FlopCounterMode(display=False) as counter:
        logits = model.head(model.features(batch(1, T), layout=layout).x_BTD)
    heads = config.num_heads * config.head_dim
    masked = 4 * heads * config.num_layers * (T - (T + 1) / 2)
    assert counter.get_total_flops() / T == pytest.approx(config.flops_per_token(T, training=False) + masked)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    backward = 2 * (config.flops_per_token(T, training=False) + masked)
    assert counter.get_total_flops() / T == pytest.approx(backward, rel=1e-6)


def test_cache_bytes_agree_with_what_the_layers_keep() -> None:
    model = build()
    T = 9
    _, k, v, _ = model.blocks[0].attn.project(
        torch.zeros(1, T, 16, dtype=torch.bfloat16).float(), torch.arange(T)[None]
    )
    kept = [min(5, T) if block.kind == "local" else T for block in model.blocks]
    values = sum(n * (k[0, 0].numel() + v[0, 0].numel()) for n in kept)
    assert model.config.kv_cache_bytes(T) == 2 * values


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gpu_path_reads_no_value(compiled: bool) -> None:
    """Meta tensors take each branch of a GPU but FlexAttention's and have no values: waiting for one would fail.

    Compiled, the whole half of a block must be one graph.
    """
    with torch.device("meta"):
        model = build_unset(expert_dim=16).bfloat16()
        x_BTD = torch.empty(2, 24, 16, dtype=torch.bfloat16, requires_grad=True)
        documents = make_documents((2, 24), torch.device("meta"), torch.empty(2, 24, dtype=torch.int32))
        targets_N = torch.empty(48, dtype=torch.int64)
    block = model.blocks[1]
    feed_forward = (
        torch.compile(block.feed_forward, backend="eager", fullgraph=True) if compiled else block.feed_forward
    )
    y_BTD, stats = feed_forward(x_BTD, documents)
    loss = fused_cross_entropy(y_BTD.flatten(0, 1), model.head.weight, targets_N, z_loss=1e-6, chunk_tokens=20)
    logprobs_N = token_logprobs(y_BTD.flatten(0, 1), model.head.weight, targets_N, chunk_tokens=20)
    assert stats is not None
    (loss.loss_sum + logprobs_N.sum() + stats.sequence_loss).backward()
    assert block.moe is not None
    assert block.moe.experts.gate_up.grad is not None
