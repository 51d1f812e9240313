"""A public model directory -> one GGUF file of llama.cpp's architecture `afmoe`, written with the `gguf` package.

llama.cpp multiplies embeddings by sqrt(dim) always and makes every fourth layer global; other models are refused. Its
RoPE turns half-split pairs as ours does, so no rows are exchanged. One tensor is in memory at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trinity.base.errors import UsageError, UserError
from trinity.base.files import read_json
from trinity.config import ModelConfig
from trinity.export.files import TensorFiles
from trinity.export.keys import Piece, pieces
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


def export_gguf(source: Path | str, out: Path | str, *, dtype: str = "bf16", force: bool = False) -> None:
    """Write the model directory `source` as the file `out`; `dtype` is fp32, bf16 or fp16 (vectors are float32 always).

    Raises UserError for a model that llama.cpp computes differently, without the `gguf` package, or when `out` exists.
    """
    try:
        import gguf  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise UserError("GGUF needs the gguf package: pip install 'trinity-moe[gguf]'") from None
    source, out = Path(source), Path(out)
    if dtype not in TYPES:
        raise UsageError(f"--dtype {dtype} cannot be stored as GGUF here; use {', '.join(TYPES)}")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; choose another file or pass --force to replace it")
    config = read_config(source)
    check_gguf(config)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TensorFiles(source, read_json(source / "config.json").get("quantization_config")) as files:
            check_files(files, config)
            writer = gguf.GGUFWriter(partial, "afmoe", use_temp_file=True)
            _settings(gguf, writer, config, out.stem)
            _vocabulary(gguf, writer, config, source, tokenizer)
            kinds = gguf.GGMLQuantizationType
            kind = {"fp32": kinds.F32, "bf16": kinds.BF16, "fp16": kinds.F16}[dtype]
            for name, tensor in _tensors(files, config):
                stored = kinds.F32 if tensor.ndim == 1 or "ffn_gate_inp" in name else kind
                data = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
                writer.add_tensor(name, data, raw_dtype=stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


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


def _tensors(files: TensorFiles, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(llama.cpp's name, value), the experts of a layer stacked."""
    stacks: dict[str, list[Piece]] = {}
    for piece in pieces(config):
        if piece.expert is None:
            yield _name(piece.public), read_piece(files, piece)
            continue
        above, _, rest = piece.public.partition(".experts.")
        part = rest.split(".")[1].removesuffix("_proj")
        layer = above.split(".")[2]
        stacks.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(piece)
    for name, parts in stacks.items():
        yield name, torch.stack([read_piece(files, piece) for piece in parts])


def _name(public: str) -> str:
    stem = public.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    if rest == "mlp.expert_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_LAYER[rest]}.weight"
