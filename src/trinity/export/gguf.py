"""A public model directory -> one GGUF file of llama.cpp's architecture `afmoe`, written with the `gguf` package.

llama.cpp multiplies embeddings by sqrt(dim) always and makes every fourth layer global; other models are refused. Its
RoPE turns half-split pairs as ours does, so no rows are exchanged.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity.base.errors import UsageError, UserError
from trinity.base.files import FULL, read_json
from trinity.config import ModelConfig
from trinity.export.files import TensorFiles
from trinity.export.gguf_parity import compare_gguf
from trinity.export.keys import Piece, pieces
from trinity.export.oracle import Rounding
from trinity.export.parity import ParityReport
from trinity.export.reading import check_files, read_config, read_piece
from trinity.tokenizer import Tokenizer

TYPES = ("fp32", "bf16", "fp16")
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_mlp_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.gate_proj": "attn_gate",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export_gguf(source: Path | str, out: Path | str, *, dtype: str = "bf16", force: bool = False) -> ParityReport:
    """Write the model directory `source` as the file `out`; `dtype` is fp32, bf16 or fp16 (vectors and routers are
    float32 always).

    The file appears only when what was read back from it agrees with `source` (`gguf_parity`). Raises UserError for a
    model that llama.cpp computes differently, without the `gguf` package, or when `out` exists; ParityError when the
    file does not hold the model.
    """
    gguf = import_gguf()
    source, out = Path(source), Path(out)
    check_type(dtype)
    check_file(out, force=force)
    config = read_config(source)
    check_gguf(config)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with TensorFiles(source, read_json(source / "config.json").get("quantization_config")) as files:
            check_files(files, config)
            _write(gguf, partial, files, config, tokenizer, source, dtype, out.stem)
        report = compare_gguf(partial, source, config, tokenizer, stored(dtype))
        partial.replace(out)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk is full: {out} was not written") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    return report


def import_gguf() -> Any:
    """The `gguf` package. Raises UserError when it is not installed."""
    try:
        import gguf  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise UserError("GGUF needs the gguf package: pip install 'trinity-moe[gguf]'") from None
    return gguf


def check_type(dtype: str) -> None:
    """Raises UsageError for a type that is not written as GGUF."""
    if dtype not in TYPES:
        raise UsageError(f"--dtype {dtype} cannot be stored as GGUF here; use {', '.join(TYPES)}")


def check_file(out: Path, *, force: bool) -> None:
    """Raises UserError when something is there that is not to be replaced."""
    if out.is_dir():
        raise UserError(f"{out} is a directory; a GGUF export is one file, such as {out / 'model.gguf'}")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; choose another file or pass --force to replace it")


def stored(dtype: str) -> Rounding:
    """What comes back for a tensor of a public name."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def rounded(public: str, value: torch.Tensor) -> torch.Tensor:
        return value.float() if is_exact(public, value.ndim) else value.to(kind).float()

    return rounded


def is_exact(public: str, ndim: int) -> bool:
    """Whether a tensor is float32 in every file: llama.cpp wants vectors and routers so."""
    return ndim == 1 or public.endswith("router.gate.weight")


def _write(
    gguf: Any,
    path: Path,
    files: TensorFiles,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    source: Path,
    dtype: str,
    name: str,
) -> None:
    """Settings, then what will come, then the tensors one at a time: no more than a layer's experts are in memory."""
    writer = gguf.GGUFWriter(path, "afmoe")
    try:
        _settings(gguf, writer, config, name)
        _vocabulary(gguf, writer, config, source, tokenizer)
        kinds = gguf.GGMLQuantizationType
        wanted = {"fp32": kinds.F32, "bf16": kinds.BF16, "fp16": kinds.F16}[dtype]
        plan = _plan(config)
        for target, parts in plan.items():
            kind = kinds.F32 if is_exact(parts[0].public, len(parts[0].shape)) else wanted
            shape = (*([len(parts)] if parts[0].expert is not None else []), *parts[0].shape)
            size = torch.Size(shape).numel() * (4 if kind == kinds.F32 else 2)
            writer.add_tensor_info(target, shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for parts in plan.values():
            kind = kinds.F32 if is_exact(parts[0].public, len(parts[0].shape)) else wanted
            values = [gguf.quants.quantize(read_piece(files, p).float().contiguous().numpy(), kind) for p in parts]
            writer.write_tensor_data(values[0] if parts[0].expert is None else np.stack(values))
    finally:
        writer.close()


def check_gguf(config: ModelConfig) -> None:
    """Raises UserError for a model that llama.cpp would compute differently."""
    regular = tuple("global" if (i + 1) % 4 == 0 else "local" for i in range(config.num_layers))
    if config.layers != regular:
        raise UserError("llama.cpp makes every fourth layer global; this model's layers are others")
    if not config.embed_scale:
        raise UserError("llama.cpp multiplies embeddings by sqrt(dim) always; this model does not")
    if not config.num_shared_experts:
        raise UserError("llama.cpp expects a shared expert; this model has none")


def _settings(gguf: Any, writer: Any, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_sliding_window(config.window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_feed_forward_length(config.expert_dim)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.route_norm)
    writer.add_expert_weights_scale(config.route_scale)


def _vocabulary(gguf: Any, writer: Any, config: ModelConfig, source: Path, tokenizer: Tokenizer | None) -> None:
    """Tokens and merges of our byte-level BPE; ids that the tokenizer does not have are marked unused."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    content = read_json(source / "tokenizer.json")
    vocab = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    control = {t["id"] for t in content["added_tokens"] if t["special"]}
    words = [f"[UNUSED{i}]" for i in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for word, number in vocab.items():
        words[number] = word
        kinds[number] = gguf.TokenType.CONTROL if number in control else gguf.TokenType.NORMAL
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("afmoe")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.stop_ids[-1])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)


def _plan(config: ModelConfig) -> dict[str, list[Piece]]:
    """What each of llama.cpp's tensors is made of: one public tensor, or those of all experts of a layer."""
    plan: dict[str, list[Piece]] = {}
    for piece in pieces(config):
        if piece.expert is None:
            plan[_name(piece.public)] = [piece]
            continue
        above, _, rest = piece.public.partition(".experts.")
        part = rest.split(".")[1].removesuffix("_proj")
        layer = above.split(".")[2]
        plan.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(piece)
    return plan


def _name(public: str) -> str:
    stem = public.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    if rest == "mlp.expert_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_LAYER[rest]}.weight"
