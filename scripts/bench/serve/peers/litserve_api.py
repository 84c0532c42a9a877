"""Models behind LitServe with batching, which has a protocol of its own and no gRPC: MODELS HTTP_PORT GRPC_PORT."""

import sys
from pathlib import Path

import numpy as np
from litserve import LitAPI, LitServer
from session import open_session


class Onnx(LitAPI):
    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    def setup(self, device):
        self.session = open_session(self.path)
        self.name = self.session.get_inputs()[0].name

    def decode_request(self, request):
        return np.array(request["inputs"], np.float32)

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, inputs):
        return self.session.run(["scores"], {self.name: inputs})[0]

    def unbatch(self, outputs):
        return list(outputs[:, None])

    def encode_response(self, output):
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    models, http, _ = sys.argv[1:]
    apis = [
        Onnx(path, api_path=f"/{path.parents[1].name}", max_batch_size=64, batch_timeout=0.001)
        for path in sorted(Path(models).glob("*/1/model.onnx"))
    ]
    LitServer(apis, accelerator="cpu", workers_per_device=1).run(
        port=int(http), num_api_servers=1, generate_client_file=False, log_level="error", access_log=False
    )
