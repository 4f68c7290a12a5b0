"""What a call measures."""

import pytest

from loadtest.client import gaps_between_tokens


def test_tokens_of_one_message_share_the_gap_before_it() -> None:
    assert list(gaps_between_tokens([(0.5, 3), (0.7, 2), (1.0, 1)])) == pytest.approx([0.1, 0.1, 0.3])
    assert list(gaps_between_tokens([(0.5, 3)])) == list(gaps_between_tokens([])) == []
