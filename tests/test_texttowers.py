"""Text towers of open_clip, with weights drawn at random: texts land in the space of the tokens that a cache holds."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.backbones import load_backbone
from embedkit.errors import BackboneError, SearchError
from embedkit.index import Index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search_texts
from embedkit.texttowers import embed_paired_texts

BACKBONE, MODEL = "vit_xsmall_patch16_clip_224", "embedkit-test-clip"
TEXTS = ["a lesion in the left lung", "a healthy brain"]


@dataclass(frozen=True)
class Towers:
    """An open_clip model of the backbone's shape, its weights in a file, and the recipe of a cache made with them."""

    model: Any
    weights: Path
    recipe: Recipe


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    clip = pytest.importorskip("open_clip", reason="needs open_clip (pip install 'embedkit[clip]')")
    folder = tmp_path_factory.mktemp("clip")
    image = {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = folder / f"{MODEL}.json"
    config.write_text(json.dumps({"embed_dim": 24, "vision_cfg": image, "text_cfg": text}))
    clip.add_model_config(config)
    torch.manual_seed(0)
    model = clip.create_model(MODEL).eval()
    safetensors.torch.save_file(model.state_dict(), folder / "towers.safetensors")
    backbone = load_backbone(BACKBONE, weights=folder / "towers.safetensors")
    recipe = Recipe(BACKBONE, backbone.info.weights, ("cls:10",), 224, (0.5,) * 3, (0.5,) * 3, preview=0)
    return Towers(model, folder / "towers.safetensors", recipe)


def make_index(towers: Towers, vectors: np.ndarray, path: Path, *, embedding: str = "mean:cls:10") -> Index:
    names = [f"c{row}" for row in range(len(vectors))]
    table = pl.DataFrame({"case_id": names, "patient_id": names})
    return write_index(vectors, table, embedding=embedding, recipe=towers.recipe, out=path)


def test_a_token_and_a_text_are_as_alike_as_both_towers_find_image_and_text(towers: Towers) -> None:
    clip = sys.modules["open_clip"]
    backbone = load_backbone(BACKBONE, weights=towers.weights)
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(each)[:, None, None] for each in (backbone.info.mean, backbone.info.std))
    with torch.inference_mode():
        seen = towers.model.encode_image((images - mean) / std)
        read = towers.model.encode_text(clip.get_tokenizer(MODEL)(TEXTS), normalize=True)
        tokens = backbone.forward_layers(images, [10]).layers[10].summary
    found = embed_paired_texts(TEXTS, MODEL, towers.weights, recipe=towers.recipe, embedding="mean:cls:10")
    assert found.vectors.shape == (2, 24) and found.projection.shape == (24, 256)
    assert found.vectors.dtype == found.projection.dtype == np.float32
    products = tokens.numpy() @ found.projection.T @ found.vectors.T
    assert np.allclose(products, (seen @ read.T).numpy(), atol=1e-4) and np.ptp(products) > 0.01


def test_cases_rank_by_the_cosine_that_clip_itself_finds(towers: Towers, tmp_path: Path) -> None:
    clip = sys.modules["open_clip"]
    tokens = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    index = make_index(towers, tokens, tmp_path / "index")
    with torch.inference_mode():
        seen = torch.nn.functional.normalize(torch.from_numpy(tokens) @ towers.model.visual.proj, dim=-1)
        read = towers.model.encode_text(clip.get_tokenizer(MODEL)(TEXTS), normalize=True)
        cosines = (read @ seen.T).numpy()
    found = search_texts(index, TEXTS, model=MODEL, weights=towers.weights, k=50)
    assert found["query"].to_list() == [text for text in TEXTS for _ in range(50)]
    assert found["case_id"].to_list() == [f"c{row}" for order in np.argsort(-cosines, axis=1) for row in order]
    assert np.allclose(found["similarity"], -np.sort(-cosines, axis=1).ravel(), atol=1e-5)
    some = search_texts(index, TEXTS[:1], model=MODEL, weights=towers.weights, k=2, where="case_id IN ('c3', 'c7')")
    assert some["case_id"].to_list() == sorted(["c3", "c7"], key=lambda name: -cosines[0, int(name[1:])])
    none = search_texts(index, TEXTS, model=MODEL, weights=towers.weights, where="case_id = 'c50'")
    assert none.is_empty()


