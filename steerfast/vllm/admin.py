"""HTTP routes that list, load, replace and remove profiles while requests run. They exist only if a key is set.

    GET    /steerfast/profiles            lists the profiles
    POST   /steerfast/profiles            {"name": ..., "file": ...} loads a profile
    PUT    /steerfast/profiles/{name}     {"file": ...} replaces one; running requests keep theirs
    DELETE /steerfast/profiles/{name}     removes one; running requests keep theirs

Each answers ``{"profiles": [...]}`` after the change, or ``{"error": {"message": ..., "code": ...}}``. The key comes as
``Authorization: Bearer KEY``. ``file`` is the name of a file in the configured directory.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from typing import Any

from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
from steerfast.vllm import compat
from steerfast.vllm.engine import inside

KEY_VARIABLE = "STEERFAST_ADMIN_KEY"
PATH = "/steerfast/profiles"
_LONGEST = 255  # characters of a name or a file's name
_LONGEST_MESSAGE = 1000  # which may quote what a file holds


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Admin:
    """vLLM's `EndpointPlugin`: the routes, and the engine behind them."""

    name = "steerfast"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._front: Any = None
        self._servers = 1
        self._lock = asyncio.Lock()

    def attach_router(self, app: Any) -> None:
        """Add the routes, if there is a key."""
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            return
        self._digest = hashlib.sha256(key.encode()).digest()
        for path, methods in ((PATH, ["GET", "POST"]), (PATH + "/{name}", ["PUT", "DELETE"])):
            app.router.add_route(path, self._route, methods=methods, include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Remember the engine."""
        self._engine = engine_client
        if engine_client is not None:
            self._front = getattr(engine_client.input_processor, "steerfast", None)
            self._servers = engine_client.vllm_config.parallel_config._api_process_count

    async def _route(self, request: Any) -> Any:
        from fastapi.responses import JSONResponse

        try:
            self._authorise(request.headers.get("Authorization", ""))
            profiles = await self._handle(request)
        except _Refused as refused:
            error = {"message": str(refused)[:_LONGEST_MESSAGE], "code": refused.status}
            return JSONResponse({"error": error}, status_code=refused.status)
        return JSONResponse({"profiles": profiles})

    def _authorise(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._digest):
            raise _Refused(401, "Authorization: expected Bearer and the admin key")

    async def _handle(self, request: Any) -> list[dict[str, Any]]:
        if self._front is None:
            raise _Refused(404, "profiles: expected a server that steers, this one was started without any")
        if request.method == "GET":
            return await self._call("steerfast_profiles")
        if self._servers > 1:
            raise _Refused(409, f"profiles: expected one API server (--api-server-count 1), got {self._servers}")
        async with self._lock:
            if request.method == "POST":
                fields = await _fields(request, "name", "file")
                return await self._change("steerfast_load", fields["name"], fields["file"])
            name = request.path_params["name"]
            if name not in self._front.points:
                raise _Refused(
                    404, f"name: expected one of {', '.join(self._front.points) or 'none'}, got {name[:80]!r}"
                )
            if request.method == "DELETE":
                return await self._change("steerfast_remove", name)
            return await self._change("steerfast_replace", name, (await _fields(request, "file"))["file"])

    async def _change(self, method: str, name: str, file: str | None = None) -> list[dict[str, Any]]:
        if file is not None:
            try:
                await asyncio.to_thread(self._check, name, file)
            except ProfileError as error:
                raise _Refused(400, str(error)) from None
        await self._call(method, name, *([] if file is None else [file]))
        profiles = await self._call("steerfast_profiles")
        points: dict[str, list[str]] = {}
        for each in profiles:
            if each["current"]:
                points.setdefault(each["name"], []).extend(filter(None, [each["threshold"]]))
        self._front.set_profiles(points, len(profiles))
        return profiles

    def _check(self, name: str, file: str) -> None:
        """Compare the profile's tokenizer with the server's; the engine has none."""
        self._front.check_tokenizer(name, SteeringProfile.load(inside(self._front.config.directory, file)))

    async def _call(self, method: str, *arguments: str) -> Any:
        try:
            return await self._engine.engine_core.call_utility_async(method, *arguments)
        except compat.EngineDeadError as error:
            raise _Refused(503, str(error)) from None
        except Exception as error:  # raised in the engine process, only its text comes here
            raise _Refused(400, str(error).removeprefix(f"Call to {method} method failed: ")) from None


async def _fields(request: Any, *names: str) -> dict[str, str]:
    """Return the body, a JSON object with these strings, printable and not long, and nothing else."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):  # the latter: deeper than Python reads
        body = None
    if not isinstance(body, dict) or set(body) != {*names} or not all(isinstance(body[name], str) for name in names):
        raise _Refused(400, f"body: expected a JSON object with the strings {', '.join(names)}")
    for name in names:
        if len(body[name]) > _LONGEST or not body[name].isprintable():
            raise _Refused(400, f"{name}: expected at most {_LONGEST} printable characters, got {body[name][:80]!r}")
    return body


def plugin() -> Admin:
    """Entry point of ``vllm.endpoint_plugins``."""
    return Admin()
