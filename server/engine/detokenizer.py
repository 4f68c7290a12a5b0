"""From tokens to text, a piece at a time: never half a character, never a part of a stop string. Event loop only."""

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens decoded again before a new one, since a token's text can depend on those before it


class TextStream:
    """Text of one growing token sequence.

    A piece is given out when it can no longer change: not while it ends inside a multi-byte character, and not while it
    could be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._text = _decoder(tokenizer)
        self._stop = stop
        self._token_ids = list(prompt_token_ids[-_CONTEXT:])
        self._prefix = 0  # decoding starts here …
        self._read = len(self._token_ids)  # … and the text of tokens before here has been taken
        self._pending = ""  # decoded, but held back
        self.stopped = False

    def push(self, token_ids: Sequence[int], *, last: bool) -> str:
        """Takes new tokens and gives the text that has become certain; with `last`, all that is left.

        Sets `stopped` when a stop string appears; what follows it is dropped, and so is the stop string itself.
        """
        self._token_ids.extend(token_ids)
        if not self._stop:
            return self._decode(last)
        self._pending += self._decode(last)
        found = [index for index in map(self._pending.find, self._stop) if index >= 0]
        if found:
            self.stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        held = 0 if last else self._held_back()
        text, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return text

    def _decode(self, last: bool) -> str:
        before = self._text(self._token_ids[self._prefix : self._read])
        text = self._text(self._token_ids[self._prefix :])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return text[len(before) :]

    def _held_back(self) -> int:
        """How many last characters could begin a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop):
                return length
        return 0


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Where the library below decodes, it is asked directly: around it, transformers takes several times as long."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)

    def decode(token_ids: list[int]) -> str:
        text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    return decode
