"""Training: one loop for every stage, its step, guard and checkpoints."""

from trinity.train.job import (
    Evaluation,
    Optimizer,
    Outcome,
    Progress,
    Record,
    Silent,
    Source,
    TrainJob,
    TrainResult,
)
from trinity.train.loop import train
from trinity.train.losses import Batch, LossFunction, LossOutput, Share, language_model_loss

__all__ = [
    "Batch",
    "Evaluation",
    "LossFunction",
    "LossOutput",
    "Optimizer",
    "Outcome",
    "Progress",
    "Record",
    "Share",
    "Silent",
    "Source",
    "TrainJob",
    "TrainResult",
    "language_model_loss",
    "train",
]
