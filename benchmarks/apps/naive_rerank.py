"""What one writes first: a Flask app that calls predict for each request. Served by gunicorn's gthread."""

import os
import threading

from flask import Flask, jsonify, request
from sentence_transformers import CrossEncoder

app = Flask(__name__)
model = CrossEncoder(os.environ["MODEL_FOLDER"], device="cpu")
lock = threading.Lock()


@app.post("/rerank")
def rerank():
    body = request.get_json()
    with lock:
        scores = model.predict([(body["query"], document) for document in body["documents"]], show_progress_bar=False)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return jsonify(results=[{"index": i, "relevance_score": float(scores[i])} for i in order])
