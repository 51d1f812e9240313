"""Every setting of a run. Published values are cited; where nothing is public the default is ours and says so."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Frozen
from trinity.config.lora import LoRAConfig
from trinity.config.model import ModelConfig
from trinity.config.parallel import ParallelConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class TokenizerConfig(Frozen):
    vocab_size: PositiveInt = 200_000
    """Entries learned by BPE, bytes included; special tokens come on top and model.vocab_size pads the rest."""
    sample_bytes: PositiveInt = 48_000_000_000
    """Bytes of text to train on at most; the report's tokenizer saw about 48 GB."""


class BalanceConfig(Frozen):
    """How the expert biases move, once per optimizer step (spec section 3)."""

    kind: Literal["smebu", "sign", "quantile", "none"] = "smebu"
    rate: NonNegativeFloat = 5e-4
    """lambda of SMEBU, gamma of the sign update; quantile balancing has no rate."""
    kappa: PositiveFloat = 2.0
    """Steepness of SMEBU's tanh; to infinity it becomes the sign update."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """beta of SMEBU."""
    recenter: bool = True
    """Keep the mean of the sign update's biases at zero."""
    frozen: bool = False
    """Keep the biases as they are; off in every stage by default."""


class LossConfig(Frozen):
    z_loss: NonNegativeFloat = 1e-6
    """Coefficient of mean(logsumexp(logits)^2); larger values destabilised the published run."""
    sequence_loss: NonNegativeFloat = 1e-4
    """alpha of the sequence-wise balance loss."""
    chunk_tokens: PositiveInt = 2048
    """Tokens whose logits exist at the same time."""
    cross_entropy: Literal["chunked", "liger", "cce"] = "chunked"
    """Whose loss without full logits: ours, Liger Kernel's, or cut cross-entropy (a GPU and the package; cce without
    z-loss)."""


class OptimConfig(Frozen):
    """Muon on hidden matrices, AdamW on embedding, head and vectors."""

    muon_lr: PositiveFloat = 8e-4
    adamw_lr: PositiveFloat = 2e-4
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    nesterov: bool = True
    """Not public; on, as in the reference Muon."""
    newton_schulz: Literal["polar-express", "quintic"] = "polar-express"
    """Coefficient set: five different iterations of the authors' fork, or Muon's single quintic."""
    adamw_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    adamw_eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled, on matrices only. Not public; 0.1 is the field's habit."""
    hidden: Literal["muon", "adamw"] = "muon"
    """Which optimizer moves the matrices of the layers; AdamW, at adamw_lr, is for comparison."""
    router: Literal["muon", "adamw"] = "adamw"
    """Which optimizer moves the router's matrix. Not public."""
    clip_norm: PositiveFloat = 1.0


class GuardConfig(Frozen):
    """What happens when a step goes wrong."""

    enabled: bool = True
    window: PositiveInt = 128
    """Steps of history behind the spike score."""
    sigma: PositiveFloat = 6.0
    """A loss or gradient norm this many standard deviations above the window's mean is a spike."""
    skips_before_rollback: PositiveInt = 3
    """Bad steps in a row that are skipped before the last good checkpoint is loaded again."""
    max_rollbacks: NonNegativeInt = 3
    """Rollbacks after which the run stops with an error."""


class CheckpointConfig(Frozen):
    enabled: bool = True
    """Off for measurements only: nothing is saved or exported, so a stopped run starts over and the guard has
    nothing to roll back to."""
    every_steps: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    """Also keep every checkpoint whose step divides by this; 0 keeps none."""
    asynchronous: bool = True
    """Write behind the next steps; the weights are copied first."""


class DataConfig(Frozen):
    """Where the tokens are and how rows are filled."""

    shards: str = ""
    """Directory that `trinity data prepare` wrote."""
    tokenizer: str = ""
    """Tokenizer directory; must be the one that made the shards."""
    packing: Literal["rsdb", "concat", "best-fit", "single"] = "rsdb"
    buffer: PositiveInt = 4096
    """User size of the RSDB over all streams: refill below it, hold up to twice as many documents."""
    streams: PositiveInt = 8
    """Fixed logical streams; any number of ranks that divides it sees the same global batches."""
    document_mask: bool = True
    """Tokens of a row of the shards attend only inside their own document; off for ablation."""
    max_epochs: PositiveInt = 4
    """Passes over a domain after which it leaves the mixture."""
    prefetch: NonNegativeInt = 2
    """Batches assembled ahead of the step by a background thread; 0 assembles inline."""
    workers: PositiveInt = 1
    """Threads that fill a batch's rows, each for some of the streams. One keeps up with a GPU while the shards are in
    memory; several wait for a slow disk at the same time."""


