"""What one writes first: a Flask app that calls encode for each request. Served by gunicorn's gthread.

`encode` stands under a lock: its tokenizer raises "Already borrowed" when two threads share it.
"""

import os
import threading

from flask import Flask, jsonify, request
from sentence_transformers import SentenceTransformer

app = Flask(__name__)
model = SentenceTransformer(os.environ["MODEL_FOLDER"], device="cpu")
lock = threading.Lock()


@app.post("/embed")
def embed():
    texts = request.get_json()["texts"]
    with lock:
        vectors = model.encode(texts, show_progress_bar=False)
    return jsonify(vectors=vectors.tolist())
