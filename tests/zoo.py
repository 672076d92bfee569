"""Tiny models, one of each architecture and layout that people use, made on the spot in seconds, always the same.

A new layout is a function here: it writes a folder. What it gives is compared with its own library in
tests/drivers/test_zoo.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WIDTH = 32
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 64}
# Large weights, and none that are alike: else all tokens are nearly one, and every mistake nearly right.
SPREAD = 0.6

CORPUS = (
    "The quick brown fox jumps over the lazy dog. Another text, rather longer than the first, so that one is padded. "
    "query: document: passage: Represent the sentence for retrieval: find: what is the capital of France? "
    "Le vif renard brun saute par-dessus le chien paresseux. Der schnelle braune Fuchs springt über den faulen Hund. "
    "0 1 2 3 4 5 6 7 8 9 , . ; : ! ? - ( ) pool embed server model token vector short long texts programs"
)


@dataclasses.dataclass(frozen=True)
class Animal:
    """A layout. `make` writes its folder; `config`: how it is registered."""

    name: str
    make: Callable[[Path], None]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_openvino: bool = True  # whether it is exported; if not, torch serves it and says why
    by_encode: bool = False  # whether the library's encode serves it
    static: bool = False
    of_model2vec: bool = False
    has_default: bool = True  # whether it takes texts without being told what they are for
    kind: str = "embed"
    causal: bool = False  # a language model that scores pairs in a chat template
    outputs: tuple[str, ...] = ()  # of a model that gives several


ZOO: dict[str, Animal] = {}


def animal(name: str, **facts: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Enter the function below as the maker of this layout."""

    def enter(make: Callable[[Path], None]) -> Callable[[Path], None]:
        ZOO[name] = Animal(name, make, **facts)
        return make

    return enter


def make(name: str, root: Path) -> Path:
    """The folder of a layout, below another."""
    folder = root / re.sub(r"\W+", "-", name)
    ZOO[name].make(folder)
    return folder


# --- tokenizers


@functools.cache
def _trained(kind: str) -> str:
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
        )
    elif kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            unk_token="<unk>",
            show_progress=False,
        )
    made.train_from_iterator([CORPUS] * 5, trainer)
    return made.to_str()


TEMPLATES = {
    "[CLS] $A [SEP]": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "<s> $A </s>": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "<s> $A </s>, typed": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "$A </s>": ("$A </s>", "$A </s> $B </s>"),
    "<s> $A": ("<s> $A", "<s> $A $B"),
}


