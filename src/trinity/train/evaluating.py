"""Evaluations between steps: when each is due, and running one so that training goes on as if it had not been."""

from contextlib import nullcontext

import torch

from trinity.base import dist
from trinity.optim.schedule import StepPlan
from trinity.train.job import Evaluation, Outcome, TrainJob
from trinity.train.journal import Journal


def is_due(evaluation: Evaluation, plan: StepPlan, step: int) -> bool:
    """Whether an evaluation is to run after `step` steps of the plan."""
    if step == len(plan):
        return evaluation.at_end
    if evaluation.at_phase_end and plan[step].phase != plan[step - 1].phase:
        return True
    return evaluation.every > 0 and step % evaluation.every == 0


def evaluate(job: TrainJob, evaluation: Evaluation, step: int, journal: Journal) -> Outcome:
    """Run an evaluation in eval mode without gradients, with a random state of its own; write down what it found."""
    dist.place.arrive(f"the evaluation after step {step}")
    model, training = job.model, job.model.training
    device = next(model.parameters()).device
    model.eval()
    whole = nullcontext() if job.sharding is None else job.sharding.whole_rows()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), whole:
        outcome = evaluation.run(model, step)
    model.train(training)
    for record in outcome.metrics:
        journal.metric({"stage": job.stage, "step": step, **record})
    for sample in outcome.samples:
        journal.sample(sample, step=step)
    return outcome
