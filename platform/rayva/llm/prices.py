"""What calls cost: a table of prices that the user can replace, and a budget that is never passed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from rayva.errors import RecipeError
from rayva.llm.request import ChatAnswer, ChatRequest

_MILLION = 1_000_000
_DATE = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{4})$")


@dataclass(frozen=True)
class Price:
    """Dollars for a million tokens."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars of one call."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _MILLION

    def of_answer(self, answer: ChatAnswer) -> float:
        """Dollars of an answer."""
        return self.of(answer.prompt_tokens, answer.completion_tokens)

    def at_most(self, request: ChatRequest) -> float:
        """Dollars of a call whose answer is as long as it may be."""
        return self.of(request.most_prompt_tokens(), request.sampling.max_tokens)


FREE = Price(0.0, 0.0)


class Prices:
    """Prices by model name; a dated name such as `gpt-4o-2024-08-06` has its family's price."""

    def __init__(self, table: dict[str, Price], source: str) -> None:
        self._table, self._source = table, source

    @classmethod
    def load(cls, path: str | None = None) -> Prices:
        """Reads a YAML file `{model: {prompt: 30.0, completion: 60.0}}` in dollars for a million tokens.

        Args:
            path: None takes the table that comes with the package.

        Raises:
            RecipeError: the file is missing or not such a table.
        """
        try:
            if path is None:
                text = resources.files("rayva.llm").joinpath("prices.yaml").read_text(encoding="utf-8")
            else:
                text = Path(path).read_text(encoding="utf-8")
            raw = yaml.safe_load(text)
            table = {str(m): Price(float(p["prompt"]), float(p["completion"])) for m, p in raw.items()}
        except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(
                f"The table of prices {path} cannot be read: {error!r}",
                "write YAML such as `my-model: {prompt: 0.5, completion: 1.5}`, dollars for a million tokens",
            ) from error
        if any(min(price.prompt, price.completion) < 0 for price in table.values()):
            raise RecipeError(f"The table of prices {path} has a negative price", "mend it")
        return cls(table, path or "the table that comes with Rayva")

    def find(self, model: str) -> Price | None:
        """The price of `model`; a dated name without a line of its own has that of its undated name."""
        return self._table.get(model) or self._table.get(_DATE.sub("", model))

    def require(self, model: str, why: str) -> Price:
        """Like `find`; `RecipeError` where there is no price."""
        price = self.find(model)
        if price is None:
            raise RecipeError(
                f"{self._source} has no price for the model {model!r}, which {why} needs",
                "give your own table with generation.prices=FILE (a model of your own may cost 0)",
            )
        return price


class Budget:
    """Keeps what is spent, and what calls in flight may still cost, under a limit.

    Args:
        limit: dollars; None for no limit.
        spent: dollars that earlier runs have paid for the same work.
    """

    def __init__(self, limit: float | None, spent: float = 0.0) -> None:
        self.limit, self.spent, self.reserved = limit, spent, 0.0
        self._in_flight = 0

    def reserve(self, worst: float) -> bool:
        """Sets `worst` dollars aside for a call, or says that there is not enough left for it."""
        if self.limit is not None and self.spent + self.reserved + worst > self.limit:
            return False
        self.reserved += worst
        self._in_flight += 1
        return True

    def settle(self, worst: float, paid: float) -> None:
        """The call has ended and cost `paid`."""
        self._in_flight -= 1
        # Differences of many small numbers never come back to zero by themselves.
        self.reserved = self.reserved - worst if self._in_flight else 0.0
        self.spent += paid

    @property
    def waits(self) -> bool:
        """Whether calls in flight may yet give back some of what is set aside."""
        return self._in_flight > 0