def tokenizer(kind: str, template: str = "", **settings: Any) -> Any:
    """A fast tokenizer of transformers, trained on a few sentences."""
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer.from_str(_trained(kind))
    if template:
        single, pair = TEMPLATES[template]
        special = {word.partition(":")[0] for word in pair.split() if not word.startswith("$")}
        made.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(word, made.token_to_id(word)) for word in sorted(special)]
        )
    names = (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        if kind == "wordpiece"
        else {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "mask_token": "<mask>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**names, "model_max_length": 512, **settings})


WORDPIECE = functools.partial(tokenizer, "wordpiece", "[CLS] $A [SEP]")
ROBERTA = functools.partial(tokenizer, "bytes", "<s> $A </s>")
XLM_R = functools.partial(tokenizer, "unigram", "<s> $A </s>")
T5 = functools.partial(tokenizer, "unigram", "$A </s>")
GPT = functools.partial(tokenizer, "bytes", "")
LLAMA = functools.partial(tokenizer, "bytes", "<s> $A", padding_side="left")


# --- transformers


def spread(model: Any, seed: int = 0) -> Any:
    """Weights that make every token count."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0, SPREAD / weight.shape[-1] ** 0.5 * (4 if "embed" in name else 1), generator=generator)
    return model.eval()


def encoder(folder: Path, architecture: str, words: Any, *, seed: int = 0, **config: Any) -> None:
    """A transformers folder: `architecture` is the name of its classes without Config and Model."""
    import transformers

    settings = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, **LAYERS, **config}
    made = getattr(transformers, f"{architecture}Config")(**settings)
    model = getattr(transformers, config.pop("model_class", f"{architecture}Model"))(made)
    spread(model, seed).save_pretrained(folder)
    words.save_pretrained(folder)


def modules() -> Any:
    """The library's modules, wherever its version has them."""
    try:
        from sentence_transformers.sentence_transformer import modules as found
    except ImportError:
        from sentence_transformers import models as found
    return found


def sentence_transformer(
    folder: Path, *steps: Any, architecture: str = "Bert", words: Any = None, pooling: Any = "mean", **settings: Any
) -> None:
    """An ST folder: a transformer, a pooling and further steps."""
    from sentence_transformers import SentenceTransformer

    taken = {k: settings.pop(k) for k in ("max_seq_length", "do_lower_case") if k in settings}
    of_pooling = {k: settings.pop(k) for k in ("include_prompt",) if k in settings}
    of_model = {k: settings.pop(k) for k in ("prompts", "default_prompt_name", "truncate_dim") if k in settings}
    base = folder.parent / f"{folder.name}-base"
    encoder(base, architecture, words or WORDPIECE(), **settings)
    found = modules()
    first = found.Transformer(str(base), **taken)
    pooled = found.Pooling(WIDTH, pooling_mode=pooling, **of_pooling)
    dense = [step() if callable(step) else step for step in steps]
    SentenceTransformer(modules=[first, pooled, *dense], device="cpu", **of_model).save_pretrained(
        str(folder), create_model_card=False
    )


def dense(width: int = 24, seed: int = 1, into: int = WIDTH) -> Callable[[], Any]:
    """A Dense step."""

    def make() -> Any:
        import torch

        return spread(modules().Dense(into, width, activation_function=torch.nn.Tanh()), seed)

    return make


def normalize() -> Any:
    """A Normalize step."""
    return modules().Normalize()


PROMPTS = {"query": "query: ", "document": "Represent the sentence for retrieval: "}

for _mode in ("mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken"):
    animal(f"bert, {_mode}")(functools.partial(sentence_transformer, pooling=_mode))
animal("bert, mean and max")(functools.partial(sentence_transformer, pooling=("mean", "max")))
animal("bert, dense")(lambda folder: sentence_transformer(folder, dense(), normalize))
animal("bert, prompts")(
    lambda folder: sentence_transformer(folder, prompts=PROMPTS, default_prompt_name="document", max_seq_length=32)
)
animal("bert, short limit")(lambda folder: sentence_transformer(folder, max_seq_length=8))
animal("bert, lower case")(
    lambda folder: sentence_transformer(folder, words=ROBERTA(), do_lower_case=True, pooling="mean")
)
animal("bert, cut at the left")(
    lambda folder: sentence_transformer(folder, words=WORDPIECE(truncation_side="left"), max_seq_length=16)
)
animal("truncate_dim")(lambda folder: sentence_transformer(folder, truncate_dim=12))
animal("distilbert")(
    lambda folder: sentence_transformer(folder, architecture="DistilBert", dim=WIDTH, n_layers=2, n_heads=2)
)
animal("roberta")(
    lambda folder: sentence_transformer(
        folder, architecture="Roberta", words=ROBERTA(), max_position_embeddings=514, max_seq_length=64
    )
)
animal("xlm-roberta")(
    lambda folder: sentence_transformer(folder, architecture="XLMRoberta", words=XLM_R(), max_position_embeddings=514)
)
animal("mpnet")(
    lambda folder: sentence_transformer(folder, architecture="MPNet", words=ROBERTA(), max_position_embeddings=514)
)
animal("modernbert")(
    lambda folder: sentence_transformer(
        folder, architecture="ModernBert", cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    )
)
animal("albert")(lambda folder: sentence_transformer(folder, architecture="Albert", words=XLM_R(), embedding_size=16))
animal("electra")(lambda folder: sentence_transformer(folder, architecture="Electra", embedding_size=WIDTH))
animal("deberta-v2")(
    lambda folder: sentence_transformer(
        folder, architecture="DebertaV2", words=XLM_R(), relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=16,
    )
)  # fmt: skip
animal("qwen3, last token")(
    lambda folder: sentence_transformer(
        folder, normalize, architecture="Qwen3", words=T5(padding_side="left"), pooling="lasttoken",
        num_key_value_heads=1, head_dim=16, prompts=PROMPTS,
    )
)  # fmt: skip
animal("mistral, last token")(
    lambda folder: sentence_transformer(
        folder, architecture="Mistral", words=LLAMA(), pooling="lasttoken", num_key_value_heads=1
    )
)
animal("t5")(
    lambda folder: sentence_transformer(
        folder, dense(), architecture="T5", words=T5(), d_model=WIDTH, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
        model_class="T5EncoderModel",
    )
)  # fmt: skip
animal("gpt2, no special tokens")(
    lambda folder: sentence_transformer(
        folder, architecture="GPT2", words=GPT(), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=512
    )
)
animal("gpt2, no special tokens, dense")(
    lambda folder: sentence_transformer(
        folder, dense(), architecture="GPT2", words=GPT(), n_embd=WIDTH, n_layer=2, n_head=2, pooling="lasttoken"
    )
)
animal("gemma 3, both ways")(
    lambda folder: sentence_transformer(
        folder, dense(48), dense(WIDTH, 2, 48), normalize, architecture="Gemma3Text", words=LLAMA(),
        num_key_value_heads=1, head_dim=16, use_bidirectional_attention=True, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], prompts=PROMPTS,
    )
)  # fmt: skip
for _mode in ("mean", "cls", "max", "weightedmean"):
    animal(f"without the prompt, {_mode}", on_openvino=_mode != "weightedmean")(
        functools.partial(sentence_transformer, pooling=_mode, include_prompt=False, prompts=PROMPTS, max_seq_length=48)
    )
animal("without the prompt, t5")(
    lambda folder: sentence_transformer(
        folder, dense(), normalize, architecture="T5", words=T5(), d_model=WIDTH, d_ff=64, d_kv=16, num_layers=2,
        num_heads=2, model_class="T5EncoderModel", include_prompt=False, prompts=PROMPTS,
    )
)  # fmt: skip
animal("without the prompt, mistral")(
    lambda folder: sentence_transformer(
        folder, architecture="Mistral", words=LLAMA(), num_key_value_heads=1, include_prompt=False, prompts=PROMPTS
    )
)


@animal("half precision")
def half(folder: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    whole = folder.parent / f"{folder.name}-whole"
    sentence_transformer(whole, dense())
    SentenceTransformer(str(whole), device="cpu", model_kwargs={"dtype": torch.bfloat16}).save_pretrained(
        str(folder), create_model_card=False
    )


@animal("sharded")
def sharded(folder: Path) -> None:
    import transformers

    sentence_transformer(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


# --- without modules.json

animal("plain encoder")(lambda folder: encoder(folder, "Bert", WORDPIECE()))
animal("plain masked lm")(lambda folder: encoder(folder, "Bert", WORDPIECE(), model_class="BertForMaskedLM"))
animal("plain causal lm")(
    lambda folder: encoder(folder, "Mistral", LLAMA(), num_key_value_heads=1, model_class="MistralForCausalLM")
)
animal("classifier, as an embedder", config={"task": "embed"})(
    lambda folder: encoder(folder, "Bert", WORDPIECE(), model_class="BertForSequenceClassification", num_labels=3)
)
animal("token classifier, as an embedder", config={"task": "embed"})(
    lambda folder: encoder(folder, "Bert", WORDPIECE(), model_class="BertForTokenClassification", num_labels=3)
)
animal("plain causal lm with a chat template", by_encode=True)(
    lambda folder: encoder(
        folder, "Mistral",
        LLAMA(chat_template="{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"),
        num_key_value_heads=1, model_class="MistralForCausalLM",
    )
)  # fmt: skip


# --- code of its own

CODE = '''
import torch
try:
    from sentence_transformers.sentence_transformer.modules import Transformer
except ImportError:
    from sentence_transformers.models import Transformer


class Counting(Transformer):
    """Makes more of a text than its ids: how many letters it has."""

    def preprocess(self, inputs, *args, **kwargs):
        features = super().preprocess(inputs, *args, **kwargs)
        features["letters"] = torch.tensor([float(len(text)) for text in inputs])
        return features

    tokenize = preprocess

    def forward(self, features, **kwargs):
        letters = features.pop("letters")
        features = super().forward(features, **kwargs)
        wave = torch.sin(letters[:, None, None] * torch.arange(1, 33))
        features["token_embeddings"] = features["token_embeddings"] + wave
        return features
'''


@animal("code of its own", by_encode=True, config={"trust_remote_code": True})
def own_code(folder: Path) -> None:
    sentence_transformer(folder, max_seq_length=64)
    (folder / "counting.py").write_text(CODE)
    file = folder / "modules.json"
    entries = json.loads(file.read_text())
    entries[0]["type"] = "counting.Counting"
    file.write_text(json.dumps(entries))


# --- tables


def table(kind: str = "wordpiece", width: int = WIDTH, rows: int | None = None) -> np.ndarray:
    words = tokenizers.Tokenizer.from_str(_trained(kind))
    random = np.random.default_rng(7)
    return random.standard_normal((rows or words.get_vocab_size(), width), dtype=np.float32)


def static(folder: Path, *steps: Any, **settings: Any) -> None:
    """A StaticEmbedding, saved by the library."""
    from sentence_transformers import SentenceTransformer

    words = tokenizers.Tokenizer.from_str(_trained("wordpiece"))
    first = modules().StaticEmbedding(words, embedding_weights=table())
    SentenceTransformer(modules=[first, *(step() for step in steps)], device="cpu", **settings).save_pretrained(
        str(folder), create_model_card=False
    )


def model2vec(folder: Path, kind: str = "wordpiece", *, quantised: bool = False, **config: Any) -> None:
    """A folder as model2vec saves it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    words = tokenizers.Tokenizer.from_str(_trained(kind))
    words.save(str(folder / "tokenizer.json"))
    tensors = {"embeddings": table(kind)}
    if quantised:
        random = np.random.default_rng(8)
        vocabulary = words.get_vocab_size()
        tensors = {
            "embeddings": random.integers(-127, 128, (50, WIDTH), dtype=np.int8),
            "mapping": random.integers(0, 50, vocabulary, dtype=np.int64),
            "weights": random.random(vocabulary, dtype=np.float32),
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"normalize": False, **config}))


animal("static", static=True)(static)
animal("static, normalised", static=True)(lambda folder: static(folder, normalize, prompts=PROMPTS))
animal("static, dense", on_openvino=False)(lambda folder: static(folder, dense()))
animal("model2vec", static=True, of_model2vec=True)(model2vec)
animal("model2vec, unigram, normalised", static=True, of_model2vec=True)(
    lambda folder: model2vec(folder, "unigram", normalize=True)
)
animal("model2vec, quantised", static=True, of_model2vec=True)(
    lambda folder: model2vec(folder, quantised=True, normalize=True)
)


@animal("model2vec, with modules.json", static=True, of_model2vec=True)
def model2vec_with_modules(folder: Path) -> None:
    model2vec(folder, normalize=True)
    steps = (("StaticEmbedding", "."), ("Normalize", "1_Normalize"))
    entries = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in steps]
    (folder / "modules.json").write_text(json.dumps(entries))


# --- routers


def routed(folder: Path, query: str, document: str, *steps: Any, **settings: Any) -> None:
    """A router whose routes are static or transformers of their own."""
    from sentence_transformers import SentenceTransformer

    found = modules()

    def route(kind: str, seed: int) -> list[Any]:
        if kind == "static":
            words = tokenizers.Tokenizer.from_str(_trained("wordpiece"))
            return [found.StaticEmbedding(words, embedding_weights=table())]
        base = folder.parent / f"{folder.name}-{seed}"
        encoder(base, "Bert", WORDPIECE(), seed=seed)
        return [found.Transformer(str(base), max_seq_length=16 + seed), found.Pooling(WIDTH, pooling_mode="mean")]

    of_router = {k: settings.pop(k) for k in ("default_route", "allow_empty_key", "route_mappings") if k in settings}
    router = found.Router({"query": route(query, 1), "document": route(document, 2)}, **of_router)
    SentenceTransformer(modules=[router, *(step() for step in steps)], device="cpu", **settings).save_pretrained(
        str(folder), create_model_card=False
    )


animal("router")(lambda folder: routed(folder, "bert", "bert", default_route="document", prompts=PROMPTS))
animal("router, static queries")(lambda folder: routed(folder, "static", "bert", normalize))
animal("router, static", static=True)(lambda folder: routed(folder, "static", "static"))
animal("router, no default", has_default=False)(lambda folder: routed(folder, "static", "bert", allow_empty_key=False))


# --- models that score


def scoring(folder: Path, architecture: str, words: Any, labels: int = 1, **config: Any) -> None:
    """A plain folder with a classification head, as most rerankers of the hub are."""
    named = {} if labels < 2 else {"id2label": {i: f"kind {i}" for i in range(labels)}}
    model_class = f"{architecture}ForSequenceClassification"
    encoder(folder, architecture, words, model_class=model_class, num_labels=labels, **named, **config)


animal("reranker, bert", kind="rerank")(lambda folder: scoring(folder, "Bert", WORDPIECE()))
animal("reranker, xlm-roberta", kind="rerank")(
    lambda folder: scoring(folder, "XLMRoberta", XLM_R(), max_position_embeddings=514)
)
animal("reranker, roberta", kind="rerank")(
    lambda folder: scoring(folder, "Roberta", ROBERTA(), max_position_embeddings=514)
)
animal("reranker, modernbert", kind="rerank")(
    lambda folder: scoring(
        folder, "ModernBert", WORDPIECE(), cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    )
)
animal("reranker, deberta-v3", kind="rerank")(
    lambda folder: scoring(
        folder, "DebertaV2", tokenizer("unigram", "<s> $A </s>, typed"), relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=16, share_att_key=True, norm_rel_ebd="layer_norm",
        position_biased_input=False, type_vocab_size=2, pooler_hidden_size=WIDTH,
    )
)  # fmt: skip
animal("classifier", kind="classify")(lambda folder: scoring(folder, "Bert", WORDPIECE(), labels=3))
animal("classifier, several labels fit", kind="classify")(
    lambda folder: scoring(folder, "Bert", WORDPIECE(), labels=3, problem_type="multi_label_classification")
)


@animal("reranker, saved by CrossEncoder", kind="rerank")
def saved_cross_encoder(folder: Path) -> None:
    from sentence_transformers import CrossEncoder

    base = folder.parent / f"{folder.name}-base"
    scoring(base, "Bert", WORDPIECE(), max_position_embeddings=64)
    model = CrossEncoder(str(base), device="cpu", prompts=PROMPTS, default_prompt_name="query")
    model.save_pretrained(str(folder))


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<s>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "<s>query: {{ messages[-2]['content'] }}\nthe document: {{ messages[-1]['content'] }}</s>{{ ' answer:' }}"
)


def causal(folder: Path, *, false_token: bool = True, **settings: Any) -> None:
    """A language model that says yes or no."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.modules import LogitScore

    if int(version("sentence-transformers").split(".")[0]) < 6:
        pytest.skip("it cuts what a chat template makes in another way, so there it computes such models itself")
    base = folder.parent / f"{folder.name}-base"
    words = LLAMA(chat_template=CHAT)
    encoder(base, "Qwen3", words, num_key_value_heads=1, head_dim=16, model_class="Qwen3ForCausalLM")
    transformer = modules().Transformer(str(base), transformer_task="text-generation", max_seq_length=256)
    score = LogitScore(words.convert_tokens_to_ids("o"), words.convert_tokens_to_ids("e") if false_token else None)
    CrossEncoder(modules=[transformer, score], device="cpu", **settings).save_pretrained(str(folder))


animal("reranker, causal", kind="rerank", causal=True)(causal)
animal("reranker, causal, one token and a prompt", kind="rerank", causal=True)(
    lambda folder: causal(folder, false_token=False, prompts={"web": "find: "}, default_prompt_name="web")
)


# --- sparse


def sparse(folder: Path, *modules_of_it: Any, **settings: Any) -> None:
    """A SparseEncoder of these modules, saved by the library."""
    from sentence_transformers import SparseEncoder

    SparseEncoder(modules=list(modules_of_it), device="cpu", **settings).save_pretrained(
        str(folder), create_model_card=False
    )


def masked_lm(folder: Path, architecture: str = "Bert", words: Any = None, **config: Any) -> Any:
    """A Transformer that gives a value for each entry of the vocabulary, most of them below zero."""
    import torch

    base = folder.parent / f"{folder.name}-base"
    words = words or WORDPIECE()
    encoder(base, architecture, words, model_class=f"{architecture}ForMaskedLM", **config)
    found = modules().Transformer(str(base), transformer_task="fill-mask")
    with torch.no_grad():
        layer = found.model.get_output_embeddings()
        assert layer.bias is not None
        layer.bias -= 2.0
    return found


def splade(folder: Path, architecture: str = "Bert", words: Any = None, **settings: Any) -> None:
    """A SPLADE: its values are pooled over a text's tokens."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    of_pooling = {k: settings.pop(k) for k in ("pooling_strategy", "activation_function") if k in settings}
    of_model = {k: settings.pop(k) for k in ("prompts", "max_active_dims") if k in settings}
    sparse(folder, masked_lm(folder, architecture, words, **settings), SpladePooling(**of_pooling), **of_model)


animal("splade", kind="sparse")(splade)
animal("splade, sum", kind="sparse")(functools.partial(splade, pooling_strategy="sum"))
animal("splade, two logarithms", kind="sparse")(
    functools.partial(splade, activation_function="log1p_relu", prompts=PROMPTS, max_active_dims=7)
)
animal("splade, distilbert", kind="sparse")(
    lambda folder: splade(folder, "DistilBert", dim=WIDTH, n_layers=2, n_heads=2)
)
animal("splade, xlm-roberta", kind="sparse")(
    lambda folder: splade(folder, "XLMRoberta", XLM_R(), max_position_embeddings=514)
)
animal("splade, modernbert", kind="sparse")(
    lambda folder: splade(folder, "ModernBert", cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
)


@animal("csr", kind="sparse")
def csr(folder: Path) -> None:
    import torch
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    base = folder.parent / f"{folder.name}-base"
    encoder(base, "Bert", WORDPIECE())
    last = spread(SparseAutoEncoder(WIDTH, 4 * WIDTH, k=9, normalize=True))
    with torch.no_grad():
        last.pre_bias.fill_(0.1)
    sparse(folder, modules().Transformer(str(base)), modules().Pooling(WIDTH, pooling_mode="mean"), last)


def weights_of_tokens() -> Any:
    """A table of weights, some of them zero."""
    import torch
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    words = WORDPIECE()
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(len(words), generator=generator)
    weight[:20] = 0
    return SparseStaticEmbedding(words, weight=weight)


animal("sparse, static", kind="sparse", static=True)(lambda folder: sparse(folder, weights_of_tokens()))


@animal("sparse, queries cost nothing", kind="sparse")
def inference_free(folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Router
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    documents = [masked_lm(folder), SpladePooling()]
    router = Router.for_query_document(query_modules=[weights_of_tokens()], document_modules=documents)
    sparse(folder, router)


@animal("sparse, of code that embedpool does not know", kind="sparse", by_encode=True)
def sparse_and_weighed(folder: Path) -> None:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    sparse(folder, masked_lm(folder), SpladePooling(), weights_of_tokens())


# --- a vector for each token

EXPANSION = {"strategy": "fixed", "attend": False, "length": 16}


def multivector(
    folder: Path,
    words: Any = None,
    *,
    expansion: Any = None,
    skipped: Any = (",", ".", "?"),
    last: Any = None,
    pools: bool = False,
    **settings: Any,
) -> None:
    """A ColBERT as sentence-transformers saves it."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask

    lengths = {k: settings.pop(k) for k in ("query_length", "document_length") if k in settings}
    base = folder.parent / f"{folder.name}-base"
    encoder(base, "Bert", words or WORDPIECE())
    found = modules()
    first = found.Transformer(str(base), query_expansion=expansion, **lengths)
    layer = found.Dense(
        WIDTH, 24, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"
    )
    steps = [first, spread(layer, 1), MultiVectorMask(list(skipped)), found.Normalize("token_embeddings")]
    if pools:
        steps.append(HierarchicalTokenPooling(2))
    MultiVectorEncoder(modules=steps, device="cpu", **settings).save_pretrained(str(folder), create_model_card=False)


animal("colbert", kind="multivector")(
    lambda folder: multivector(folder, expansion=EXPANSION, prompts={"query": "query: ", "document": "passage: "})
)
animal("colbert, queries at least so long", kind="multivector")(
    lambda folder: multivector(
        folder, expansion={**EXPANSION, "strategy": "min", "attend": True}, query_length=24, document_length=20
    )
)
animal("colbert, no expansion", kind="multivector")(
    lambda folder: multivector(folder, skipped=(), query_length=12, similarity_fn_name="meanmaxsim")
)
animal("colbert, tokens pooled", kind="multivector", by_encode=True)(lambda folder: multivector(folder, pools=True))


@animal("colbert of pylate", kind="multivector")
def colbert_of_pylate(folder: Path) -> None:
    """Transformer and Dense alone; the rest stands in the configuration."""
    words = WORDPIECE()
    words.add_tokens(["[Q] ", "[D] "])
    multivector(folder, words)
    modules_file, config_file = folder / "modules.json", folder / "config_sentence_transformers.json"
    entries = json.loads(modules_file.read_text())[:2]
    entries[0]["type"] = "sentence_transformers.models.Transformer"
    entries[1]["type"] = "pylate.models.Dense.Dense"
    modules_file.write_text(json.dumps(entries))
    dense_file = folder / entries[1]["path"] / "config.json"
    kept = json.loads(dense_file.read_text())
    dense_file.write_text(json.dumps({k: v for k, v in kept.items() if not k.startswith("module_")}))
    config = {
        "model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 16,
        "document_length": 24, "attend_to_expansion_tokens": False, "skiplist_words": None,
    }  # fmt: skip
    config_file.write_text(json.dumps(config))
    for name in ("sentence_bert_config.json",):
        settings = json.loads((folder / name).read_text())
        plain = {k: v for k, v in settings.items() if k not in ("query_length", "document_length", "query_expansion")}
        (folder / name).write_text(json.dumps(plain))


@animal("colbert of stanford", kind="multivector")
def colbert_of_stanford(folder: Path) -> None:
    """One folder of transformers, the projection among its weights, and a file of metadata."""
    import torch
    from safetensors.torch import load_file, save_file

    words = tokenizer("wordpiece", "[CLS] $A [SEP]")
    words.add_tokens(["[unused0]", "[unused1]"])
    encoder(folder, "Bert", words)
    weights = {f"bert.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(4)
    weights["linear.weight"] = torch.randn((24, WIDTH), generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    metadata = {"query_maxlen": 16, "doc_maxlen": 24, "attend_to_mask_tokens": False, "mask_punctuation": True}
    (folder / "artifact.metadata").write_text(json.dumps(metadata))


# --- several outputs


@animal("bge-m3", outputs=("embed", "multivector", "sparse"))
def bge_m3(folder: Path) -> None:
    """A dense model whose folder has the layers of the other two outputs, as `embedpool pull --convert` writes them."""
    from safetensors.numpy import save_file

    sentence_transformer(
        folder, normalize, architecture="XLMRoberta", words=XLM_R(cls_token="<s>", unk_token="<unk>"), pooling="cls",
        max_position_embeddings=514,
    )  # fmt: skip
    random = np.random.default_rng(9)
    for name, width in (("sparse", 1), ("colbert", WIDTH)):
        layer = {"weight": random.standard_normal((width, WIDTH)), "bias": random.standard_normal(width)}
        save_file({k: v.astype(np.float32) for k, v in layer.items()}, folder / f"{name}_linear.safetensors")
