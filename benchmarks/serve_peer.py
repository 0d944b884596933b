"""A server as one writes it in an hour with transformers and FastAPI: the peer of benchmarks/serve.py.

    python benchmarks/serve_peer.py FOLDER PORT

FOLDER is a model in the format llava-hf. One request at a time is computed, and streamed as its text arrives.
"""

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def create(folder: Path) -> FastAPI:
    """Returns the application."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    app, lock = FastAPI(), threading.Lock()

    def chunks(body: dict[str, Any]) -> Iterator[str]:
        pictures, text = read(body)
        prompt = f"{SYSTEM}USER: {'<image>' * len(pictures)}\n{text} ASSISTANT:"
        inputs = processor(images=pictures or None, text=prompt, return_tensors="pt")
        with lock:
            streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            options = {**inputs, "max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs=options)
            thread.start()
            n = 0
            for piece in streamer:
                n += bool(piece)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
            thread.join()
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': n}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(chunks(body), media_type="text/event-stream")

    @app.get("/health")
    def health() -> str:
        return "ok"

    return app


def read(body: dict[str, Any]) -> tuple[list[Image.Image], str]:
    """Returns the pictures and the text of a request."""
    parts = body["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB") for url in urls]
    return pictures, parts[-1]["text"]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    uvicorn.run(create(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
