"""LitServe with batching: up to 32 requests a batch, waiting 10 ms for them."""

import os

import litserve
from sentence_transformers import SentenceTransformer


class Embed(litserve.LitAPI):
    def setup(self, device):
        self.model = SentenceTransformer(os.environ["MODEL_FOLDER"], device="cpu")

    def decode_request(self, request):
        return request["texts"]

    def batch(self, inputs):
        return inputs

    def predict(self, requests):
        vectors = self.model.encode([text for texts in requests for text in texts], show_progress_bar=False).tolist()
        answers = []
        for texts in requests:
            answers.append(vectors[: len(texts)])
            vectors = vectors[len(texts) :]
        return answers

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"vectors": output}


if __name__ == "__main__":
    api = Embed(max_batch_size=32, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
