"""The Open Inference Protocol over HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.service.errors import ClientGoneError, InferenceError, NotFoundError, TooLargeError, unlike
from trainer.service.page import HEADERS, render
from trainer.service.protocol import decode_request, encode_response

if TYPE_CHECKING:
    from trainer.service.repository import ServedVersion
    from trainer.service.request_memory import HeldBytes
    from trainer.service.server import InferenceService

HEADER_LENGTH = "inference-header-content-length"
RETRY_AFTER = {"retry-after": "1"}


def make_app(service: InferenceService) -> Starlette:
    """Return the application that answers for a service."""
    rest = Rest(service)
    model = "/v2/models/{model}"
    versions = (model, model + "/versions/{version}")
    routes = [
        *(Route(f"{path}/infer", rest.infer, methods=["POST"]) for path in versions),
        Route("/v2/health/live", rest.live),
        Route("/v2/health/ready", rest.ready),
        *(Route(f"{path}/ready", rest.model_ready) for path in versions),
        *(Route(path, rest.model_metadata) for path in versions),
        Route("/v2", rest.server_metadata),
        Route("/v2/repository/index", rest.index, methods=["GET", "POST"]),
        Route("/metrics", rest.metrics),
        Route("/", rest.page),
    ]
    handlers: dict[Any, Any] = {
        InferenceError: _inference_error,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _failure,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path of another model or version is not found, and leads nowhere
    return app


class Rest:
    """The endpoints."""

    def __init__(self, service: InferenceService):
        self._service = service

    async def infer(self, request: Request) -> Response:
        version = self._find(request)
        with version.meters.request(), self._service.memory.hold() as held:
            body = await self._body(request, held)
            inference = decode_request(body, _header_length(request), version.signature)
            answer = self._service.batcher.submit(version, inference)
            gone = asyncio.ensure_future(request.receive())  # behind the body there is only the end of the connection
            gone.add_done_callback(lambda _: answer.cancel())
            try:
                outputs = await answer
            except asyncio.CancelledError as error:
                if gone.done():
                    raise ClientGoneError("the client has gone") from error
                raise
            finally:
                gone.cancel()
            content, header_length = encode_response(version.model, version.number, inference, outputs)
        if header_length is None:
            return _raw_json(content)
        return Response(content, headers={HEADER_LENGTH: str(header_length)}, media_type="application/octet-stream")

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        is_ready = self._service.is_ready
        return _json({"ready": is_ready}, HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def server_metadata(self, _: Request) -> Response:
        return _json({"name": "silotrain", "version": self._service.release, "extensions": ["binary_tensor_data"]})

    async def model_ready(self, request: Request) -> Response:
        return _json({"name": self._find(request).model, "ready": True})

    async def model_metadata(self, request: Request) -> Response:
        version = self._find(request)
        return _json(
            {
                "name": version.model,
                "versions": [str(number) for number in sorted(self._service.repository.models[version.model])],
                "platform": version.engine.platform,
                "inputs": version.description.inputs,
                "outputs": version.description.outputs,
            }
        )

    async def index(self, _: Request) -> Response:
        models = self._service.repository.models
        return _json(
            [
                {"name": model, "version": str(number), "state": "READY", "reason": ""}
                for model, versions in models.items()
                for number in versions
            ]
        )

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.meters.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        """Answer the page of a model, by default the first one."""
        models = list(self._service.repository.models)
        version = self._service.repository.find(request.query_params.get("model", next(iter(models), "")))
        try:
            content = await asyncio.to_thread(render, version.folder, version.description, models)
        except OSError as error:  # the folder was removed; the model is in memory
            raise NotFoundError(f"page: {error.filename} cannot be read: {error.strerror}") from error
        return Response(content, headers=HEADERS, media_type="text/html")

    def _find(self, request: Request) -> ServedVersion:
        path = request.path_params
        return self._service.repository.find(path["model"], path.get("version", ""))

    async def _body(self, request: Request, held: HeldBytes) -> bytes:
        """Read the body, of which never more than the limit is in memory."""
        limit = self._service.max_body
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise unlike("Content-Encoding", encoding, "a body that is not compressed")
        if int(request.headers.get("content-length", 0)) > limit:
            raise TooLargeError(f"body: got {request.headers['content-length']} bytes, wanted at most {limit}")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLargeError(f"body: got more than {limit} bytes, wanted at most as many")
            held.add(len(part))
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _header_length(request: Request) -> int | None:
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 20):
        raise unlike("Inference-Header-Content-Length", given, "a number of bytes")
    return int(given)


def _raw_json(content: bytes, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")


def _json(content: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    return _raw_json(orjson.dumps(content), status, headers)


async def _inference_error(_: Request, error: InferenceError) -> Response:
    headers = RETRY_AFTER if error.status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return _json({"error": str(error)}, error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    got = f"{request.method} {request.url.path[:80]}"
    wanted = "a path of the Open Inference Protocol, such as GET /v2 or POST /v2/models/NAME/infer"
    return _json({"error": f"{error.detail}: got {got}, wanted {wanted}"}, error.status_code)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=ClientGoneError.status)


async def _failure(_: Request, __: Exception) -> Response:
    return _json({"error": "the server has failed; its log says why"}, HTTPStatus.INTERNAL_SERVER_ERROR)
