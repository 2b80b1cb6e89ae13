"""Sampled tokens in a record: ids and log-probs as short ASCII texts, which JSON readers pass over quickly.

Ids are base64 of LEB128, seven bits a byte and the lowest first: one byte below 128, two below 16,384, three below
2,097,152. Log-probs are base64 of little-endian float16, two bytes each.
"""

import base64
import binascii
from collections.abc import Sequence

from stages.core.errors import InputError


def pack_ids(ids: Sequence[int]) -> str:
    """Token ids as text. pack_ids([5, 300]) == "BawC"."""
    import numpy as np

    numbers = np.asarray(ids, dtype=np.uint32)
    width = max(7, int(numbers.max(initial=0)).bit_length())
    bits = numbers[:, None] >> np.arange(0, width, 7, dtype=np.uint32)  # what is left of an id at each of its bytes
    bytes_ = (bits & 127 | (bits > 127) << 7).astype(np.uint8)
    bits[:, 0] |= 1  # the first byte is always there
    return base64.b64encode(bytes_[bits > 0].tobytes()).decode()


def unpack_ids(text: str) -> list[int]:
    """What `pack_ids` made a text of; InputError for any other text."""
    import numpy as np

    packed = np.frombuffer(_decoded(text, "token_ids"), dtype=np.uint8)
    is_last = packed < 128
    if packed.size and not is_last[-1]:
        raise InputError("token_ids ends within an id: was it cut?")
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]])) if packed.size else np.zeros(0, dtype=int)
    position = np.arange(packed.size) - np.repeat(starts, np.diff([*starts, packed.size]))
    if packed.size == 0:
        return []
    if position.max() > 4:
        raise InputError("token_ids holds an id of more than 32 bits")
    shifted = (packed & 127).astype(np.int64) << (7 * position)
    return [int(number) for number in np.add.reduceat(shifted, starts)]


def pack_log_probs(log_probs: Sequence[float]) -> str:
    """Log-probs in nats as text; what lies below -65,504, such as minus infinity, becomes that."""
    import numpy as np

    return base64.b64encode(np.clip(log_probs, -65504, 65504).astype("<f2").tobytes()).decode()


def unpack_log_probs(text: str) -> list[float]:
    """What `pack_log_probs` made a text of, to three digits; InputError for any other text."""
    import numpy as np

    packed = _decoded(text, "log_probs")
    if len(packed) % 2:
        raise InputError("log_probs ends within a number: was it cut?")
    return [float(number) for number in np.frombuffer(packed, dtype="<f2")]


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise InputError(f"{name} is no base64") from None
