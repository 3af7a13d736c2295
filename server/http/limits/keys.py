"""The class `Keys` holds the API keys that are valid now, and for each owner of keys an account that counts its
requests and tokens."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable, Sequence

from jamba_server.server.http.limits.account import Account
from jamba_server.server.http.limits.bucket import Clock
from jamba_server.server.http.limits.key_file import Key


class Keys:
    """The valid API keys. They can be replaced while the server runs."""

    def __init__(self, keys: Iterable[Key], clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}  # maps the name of each owner to its account
        self._known: list[tuple[bytes, str]] = []  # pairs of a key and its owner
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """Makes exactly these keys valid. Owners who had a key before keep their accounts.

        If two keys have one owner, they share the account, and the limits are those of the first of them.
        """
        known, accounts = list[tuple[bytes, str]](), dict[str, Account]()
        for key in keys:
            known.append((key.key.encode(), key.owner))
            if key.owner in accounts:
                continue
            if (account := self._accounts.get(key.owner)) is None:
                account = Account(key, self._clock)
            else:
                account.change(key)
            accounts[key.owner] = account
        self._known, self._accounts = known, accounts

    def owner_of(self, sent: Sequence[bytes]) -> str | None:
        """Returns the owner of the first valid key in `sent`, or None if there is no valid key.

        Every key is compared in constant time, so that the duration does not reveal which key matched.
        """
        matches = [hmac.compare_digest(key, known) for key in sent for known, _ in self._known]
        return self._known[matches.index(True) % len(self._known)][1] if any(matches) else None

    def account(self, owner: str) -> Account | None:
        """Returns the account of an owner of keys, or None if the owner has no valid key now."""
        return self._accounts.get(owner)
