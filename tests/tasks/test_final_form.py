"""The final form of vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedpool.errors import InferenceFailed, InvalidRequest
from embedpool.tasks.embed import EmbedOptions, final_form

RAW = np.random.default_rng(7).standard_normal((5, 24), dtype=np.float32) * 3


def finished(vectors: np.ndarray = RAW, *, normalize: bool = False, dtype: str = "float32", **options: object):
    return final_form(vectors, EmbedOptions(**options), normalize=normalize, dtype=dtype)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("model", "asked", "normalized"), [
    (True, None, True), (False, None, False), (True, False, False), (False, True, True),
])  # fmt: skip
def test_normalize_is_the_requests_or_else_the_models(model: bool, asked: bool | None, normalized: bool) -> None:
    """A request's `normalize` wins over the model's; without normalising, vectors come as the model made them."""
    vectors = final_form(RAW, EmbedOptions(normalize=asked), normalize=model, dtype="float32")
    np.testing.assert_allclose(vectors, unit(RAW) if normalized else RAW, rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_dimensions_cut_first_and_normalise_then(normalize: bool) -> None:
    """`dimensions` keeps the first values, and what is normalised is what is left."""
    cut = RAW[:, :10]
    np.testing.assert_allclose(finished(normalize=normalize, dimensions=10), unit(cut) if normalize else cut, rtol=1e-6)


def test_more_dimensions_than_the_model_has_are_refused() -> None:
    """Asking for more dimensions than there are is the caller's fault and names the field."""
    with pytest.raises(InvalidRequest, match="25 is more than the model's 24") as caught:
        finished(dimensions=25)
    assert set(caught.value.fields) == {"options.dimensions"}
    assert finished(dimensions=24).shape == (5, 24)


def test_a_zero_vector_stays_zero() -> None:
    """A vector without a direction is given as zeros, not as NaN."""
    assert not finished(np.zeros((1, 4), np.float32), normalize=True).any()


@pytest.mark.parametrize(("model", "asked", "given"), [
    ("float32", None, np.float32), ("float16", None, np.float16),
    ("float32", "float16", np.float16), ("float16", "float32", np.float32),
])  # fmt: skip
def test_dtype_is_the_requests_or_else_the_models(model: str, asked: str | None, given: type) -> None:
    """A request's `dtype` wins over the model's, and values survive within its precision."""
    vectors = final_form(RAW, EmbedOptions(dtype=asked), normalize=True, dtype=model)
    assert vectors.dtype == given
    np.testing.assert_allclose(vectors.astype(np.float32), unit(RAW), atol=1e-3)


def test_what_does_not_fit_float16_is_an_error() -> None:
    """A value too large for float16 is refused, never given out as infinity."""
    with pytest.raises(InferenceFailed, match="float16"):
        finished(np.full((1, 4), 70000, np.float32), dtype="float16")


@pytest.mark.parametrize("normalize", [True, False, None])
def test_int8_and_uint8_are_of_the_normalised_vector(normalize: bool | None) -> None:
    """int8 is round(127·v) of the normalised vector, whatever `normalize` says; uint8 is that plus 128."""
    expected = np.clip(np.round(unit(RAW) * 127), -127, 127)
    int8, uint8 = (finished(precision=p, normalize=bool(normalize)) for p in ("int8", "uint8"))
    assert (int8.dtype, uint8.dtype) == (np.int8, np.uint8)
    np.testing.assert_array_equal(int8, expected)
    np.testing.assert_array_equal(uint8, expected + 128)


@pytest.mark.parametrize("dimensions", [24, 16, 13])
def test_binary_packs_signs_as_sentence_transformers_does(dimensions: int) -> None:
    """ubinary packs the signs of eight values into a byte, first value highest; binary is the same less 128."""
    packed = np.packbits(RAW[:, :dimensions] > 0, axis=1)
    ubinary, binary = (finished(precision=p, dimensions=dimensions) for p in ("ubinary", "binary"))
    assert (ubinary.dtype, binary.dtype) == (np.uint8, np.int8)
    np.testing.assert_array_equal(ubinary, packed)
    np.testing.assert_array_equal(binary, (packed.astype(int) - 128).astype(np.int8))


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
@settings(max_examples=30, deadline=None, database=None)
@given(hnp.arrays(np.float32, (4, 16), elements=st.floats(-100, 100, width=32)))
def test_a_vector_does_not_depend_on_its_batch(precision: str, vectors: np.ndarray) -> None:
    """Whatever travels beside a text, its vector is the same in every precision, and ready to be written out."""
    together = finished(vectors, normalize=True, precision=precision)
    alone = [finished(vectors[i : i + 1], normalize=True, precision=precision)[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)
    assert together.flags.c_contiguous
