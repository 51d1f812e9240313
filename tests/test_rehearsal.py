"""A rehearsal's numbers against arithmetic by hand, written out here, and against a real step."""

import json
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import layouts
from processes import run
from trinity.base.dist import local
from trinity.base.errors import UsageError
from trinity.cli import main
from trinity.config import ModelConfig, RunConfig, resolve
from trinity.parallel.ledger import Ledger
from trinity.parallel.split import RowSplit, halo
from trinity.train.rehearsal import Rehearsal, rehearse

RANKS, REPLICAS, EXPERT = 2048, 8, 8
LAYOUT = (f"parallel.replicate={REPLICAS}", f"parallel.expert={EXPERT}", "runtime.recompute=block")
EXTEND_RANKS, CONTEXT = 256, 4
EXTEND_LAYOUT = (f"parallel.expert={EXPERT}", f"parallel.context={CONTEXT}", "runtime.recompute=block")


def config(*overrides: str) -> RunConfig:
    return resolve("large", overrides=overrides)[0]


def near(found: float, by_hand: float) -> None:
    assert found == pytest.approx(by_hand, rel=0.1)


def routers(model: ModelConfig) -> int:
    return model.num_moe_layers * model.num_experts * model.dim


def check_weights(found: Rehearsal, model: ModelConfig, fsdp: int) -> None:
    """Everything but the routers is split over the ranks of a replica, in float32; gradients are the same; Muon has one
    number for each, AdamW (embedding and head) two."""
    own = (model.num_params() - routers(model)) / fsdp + routers(model)
    near(found.parameters, 4 * own)
    near(found.gradients, 4 * own)
    vocabulary = 2 * model.vocab_size * model.dim
    near(found.optimizer_state, 4 * (own + vocabulary / fsdp))
    # Muon updates whole experts where they are; all other matrices travel.
    experts = model.num_moe_layers * model.num_experts * 3 * model.dim * model.expert_dim
    near(found.muon_updates, 4 * (experts / fsdp + routers(model)))


def check_activations(found: Rehearsal, model: ModelConfig) -> None:
    """In bfloat16: the input of each block and of the final norm, its output's gradient, and the head's gradient, which
    the loss computes at once."""
    hidden = found.local_len * found.micro_rows * model.dim
    near(found.activations, 2 * ((model.num_layers + 2) * hidden + model.vocab_size * model.dim))


def check_traffic(found: Rehearsal, model: ModelConfig, fsdp: int) -> None:
    sent = {(e.kind, e.over): e.bytes_sent for e in found.exchanged}
    efsdp, times = fsdp // EXPERT, found.micro_batches
    expert = 3 * model.dim * model.expert_dim
    own_experts = model.num_moe_layers * model.num_experts // EXPERT * expert
    # Gathered in bfloat16 before the forward and the backward pass; reduced once, in float32.
    near(sent["all-gather of weights", "expert weights"], times * 2 * 2 * own_experts * (efsdp - 1) / efsdp)
    near(sent["reduce-scatter of gradients", "expert weights"], times * 4 * own_experts * (efsdp - 1) / efsdp)
    rest = model.num_params() - routers(model) - model.num_moe_layers * model.num_experts * expert
    vocabulary = 2 * model.vocab_size * model.dim  # the root stays gathered from the forward to the backward pass
    near(sent["all-gather of weights", "weights"], times * 2 * (2 * (rest - vocabulary) + vocabulary))
    near(sent["reduce-scatter of gradients", "weights"], times * 4 * rest)
    # To the experts and back, forward, again when it is recomputed, and their gradients; an eighth stays here.
    rows = found.local_len * found.micro_rows * model.experts_per_token
    tokens = 6 * model.num_moe_layers * rows * model.dim * 2 * (EXPERT - 1) / EXPERT
    near(sent["all-to-all of tokens", "experts"], times * tokens)


