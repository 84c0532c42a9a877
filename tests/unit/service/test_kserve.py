"""The clients of KServe's SDK, in a process of their own: its messages of gRPC have the names of tritonclient's."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from tests.support.exported import weights, write_linear
from tests.support.serving import serving

CLIENTS = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(url, address):
    answers = []
    for binary in (True, False):
        tensor = InferInput("inputs", [2, 4], "FP32")
        tensor.set_data_from_numpy(np.arange(8, dtype=np.float32).reshape(2, 4), binary_data=binary)
        request = InferRequest("linear", [tensor])
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await rest.is_server_ready(url) and await rest.is_server_live(url)
        assert await rest.is_model_ready(url, "linear")
        answers.append(await rest.infer(url, request, model_name="linear"))
        async with InferenceGRPCClient(address) as rpc:
            assert await rpc.is_server_ready() and await rpc.is_model_ready("linear")
            answers.append(await rpc.infer(request))
    print(json.dumps([answer.outputs[0].as_numpy().tolist() for answer in answers]))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("kserve") is None, reason="kserve is not installed")
def test_the_sdk_of_kserve_gets_the_answers(tmp_path):
    write_linear(tmp_path / "linear", 1)
    with serving(tmp_path) as server:
        command = [sys.executable, "-c", CLIENTS, server.http_url, server.grpc_address]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    expected = np.arange(8, dtype=np.float32).reshape(2, 4) @ weights(1)
    answers = json.loads(ended.stdout.splitlines()[-1])
    assert len(answers) == 4
    for answer in answers:
        np.testing.assert_array_equal(np.array(answer, np.float32), expected)