class Phase(Frozen):
    """One phase of the data mix."""

    name: str
    tokens: PositiveInt
    weights: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    """Share of the tokens by domain, or by `source:PATTERN` (as in a shell) of the recorded sources; normalised. What
    names nothing in the shards is refused."""


class BatchSize(Frozen):
    """Rows per optimizer step from a number of tokens on."""

    from_tokens: NonNegativeInt
    rows: PositiveInt


class StageConfig(Frozen):
    """What every training stage has. A row is one sequence of `seq_len` tokens."""

    seq_len: PositiveInt
    micro_rows: PositiveInt = 1
    """Rows of one forward pass on one rank; gradients accumulate over the rest."""
    lr_scale: PositiveFloat = 1.0
    """Factor on both learning rates at the start of the stage (after warm-up)."""
    final_lr_scale: NonNegativeFloat = 0.1
    """Factor on both learning rates at the end of the stage."""
    warmup_steps: NonNegativeInt = 0
    decay_fraction: Fraction = 1.0
    """Last part of the stage's tokens over which the learning rate falls along a cosine; before it, it is stable."""
    eval_every: PositiveInt = 250
    eval_rows: PositiveInt = 64
    """Held-out rows of an evaluation, per domain."""


Retrieval = Literal["lookup", "values", "queries", "tracking", "count", "where", "quote"]
"""What training documents about retrieval ask for (`data/retrieval.py`)."""


class RetrievalConfig(Frozen):
    """How training documents about retrieval are made. Nothing here is public; the values are ours."""

    tasks: Annotated[dict[Retrieval, PositiveFloat], Field(min_length=1)] = Field(
        default_factory=lambda: {
            "lookup": 4.0, "values": 1.0, "queries": 1.0, "tracking": 0.5, "count": 0.25, "where": 1.0, "quote": 2.0
        }
    )  # fmt: skip
    """Share of each task among the questions, by weights."""
    density: tuple[Fraction, Fraction] = (0.1, 0.9)
    """Smallest and largest part of a document that facts and questions take; drawn evenly on a logarithmic scale. The
    rest is text of the training shards. Denser documents ask more often for each token read."""
    whole_rows: Fraction = 0.5
    """Share of the retrieval rows that are one document; the others hold several shorter ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.density
        if not 0 < low <= high:
            raise ValueError(f"density must be two rising numbers above 0, not {low} and {high}")
        return self


class PretrainConfig(StageConfig):
    niah_share: Fraction = 0.0
    """As `extend.niah_share`."""
    phases: tuple[Phase, ...]
    batch: tuple[BatchSize, ...]
    """Batch ramp; the first entry starts at token 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.phases:
            raise ValueError("phases is empty; a run needs at least one")
        if not self.batch or self.batch[0].from_tokens != 0:
            raise ValueError("batch must start with an entry of from_tokens = 0")
        starts = [b.from_tokens for b in self.batch]
        if starts != sorted(set(starts)):
            raise ValueError(f"batch entries must rise in from_tokens, not {starts}")
        return self

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)


class ExtendConfig(StageConfig):
    """Context extension: straight to the longest rows."""

    tokens: PositiveInt
    batch_rows: PositiveInt
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Share by domain; empty takes the last pretraining phase's."""
    length_bias: NonNegativeFloat = 1.0
    """A document is drawn with odds (length ** length_bias) inside its domain; 0 draws evenly."""
    niah_share: Fraction = 0.0
    """Share of rows that are generated retrieval documents (`retrieval`): nothing in them meets the evaluation. Only
    their answers bear a loss."""
    niah_every: NonNegativeInt = 0
    """Steps between evaluations of MK-NIAH during the run; 0 evaluates at the end only."""
    stop_at: Fraction = 1.0
    """Stop early once MK-NIAH at seq_len reaches this score; 1.0 runs to the end."""


