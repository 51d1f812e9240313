"""The budget: what a request may cost at most is set aside before it is sent, and settled when its answer is there."""

import threading

from trinity.config.curate import BudgetConfig

_UNKNOWN_PROMPT = 2
"""Characters for which a prompt token is set aside; most tokenizers need less."""


class Purse:
    """Tokens and money that are left. Safe for threads; in Ray one actor holds it for all workers."""

    def __init__(self, budget: BudgetConfig, tokens: int = 0, money: float = 0.0) -> None:
        """tokens, money: spent by earlier calls."""
        self._budget = budget
        self._tokens, self._money = tokens, money
        self._lock = threading.Lock()
        self.refused = 0
        """Requests that were not sent for lack of budget."""

    def take(self, tokens: int, money: float) -> bool:
        """Set aside; False when it would go beyond the budget."""
        with self._lock:
            over_tokens = self._budget.tokens is not None and self._tokens + tokens > self._budget.tokens
            over_money = self._budget.money is not None and self._money + money > self._budget.money
            if over_tokens or over_money:
                self.refused += 1
                return False
            self._tokens += tokens
            self._money += money
            return True

    def settle(self, tokens: int, money: float) -> None:
        """Correct what was set aside by the difference, mostly negative."""
        with self._lock:
            self._tokens += tokens
            self._money += money

    def spent(self) -> tuple[int, float]:
        with self._lock:
            return self._tokens, self._money


def most_tokens(prompt_chars: int, max_tokens: int) -> tuple[int, int]:
    """(prompt tokens, answer tokens) to set aside for a request."""
    return prompt_chars // _UNKNOWN_PROMPT + 16, max_tokens
