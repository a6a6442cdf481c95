"""Error codes across the wire, and limits."""

from __future__ import annotations

import base64

import pytest

from regionspot.errors import InputError
from regionspot.serving.contract import (
    CODES,
    CUT_SIGN,
    INPUTS,
    MAX_MESSAGE_BYTES,
    OUTPUTS,
    RETRYABLE,
    Limits,
    RequestError,
    ServingError,
    as_text,
    base64_hint,
    error_of,
    from_text,
    to_utf8,
)


@pytest.mark.parametrize("code", CODES)
def test_errors_cross_the_wire(code: str) -> None:
    sent = error_of(code, "box 2 is inverted: mend it")
    read = from_text(f"in ensemble 'x', {as_text(sent)}")
    assert read is not None and (read.code, str(read), type(read)) == (
        code,
        "box 2 is inverted: mend it",
        type(sent),
    )


def test_what_the_caller_can_mend_is_an_input_error() -> None:
    assert isinstance(error_of("REGION_INVALID", "x"), InputError)
    assert {code for code in CODES if not isinstance(error_of(code, "x"), RequestError)} == {
        *RETRYABLE,
        "TIMEOUT",
        "INTERNAL",
    }


def test_other_texts_are_no_errors_of_ours() -> None:
    assert from_text("unexpected shape for input 'boxes'") is None
    assert (
        from_text("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1")
        is None
    )
    quoted = error_of("VOCABULARY_UNKNOWN", "no vocabulary 'REQUEST_INVALID: x' is registered")
    read = from_text(f"[request id: 7] {as_text(quoted)}")
    assert read is not None and (read.code, str(read)) == (quoted.code, str(quoted))
    with pytest.raises(AssertionError):
        ServingError("NO_SUCH_CODE", "x")


@pytest.mark.parametrize("letter", ["x", "猫", "\udc00"])
def test_a_long_message_keeps_its_code(letter: str) -> None:
    """gRPC gives up the whole answer for one that fits into no header."""
    text = as_text(RequestError("REGION_INVALID", f"box 2 {letter * 5000}"))
    assert len(text.encode("utf-8", "backslashreplace")) <= MAX_MESSAGE_BYTES
    assert text.startswith("REGION_INVALID: box 2 ") and text.endswith(CUT_SIGN)
    read = from_text(text)
    assert read is not None and read.code == "REGION_INVALID"
    short = as_text(RequestError("REGION_INVALID", f"box 2 {letter}"))
    assert short == f"REGION_INVALID: box 2 {letter}"


def test_tensors_have_names_of_their_own() -> None:
    for fields in (INPUTS, OUTPUTS):
        assert len({field.name for field in fields}) == len(fields)


def test_limits() -> None:
    limits = Limits(max_regions=7)
    assert Limits.from_json(limits.to_json() | {"of_a_later_release": 1}) == limits
    with pytest.raises(InputError, match="max_words must be 1 or more, not 0"):
        Limits(max_words=0)


@pytest.mark.parametrize("prefix", [b"", b" \n", b"data:image/jpeg;base64,"])
def test_base64_text_is_known(prefix: bytes) -> None:
    for content in (
        b"\xff\xd8\xff" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"RIFF" + bytes(100),
    ):
        assert "it is base64 text: decode it" in base64_hint(prefix + base64.b64encode(content))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", b"not a picture", b"aGVsbG8gd29ybGQ=", b"data:", bytes(300)]
)
def test_other_bytes_are_not_called_base64(content: bytes) -> None:
    assert base64_hint(content) == ""


def test_text_for_the_wire() -> None:
    assert to_utf8("猫", "word 0") == "猫".encode()
    with pytest.raises(
        InputError, match=r"word 3 '\\ud800' is no Unicode text: it holds half of a surrogate pair"
    ):
        to_utf8("\ud800", "word 3")
    with pytest.raises(InputError, match="word 3") as long:
        to_utf8("\ud800" * 100_000, "word 3")
    assert len(str(long.value)) < 200  # what a stranger sent is not sent back whole
    with pytest.raises(InputError, match="word 0 must be text, not int: 7"):
        to_utf8(7, "word 0")
