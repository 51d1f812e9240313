"""Conversations -> packed rows for supervised fine-tuning, with loss only on what the assistant wrote.

Each conversation is its own document, and by default none is split, so packing changes no loss. The order of an epoch
is a permutation of the conversations that follows from (seed, epoch), and so do its rows: the state is one row counter.
"""

import hashlib
import io
import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from trinity.base.errors import UserError
from trinity.base.rng import Draws, derive
from trinity.data.permutation import Permutation
from trinity.data.rows import IGNORE, Chunk, Rows, empty_rows, finish_row
from trinity.tokenizer import Tokenizer

Message = dict[str, Any]
Turns = Literal["all", "last"]
Packing = Literal["best-fit", "rsdb", "single"]

_PACK_WINDOW = 4096  # conversations packed together: enough for rows that are nearly full, few enough to stay random
_BUFFER = 512  # conversations that RSDB draws from: refilled to twice as many when so few are left


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Any] | None
    where: str
    """File and line (or row), for messages."""

    @property
    def hash(self) -> bytes:
        """SHA-256 of the content, the same for any order of a message's keys."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).digest()


def read_conversations(paths: Iterable[str | Path]) -> Iterator[Conversation]:
    """Conversations of jsonl(.gz, .zst) and parquet files, in file order; each has `messages` and perhaps `tools`.

    Raises UserError naming file and line for a file that is missing or of another kind, a line that is not JSON, a
    message without a known role or with content that is not text, and a conversation without an assistant message.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"there is no conversations file {path}")
        for where, record in _records(path):
            yield _checked(record, where)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        try:
            table = pq.ParquetFile(path)
            row = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read as parquet: {error}") from None
        return
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except (OSError, EOFError, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from None


def _open_text(path: Path) -> io.TextIOBase:
    name = path.name
    if name.endswith(".jsonl"):
        return path.open(encoding="utf-8")
    if name.endswith(".jsonl.gz"):
        import gzip

        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    if name.endswith(".jsonl.zst"):
        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8")
    raise UserError(f"{path} is not a conversations file: use .jsonl, .jsonl.gz, .jsonl.zst or .parquet")


def _checked(record: Any, where: str) -> Conversation:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no list `messages`")
    clean: list[Message] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise UserError(f"{where}: message {i} has no role out of system, user, assistant, tool")
        # Parquet gives every message every column; what is null is not there.
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("content", ""), str) or (
            "content" not in message and not message.get("tool_calls")
        ):
            raise UserError(f"{where}: message {i} ({message['role']}) has no text `content`")
        _check_weight(message, f"{where}: message {i}")
        clean.append(message)
    if not any(message["role"] == "assistant" for message in clean):
        raise UserError(f"{where} has no assistant message, so nothing in it can be learned")
    return Conversation(clean, record.get("tools") or None, where)


def _check_weight(message: Message, where: str) -> None:
    if "weight" not in message:
        return
    if message["role"] != "assistant":
        raise UserError(f"{where} ({message['role']}) has a weight; only the assistant's turns can have loss")
    if isinstance(message["weight"], bool) or message["weight"] not in (0, 1):
        raise UserError(f"{where} has weight {message['weight']!r}; use 1 to learn the turn, 0 to read it only")


def learned_turns(messages: Sequence[Message], turns: Turns) -> list[bool]:
    """Whether each of the assistant's turns has loss: all or the last, and where a message says `weight`, that."""
    answers = [message for message in messages if message["role"] == "assistant"]
    return [
        bool(message.get("weight", turns == "all" or number == len(answers) - 1))
        for number, message in enumerate(answers)
    ]


def switch_turns(mask: Sequence[bool], learned: Sequence[bool]) -> list[bool]:
    """The loss mask of a conversation without the turns that are not to be learned.

    The assistant's turns are the runs of `mask`: between two of them stand the tokens that close and open a turn.
    """
    switched, turn = [], -1
    for position, here in enumerate(mask):
        if here and (position == 0 or not mask[position - 1]):
            turn += 1
        switched.append(here and learned[turn])
    assert turn + 1 == len(learned), f"{turn + 1} turns in the mask, {len(learned)} in the messages"
    return switched


def is_held_out(conversation: Conversation, share: float) -> bool:
    """Whether the conversation belongs to the held-out split: by the hash of its content, whatever file it stands
    in."""
    return int.from_bytes(conversation.hash[:8], "big") < share * 2**64


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of item numbers whose lengths add up to at most `capacity`: longest first, into the fullest row with
    room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[item]
        assert need <= capacity
        at = bisect_left(room, (need, -1))
        if at < len(room):
            free, row = room.pop(at)
            rows[row].append(item)
        else:
            free, row = capacity, len(rows)
            rows.append([item])
        if free > need:
            insort(room, (free - need, row))
    return rows


