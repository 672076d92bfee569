"""mosec with dynamic batching: up to 32 requests a batch, waiting 10 ms for them."""

import os
import sys

from mosec import Server, Worker
from sentence_transformers import SentenceTransformer


class Embed(Worker):
    def __init__(self):
        super().__init__()
        self.model = SentenceTransformer(os.environ["MODEL_FOLDER"], device="cpu")

    def forward(self, data):
        vectors = self.model.encode([text for one in data for text in one["texts"]], show_progress_bar=False).tolist()
        answers = []
        for one in data:
            count = len(one["texts"])
            answers.append({"vectors": vectors[:count]})
            vectors = vectors[count:]
        return answers


if __name__ == "__main__":
    sys.argv += ["--port", os.environ["PORT"], "--address", "127.0.0.1", "--timeout", "600000"]  # its own way in
    server = Server()
    server.append_worker(Embed, max_batch_size=32, max_wait_time=10)
    server.run()
