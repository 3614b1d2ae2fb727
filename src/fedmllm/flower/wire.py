"""Array format of a message, and text from other machines.

An adapter is ONE array of raw float32: Flower stores and fetches every array of a message as an object of its own, and 200
tensors cost five times what one costs. The array's data are the numbers and nothing else: there is no header to trust, and
nothing to unpickle.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from fedmllm.core.errors import FedmllmError

ADAPTER_KEY, ABOUT = "adapter", "about"  # the two records of a message
FLAT = "flat"  # the one array of the adapter record
SECURE = "secure"  # key of a message about keys of a secure sum, and of its reply
LARGEST_RANK = "largest_rank"  # key of a message that asks a site for its limit, and of its reply: 0 = none
REFUSED = "refused"  # key of a reply with a reason instead of an update
HERE = "here"  # key of what the trainer adds to a reason for its site's own log; it does not travel
FLOAT32, RAW = "float32", "raw-little-endian"
UINT8 = "uint8"  # of a masked reply
LONGEST_WORDS = 2000  # characters of another machine's reason that are kept


def array_record(data: bytes) -> ArrayRecord:
    """Raw little-endian float32 [P] as the adapter record of a message."""
    return ArrayRecord({FLAT: Array(FLOAT32, (len(data) // 4,), RAW, data)})


def array_data(content: RecordDict) -> bytes:
    """The raw float32 of a message.

    Raises:
        FedmllmError: The array has another type, format or length.
        KeyError: The message has no adapter.
    """
    array = content[ADAPTER_KEY][FLAT]
    if (array.dtype, array.stype) != (FLOAT32, RAW):
        raise FedmllmError(f"the adapter came as {array.dtype}, {array.stype}; only {FLOAT32}, {RAW} travels"[:200])
    if tuple(array.shape) != (len(array.data) // 4,) or len(array.data) % 4:
        raise FedmllmError(f"the adapter has {len(array.data)} bytes for shape {array.shape}"[:200])
    return bytes(array.data)


def masked_record(data: bytes) -> ArrayRecord:
    """Masked words, as they travel, as the adapter record of a reply."""
    return ArrayRecord({FLAT: Array(UINT8, (len(data),), RAW, data)})


def masked_data(content: RecordDict, num_bytes: int) -> bytes:
    """The masked words of a reply, as they travel.

    Raises:
        FedmllmError: The array has another type, format or length.
        KeyError: The reply has no array.
    """
    array = content[ADAPTER_KEY][FLAT]
    if (array.dtype, array.stype, len(array.data)) != (UINT8, RAW, num_bytes):
        raise FedmllmError(
            f"masked words came as {len(array.data)} bytes of {array.dtype}, {array.stype}; "
            f"required: {num_bytes} bytes of {UINT8}, {RAW}"[:200]
        )
    return bytes(array.data)


def legible(words: object) -> str:
    """Text from another machine as one printable line of at most `LONGEST_WORDS` characters, for terminals and logs."""
    text = str(words)[: LONGEST_WORDS + 1]
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]} ..."
