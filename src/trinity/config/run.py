"""Every setting of a run. Published values are cited; where nothing is public the default is ours and says so."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Fraction, Frozen
from trinity.config.lora import LoRAConfig
from trinity.config.model import ModelConfig
from trinity.config.parallel import ParallelConfig
from trinity.config.retrieval import RetrievalConfig
from trinity.config.rl import RLConfig
from trinity.config.sft import SFTConfig
from trinity.config.stage import ExtendConfig, PretrainConfig


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
