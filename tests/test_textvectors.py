"""Text vectors: read from files, kept in options exactly, refused where they are no vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from embedkit.errors import HeadError
from embedkit.members import complete_options
from embedkit.textvectors import embed_texts, read_vectors, write_vectors

VECTORS = np.arange(6, dtype=np.float32).reshape(2, 3) / 7


def test_vectors_are_read_from_either_file_and_from_what_was_written(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VECTORS)
    safetensors.numpy.save_file({"vectors": VECTORS, "other": VECTORS[0]}, tmp_path / "a.safetensors")
    for source in (str(tmp_path / "a.npy"), str(tmp_path / "a.safetensors"), write_vectors(VECTORS)):
        assert np.array_equal(read_vectors(source), VECTORS)


def test_a_run_keeps_the_vectors_and_not_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VECTORS)
    options = complete_options("text", {"vectors": str(tmp_path / "a.npy")})
    (tmp_path / "a.npy").unlink()
    assert complete_options("text", options) == options
    assert np.array_equal(read_vectors(options["vectors"]), VECTORS)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (VECTORS[0], r"are float32 \[3\], expected floats \[texts, dim\]"),
        (VECTORS.astype(np.int64), r"are int64 \[2, 3\]"),
        (VECTORS * np.nan, "hold NaN or infinity"),
    ],
)
def test_what_is_no_table_of_vectors_is_refused(tmp_path: Path, array: np.ndarray, problem: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(HeadError, match=problem):
        read_vectors(str(tmp_path / "a.npy"))


def test_files_that_hold_no_vectors_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"cannot be read from .*none.npy: .*give a .npy or .safetensors file"):
        read_vectors(str(tmp_path / "none.npy"))
    (tmp_path / "empty.npy").touch()
    with pytest.raises(HeadError, match=r"cannot be read from .*empty.npy"):
        read_vectors(str(tmp_path / "empty.npy"))
    with pytest.raises(HeadError, match=r"its name ends in '\.txt'"):
        read_vectors(str(tmp_path / "a.txt"))
    safetensors.numpy.save_file({"a": VECTORS, "b": VECTORS}, tmp_path / "two.safetensors")
    with pytest.raises(HeadError, match="it holds a, b, and none is called vectors"):
        read_vectors(str(tmp_path / "two.safetensors"))
    with pytest.raises(HeadError, match="of 2 x 3 float32 hold 2 bytes; restore the run"):
        read_vectors("float32[2,3]:QUJD"[:-1] + "=")


def test_the_text_head_says_what_it_needs() -> None:
    with pytest.raises(HeadError, match=r"'text' needs the texts to look for: --head-option text\.vectors=FILE"):
        complete_options("text", {})
    with pytest.raises(HeadError, match="was given vectors and texts"):
        complete_options("text", {"vectors": write_vectors(VECTORS), "texts": ("tumour",)})


def test_without_sentence_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(HeadError, match=r"pip install 'embedkit\[text\]', or give the vectors as a file"):
        embed_texts(["tumour"], "some-model")
