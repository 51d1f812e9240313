"""Rewards that a program can verify: each takes an `Attempt` and gives a number from 0 to 1."""

from trinity.rl.rewards.attempt import Attempt, Message, Reward, Rubric, Scores
from trinity.rl.rewards.integers import exact_integer, read_integer

__all__ = ["Attempt", "Message", "Reward", "Rubric", "Scores", "exact_integer", "read_integer"]
