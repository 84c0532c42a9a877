"""Models behind FastAPI and pydantic, as they are often written by hand: MODELS HTTP_PORT GRPC_PORT."""

import sys
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from session import sessions


class Images(BaseModel):
    inputs: list[list[list[list[float]]]]


class Answer(BaseModel):
    outputs: list[list[float]]


models, http, _ = sys.argv[1:]
loaded, app = sessions(Path(models)), FastAPI()


@app.post("/{name}")
async def predict(name: str, images: Images) -> Answer:
    session = loaded[name]
    inputs = {session.get_inputs()[0].name: np.array(images.inputs, np.float32)}
    return Answer(outputs=session.run(["scores"], inputs)[0].tolist())


uvicorn.run(app, port=int(http), access_log=False, log_level="warning")
