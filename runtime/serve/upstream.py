"""What the front must know of the llama-server behind it. Whoever starts the child keeps these true."""

from __future__ import annotations

from typing import Literal, Protocol

State = Literal["starting", "ready", "restarting", "stopping"]


class Upstream(Protocol):
    """One llama-server on loopback. The front reads each attribute anew for every request."""

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash at the end; may change with a restart."""

    @property
    def state(self) -> State:
        """Only a "ready" child gets requests."""

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which a client may try again while the child is not ready."""

    @property
    def restarts(self) -> int:
        """How often the child was started again."""

    @property
    def api_key(self) -> str:
        """The key between front and child: random, new with every start, in no log."""
