"""The page and the stream behind it, for browsers on this machine.

A page asks for each chunk when it has room for it, so nothing is made ahead of what is watched, and what nobody watches
any more is not made. Pages take turns, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import json
import math
import pathlib
import secrets
import tempfile
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fxq.play.show import AskedError, Show, Shown
from fxq.play.stage import Stage
from fxq.report.video import VideoError, write_video

PAGE = pathlib.Path(__file__).with_name("page")
FILES = {"": "text/html", "play.js": "text/javascript", "play.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_MESSAGE = 16_384
"""Most characters of what a page sends at once."""


class Player:
    """The server's side: one stage, and the shows of the pages that are open."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.shows: dict[str, Show] = {}
        self._turn = asyncio.Lock()

    def app(self, hosts: list[str]) -> Starlette:
        """The application for requests that name one of ``hosts``."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/play.js", self._page),
                Route("/play.css", self._page),
                Route("/film/{token}.mp4", self._film),
                WebSocketRoute("/stream", self._stream),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        )

    async def _page(self, request: Request) -> Response:
        name = request.url.path.lstrip("/")
        return FileResponse(PAGE / (name or "play.html"), media_type=FILES[name], headers=HEADERS)

    async def _film(self, request: Request) -> Response:
        show = self.shows.get(request.path_params["token"])
        if show is None:
            return PlainTextResponse("this video is gone: its page was closed or started another", 404, HEADERS)
        try:
            content = await asyncio.to_thread(_mp4, show)
        except (AskedError, VideoError) as error:
            return PlainTextResponse(str(error).rsplit("/", 1)[-1], 409, HEADERS)
        given = HEADERS | {"Content-Disposition": 'attachment; filename="fxq.mp4"'}
        return Response(content, media_type="video/mp4", headers=given)

    async def _stream(self, socket: WebSocket) -> None:
        origin, host = socket.headers.get("origin"), socket.headers.get("host")
        if origin is not None and origin.partition("//")[2] != host:
            await socket.close(1008)
            return
        await socket.accept()
        token = secrets.token_urlsafe(16)
        await socket.send_text(json.dumps(self._welcome(token)))
        try:
            while True:
                await self._answer(socket, token, await socket.receive_text())
        except WebSocketDisconnect:
            pass
        finally:
            self.shows.pop(token, None)

    async def _answer(self, socket: WebSocket, token: str, text: str) -> None:
        try:
            asked = read(text)
            if asked["do"] == "start":
                self.shows.pop(token, None)
                show = await asyncio.to_thread(_start, self.stage, asked)
                self.shows[token] = show
                await socket.send_text(json.dumps({"kind": "started", "panels": self._panels(show)}))
                return
            running = self.shows.get(token)
            if running is None:
                raise AskedError("nothing is running: start first")
            if asked["do"] == "prompt":
                await asyncio.to_thread(running.ask, str(asked.get("prompt", "")))
                await socket.send_text(json.dumps({"kind": "asked", "chunk": running.done}))
                return
            async with self._turn:
                shown = await asyncio.to_thread(running.next_chunk)
            head, frames = message(running, shown)
            await socket.send_text(json.dumps(head))
            await socket.send_bytes(frames)
        except AskedError as error:
            await socket.send_text(json.dumps({"kind": "refused", "why": str(error)}))

    def _welcome(self, token: str) -> dict[str, Any]:
        stage = self.stage
        return {
            "kind": "welcome",
            "token": token,
            "model": stage.model,
            "models": list(stage.contestants),
            "prompt": stage.example,
            "chunks": stage.chunks,
            "pace": stage.pace,
            "pixelated": stage.scale > 1,
        }

    def _panels(self, show: Show) -> list[dict[str, Any]]:
        return [
            {"name": panel.contestant.name, "weights": self.stage.weight_bytes(panel.contestant)}
            for panel in show.panels
        ]


def read(text: str) -> dict[str, Any]:
    """A page's message.

    Raises:
        AskedError: when it is no object that says what to do.
    """
    try:
        asked = json.loads(text) if len(text) <= MAX_MESSAGE else None
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or asked.get("do") not in ("start", "next", "prompt"):
        raise AskedError("expected a JSON object whose 'do' is start, next or prompt")
    return asked


def _start(stage: Stage, asked: dict[str, Any]) -> Show:
    names, numbers = asked.get("models"), (asked.get("seed", 0), asked.get("chunks", 0))
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise AskedError("models: expected a list of names")
    if any(type(number) is not int for number in numbers):
        raise AskedError("seed and chunks: expected whole numbers")
    return Show(stage, names, str(asked.get("prompt", "")), *numbers)


def message(show: Show, shown: list[Shown]) -> tuple[dict[str, Any], bytes]:
    """What a page gets of a chunk: a JSON object, then the RGB bytes of each panel's frames, one after the other."""
    panels = [
        {
            "seconds": round(part.seconds, 4),
            "cache": part.cache_bytes,
            "decibels": part.decibels if part.decibels is None else 999 if math.isinf(part.decibels) else part.decibels,
            "size": list(part.frames.shape[:3]),
        }
        for part in shown
    ]
    head = {"kind": "chunk", "number": show.done, "of": show.chunks, "ended": show.ended, "panels": panels}
    return head, b"".join(part.frames.tobytes() for part in shown)


def _mp4(show: Show) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "fxq.mp4"
        write_video(path, show.film(), show.stage.pace, show.stage.scale)
        return path.read_bytes()