def test_texts_that_the_model_cannot_read_whole_are_refused(towers: Towers) -> None:
    def embed(text: str) -> np.ndarray:
        texts = [TEXTS[0], text]
        return embed_paired_texts(texts, MODEL, towers.weights, recipe=towers.recipe, embedding="mean:cls:10").vectors

    assert not np.array_equal(embed("word " * 74 + "left")[1], embed("word " * 74 + "right")[1])
    with pytest.raises(SearchError, match=r"^text 'word word.*' is longer than the 77 tokens that .*; shorten it$"):
        embed("word " * 76)
    with pytest.raises(SearchError, match=r"a text is blank \('  '\), .*; leave it out"):
        embed("  ")


def test_towers_that_are_not_the_backbone_are_refused(towers: Towers, tmp_path: Path) -> None:
    index = make_index(towers, np.eye(3, 256, dtype=np.float32), tmp_path / "index")
    state = safetensors.torch.load_file(towers.weights)
    state["visual.ln_post.bias"] = state["visual.ln_post.bias"] + 1e-3
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        SearchError, match=r"has weights sha256:\w+, but the index was made by vit_xsmall.* no space; give"
    ):
        search_texts(index, TEXTS, model=MODEL, weights=tmp_path / "other.safetensors")
    recipe = replace(towers.recipe, backbone="vit_medium_patch16_clip_224")
    with pytest.raises(BackboneError, match=f"weights of {MODEL} .* do not fit VisionTransformer"):
        embed_paired_texts(TEXTS, MODEL, towers.weights, recipe=recipe, embedding="mean:cls:10")
    other = make_index(towers, np.eye(3, 256, dtype=np.float32), tmp_path / "other", embedding="mean:cls:9")
    with pytest.raises(
        SearchError, match=r"holds mean:cls:9, but .* class token of layer 10; .*mean:cls:10 --whiten 0"
    ):
        search_texts(other, TEXTS, model=MODEL, weights=towers.weights)


def test_what_cannot_be_loaded_is_named(towers: Towers, tmp_path: Path) -> None:
    def refuse(model: str, weights: str | Path, match: str) -> None:
        with pytest.raises(SearchError, match=match):
            embed_paired_texts(TEXTS, model, weights, recipe=towers.recipe, embedding="mean:cls:10")

    refuse("ViT-B-61", "openai", r"open_clip has no model 'ViT-B-61'; nearest: ViT-B-16")
    refuse("ViT-B-16", "openai", r"weights openai were trained with QuickGELU, unlike ViT-B-16; name .* that has it")
    refuse("ViT-B-16-quickgelu", "openai", r"backbone vit_xsmall.* made the index without QuickGELU, unlike ViT-B-16-q")
    refuse("ViT-B-16", "opnai", r"opnai is no file and no tag of ViT-B-16's weights; give a file, or one of .*openai")
    (tmp_path / "empty.safetensors").touch()
    refuse(MODEL, tmp_path / "empty.safetensors", r"empty.safetensors of .* cannot be loaded: .*--text-weights FILE")
    shutil.copy(towers.weights, tmp_path / "unnamed")
    refuse(MODEL, tmp_path / "unnamed", r"weights file .*unnamed is safetensors, .*; end it in .safetensors")
    refuse(
        "roberta-ViT-B-32", towers.weights, r"roberta-ViT-B-32 reads texts by roberta-base of Hugging Face, .*; take a"
    )