class ChatRows:
    """Conversations, tokenised and held in memory, as packed rows of `seq_len` tokens.

    tokens of all conversations lie in one array [n] with the loss mask beside it [n]; `truncated` counts conversations
    cut to `seq_len` tokens (none with `rsdb`), `dropped` those that have nothing to learn, or no more after the cut.
    `turns` and each message's `weight` say which turns have loss.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int = 0,
        *,
        turns: Turns = "all",
        packing: Packing = "best-fit",
    ):
        self.seq_len, self.seed, self.packing = seq_len, seed, packing
        self.truncated = self.dropped = 0
        tokens, masks, digest = [], [], hashlib.sha256()
        for conversation in conversations:
            digest.update(conversation.hash)
            ids, mask = tokenizer.encode_chat(conversation.messages, conversation.tools)
            learned = learned_turns(conversation.messages, turns)
            if not all(learned):
                mask = switch_turns(mask, learned)
            # A row of T inputs has T targets, the last of which needs token T + 1.
            if len(ids) > seq_len + 1 and packing != "rsdb":
                self.truncated += 1
                ids, mask = ids[: seq_len + 1], mask[: seq_len + 1]
            if not any(mask[1:]):
                self.dropped += 1
                continue
            tokens.append(np.asarray(ids, dtype=np.int32))
            masks.append(np.asarray(mask, dtype=bool))
        if not tokens:
            raise UserError(f"there are no conversations with an answer inside {seq_len} tokens to train on")
        self.fingerprint = digest.hexdigest()
        """Of the conversations in their order."""
        self._tokens, self._mask = np.concatenate(tokens), np.concatenate(masks)
        self._ends = np.cumsum([len(t) for t in tokens])
        self._plans: dict[int, list[list[Chunk]]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def whole(self, number: int) -> Chunk:
        """All inputs of a conversation: its last token is a target only."""
        start = int(self._ends[number - 1]) if number else 0
        return Chunk(number, 0, int(self._ends[number]) - start - 1)

    def plan(self, epoch: int) -> list[list[Chunk]]:
        """The rows of an epoch, each a list of pieces of conversations, which are whole unless `packing` is rsdb; every
        input is in exactly one."""
        if epoch not in self._plans:
            order = _shuffled(np.arange(len(self)), self.seed, epoch)
            if self.packing == "rsdb":
                rows = self._drawn(order, Draws(derive(self.seed, "chat", "rsdb", epoch)))
            elif self.packing == "single":
                rows = [[self.whole(number)] for number in order.tolist()]
            else:
                rows = self._fitted(order, epoch)
            self._plans = {epoch: rows}  # the last one asked for
        return self._plans[epoch]

    def _fitted(self, order: np.ndarray, epoch: int) -> list[list[Chunk]]:
        inputs = np.diff(self._ends, prepend=0) - 1
        rows: list[list[Chunk]] = []
        for start in range(0, len(order), _PACK_WINDOW):
            window = order[start : start + _PACK_WINDOW]
            packed = best_fit(inputs[window].tolist(), self.seq_len)
            # best_fit begins with the longest: the rows of a window change places at random.
            places = _shuffled(np.arange(len(packed)), self.seed, epoch, start)
            rows += [[self.whole(number) for number in window[packed[i]].tolist()] for i in places]
        return rows

    def _drawn(self, order: np.ndarray, draws: Draws) -> list[list[Chunk]]:
        """Rows as the random sequential document buffer fills them (`rsdb.py`), from the conversations in `order`."""
        waiting = [self.whole(number) for number in order[::-1].tolist()]
        pool: list[Chunk] = []  # of each what is left
        rows: list[list[Chunk]] = []
        room = 0
        while waiting or pool:
            if len(pool) <= _BUFFER:
                pool += [waiting.pop() for _ in range(min(len(waiting), 2 * _BUFFER - len(pool)))]
            if room == 0:
                rows.append([])
                room = self.seq_len
            place = draws.below(len(pool))
            number, start, left = pool[place]
            taken = min(left, room)
            rows[-1].append(Chunk(number, start, taken))
            room -= taken
            if taken < left:
                pool[place] = Chunk(number, start + taken, left - taken)
            else:
                pool[place] = pool[-1]
                pool.pop()
        return rows

    def rows(self, groups: Sequence[Sequence[Chunk]]) -> Rows:
        """The given groups of pieces as one batch [B, T]; an empty group is a row of padding."""
        rows = empty_rows(len(groups), self.seq_len)
        for row, group in enumerate(groups):
            at = 0
            for number, head, length in group:
                start = (int(self._ends[number - 1]) if number else 0) + head
                ids, mask = self._tokens[start : start + length + 1], self._mask[start : start + length + 1]
                rows.tokens_BT[row, at : at + length] = ids[:-1]
                rows.targets_BT[row, at : at + length] = np.where(mask[1:], ids[1:], IGNORE)
                at += length
            finish_row(rows, row, list(group))
        return rows


def _shuffled(items: np.ndarray, *path: int) -> np.ndarray:
    seed, *rest = path
    return items[Permutation(derive(seed, "chat", *rest), len(items))(np.arange(len(items)))]
