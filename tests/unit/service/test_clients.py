"""Clients that nobody here wrote get the answers of a bare session, bit for bit, over every protocol."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http

from tests.support.exported import write_linear
from tests.support.serving import serving
from trainer.service.server import Server
from trainer.service.version import EXAMPLE_REQUEST, EXAMPLE_RESPONSE, ONNX


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for number in (1, 2, 3):
        write_linear(root / "linear", number, metrics={"test/accuracy": 0.9})
    return root


@pytest.fixture(scope="module")
def server(models) -> Iterator[Server]:
    with serving(models) as server:
        yield server


@pytest.fixture(scope="module")
def session(models) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(models / "linear" / "3" / ONNX)


INPUTS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def http(server) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        yield client


@pytest.fixture(scope="module")
def rpc(server) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        yield client


@pytest.fixture
def curl(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}") as client:
        yield client


def check(result, session) -> None:
    for name, expected in zip(("outputs", "label"), session.run(["outputs", "label"], {"inputs": INPUTS}), strict=True):
        answer = result.as_numpy(name)
        assert answer.dtype == expected.dtype
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_http(http, session, binary):
    given = tritonclient.http.InferInput("inputs", INPUTS.shape, "FP32").set_data_from_numpy(INPUTS, binary_data=binary)
    outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name in ("outputs", "label")]
    result = http.infer("linear", [given], outputs=outputs, request_id="one")
    assert result.get_response()["id"] == "one"
    assert result.get_response()["model_version"] == "3"
    check(result, session)
    check(http.infer("linear", [given]), session)


def test_tritonclient_grpc(rpc, session):
    given = tritonclient.grpc.InferInput("inputs", INPUTS.shape, "FP32").set_data_from_numpy(INPUTS)
    result = rpc.infer("linear", [given], request_id="two")
    assert result.get_response().id == "two"
    check(result, session)
    only = rpc.infer("linear", [given], outputs=[tritonclient.grpc.InferRequestedOutput("label")])
    assert [output.name for output in only.get_response().outputs] == ["label"]


def test_tritonclient_asks_for_everything_else(http, rpc):
    for client in (http, rpc):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("linear")
        assert client.is_model_ready("linear", "2")
        assert not client.is_model_ready("linear", "1")
        assert not client.is_model_ready("other")
    described = http.get_model_metadata("linear")
    assert described["versions"] == ["2", "3"]
    assert described["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": [-1, 4]}]
    assert rpc.get_model_metadata("linear", as_json=True)["outputs"][1] == {
        "name": "label",
        "datatype": "INT64",
        "shape": ["-1"],
    }
    assert rpc.get_model_config("linear").config.max_batch_size == 64
    assert [model["version"] for model in http.get_model_repository_index()] == ["3", "2"]
    assert [model.version for model in rpc.get_model_repository_index().models] == ["3", "2"]
    assert http.get_server_metadata()["name"] == rpc.get_server_metadata().name == "silotrain"


def test_the_example_of_a_version_is_a_request(curl, models):
    folder = models / "linear" / "3"
    answer = curl.post("/v2/models/linear/infer", content=(folder / EXAMPLE_REQUEST).read_bytes())
    assert answer.status_code == 200
    expected = httpx.Response(200, content=(folder / EXAMPLE_RESPONSE).read_bytes()).json()
    assert answer.json() == expected


def test_metrics_are_those_of_triton(curl):
    curl.post("/v2/models/linear/versions/2/infer", json={"inputs": []})
    text = curl.get("/metrics").text
    assert 'nv_inference_request_failure{model="linear",reason="OTHER",version="2"}' in text
    assert 'silotrain_model_version{model="linear"} 3.0' in text
    assert 'silotrain_model_accuracy{metric="test/accuracy",model="linear"} 0.9' in text
