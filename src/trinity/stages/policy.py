"""The policy of the RL stage: its loss on the training loop, its log-probabilities, and what it started from."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trinity.config import LossConfig, RLConfig
from trinity.data.rows import to_device
from trinity.evals.scoring import target_logprobs
from trinity.model.transformer import Transformer
from trinity.ops.cross_entropy import token_logprobs_and_entropies
from trinity.rl.loss import kl_penalty, policy_loss
from trinity.rl.rollout import Scorer
from trinity.rl.rows import PolicyRows, ReplayRows
from trinity.stages.setup import Stage
from trinity.train.compilation import compile_blocks
from trinity.train.losses import Batch, LossOutput, Share
from trinity.train.precision import KEEP


@dataclass(frozen=True)
class PolicyGradient:
    """`rl.loss.policy_loss` on `rl.rows.PolicyRows`, with the sequence-wise balance loss of every stage."""

    settings: RLConfig

    def __call__(self, model: nn.Module, batch: Batch, share: Share, settings: LossConfig) -> LossOutput:
        assert isinstance(model, Transformer)
        chosen_BTLk = batch.extra.get("experts_BTLk") if self.settings.replay else None
        features = model.features(batch.tokens_BT, batch.segments_BT, batch.positions_BT, chosen_BTLk=chosen_BTLk)
        there_BT = batch.targets_BT != -100
        logprobs_N, entropies_N = token_logprobs_and_entropies(
            features.x_BTD[there_BT],
            model.head.weight,
            batch.targets_BT[there_BT],
            chunk_tokens=settings.chunk_tokens,
            temperature=self.settings.temperature,
        )
        old_N = batch.extra["old_logprobs_BT"][there_BT]
        result = policy_loss(
            logprobs_N,
            torch.where(old_N.isnan(), logprobs_N.detach(), old_N),
            batch.extra["sampler_logprobs_BT"][there_BT],
            batch.extra["advantages_BT"][there_BT],
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            max_weight=self.settings.max_weight,
        )
        loss, kl_terms = result.sum / share.targets, dict[str, torch.Tensor]()
        if self.settings.kl:
            kl = kl_penalty(logprobs_N, batch.extra["start_logprobs_BT"][there_BT]) / share.targets
            loss, kl_terms = loss + self.settings.kl * kl, {"kl_start": kl.detach()}
        routing = features.routing
        part = (batch.segments_BT >= 0).sum() / share.tokens
        sequence_loss = settings.sequence_loss * part * routing.sequence_loss
        return LossOutput(
            loss=loss + sequence_loss,
            terms={
                "policy_loss": result.sum.detach() / share.targets,
                "sequence_loss": sequence_loss.detach(),
                "kl_gap": result.gap_sum / share.targets,
                "clip_fraction": result.clipped_tokens / share.targets,
                "truncated_fraction": result.truncated_tokens / share.targets,
                "policy_entropy": entropies_N.sum() / share.targets,
                "router_entropy": routing.entropy_L * part,
                **kl_terms,
            },
            mean=result.sum.detach() / there_BT.sum().clamp(min=1),
            counts_LE=routing.counts_LE,
            extremes={"router_max": routing.logit_max_L, "router_negated_min": -routing.logit_min_L},
            margins_LEB=routing.margins_LEB,
        )


def scorer(model: Transformer, temperature: float) -> Scorer:
    """The trainer's log-probabilities: the same forward pass and head as the loss."""

    @torch.no_grad()
    def score(rows: PolicyRows, replay: bool) -> np.ndarray:
        device = next(model.parameters()).device
        chosen_BTLk = None
        if replay and isinstance(rows, ReplayRows):
            chosen_BTLk = torch.from_numpy(rows.experts_BTLk).to(device)
        return target_logprobs(model, to_device(rows, device), chosen_BTLk, temperature).cpu().numpy()

    return score


def start_policy(stage: Stage) -> Transformer:
    """A frozen copy of the model as it is, on its device: of a stage that was just opened, the weights that it starts
    from, also where it then goes on from a checkpoint.

    It takes model.num_params() weights of `runtime.dtype`, with which the first forward passes of the training run.
    """
    runtime, model = stage.config.runtime, stage.model
    dtype, parameters = getattr(torch, runtime.dtype), dict(model.named_parameters())
    with torch.device("meta"):
        copy = Transformer(model.config, kernels=model.kernels)
    tensors = {}
    for name, tensor in model.state_dict().items():
        rounded = name in parameters and not name.endswith(KEEP)
        tensors[name] = tensor.detach().to(dtype if rounded else tensor.dtype, copy=True)
    copy.load_state_dict(tensors, assign=True)
    if runtime.fp8:
        copy.use_fp8(stage.device)
    compile_blocks(copy, runtime, stage.device)
    return copy.requires_grad_(False).eval()


def fingerprint(model: Transformer) -> str:
    """sha256 over names and bytes of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()
