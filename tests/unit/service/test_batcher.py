"""A request with more rows than a batch."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.exported import weights, write_linear
from tests.support.serving import serving


@pytest.mark.parametrize("rows", [1, 8, 9, 24, 25])
def test_a_large_request_is_computed_in_parts(tmp_path: Path, rows: int) -> None:
    write_linear(tmp_path / "linear", 3)
    inputs = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [rows, 4], "data": inputs.ravel().tolist()}
    with serving(tmp_path, max_batch=8) as server:
        answer = httpx.post(f"{server.http_url}/v2/models/linear/infer", json={"inputs": [tensor]}).json()
        families = {
            family.name: family
            for family in text_string_to_metric_families(httpx.get(f"{server.http_url}/metrics").text)
        }
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer["outputs"]}
    np.testing.assert_allclose(outputs["outputs"], inputs @ weights(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["label"], outputs["outputs"].argmax(1))
    (count,) = families["nv_inference_count"].samples
    assert (count.labels, count.value) == ({"model": "linear", "version": "3"}, rows)
