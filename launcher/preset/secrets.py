"""What looks like a token or a password, so that it is refused in a file and never shown. Known shapes only: nothing is guessed from
randomness, since a commit is as random as a key. Secrets come from the environment, or from files that only their owner reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.preset.tree import Key, Node

_TOKEN = re.compile(
    r"""(?x)
      \b(?:hf|api_org)_[A-Za-z0-9]{16,}                   # Hugging Face
    | \b(?:gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}        # GitHub
    | \bglpat-[A-Za-z0-9_-]{16,}                          # GitLab
    | \bsk-[A-Za-z0-9_-]{20,} | \bxox[abeprs]-[A-Za-z0-9-]{10,} | \bpypi-[A-Za-z0-9_-]{40,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                       # AWS
    | \beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}[.A-Za-z0-9_-]*   # JSON web token
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----
    | (?<=://)(?!git@)[^/\s@'"]+(?=@)                     # user:password@ of a URL
    | (?i:(?<=[?&])(?:access_token|api_?key|auth|key|password|private_token|sig|signature|token)=)[^&\s'"]+
    """
)
_KEYS = frozenset({"access_token", "api_key", "auth_token", "hf_token", "passwd", "password", "secret", "token", "use_auth_token"})
"""Names of keys whose value is a secret whatever it looks like."""


def redacted(text: str) -> str:
    """The text with ``***`` in the place of each secret."""
    return _TOKEN.sub("***", text)


def secrets(node: Node, key: Key = ()) -> Iterator[tuple[Key, Node]]:
    """The keys and values that are a secret, each with the entry that holds it."""
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for name, child in children:
        at = (*key, str(name))
        if _TOKEN.search(str(name)) or (isinstance(child.value, str) and (_TOKEN.search(child.value) or (name in _KEYS and child.value))):
            yield at, child
        else:
            yield from secrets(child, at)
