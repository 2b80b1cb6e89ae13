import base64
import random

import pytest

from stages.core.drawing import tokens
from stages.core.errors import InputError


def leb128(number):
    """One number by the book."""
    out = []
    while True:
        number, low = divmod(number, 128)
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


@pytest.mark.parametrize("most", [1, 127, 128, 16_383, 16_384, 151_935, 2**21, 2**32 - 1])
def test_ids_are_packed_by_the_book_and_come_back(most):
    rng = random.Random(most)
    ids = [0, most, *(rng.randint(0, most) for _ in range(200)), most, 0]
    packed = tokens.pack_ids(ids)
    assert base64.b64decode(packed) == b"".join(map(leb128, ids))
    assert tokens.unpack_ids(packed) == ids


def test_a_completion_without_tokens_has_an_empty_text():
    assert tokens.pack_ids([]) == tokens.pack_log_probs([]) == ""
    assert tokens.unpack_ids("") == tokens.unpack_log_probs("") == []


def test_log_probs_come_back_to_three_digits_and_none_is_infinite():
    values = [0.0, -1e-4, -0.123456, -2.5, -17.25, -1e9, float("-inf")]
    assert tokens.unpack_log_probs(tokens.pack_log_probs(values)) == pytest.approx(
        [*values[:5], -65504, -65504], rel=1e-3
    )


@pytest.mark.parametrize("text", ["gA==", "gICAgICAAQ==", "not base64", "?"])
def test_a_text_that_is_no_packed_ids_is_refused(text):
    with pytest.raises(InputError, match="token_ids"):
        tokens.unpack_ids(text)


def test_half_a_log_prob_is_refused():
    with pytest.raises(InputError, match="log_probs ends within a number"):
        tokens.unpack_log_probs("AAAA")
