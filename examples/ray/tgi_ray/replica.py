"""A replica: a whole tgi-gateway server, and HTTP from Ray to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

import httpx
from ray import serve

from tgi_ray.messages import OF_A_CONNECTION, Asked, Broken, Down, Head, Part, Taken
from tgi_ray.server import Server

CONNECT_S = 5.0


class Replica:
    """A deployment."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, arguments: Sequence[str], variables: Mapping[str, str], stop_s: float
    ) -> None:
        """Return when the server is ready. Raises `StartError`, which makes Serve try again elsewhere."""
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._server = Server(arguments, variables, stop_s)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # proxies of the environment are for other machines
        )
        await self._server.start()

    async def check_health(self) -> None:
        """Serve replaces a replica whose server does not come up again."""
        if self._server.failure is not None:
            raise RuntimeError(self._server.failure)

    async def __del__(self) -> None:
        """Serve awaits this when the replica's last request has ended, or its time is over."""
        await self._server.stop()
        await self._client.aclose()

    async def ask(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """Pass a request on; the answer comes as it is written. A caller who leaves hangs up on the server."""
        if self._server.url is None:
            yield Down(self._name)
            return
        yield Taken(self._name)
        try:
            # A request of our own, which adds no header of httpx's.
            request = httpx.Request(
                asked.method, self._server.url + asked.target, headers=asked.headers, content=asked.body
            )
            answer = await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            yield Down(self._name)
            return
        except httpx.TransportError:
            yield Broken()
            return
        try:
            headers = [pair for pair in answer.headers.raw if pair[0].lower() not in OF_A_CONNECTION]
            yield Head(answer.status_code, headers)
            async for chunk in answer.aiter_raw():
                yield chunk
        except httpx.TransportError:
            yield Broken()
        finally:
            await answer.aclose()

    async def ask_whole(self, asked: Asked) -> tuple[str, Head, bytes] | None:
        """As `ask`, for an answer that is short: this replica's name, and its head and body; None without one."""
        head, body = None, b""
        async for part in self.ask(asked):
            match part:
                case Head():
                    head = part
                case bytes():
                    body += part
                case Broken() | Down():
                    return None
        return None if head is None else (self._name, head, body)
