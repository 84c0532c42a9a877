"""Messages of gRPC, and paths of HTTP, that no client sends: refused with got and wanted, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from tests.support.exported import INPUTS, write_linear
from tests.support.serving import serving
from trainer.service.protocol import DTYPES
from trainer.service.server import Server

CONTENTS = (
    *("bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents"),
    *("fp32_contents", "fp64_contents", "bytes_contents"),
)
INFER = "/inference.GRPCInferenceService/ModelInfer"

names = st.sampled_from(["linear", "", "..", "../linear", "linear/1", "\0"]) | st.text(max_size=8)
shapes = st.sampled_from([[1, 4], [2, 4], [0, 4], [-1, 4], [2**62, 4], []]) | st.lists(
    st.integers(-(2**63), 2**63 - 1), max_size=3
)
raw_contents = st.lists(st.sampled_from([bytes(16), bytes(32), b""]) | st.binary(max_size=20), max_size=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    write_linear(root / "linear", 1)
    (root / "secret").write_text("secret")
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def call(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel.unary_unary(INFER)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http_url) as client:
        yield client


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a ModelInferRequest that is right in most of its parts, or in none."""
    request = messages.ModelInferRequest(
        model_name=draw(st.sampled_from(["linear"] * 3) | names),
        model_version=draw(st.sampled_from(["", "1", "2", "-1", "1.0"])),
        raw_input_contents=draw(raw_contents),
    )
    for _ in range(draw(st.integers(0, 2))):
        tensor = request.inputs.add(
            name=draw(st.sampled_from(["inputs", "inputs", "other"])),
            datatype=draw(st.sampled_from(["FP32", *DTYPES, "BYTES", ""])),
            shape=draw(shapes),
        )
        if draw(st.booleans()):
            field = draw(st.sampled_from(CONTENTS))
            getattr(tensor.contents, field).extend(draw(st.lists(st.just(b"" if "bytes" in field else 1), max_size=8)))
    for name in draw(st.lists(st.sampled_from(["outputs", "label", "other"]), max_size=2)):
        request.outputs.add(name=name)
    if draw(st.booleans()):
        request.parameters["timeout"].int64_param = draw(st.integers(-(2**63), 2**63 - 1))
    return request.SerializeToString()


@settings(max_examples=200, deadline=None)
@given(message=requests())
def test_messages(call: Any, message: bytes) -> None:
    try:
        answer = call(message, timeout=20)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        known = {grpc.StatusCode.INVALID_ARGUMENT: ": got ", grpc.StatusCode.NOT_FOUND: ": got "}
        assert known.get(code, "timeout: ") in details or code is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        outputs = messages.ModelInferResponse.FromString(answer).outputs
        assert {output.name for output in outputs} <= {"outputs", "label"}


@settings(max_examples=60, deadline=None)
@given(message=st.binary(max_size=60))
def test_bytes_that_are_no_message(call: Any, message: bytes) -> None:
    try:
        call(message, timeout=20)
    except grpc.RpcError as error:
        code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        refused = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        assert code in refused


def quoted(name: str) -> str:
    """Return a name for a path, also `..`, which clients would resolve."""
    return quote(name, safe="").replace(".", "%2E")


def test_a_slash_too_many_leads_nowhere(client: httpx.Client) -> None:
    assert client.get("/v2/models/linear/versions/0/").status_code == 404


@settings(max_examples=150, deadline=None)
@given(model=names, version=st.none() | names, tail=st.sampled_from(["", "/ready", "/infer"]))
def test_paths(client: httpx.Client, model: str, version: str | None, tail: str) -> None:
    within = "" if version is None else f"/versions/{quoted(version)}"
    method = "POST" if tail == "/infer" else "GET"
    answer = client.request(method, f"/v2/models/{quoted(model)}{within}{tail}", content=b"{}")
    assert answer.status_code in ({200, 400, 404, 405} if model == "linear" else {400, 404, 405})
    assert "secret" not in answer.text
    if answer.status_code != 200 and answer.headers["content-type"] == "application/json":
        assert ": got " in answer.json()["error"]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["Inference-Header-Content-Length", "Content-Encoding", "Content-Type", "Expect"]),
    value=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=10),
)
def test_headers(client: httpx.Client, name: str, value: str) -> None:
    body = json.dumps({"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 4], "data": [1] * 4}]}).encode()
    assert INPUTS[0].shape == [-1, 4]
    answer = client.post("/v2/models/linear/infer", content=body, headers={name: value})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert ": got " in answer.json()["error"]
