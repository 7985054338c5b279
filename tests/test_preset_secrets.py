"""What is taken for a secret, and what is not."""

from __future__ import annotations

import pytest

from launcher.preset.secrets import redacted


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("a ghp_0123456789abcdefghij0123 b", "a *** b"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("https://ada:pass@host/x", "https://***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host/x?a=1&token=abc&b=2", "https://host/x?a=1&***&b=2"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "***"),
    ],
)
def test_secrets(text: str, clean: str) -> None:
    assert redacted(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "bigcode/starcoder2-15b", "d542e29d542e29d542e29d542e29d542e29d542e2", "sha256:0123456789abcdef", "ada@example.org",
        "ssh://git@host/x", "https://host/x?revision=main", "sk-learn", "hf_hub", "node[3-5]", "eos_token_id",
    ],
)  # fmt: skip
def test_no_secrets(text: str) -> None:
    assert redacted(text) == text