def check_replicas(found: Rehearsal, model: ModelConfig) -> None:
    """Each rank's gradients, once a step, both ways."""
    sent = {e.kind: e.bytes_sent for e in found.exchanged}
    own = 4 * (model.num_params() - routers(model)) / (RANKS // REPLICAS)
    near(sent["all-reduce of gradients"], 2 * own * (REPLICAS - 1) / REPLICAS)


def check_context(found: Rehearsal, model: ModelConfig) -> None:
    """Keys and values of G * K channels each in bfloat16, forward, recomputed, and their gradients."""
    sent = {e.kind: e.bytes_sent for e in found.exchanged}
    token = 2 * model.num_kv_heads * model.head_dim * 2
    kinds = model.layers
    whole = found.seq_len * token * (CONTEXT - 1) / CONTEXT
    near(sent["all-gather of keys and values"], found.micro_batches * 2 * kinds.count("global") * whole)
    near(sent["reduce-scatter of their gradients"], found.micro_batches * kinds.count("global") * whole)
    # Chunk 1 and chunk 6 of 8: the ends of both are sent, the ends of chunks 0 and 5 arrive.
    windows = 2 * (model.window - 1) * token
    assert found.rank == 1
    near(sent["halo of local layers, all-to-all"], found.micro_batches * 3 * kinds.count("local") * windows)


def check_pretraining(found: Rehearsal, model: ModelConfig) -> None:
    assert (found.micro_batches, found.local_len) == (8, 8192)  # 16 384 rows over 2 048 data ranks
    check_weights(found, model, RANKS // REPLICAS)
    check_activations(found, model)
    check_traffic(found, model, RANKS // REPLICAS)
    check_replicas(found, model)


def check_extension(found: Rehearsal, model: ModelConfig) -> None:
    assert (found.micro_batches, found.seq_len, found.local_len) == (2, 262144, 65536)
    check_weights(found, model, EXTEND_RANKS)
    check_activations(found, model)
    check_traffic(found, model, EXTEND_RANKS)
    check_context(found, model)


def test_six_layers_of_large_on_2048_ranks() -> None:
    settings = config(*LAYOUT, "model.num_layers=6", "model.num_dense_layers=2")
    check_pretraining(rehearse(settings, "pretrain", RANKS), settings.model)


def test_six_layers_of_a_256k_extension() -> None:
    settings = config(*EXTEND_LAYOUT, "model.num_layers=6", "model.num_dense_layers=2")
    check_extension(rehearse(settings, "extend", EXTEND_RANKS), settings.model)


@pytest.mark.slow
def test_large_on_2048_ranks() -> None:
    settings = config(*LAYOUT)
    check_pretraining(rehearse(settings, "pretrain", RANKS), settings.model)


@pytest.mark.slow
def test_a_256k_extension() -> None:
    settings = config(*EXTEND_LAYOUT)
    check_extension(rehearse(settings, "extend", EXTEND_RANKS), settings.model)


Step = tuple[dict[str, int], dict[str, tuple[int, int]]]
"""Bytes that live after a step, and messages and bytes by operation."""


def real_steps(rank: int, several: list[dict[str, int]]) -> list[Step]:
    return [real_step(layout) for layout in several]


def real_step(layout: dict[str, int]) -> Step:
    training = layouts.Training(layouts.config(), torch.device("cpu"), layout)
    training.optimizer.zero_grad()
    ledger = Ledger()
    with ledger.watching():
        training.step(0)
    kept = {
        "parameters": sum(local(p).nbytes for p in training.model.parameters()),
        "gradients": sum(local(p.grad).nbytes for p in training.model.parameters() if p.grad is not None),
        "optimizer_state": sum(t.nbytes for t in training.optimizer.state_dict().values() if t.ndim),
    }
    traffic: dict[str, tuple[int, int]] = {}
    for (_, operation, _), entry in ledger.traffic.items():
        if entry.ranks > 1:
            messages, sent = traffic.get(operation, (0, 0))
            traffic[operation] = messages + entry.messages, sent + entry.sent
    return kept, traffic


def test_a_real_step_moves_what_the_rehearsal_said() -> None:
    several = [{"context": 2}, {"expert": 2}]
    ranks = run(real_steps, 2, several)
    for number, layout in enumerate(several):
        settings = layouts.config(*(f"parallel.{name}={size}" for name, size in layout.items()))
        found = rehearse(settings, "pretrain", 2)
        compare(found, *ranks[found.rank][number])


def compare(found: Rehearsal, kept: dict[str, int], traffic: dict[str, tuple[int, int]]) -> None:
    for name, size in kept.items():
        assert getattr(found, name) == pytest.approx(size, rel=0.02), name
    assert set(traffic) == {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"}
    for operation, (messages, sent) in traffic.items():
        told = [e for e in found.exchanged if operation in e.kind]
        assert sum(e.messages for e in told) == messages, operation
        # Tokens go where the routing says, and matrices come back from Muon in float32 here, in bfloat16 from a GPU.
        if operation != "all-to-all":
            assert sum(e.bytes_sent for e in told) == pytest.approx(sent, rel=1e-6), operation


def test_the_verb_prints_json_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["nano", "model.num_layers=2", "model.num_dense_layers=1", "model.num_experts=16"]
    assert main(["rehearse", *small, "parallel.expert=2", "--ranks", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["ranks"], found["sizes"]["shard"]) == ("nano", 4, 4)
    assert found["peak"] == max(sum(found[moment].values()) for moment in ("forward_backward", "update"))
    assert main(["rehearse", *small, "--ranks", "1"]) == 0
    output = capsys.readouterr()
    assert "rank 0 of 1" in output.out
    assert "Muon's step holds the updates" in output.err
    assert main(["rehearse", *small, "parallel.expert=3", "--ranks", "6"]) == 2
    assert "does not divide model.num_experts = 16" in capsys.readouterr().err
    assert main(["rehearse", *small, "--stage", "rl"]) == 2
    assert "--stage rl is not one of pretrain, extend, sft" in capsys.readouterr().err


def test_a_group_that_is_there_is_left_alone() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(UsageError, match="process group of its own"):
            rehearse(config(), "pretrain", 2)
        assert torch.distributed.get_world_size() == 2
    finally:
        torch.distributed.destroy_process_group()


def test_the_middle_ranks_fetch_most() -> None:
    """Which is why a rehearsal is of rank 1."""
    for ranks in (2, 3, 4, 8):
        split: Any = RowSplit(ranks, 2 * ranks * 100)
        received = [sum(halo(split, rank, 50).receive_counts) for rank in range(ranks)]
        assert received[1] == max(received)
