"""The tokenizer: text, bytes and conversations to ids and back, and its directory on disk."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from trinity.base.errors import UsageError, UserError
from trinity.base.files import atomic_write, read_json, write_json
from trinity.tokenizer.any_bytes import encode_any_bytes
from trinity.tokenizer.pretokenize import byte_alphabet, cut_long, trinity_pre_tokenizer
from trinity.tokenizer.template import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    Message,
    Tool,
    assistant_mask,
    default_template,
    render,
)

PART_CHARACTERS = 1 << 18
"""Longer texts are encoded in parts, which bounds memory and lets a book use every core."""

_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Tokenizer:
    """A byte-level BPE tokenizer with special tokens and a chat template.

    Text is data: in `encode` and `encode_batch` the string "<|im_end|>" is ten characters like any others. Special
    tokens come from the chat template, from `eos_id` and its like, or from `encode(..., special=True)`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None = None,
        eos_token: str = END_OF_TEXT,
        pad_token: str = END_OF_TEXT,
        max_positions: int | None = None,
    ):
        """`tokenizer_json` is the content of a tokenizer.json; raises UserError when it is not byte-level BPE."""
        self._json = tokenizer_json
        self.chat_template = chat_template or default_template()
        self.eos_token, self.pad_token = eos_token, pad_token
        self._max_positions = max_positions
        try:
            self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer.json cannot be read: {error}") from None
        # The same vocabulary, shared, without special tokens: nothing in a text is one.
        self._plain = tokenizers.Tokenizer(self._full.model)
        if self._full.normalizer is not None:
            self._plain.normalizer = self._full.normalizer
        cuts = self._full.pre_tokenizer
        if cuts is not None:
            self._plain.pre_tokenizer = cuts
        # The serialised form, for the printed one is shortened.
        self._own_cuts = (
            self._full.normalizer is None
            and cuts is not None
            and cuts.__getstate__() == trinity_pre_tokenizer().__getstate__()
        )
        added = self._full.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items()}
        self._hidden = {i for i, token in added.items() if token.special}
        self.vocab_size: int = self._full.get_vocab_size(with_added_tokens=True)
        self.fingerprint: str = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self._byte_ids: list[int] = []
        for byte, character in enumerate(byte_alphabet()):
            byte_id = self._plain.token_to_id(character)
            if byte_id is None:
                raise UserError(f"the vocabulary lacks byte 0x{byte:02x}; a byte-level BPE tokenizer is needed")
            self._byte_ids.append(byte_id)
        self.eos_id: int = self.special_id(eos_token)
        self.pad_id: int = self.special_id(pad_token)

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Read a tokenizer directory, ours or another byte-level BPE one; raises UserError that names the file."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError:
            raise UserError(f"{directory} is not a tokenizer directory: there is no file {path}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None
        config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = read_json(config_path)
        if not isinstance(config, dict):
            raise UserError(f"{config_path} is not a JSON object")
        template = config.get("chat_template")
        if template_path.exists():
            try:
                template = template_path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{template_path} cannot be read: {error}") from None
        if template is not None and not isinstance(template, str):
            raise UserError(f"{config_path} holds several chat templates; write the one to use to {template_path}")
        eos = _token_name(config.get("eos_token")) or END_OF_TEXT
        try:
            return cls(text, template, eos, _token_name(config.get("pad_token")) or eos, config.get("model_max_length"))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, directory: Path | str, model_max_length: int | None = None) -> None:
        """Write the four files that `transformers.AutoTokenizer` and inference servers read.

        `model_max_length` is in tokens; without it, the value that was loaded is kept.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = {"eos_token": self.eos_token, "pad_token": self.pad_token}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            **names,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        length = model_max_length or self._max_positions
        if length is not None:
            config["model_max_length"] = length
        for name, text in (("tokenizer.json", self._json), ("chat_template.jinja", self.chat_template)):
            with atomic_write(directory / name) as file:
                file.write(text.encode())
        write_json(directory / "special_tokens_map.json", names)
        write_json(directory / "tokenizer_config.json", config)

    def special_id(self, token: str) -> int:
        """The id of a special token such as "<think>"; raises UserError when this tokenizer has none."""
        if token not in self._special:
            raise UserError(f"the tokenizer has no special token {token}; it has {', '.join(self._special) or 'none'}")
        return self._special[token]

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which an answer is complete: the end of the turn, where there is one, and of the document."""
        return sorted({self.eos_id} | ({self._special[TURN_END]} if TURN_END in self._special else set()))

    def check_model_vocab(self, model_vocab_size: int) -> None:
        """Raises UsageError unless the model's embedding has a row for every id; more rows are padding."""
        if model_vocab_size < self.vocab_size:
            raise UsageError(
                f"model.vocab_size = {model_vocab_size} is smaller than the tokenizer's {self.vocab_size} entries; "
                f"set it to {self.vocab_size} or more"
            )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. With `special`, strings such as "<|im_end|>" in it become special tokens.

        Raises UserError for a lone surrogate, which is not text; `encode_bytes` takes any bytes.
        """
        if special:
            return self._encode(self._full, [text])[0].ids
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32 [n], computed on every core without the GIL."""
        size = PART_CHARACTERS if self._own_cuts else max(map(len, texts), default=0)
        parts = [cut_long(text, size) for text in texts]
        encodings = iter(self._encode(self._plain, [part for split in parts for part in split]))
        return [_join([np.array(next(encodings).ids, np.uint32) for _ in split]) for split in parts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any byte string: valid UTF-8 as text, every other byte as the token of that byte."""
        model = self._plain.model if self._own_cuts else None
        return encode_any_bytes(data, self._byte_ids, self.encode_batch, model).tolist()

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control tokens out."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """Bytes of ids, the inverse of `encode_bytes`; ids in the model's padding raise UserError."""
        table, hidden = self._token_bytes, self._hidden if skip_special else ()
        try:
            return b"".join([table[i] for i in map(int, ids) if i not in hidden])
        except KeyError as error:
            raise UserError(f"id {error} is not in the tokenizer's {self.vocab_size} entries") from None

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text, as `transformers`' `apply_chat_template` renders it; raises UserError."""
        names = {"eos_token": self.eos_token, "pad_token": self.pad_token}
        return render(self.chat_template, messages, tools, add_generation_prompt, names)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation and, for each, whether to learn it: what the assistant wrote, with its `<|im_end|>`.

        The ids are those of `encode(render_chat(...), special=True)`. Raises UserError for a malformed conversation
        and for a chat template whose turns are not ChatML.
        """
        ids = self.encode(self.render_chat(messages, tools, add_generation_prompt), special=True)
        start, end = self.special_id(TURN_START), self.special_id(TURN_END)
        mask = assistant_mask(ids, start, end, self._assistant_header)
        if not any(mask) and any(message["role"] == "assistant" for message in messages):
            raise UserError(f"the chat template does not open the assistant's turn with {TURN_START}assistant")
        return ids, mask

    @cached_property
    def _assistant_header(self) -> list[int]:
        return self.encode("assistant\n")

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        to_byte = {character: byte for byte, character in enumerate(byte_alphabet())}
        table = {i: token.encode() for token, i in self._special.items()}
        for token, i in self._plain.get_vocab().items():
            if i not in table:
                table[i] = bytes([to_byte[character] for character in token])
        return table

    def _encode(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        try:
            return backend.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            for number, text in enumerate(texts):
                found = _SURROGATES.search(text)
                if found:
                    raise UserError(
                        f"text {number} holds the lone surrogate U+{ord(found[0][0]):04X} at character "
                        f"{found.start()}, which is not valid Unicode; replace it, or encode the original bytes"
                    ) from None
            raise


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _token_name(value: Any) -> str | None:
    """Directories written by older libraries hold the token's properties instead of its name."""
    return value.get("content") if isinstance(value, dict) else value