class SFTConfig(StageConfig):
    conversations: tuple[str, ...] = ()
    """jsonl(.gz, .zst) or parquet files with a `messages` column."""
    epochs: PositiveInt = 3
    batch_rows: PositiveInt = 32
    held_out: Fraction = 0.05
    """Share of the conversations kept for evaluation, chosen by content hash."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns have loss; a message's own `weight` (0 or 1) goes before."""
    packing: Literal["best-fit", "rsdb", "single"] = "best-fit"
    """best-fit: whole conversations, longest first into the fullest row with room; rsdb: drawn at random from a buffer,
    a conversation that reaches the end of a row goes on in a later one; single: one conversation a row."""
    template_samples: NonNegativeInt = 32
    """Held-out conversations whose next turn is sampled, to see whether the answers keep to the template."""
    sample_tokens: PositiveInt = 256
    """Most tokens of such an answer."""


class RLConfig(StageConfig):
    """Group-relative policy gradient on verifiable rewards."""

    environment: Literal["arithmetic", "word-problems", "instructions", "code", "repository"] = "arithmetic"
    """What is asked: sums and products; questions with a number as answer; constraints on the form; small functions;
    a repository to repair with tools. The last two run programs in the sandbox."""
    questions: str = ""
    """jsonl file of the questions of `word-problems` or `instructions`."""
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

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server and self.replay:
            raise ValueError("server gives no experts to replay: set replay = false")
        return self

    max_number: PositiveInt = 9
    """Largest operand of the generated arithmetic."""


NeedleTask = Literal["multikey", "single", "multivalue", "multiquery", "tracking"]


class EvalConfig(Frozen):
    niah_tasks: Annotated[tuple[NeedleTask, ...], Field(min_length=1)] = ("multikey",)
    """RULER's tasks to ask; the first one's score decides about `extend.stop_at`."""
    niah_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (4096, 8192, 16384, 32768)
    niah_depths: PositiveInt = 5
    """Depths of the needle, evenly from the start to the end of the haystack."""
    niah_keys: PositiveInt = 4
    """Needles in a haystack, of which one is asked for."""
    niah_samples: PositiveInt = 20
    """Questions per cell of length and depth."""
    niah_reuse: bool = False
    """One text for the questions of all depths of multikey and single: it is read once, however many depths there are.
    It then has at least as many needles as depths."""
    arithmetic_questions: PositiveInt = 200


class RuntimeConfig(Frozen):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the forward and backward pass; weights of the optimizer are float32 where master_weights is on."""
    master_weights: bool = True
    seed: NonNegativeInt = 0
    compile: bool = True
    """torch.compile the blocks on a GPU; the CPU runs eagerly."""
    cuda_graphs: bool = True
    """Record forward and backward pass of a micro-batch as one CUDA graph and replay it (one GPU; the CPU has none)."""
    recompute: Literal["none", "selective", "block"] = "none"
    """What the backward pass computes again: nothing, what is cheap (norms, gates, activations), or whole blocks."""
    fp8: bool = False
    """Matrix products of the blocks in FP8, forward and input gradients (`ops/fp8.py`); a CPU simulates them."""
    kernels: Literal["fast", "reference"] = "fast"
    """The plain reference of every operation, or the fastest path that the device has."""
    threads: NonNegativeInt = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    timeout: PositiveFloat = 600.0
    """Seconds that a group of processes waits for a rank at a step, an evaluation or a checkpoint before it ends."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fp8 and (self.compile or self.kernels == "reference"):
            raise ValueError("runtime.fp8 has kernels of its own: it needs runtime.compile = false and kernels = fast")
        if self.recompute == "selective" and self.compile:
            raise ValueError(
                "runtime.recompute = selective needs runtime.compile = false: the compiler decides itself what it keeps"
            )
        return self


class RunConfig(Frozen):
    """One run, from text to a served model."""

    name: str
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    balance: BalanceConfig = BalanceConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    pretrain: PretrainConfig
    extend: ExtendConfig
    sft: SFTConfig
    rl: RLConfig
    lora: LoRAConfig = LoRAConfig()
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    eval: EvalConfig = EvalConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.balance.kind == "quantile" and self.model.experts_per_token == self.model.num_experts:
            raise ValueError("balance.kind = quantile needs model.experts_per_token below model.num_experts")
        return self
