"""The gate of a GGUF file: what is read back from it must compute what the model directory computes.

The names are those that the `gguf` package itself gives the public ones, and the settings of the forward pass are the
file's own, so that a fault of the writer's tables is seen. llama.cpp itself is compared by the tests of other engines.
"""

from pathlib import Path
from typing import Any

import torch

from trinity.base.files import read_json
from trinity.config import ModelConfig
from trinity.export.files import TensorFiles
from trinity.export.keys import pieces
from trinity.export.oracle import Rounding, oracle_forward, oracle_pass
from trinity.export.parity import ParityError, ParityReport, compare_logits, prompts
from trinity.export.reading import read_piece
from trinity.tokenizer import Tokenizer


def compare_gguf(
    path: Path, source: Path, config: ModelConfig, tokenizer: Tokenizer | None, rounding: Rounding
) -> ParityReport:
    """Compare the file at `path` with the directory `source`, whose tensors it holds after `rounding`.

    Raises ParityError that names the tensor, the token or the logits that differ.
    """
    written = GgufTensors(path)
    held = set(written.names_in_file)
    with TensorFiles(source, read_json(source / "config.json").get("quantization_config")) as files:
        for piece in pieces(config):
            expected = rounding(piece.public, read_piece(files, piece))
            if not written.holds(piece.public) or not torch.equal(written.raw(piece.public), expected):
                raise ParityError(f"{path}: {piece.public} comes back with other values than in {source}")
            held.discard(written.place(piece.public)[0])
    if held:
        raise ParityError(f"{path}: {min(held)} is no tensor of this model")
    if tokenizer is not None:
        _compare_vocabulary(written, tokenizer, config, path)
    rows_BT = prompts(config, tokenizer)
    expected_output = oracle_forward(source, rows_BT, rounding=rounding)
    found = oracle_pass(written, written.settings(), rows_BT, expected_output.indices_LNk)
    if found.regret_LN.numel() and found.regret_LN.max() > 0:
        raise ParityError(f"{path}: tokens go to other experts than in {source}")
    name = "independent forward pass over the GGUF file"
    error = compare_logits(name, expected_output.logits_BTV, found.logits_BTV, path)
    skipped = {"llama.cpp": "not run by an export; `make test-clients` compares with it"}
    return ParityReport(rows_BT.numel(), {name: error}, skipped, None)


class GgufTensors:
    """The tensors of a GGUF file by public name, mapped from the file; `oracle.Tensors`."""

    def __init__(self, path: Path) -> None:
        import gguf  # type: ignore[import-not-found]  # optional; the writer has checked

        self._gguf, self._path = gguf, path
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.AFMOE, self.field("block_count"))
        self.names_in_file = tuple(self._tensors)

    @property
    def names(self) -> "GgufTensors":
        return self

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.holds(name)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of this public name."""
        return self.place(name)[0] in self._tensors

    def place(self, name: str) -> tuple[str, int | None]:
        """Name in the file, and the number of the expert in it."""
        expert = None
        if ".mlp.experts." in name:
            above, _, rest = name.partition(".experts.")
            number, part = rest.split(".", 1)
            expert, name = int(number), f"{above}.experts.{part}"
        stem = name.removesuffix(".weight")
        found = self._map.get_name(stem)
        return f"{found}.{'bias' if stem.endswith('expert_bias') else 'weight'}", expert

    def raw(self, name: str) -> torch.Tensor:
        """The value in float32."""
        place, expert = self.place(name)
        if place not in self._tensors:
            raise ParityError(f"{self._path}: there is no {place} for {name}")
        tensor = self._tensors[place]
        data = tensor.data if expert is None else tensor.data[expert]
        return torch.from_numpy(self._gguf.quants.dequantize(data, tensor.tensor_type).copy()).float()

    def field(self, name: str) -> Any:
        """A setting of the architecture."""
        return self._reader.fields[f"afmoe.{name}"].contents()

    def tokenizer_field(self, name: str) -> Any:
        """A setting of the vocabulary; None where it is missing."""
        found = self._reader.fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    def settings(self) -> dict[str, Any]:
        """What config.json would say; llama.cpp takes for granted that every fourth layer is global and that
        embeddings are multiplied by sqrt(dim)."""
        field = self.field
        kinds = ("sliding_attention", "sliding_attention", "sliding_attention", "full_attention")
        return {
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "mup_enabled": True,
            "hidden_size": field("embedding_length"),
            "layer_types": [kinds[i % 4] for i in range(field("block_count"))],
            "num_dense_layers": field("leading_dense_block_count"),
            "num_experts": field("expert_count"),
            "num_experts_per_tok": field("expert_used_count"),
            "num_shared_experts": field("expert_shared_count"),
            "num_attention_heads": field("attention.head_count"),
            "num_key_value_heads": field("attention.head_count_kv"),
            "head_dim": field("attention.key_length"),
            "rope_theta": field("rope.freq_base"),
            "sliding_window": field("attention.sliding_window"),
            "route_norm": field("expert_weights_norm"),
            "route_scale": field("expert_weights_scale"),
        }


def _compare_vocabulary(written: GgufTensors, tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Every token must stand for the bytes that it stands for in `tokenizer`."""
    words, kinds = written.tokenizer_field("tokens"), written.tokenizer_field("token_type")
    if words is None or len(words) != config.vocab_size:
        raise ParityError(f"{path}: the vocabulary has not {config.vocab_size} entries")
    control = written._gguf.TokenType.CONTROL
    table = _byte_of_letter()
    for number in range(tokenizer.vocab_size):
        expected = tokenizer.decode_bytes([number])
        word = words[number]
        spelled = word.encode()
        if kinds[number] != control and word.encode() != expected:
            spelled = bytes(table.get(letter, 0) for letter in word)
        if spelled != expected:
            raise ParityError(f"{path}: token {number} is {word!r}, but the tokenizer's is {expected!r}")


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}
