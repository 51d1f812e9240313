"""Tasks with verifiable rewards, from single questions to a repository with a failing test.

The protocol (`environment.Environment`) has the shape of the `verifiers` package: rows with `prompt`, `answer`, `info`;
a rollout of messages; a rubric of reward functions.
"""
