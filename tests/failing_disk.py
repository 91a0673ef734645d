"""A disk that fails once, at a place of one's choice."""

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from stablevsr.errors import UserError


class FailingOnce:
    """A function that is replaced by one that fails at its n-th call, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self._real, self._calls, self._fail_at = getattr(owner, name), 0, 0
        self.message: str | None = None  # of the `UserError`, if the last attempt raised one
        # A function, not this object: what is looked up on a class must bind.
        monkeypatch.setattr(owner, name, lambda *arguments, **more: self._call(*arguments, **more))

    def _call(self, *arguments: object, **more: object) -> object:
        self._calls += 1
        if self._calls == self._fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._real(*arguments, **more)

    def attempts(self, attempt: Callable[[], object]) -> Iterator[None]:
        """Call `attempt` with the first call failing, then the second, ... until none is left to fail.

        Yields after each, with nothing failing. What is raised must be one sentence.
        """
        while self.message or not self._fail_at:
            self._fail_at, self._calls, self.message = self._fail_at + 1, 0, None
            try:
                attempt()
            except UserError as error:
                self.message = str(error)
                assert "\n" not in self.message
            self._calls = 1_000_000  # nothing fails now
            yield
        assert self._fail_at > 1  # else the function was never called
