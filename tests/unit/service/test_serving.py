"""A server under load: new versions without a failed request, errors that say what is wrong, an end that drains."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.support.exported import weights, write_linear
from tests.support.serving import serving
from trainer.service.engine import Tensors
from trainer.service.version import EXAMPLE_REQUEST, ONNX


def body(*rows: float, **changes: object) -> dict[str, object]:
    data = [[value] * 4 for value in rows]
    return {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [len(rows), 4], "data": data, **changes}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_linear(root / "linear", 1)
    with serving(root, max_body=100_000) as server:
        yield server


@pytest.fixture
def curl(server):
    with httpx.Client(base_url=server.http_url) as client:
        yield client


def test_five_versions_under_load_without_a_failed_request(tmp_path):
    models = tmp_path / "models"
    write_linear(models / "linear", 1)
    inputs = np.ones((3, 4), np.float32)
    expected = {str(number): (inputs @ weights(number)).tobytes() for number in range(1, 6)}
    answered = list[str]()
    done = Event()

    def load(address: str) -> None:
        given = tritonclient.grpc.InferInput("inputs", inputs.shape, "FP32").set_data_from_numpy(inputs)
        with tritonclient.grpc.InferenceServerClient(address) as client:
            while not done.is_set():
                result = client.infer("linear", [given])
                number = result.get_response().model_version
                assert result.as_numpy("outputs").tobytes() == expected[number]
                answered.append(number)

    with serving(models) as server, ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(load, server.grpc_address) for _ in range(4)]
        for number in range(1, 6):
            if number > 1:
                folder = write_linear(tmp_path / "aside", number)
                if number == 4:
                    (folder / ONNX).write_bytes(b"damaged")
                folder.rename(models / "linear" / str(number))
                server.service.repository.refresh()
            assert server.service.is_ready
            seen = len(answered)
            while len(answered) < seen + 20 and not any(client.done() for client in clients):
                time.sleep(0.01)
        done.set()
        for client in clients:
            client.result()
    assert set(answered) == {"1", "2", "3", "5"}


def test_new_versions_are_found_within_seconds(tmp_path):
    write_linear(tmp_path / "linear", 1)
    with serving(tmp_path) as server:
        write_linear(tmp_path / "linear", 2)
        ends = time.monotonic() + 20
        while server.service.repository.find("linear").number == 1 and time.monotonic() < ends:
            time.sleep(0.05)
        assert httpx.post(f"{server.http_url}/v2/models/linear/infer", json=body(1)).json()["model_version"] == "2"


def test_a_hundred_clients_at_once(server):
    async def ask(client: httpx.AsyncClient, value: int) -> list[float]:
        answer = await client.post("/v2/models/linear/infer", json=body(value))
        return answer.json()["outputs"][0]["data"]

    async def run() -> list[list[float]]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.http_url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client, value) for value in range(100)))

    inputs = np.arange(100, dtype=np.float32)[:, None].repeat(4, 1)
    np.testing.assert_array_equal(np.array(asyncio.run(run()), np.float32), inputs @ weights(1))


@pytest.mark.parametrize(
    ("request_body", "error"),
    [
        ({}, "inputs: got [], wanted each of inputs once"),
        ([], "request: got [], wanted an object"),
        (body(1, name="images"), "input: got 'images', wanted inputs"),
        (body(1, datatype="FP64"), "datatype of inputs: got 'FP64', wanted FP32"),
        (body(1, shape=[1, 5]), "shape of inputs: got [1, 5], wanted [-1, 4], where -1 is any size but 0"),
        (body(1, shape=[1, "4"]), "shape of inputs: got [1, '4'], wanted whole numbers"),
        (body(1, shape=[10**12, 4]), "data of inputs: got '4 elements', wanted 4000000000000 elements"),
        (body(1, data=[1, 2, 3, "x"]), "data of inputs: got 'x', wanted FP32"),
        (body(1, data=[1, 2, 3, True]), "data of inputs: got True, wanted FP32"),
        (body(1, data=[[1, 2], [3]]), "data of inputs: got 'lists of several lengths', wanted numbers"),
        (body(1, data={"a": 1}), "data of inputs: got 'no list of numbers', wanted numbers"),
        (body(1, data=None), "data of inputs: got 'no list of numbers', wanted numbers"),
        (body(1, parameters={"binary_data_size": 16}), "data of inputs: got '0 bytes', wanted 16 bytes"),
        ({**body(1), "outputs": [{"name": "logits"}]}, "output: got 'logits', wanted outputs or label"),
        ({"inputs": body(1)["inputs"] * 2}, "inputs: got ['inputs'], wanted each of inputs once"),
        ({**body(1), "id": 5}, "id of request: got 5, wanted a text"),
    ],
)
def test_what_is_wrong_with_a_request(curl, request_body, error):
    answer = curl.post("/v2/models/linear/infer", json=request_body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(error)


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "error"),
    [
        ("POST", "/v2/models/liner/infer", {"json": {}}, 404, "model: got 'liner', wanted linear"),
        ("POST", "/v2/models/linear/versions/7/infer", {"json": {}}, 404, "version of linear: got '7', wanted 1"),
        ("POST", "/v2/models/linear/infer", {"content": b"{"}, 400, "request: got"),
        ("POST", "/v2/models/linear/infer", {"content": bytes(100_001)}, 413, "body: got 100001 bytes, wanted at most"),
        ("POST", "/v2/models/linear/infer", {"content": iter([bytes(99_999)] * 2)}, 413, "body: got more than 100000"),
        ("GET", "/v2/models/linear/infer", {}, 405, "Method Not Allowed: got GET /v2/models/linear/infer"),
        ("GET", "/v1/models", {}, 404, "Not Found: got GET /v1/models"),
        ("POST", "/v2/models/linear/infer", {"headers": {"content-encoding": "gzip"}}, 400, "Content-Encoding:"),
        (
            "POST",
            "/v2/models/linear/infer",
            {"headers": {"inference-header-content-length": "9"}, "content": b"{}"},
            400,
            "Inference-Header-Content-Length: got 9, wanted 0 to 2",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call(curl, method, path, options, status, error):
    answer = curl.request(method, path, **options)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(error)


def test_errors_of_grpc_have_their_code(server):
    good = service_pb2.ModelInferRequest.InferInputTensor(name="inputs", datatype="FP32", shape=[1, 4])
    cases = [
        (service_pb2.ModelInferRequest(model_name="liner"), "NOT_FOUND", "model: got 'liner', wanted linear"),
        (service_pb2.ModelInferRequest(model_name="linear"), "INVALID_ARGUMENT", "inputs: got []"),
        (
            service_pb2.ModelInferRequest(model_name="linear", inputs=[good], raw_input_contents=[b"short"]),
            "INVALID_ARGUMENT",
            "data of inputs: got '5 bytes', wanted 16 bytes",
        ),
        (
            service_pb2.ModelInferRequest(model_name="linear", inputs=[good], raw_input_contents=[bytes(200_000)]),
            "RESOURCE_EXHAUSTED",
            "",
        ),
    ]
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for request, code, details in cases:
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(request)
            assert raised.value.code().name == code
            assert raised.value.details().startswith(details)
        good.contents.fp32_contents.extend([1, 1, 1, 1])
        answer = stub.ModelInfer(service_pb2.ModelInferRequest(model_name="linear", inputs=[good]))
    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), weights(1).sum(0))


class Slow:
    """An engine that begins, and computes when it is let."""

    platform = "test"

    def __init__(self, engine):
        self._engine, self.begun, self.open = engine, Event(), Event()

    def run(self, inputs: Tensors) -> Tensors:
        self.begun.set()
        assert self.open.wait(30)
        return self._engine.run(inputs)


def test_an_end_finishes_what_is_in_flight(tmp_path):
    write_linear(tmp_path / "linear", 1)
    with serving(tmp_path) as server, ThreadPoolExecutor(4) as threads:
        version = server.service.repository.find("linear")
        slow = Slow(version.engine)
        server.service.repository.models = {"linear": {1: replace(version, engine=slow)}}
        url = f"{server.http_url}/v2/models/linear/infer"
        in_flight = threads.submit(httpx.post, url, json=body(1), timeout=30)
        assert slow.begun.wait(30)
        with grpc.insecure_channel(server.grpc_address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            states = health.Watch(health_pb2.HealthCheckRequest())
            assert next(states).status == health_pb2.HealthCheckResponse.SERVING
            server.stop()
            assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
            states.cancel()
        assert not server.service.is_ready
        slow.open.set()
        assert in_flight.result().json()["outputs"][1]["data"] == [2]


def test_a_client_that_has_gone_is_not_computed(tmp_path):
    write_linear(tmp_path / "linear", 1)
    with serving(tmp_path) as server, ThreadPoolExecutor(4) as threads:
        version = server.service.repository.find("linear")
        slow = Slow(version.engine)
        server.service.repository.models = {"linear": {1: replace(version, engine=slow)}}
        url = f"{server.http_url}/v2/models/linear/infer"
        first = threads.submit(httpx.post, url, json=body(1), timeout=30)
        assert slow.begun.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body(2), timeout=0.2)
        time.sleep(0.2)
        slow.open.set()
        assert first.result().status_code == 200
        metrics = httpx.get(f"{server.http_url}/metrics").text
    assert 'nv_inference_count{model="linear",version="1"} 1.0' in metrics
    assert 'nv_inference_request_failure{model="linear",reason="CANCELED",version="1"} 1.0' in metrics


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from trainer.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_serves_without_torch_until_sigterm(tmp_path):
    folder = write_linear(tmp_path / "linear", 1)
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve", str(tmp_path), "--http", "0", "--grpc", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert process.stdout.readline() == "serves linear version 1\n"
    process.stdout.readline()
    url = process.stdout.readline().split()[-1]
    answer = httpx.post(url, content=(folder / EXAMPLE_REQUEST).read_bytes())
    assert answer.json()["model_version"] == "1"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


def test_a_port_that_is_taken_is_named(tmp_path):
    write_linear(tmp_path / "linear", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("http", "grpc"):
            sentence = f"--{option} {port}: nothing can listen at 127.0.0.1:{port}"
            with pytest.raises(ValueError, match=sentence), serving(tmp_path, **{option: port}):
                pass
