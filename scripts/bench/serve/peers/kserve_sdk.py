"""Models behind the kserve SDK, which has both protocols and no batching: MODELS HTTP_PORT GRPC_PORT."""

import sys
from pathlib import Path

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.numpy_codec import from_np_dtype
from session import sessions


class Onnx(Model):
    def __init__(self, name, session):
        super().__init__(name)
        self.session, self.names = session, [output.name for output in session.get_outputs()]
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        answers = self.session.run(self.names, {each.name: each.as_numpy() for each in payload.inputs})
        outputs = []
        for name, answer in zip(self.names, answers, strict=True):
            output = InferOutput(name, list(answer.shape), from_np_dtype(answer.dtype))
            output.set_data_from_numpy(answer, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=outputs)


models, http, grpc = sys.argv[1:]
ModelServer(http_port=int(http), grpc_port=int(grpc), enable_latency_logging=False).start(
    [Onnx(name, session) for name, session in sessions(Path(models)).items()]
)
