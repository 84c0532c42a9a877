"""The Open Inference Protocol over gRPC, with the messages of Triton's client, health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from trainer.service.errors import InferenceError, unlike
from trainer.service.protocol import InferenceRequest, Signature, datatype_of, from_bytes, from_list

if TYPE_CHECKING:
    from trainer.service.repository import ServedVersion
    from trainer.service.server import InferenceService

messages: Any = service_pb2  # made when they are imported: no checker of types knows them
config: Any = model_config_pb2

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
OVERHEAD = 64 * 1024  # bytes of a message beside its tensors

# The field of a tensor's contents, by data type. FP16 has none: it comes as bytes.
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def make_server(service: InferenceService, options: dict[str, Any]) -> grpc.aio.Server:
    """Return the server that answers for a service; it has no port yet."""
    limit = service.max_body + OVERHEAD
    sizes = {"grpc.max_receive_message_length": limit, "grpc.max_send_message_length": -1}
    server = grpc.aio.server(options=list({**sizes, **options}.items()))
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(service), server)
    reflection.enable_server_reflection((INFERENCE, HEALTH, reflection.SERVICE_NAME), server)
    return server


def _answers_errors(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Answer an InferenceError of a method by its code."""

    async def answering(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request)
        except InferenceError as error:
            await context.abort(getattr(grpc.StatusCode, error.code), str(error))

    return answering


class InferenceServicer(GRPCInferenceServiceServicer):
    """The unary calls of the inference service."""

    def __init__(self, service: InferenceService):
        self._service = service

    @_answers_errors
    async def ModelInfer(self, request: Any) -> Any:
        version = self._service.repository.find(request.model_name, request.model_version)
        with version.meters.request(), self._service.memory.hold() as held:
            held.add(request.ByteSize())
            inference = decode_message(request, version.signature)
            outputs = await self._service.batcher.submit(version, inference)
            return encode_message(version, inference, outputs)

    @_answers_errors
    async def ServerLive(self, _: Any) -> Any:
        return messages.ServerLiveResponse(live=True)

    @_answers_errors
    async def ServerReady(self, _: Any) -> Any:
        return messages.ServerReadyResponse(ready=self._service.is_ready)

    @_answers_errors
    async def ServerMetadata(self, _: Any) -> Any:
        return messages.ServerMetadataResponse(name="silotrain", version=self._service.release)

    @_answers_errors
    async def ModelReady(self, request: Any) -> Any:
        versions = self._service.repository.models.get(request.name, {})
        is_ready = bool(versions) and (not request.version or request.version in map(str, versions))
        return messages.ModelReadyResponse(ready=is_ready)

    @_answers_errors
    async def ModelMetadata(self, request: Any) -> Any:
        version = self._service.repository.find(request.name, request.version)
        inputs, outputs = (
            [
                messages.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
                for spec in specs
            ]
            for specs in (version.description.inputs, version.description.outputs)
        )
        return messages.ModelMetadataResponse(
            name=version.model,
            versions=[str(number) for number in sorted(self._service.repository.models[version.model])],
            platform=version.engine.platform,
            inputs=inputs,
            outputs=outputs,
        )

    @_answers_errors
    async def ModelConfig(self, request: Any) -> Any:
        version = self._service.repository.find(request.name, request.version)
        inputs, outputs = (
            [
                make(name=spec.name, data_type=getattr(config, f"TYPE_{spec.datatype}"), dims=spec.shape[1:])
                for spec in specs
            ]
            for make, specs in (
                (config.ModelInput, version.description.inputs),
                (config.ModelOutput, version.description.outputs),
            )
        )
        return messages.ModelConfigResponse(
            config=config.ModelConfig(
                name=version.model,
                platform=version.engine.platform,
                max_batch_size=self._service.batcher.max_batch,
                input=inputs,
                output=outputs,
                dynamic_batching=config.ModelDynamicBatching(),
            )
        )

    @_answers_errors
    async def RepositoryIndex(self, _: Any) -> Any:
        return messages.RepositoryIndexResponse(
            models=[
                messages.RepositoryIndexResponse.ModelIndex(name=model, version=str(number), state="READY")
                for model, versions in self._service.repository.models.items()
                for number in versions
            ]
        )


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The health protocol of gRPC, for the server as a whole and for the inference service."""

    def __init__(self, service: InferenceService):
        self._service = service

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request.service not in ("", INFERENCE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: got {request.service!r}, wanted {INFERENCE}")
        return self._status()

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        shown = None
        while True:
            if (status := self._status()) != shown:
                await context.write(status)
                shown = status
            await asyncio.sleep(1)

    def _status(self) -> Any:
        return health_pb2.HealthCheckResponse(status="SERVING" if self._service.is_ready else "NOT_SERVING")


def decode_message(request: Any, signature: Signature) -> InferenceRequest:
    """Read and check a ModelInferRequest.

    Raises:
        InvalidRequestError: it is not as the protocol or the model wants it.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise unlike("raw_input_contents", f"{len(raw)} tensors", f"{len(request.inputs)}, one for each input")
    inputs: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(request.inputs):
        name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
        signature.check_input(name, datatype, shape)
        if raw:
            inputs[name] = from_bytes(name, raw[index], datatype, shape)
        elif datatype in CONTENTS:
            inputs[name] = from_list(name, list(getattr(tensor.contents, CONTENTS[datatype])), datatype, shape)
        else:
            raise unlike(f"data of {name}", "no bytes", f"bytes in raw_input_contents, as {datatype} has no other form")
    signature.check_whole(inputs, len(request.inputs))
    outputs = signature.check_outputs([output.name for output in request.outputs])
    parameters = request.parameters
    timeout = parameters["timeout"].int64_param if "timeout" in parameters else 0
    return InferenceRequest(inputs, outputs, id=request.id, timeout_us=max(timeout, 0))


def encode_message(version: ServedVersion, request: InferenceRequest, outputs: dict[str, np.ndarray]) -> Any:
    """Return the ModelInferResponse, with its tensors as bytes."""
    tensors = [(name, outputs[name]) for name in request.outputs]
    return messages.ModelInferResponse(
        model_name=version.model,
        model_version=str(version.number),
        id=request.id,
        outputs=[
            messages.ModelInferResponse.InferOutputTensor(
                name=name, datatype=datatype_of(tensor.dtype), shape=tensor.shape
            )
            for name, tensor in tensors
        ],
        raw_output_contents=[tensor.tobytes() for _, tensor in tensors],
    )
