"""Settings of reinforcement learning."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Fraction
from trinity.config.stage import StageConfig


class RLConfig(StageConfig):
    """Group-relative policy gradient on verifiable rewards."""

    environment: Literal["arithmetic", "word-problems", "instructions", "code", "repository"] = "arithmetic"
    """What is asked: sums and products; questions with a number as answer; constraints on the form; small functions;
    a repository to repair with tools. The last two run programs in the sandbox."""
    questions: str = ""
    """jsonl file of the questions of `word-problems` or `instructions`."""
    max_number: PositiveInt = 9
    """Largest operand of the generated arithmetic."""
    held_out_tasks: NonNegativeInt = 64
    """Held-out tasks that an evaluation plays, in the environments other than arithmetic."""
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 32
    group: Annotated[int, Field(ge=2)] = 8
    """Samples of one prompt, whose mean reward is the baseline."""
    updates: PositiveInt = 1
    """Optimizer steps of one rollout, each on prompts_per_step prompts of its own. Beyond 1 the later ones are
    off-policy, which is what the clip is for."""
    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    """The policy is softmax(logits / temperature), when it samples and when it trains."""
    kl: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the weights that the stage starts from (k3), a mean over the step's tokens;
    keeps a copy of those weights on the device (one process only)."""
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28
    """Asymmetric clipping of the probability ratio to [1 - clip_low, 1 + clip_high]."""
    max_weight: PositiveFloat = 2.0
    """Truncation of the importance weights between sampler and trainer."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide a group's centred rewards by their standard deviation, or by nothing."""
    normalise: Literal["token", "answer", "constant"] = "token"
    """The loss is a mean over tokens, over answers of their means, or the sum over the most tokens possible."""
    overlong_tokens: NonNegativeInt = 0
    """Over the last so many tokens before max_new_tokens the reward falls by up to 1; 0: it does not."""
    mask_cut: bool = False
    """Leave answers that were cut off out of the loss; they still count in their group's mean."""
    retries: NonNegativeInt = 0
    """How often a question whose answers all earned the same is replaced by another one."""
    max_turns: PositiveInt = 1
    """Turns of the policy in an episode; more than one only for tasks that reply."""
    replay: bool = True
    """Train with the experts that the sampler chose (router replay)."""
    gap_every: NonNegativeInt = 10
    """Steps between comparisons of sampler and trainer, with replay and without; 0: never."""
    ahead: bool = False
    """Sample the next step's answers on a copy of the weights while this step trains: one step off-policy."""
    sampler_batch: PositiveInt = 256
    """Answers sampled together."""
    server: str = ""
    """URL up to and with /v1 of a server that samples in place of the native engine; without replay."""
    server_model: str = "default"
    """The model's name on that server."""
    server_kind: Literal["vllm", "sglang"] = "vllm"
    """How the server is told to load new weights."""
    server_tempers: bool = False
    """The server's log-probabilities are those after the temperature: SGLang as it comes, vLLM started with
    --logprobs-mode processed_logprobs. Needed where the temperature is not 1."""

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server and self.replay:
            raise ValueError("server gives no experts to replay: set replay = false")
        if self.server and self.temperature != 1 and not self.server_tempers:
            raise ValueError(
                f"temperature = {self.temperature} needs a server whose log-probabilities are tempered too: SGLang, or "
                "vLLM with --logprobs-mode processed_logprobs; then set server_tempers = true"
            )
        return self
