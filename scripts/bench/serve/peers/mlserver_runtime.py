"""Models behind MLServer with adaptive batching, in its own process: MODELS HTTP_PORT GRPC_PORT."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import open_session


class Onnx(MLModel):
    async def load(self) -> bool:
        self.session = open_session(Path(self.settings.parameters.uri))
        self.names = [output.name for output in self.session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        answers = self.session.run(self.names, inputs)
        outputs = [NumpyCodec.encode_output(name, answer) for name, answer in zip(self.names, answers, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def write_settings(models: Path, http: str, grpc: str, folder: Path) -> None:
    """Write the files that MLServer reads."""
    server = {"http_port": int(http), "grpc_port": int(grpc), "metrics_endpoint": None, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps({**server, "debug": False}))
    for path in sorted(models.glob("*/1/model.onnx")):
        name = path.parents[1].name
        model = {"name": name, "implementation": "mlserver_runtime.Onnx", "parameters": {"uri": str(path)}}
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(
            json.dumps({**model, "max_batch_size": 64, "max_batch_time": 0.002})
        )


if __name__ == "__main__":
    from mlserver.cli.serve import load_settings
    from mlserver.server import MLServer

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_settings(Path(sys.argv[1]), *sys.argv[2:], Path(folder))
            settings, models = await load_settings(folder)
            await MLServer(settings).start(models)

    asyncio.run(serve())