class Code:
    """Pickled as a call that makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


def test_weights_that_would_run_code_are_refused_and_run_none(towers: Towers, tmp_path: Path) -> None:
    torch.save({"a": Code(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(SearchError, match=r"code.pt is no plain table of tensors, .* so it is refused; save") as caught:
        embed_paired_texts(TEXTS, MODEL, tmp_path / "code.pt", recipe=towers.recipe, embedding="mean:cls:10")
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it would have been seen


def test_a_program_and_a_backbone_that_learned_nothing_are_named_as_such(towers: Towers, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give up such programs, which users still have
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "program.pt")
    with pytest.raises(SearchError, match=r"program.pt holds a program \(TorchScript\): it .* so it is refused; save"):
        embed_paired_texts(TEXTS, MODEL, tmp_path / "program.pt", recipe=towers.recipe, embedding="mean:cls:10")
    recipe = replace(towers.recipe, backbone="embedkit/scattering")
    with pytest.raises(SearchError, match="made by embedkit/scattering, which learned nothing and so shares no space"):
        embed_paired_texts(TEXTS, MODEL, towers.weights, recipe=recipe, embedding="mean:cls:2")


def test_a_file_named_as_published_weights_is_the_file(
    towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(towers.model.state_dict(), tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedkit.texttowers.fetch_hub_file", lambda *_: pytest.fail("fetched"))
    with pytest.raises(SearchError, match=r"weights openai of ViT-B-16 cannot be loaded: .*(pos_embed|size mismatch)"):
        embed_paired_texts(TEXTS, "ViT-B-16", "openai", recipe=towers.recipe, embedding="mean:cls:10")
    found = embed_paired_texts(TEXTS, MODEL, "openai", recipe=towers.recipe, embedding="mean:cls:10")
    assert found.vectors.shape == (2, 24)


def test_the_command_reads_texts_by_both_towers(towers: Towers, tmp_path: Path) -> None:
    make_index(towers, np.eye(3, 256, dtype=np.float32), tmp_path / "index")
    texts = [word for text in TEXTS for word in ("--text", text)]
    paired = ["--text-model", MODEL, "--text-weights", str(towers.weights)]
    result = CliRunner().invoke(app, ["search", str(tmp_path / "index"), *texts, *paired, "-k", "2", "--json"])
    assert result.exit_code == 0, result.output
    expected = search_texts(tmp_path / "index", TEXTS, model=MODEL, weights=towers.weights, k=2)
    assert json.loads(result.stdout) == expected.to_dicts() and expected.height == 4


def test_published_weights_out_of_reach_are_named_with_the_ways_out(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(repository: str, file_names: tuple[str, ...]) -> Path:
        asked.append((repository, file_names))
        raise BackboneError("no network")

    monkeypatch.setattr("embedkit.texttowers.fetch_hub_file", fail)
    with pytest.raises(SearchError, match=r"laion2b_s34b_b88k of ViT-B-16 are not in .* \(no network\); .*set HF_HOME"):
        embed_paired_texts(TEXTS, "ViT-B-16", "laion2b_s34b_b88k", recipe=towers.recipe, embedding="mean:cls:10")
    assert [name for name, _ in asked] == ["laion/CLIP-ViT-B-16-laion2B-s34B-b88K"]


def test_a_model_comes_with_its_weights_and_without_vectors(tmp_path: Path) -> None:
    names = ["a", "b"]
    index = write_index(
        np.eye(2, dtype=np.float32),
        pl.DataFrame({"case_id": names, "patient_id": names}),
        embedding="mean:cls:2",
        recipe=Recipe("a clip", "builtin:0", ("cls:2",), 32, (0.0,), (1.0,), preview=0),
        out=tmp_path / "index",
    )
    both = "or given as vectors (--text-vectors, --shared-space), not both"
    for options, words in (
        ({"model": MODEL}, f"beside model {MODEL} give --text-weights"),
        ({"weights": "openai"}, "beside weights give --text-model"),
        ({"model": MODEL, "weights": "x", "vectors": np.eye(2)}, both),
        ({"model": MODEL, "weights": "x", "shared_space": True}, both),
    ):
        with pytest.raises(SearchError, match=re.escape(words)):
            search_texts(index, TEXTS, **options)
    with pytest.raises(SearchError, match="no text was given for the text tower of"):
        search_texts(index, [], model=MODEL, weights="openai")


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    recipe = Recipe("a clip", "builtin:0", ("cls:2",), 32, (0.0,), (1.0,), preview=0)
    with pytest.raises(
        SearchError, match=r"pip install 'embedkit\[clip\]', or give the vectors of the texts as a file"
    ):
        embed_paired_texts(TEXTS, "ViT-B-16", "openai", recipe=recipe, embedding="mean:cls:2")
