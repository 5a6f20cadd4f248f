"""Training on altered copies: of training cases alone, with the label of their case, and for nothing but training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from embedkit import gradientfits
from embedkit.advice import advise
from embedkit.bags import Bag
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.copies import Copies
from embedkit.crossfitting import CrossFit, cross_fit
from embedkit.errors import CacheError, HeadError, ManifestError, OptionError, RecipeError, RunError
from embedkit.evaluation import evaluate
from embedkit.explanation import explain
from embedkit.fitting import FitOptions
from embedkit.folder import create_cache, write_shard
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan, plan_heads
from embedkit.indexbuilding import build_index
from embedkit.losses import StackedLoss
from embedkit.members import complete_options
from embedkit.neighbours import probe_neighbours
from embedkit.preparation import Preparation
from embedkit.recipe import Recipe
from embedkit.runs import Run, open_run, predict
from embedkit.segmentation import segment
from embedkit.serving import serve
from embedkit.shots import few_shot
from embedkit.stacks import Fit
from embedkit.storage import ResidentStore, Storage
from embedkit.sweeps import Candidate
from embedkit.tasks import make_task, repeat_folds
from embedkit.training import Training, train

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe("tiny", "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
CASES = [f"c{case:02}" for case in range(36)]
PATIENTS = {case: f"p{number // 2:02}" for number, case in enumerate(CASES)}
ILL = np.arange(36) // 2 % 2
LABELS = pl.DataFrame({"case_id": CASES, "ill": ILL, "size": ILL * 5.0 + np.arange(36) % 3, "months": 20.0 - 9 * ILL})
LABELS = LABELS.with_columns(died=pl.lit(1))
COPIES = 3
QUICK: dict[str, Any] = {"epochs": 10, "batch_size": 8, "learning_rate": 5e-2}


def build(
    folder: Path, tokens: dict[str, np.ndarray], *, augment: str = "", patients: dict[str, str] = PATIENTS, **kept: Any
) -> Cache:
    """A cache of cases, or of their copies, with class tokens case -> [slices dim]; ``kept`` changes the recipe."""
    recipe = dataclasses.replace(RECIPE, augment=augment, **kept)
    create_cache(folder, recipe)
    stacks = []
    for case, values in tokens.items():
        origin = case.partition("#")[0]
        count = len(values)
        stacks.append(
            StackTokens(
                case_id=case, patient_id=patients[origin], view="t1", plane="axial", sources=("t1",),
                indices=np.arange(count, dtype=np.int32), positions_mm=np.arange(count, dtype=np.float32),
                blank=np.zeros(count, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(count, 8, 8),
                source_affine=np.eye(4), source_bytes=1, source_digest=origin,
                tokens={name: values.astype(np.float16) for name in recipe.token_sets},
            )
        )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def tell_illness(shift: float = 0.0) -> dict[str, np.ndarray]:
    """Channel 0 tells who is ill; of two or three slices."""
    rng = np.random.default_rng(0)
    tokens = {case: rng.normal(shift, 1, (2 + number % 2, 6)) for number, case in enumerate(CASES)}
    for values, ill in zip(tokens.values(), ILL, strict=True):
        values[:, 0] += 3 * ill
    return tokens


def copy_all(tokens: dict[str, np.ndarray], *, spread: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"{case}#{number}": values + rng.normal(0, spread, values.shape)
        for case, values in tokens.items()
        for number in range(1, COPIES + 1)
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build(tmp_path_factory.mktemp("cases") / "cache", tell_illness())


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build(tmp_path_factory.mktemp("copies") / "copies", copy_all(tell_illness(shift=2)), augment="3")


def run_training(cache: Cache, out: Path, **options: Any) -> Training:
    settings: dict[str, Any] = {
        "targets": ["ill"], "heads": ["abmil"], "folds": 3, "resamples": 2, "device": "cpu", "fit_options": QUICK,
    }  # fmt: skip
    return train(cache, LABELS, out=out, **settings | options)


@pytest.fixture(scope="module")
def plain(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    trained = run_training(cache, tmp_path_factory.mktemp("plain"))
    return {run.head: run for run in trained.runs}


@pytest.fixture(scope="module")
def shown(cache: Cache, copies: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    trained = run_training(cache, tmp_path_factory.mktemp("shown"), copies=copies)
    return {run.head: run for run in trained.runs}


def fit_head(
    cache: Cache,
    copies: Cache,
    head: str = "abmil",
    *,
    repeats: int = 1,
    seeds: int = 1,
    storage: Storage = "memory",
    block_bytes: int = 2**20,
    **how: Any,
) -> CrossFit:
    """One head without baselines beside it, as `train` fits it on the cases and their copies."""
    both = Copies(cache, copies)
    task, _ = make_task(LABELS, "ill", cache.stacks.select("case_id", "patient_id"))
    plan = HeadPlan(head, (Candidate(("cls:2",), complete_options(head, {}), FitOptions(**QUICK | how)),))
    preparation = Preparation(
        both.source, [plan], CASES, torch.device("cpu"), storage=storage, block_bytes=block_bytes, copies=both.by_case
    )
    folded = FoldedTask(task, repeat_folds(task, 3, repeats=repeats, seed=0))
    (fitted,) = cross_fit(preparation, [(plan, folded)], seed=0, seeds=seeds)
    return fitted


def score(fitted: CrossFit) -> float:
    """AUROC out of fold."""
    return float(roc_auc_score(ILL, fitted.scores[0, :, 0]))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """Every fit that is trained."""
    run_passes, seen = gradientfits.run_passes, list[Fit]()

    def watch(given: list[Fit], *others: Any) -> Any:
        seen.extend(given)
        return run_passes(given, *others)

    monkeypatch.setattr(gradientfits, "run_passes", watch)
    return seen


def name_items(fit: Fit, items: np.ndarray) -> set[str]:
    """The ids under which the store of a fit gives some items of its deck."""
    places = fit.deck.places[np.flatnonzero(items)]
    return set(fit.store.batch(places, fit.standardiser.token_sets).case_ids) if len(places) else set()


def find_patients(ids: set[str]) -> set[str]:
    return {PATIENTS[each.partition("#")[0]] for each in ids}


@pytest.mark.parametrize(
    ("head", "options"),
    [("abmil", {"seeds": 2}), ("mlp", {"repeats": 2, "inner_splits": 2}), ("abmil", {"sampling": "balanced"})],
)
def test_copies_are_of_training_patients_alone_and_held_out_never(
    cache: Cache, copies: Cache, fits: list[Fit], head: str, options: dict[str, Any]
) -> None:
    fitted = fit_head(cache, copies, head, epochs=1, **options)
    assert any(fit.held_out.any() for fit in fits) and any(not fit.held_out.any() for fit in fits)
    everybody = set(PATIENTS.values())
    tested = set()
    for fit in fits:
        seen, held = name_items(fit, fit.training), name_items(fit, fit.held_out)
        originals = {each for each in seen if "#" not in each}
        assert seen - originals == {f"{case}#{number}" for case in originals for number in range(1, COPIES + 1)}
        assert held <= set(CASES)
        assert find_patients(held).isdisjoint(find_patients(seen))
        tested.add(frozenset(everybody - find_patients(seen) - find_patients(held)))
    assert len(tested) == 3 * options.get("repeats", 1) and set.union(*map(set, tested)) == everybody
    assert np.isfinite(fitted.scores).all()
    for each in fitted.inner:
        assert len(each.cases) == len(each.scores) < 24 and each.cases.max() < len(CASES)


def test_a_head_that_knows_patients_again_is_at_chance(tmp_path: Path) -> None:
    """Tokens name the patient and nothing else: a copy of a tested one in training would give the answer away."""
    rng = np.random.default_rng(3)
    names = {patient: rng.normal(0, 3, 24) for patient in PATIENTS.values()}
    tokens = {case: np.stack([names[patient]] * 2) for case, patient in PATIENTS.items()}
    cache = build(tmp_path / "cache", tokens)
    copies = build(tmp_path / "copies", copy_all(tokens), augment="3")
    fitted = fit_head(cache, copies, "mlp", epochs=20)
    assert score(fitted) < 0.8
    for each in fitted.inner:
        assert ((each.scores[:, 0] > 0.5) == ILL[each.cases]).mean() < 0.95


def test_a_copy_is_learned_with_the_label_of_its_case(
    cache: Cache, copies: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, total = ResidentStore.batch, StackedLoss.total
    last, learned = list[str](), set[tuple[str, str]]()

    def read(store: ResidentStore, places: Any, *others: Any, **how: Any) -> Bag:
        found = batch(store, places, *others, **how)
        last[:] = found.case_ids
        return found

    def lose(loss: StackedLoss, logits: torch.Tensor, cases: torch.Tensor, *others: Any) -> torch.Tensor:
        learned.update(zip(last, (CASES[case] for case in cases.flatten()), strict=True))
        return total(loss, logits, cases, *others)

    monkeypatch.setattr(ResidentStore, "batch", read)
    monkeypatch.setattr(StackedLoss, "total", lose)
    assert score(fit_head(cache, copies, epochs=2)) > 0.9
    assert learned == {(case, case) for case in CASES} | {
        (f"{case}#{number}", case) for case in CASES for number in range(1, COPIES + 1)
    }


def test_baselines_and_standardisation_are_of_the_cases_alone(plain: dict[str, Run], shown: dict[str, Run]) -> None:
    for head in ("logistic", "raptor"):
        assert plain[head].predictions.equals(shown[head].predictions)
        assert shown[head].record.copies is None
    assert not plain["abmil"].predictions.equals(shown["abmil"].predictions)
    for one, other in zip(plain["abmil"].members, shown["abmil"].members, strict=True):
        for name, values in one.standardiser.state_dict().items():
            torch.testing.assert_close(other.standardiser.state_dict()[name], values, rtol=0, atol=0)


def test_there_are_as_many_steps_in_fewer_epochs_and_the_run_names_its_copies(
    shown: dict[str, Run], copies: Cache
) -> None:
    record = shown["abmil"].record
    assert record.fit_options["epochs"] == 3  # 10 / 4, rounded up
    assert max(member["epochs"] for member in record.members) <= 3
    names = hashlib.sha256("\n".join(sorted(copies.stacks["case_id"])).encode()).hexdigest()[:16]
    assert record.copies == {"fingerprint": copies.fingerprint, "augment": "3", "shown": 108, "names": names}
    fields = json.loads((shown["abmil"].path / "run.json").read_text())
    assert fields["copies"] == record.copies and "augment" not in fields["recipe"]
    assert set(shown["abmil"].predictions["case_id"]) == set(CASES)
    assert set(shown["abmil"].inner["case_id"]) <= set(CASES)


def test_resuming_keeps_what_was_trained_on_the_same_copies_and_refuses_others(
    cache: Cache, copies: Cache, shown: dict[str, Run]
) -> None:
    out = shown["abmil"].path.parent
    before = (shown["abmil"].path / "weights.safetensors").stat()
    run_training(cache, out, copies=copies, resume=True)
    assert (shown["abmil"].path / "weights.safetensors").stat() == before
    with pytest.raises(RunError, match=r"was trained with copies .*, but this training asks for null"):
        run_training(cache, out, resume=True)


def test_it_makes_no_difference_where_tokens_lie(cache: Cache, copies: Cache) -> None:
    for block_bytes in (1500, 2**20):  # several blocks of cases and copies, or one
        held, streamed = (
            fit_head(cache, copies, storage=where, block_bytes=block_bytes, epochs=3)
            for where in ("memory", "stream")
        )  # fmt: skip
        np.testing.assert_allclose(held.scores, streamed.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["ill", "size"], "heads": ["multitask"], "same_folds": True},
        {"targets": ["months"], "event": "died", "heads": ["cox"]},
    ],
)
def test_copies_go_with_other_kinds_of_targets(
    cache: Cache, copies: Cache, tmp_path: Path, options: dict[str, Any]
) -> None:
    for run in run_training(cache, tmp_path, copies=copies, **options).runs:
        assert (run.record.copies is None) == (run.head in ("logistic", "raptor"))
        assert set(run.predictions["case_id"]) == set(CASES)
        scores = run.predictions.select(run.record.score_columns[0]).to_series().to_numpy()
        assert np.isfinite(scores).all() and scores.std() > 0


def test_a_head_that_starts_from_a_run_is_shown_copies_too(
    cache: Cache, copies: Cache, plain: dict[str, Run], tmp_path: Path
) -> None:
    start: dict[str, Any] = {"targets": ["size"], "heads": None, "start": plain["abmil"], "copies": copies}
    trained = run_training(cache, tmp_path / "new", **start)
    assert [run.record.copies is not None for run in trained.runs] == [False, False, True]
    assert "started from run ill.abmil" in trained.runs[-1].record.notes[-1]
    with pytest.raises(OptionError, match="altered copies are learned from too: leave them out"):
        run_training(cache, tmp_path / "kept", keep_old=4, **start)


def test_cases_without_copies_and_copies_without_cases_are_told(cache: Cache, copies: Cache, tmp_path: Path) -> None:
    fewer = copy_all(tell_illness())
    some = {name: values for name, values in fewer.items() if name[:3] not in ("c00", "c01")} | {"x#1": fewer["c00#1"]}
    build(tmp_path / "copies", some, augment="3", patients=PATIENTS | {"x": "px"})
    LABELS.write_csv(tmp_path / "labels.csv")
    asked = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "ill", "--head", "linear"]
    asked += ["--folds", "3", "--copies", str(tmp_path / "copies"), "-o", str(tmp_path / "runs")]
    found = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "ill: 2 cases without copies: c00, c01" in found.output
    assert "note: ill: heads trained by gradient were shown 102 altered copies beside 36 cases" in found.output
    assert "ill: 1 cases with copies but not cached: x" in found.output
    assert open_run(tmp_path / "runs" / "ill.linear").record.copies["shown"] == 34 * 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"augment": ""}, OptionError, "holds cases and no altered copies; make those .* with embedkit extract"),
        ({"image_size": 64}, RecipeError, "image_size is 64 there and 32 here"),
        ({"patients": dict.fromkeys(CASES, "p")}, ManifestError, "copies of 36 cases .* were made of another patient"),
    ],
)
def test_what_are_no_copies_of_these_cases_is_refused(
    cache: Cache, tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    build(tmp_path / "copies", copy_all(tell_illness()), **{"augment": "3"} | change)
    with pytest.raises(error, match=words):
        run_training(cache, tmp_path / "runs", copies=tmp_path / "copies")


def test_copies_of_other_files_of_no_case_or_with_a_name_that_is_taken_are_refused(
    cache: Cache, copies: Cache, tmp_path: Path
) -> None:
    changed = open_cache(cache.path)
    changed.stacks = cache.stacks.with_columns(source_digest=pl.lit("other"))
    with pytest.raises(ManifestError, match="were made of other files than in"):
        Copies(changed, copies)
    strangers = build(tmp_path / "strangers", {"x#1": np.ones((2, 6))}, augment="1", patients={"x": "p"})
    with pytest.raises(OptionError, match=r"copies of 1 case \(x\), none of which is in cache"):
        Copies(cache, strangers)
    named = build(tmp_path / "named", {name: np.ones((2, 6)) for name in ("c00", "c00#1")})
    with pytest.raises(ManifestError, match="has a case c00#1, which is what a copy of case c00 is called"):
        Copies(named, copies)


@pytest.mark.parametrize(
    ("copied", "batch_size", "epochs"),
    [
        (2, 16, 30),  # 36 cases in 3 batches, with 2 x 3 copies in 3: as many
        (12, 16, 18),  # with 12 x 3 copies 72 in 5
        (36, 16, 10),  # 144 in 9
        (36, 1024, 30),  # one step either way
    ],
)
def test_fewer_epochs_take_as_many_steps_however_many_cases_have_copies(
    cache: Cache, tmp_path: Path, copied: int, batch_size: int, epochs: int
) -> None:
    some = {name: values for name, values in copy_all(tell_illness()).items() if name[:3] in CASES[:copied]}
    plans = plan_heads(cache, ["mlp"], None, {}, {"batch_size": batch_size, "epochs": 30})
    planned = Copies(cache, build(tmp_path / "copies", some, augment="3")).plan(plans, CASES)
    assert [plan.fit.epochs for plan in planned if plan.by_gradient] == [epochs]


def test_steps_are_counted_over_cases_that_have_a_label(cache: Cache, copies: Cache) -> None:
    plans = Copies(cache, copies).plan(plan_heads(cache, ["mlp"], None, {}, {"batch_size": 4}), CASES[:8])
    assert [plan.fit.epochs for plan in plans if plan.by_gradient] == [8]  # 30 of 2 batches, where all take 8


def test_copies_that_lack_a_view_of_their_case_are_refused(cache: Cache, copies: Cache) -> None:
    more = open_cache(cache.path)
    second = cache.stacks.filter(pl.col("case_id").is_in(["c03", "c07"])).with_columns(view=pl.lit("t2"))
    more.stacks = pl.concat([cache.stacks, second])
    with pytest.raises(
        ManifestError, match=r"copies of 2 cases \(c03, c07\) in .* lack t2/axial, which the cases have"
    ):
        Copies(more, copies)


def test_copies_of_other_cases_by_the_same_recipe_are_not_taken_for_those_of_a_run(
    cache: Cache, tmp_path: Path
) -> None:
    every = copy_all(tell_illness())
    halves = [
        build(
            tmp_path / f"{first}", {name: every[name] for name in every if name[:3] in CASES[first:][:18]}, augment="3"
        )
        for first in (0, 18)
    ]
    run_training(cache, tmp_path / "runs", copies=halves[0], heads=["linear"])
    with pytest.raises(RunError, match=r"was trained with copies .*names"):
        run_training(cache, tmp_path / "runs", copies=halves[1], heads=["linear"], resume=True)


def test_heads_must_be_able_to_learn_from_copies(cache: Cache, copies: Cache, tmp_path: Path) -> None:
    more = build(tmp_path / "cache", tell_illness(), token_sets=("cls:1", "cls:2"))
    with pytest.raises(CacheError, match=r"head 'abmil' reads cls:1, but the copies in .* hold cls:2"):
        run_training(more, tmp_path / "runs", copies=copies, token_sets={"abmil": ["cls:1"]})
    plans = plan_heads(more, ["abmil"], {"abmil": ["cls:2"], "logistic": ["cls:1"]}, {}, {})
    plans = Copies(more, copies).plan(plans, CASES)
    assert [plan.fit.epochs for plan in plans if plan.by_gradient] == [10]  # 30 of 3 steps, where all take 9
    with pytest.raises(HeadError, match="all of the heads logistic, raptor are fitted in closed form"):
        run_training(cache, tmp_path / "runs", copies=copies, heads=[])


def test_copies_alone_are_nothing_to_train_on_predict_or_search(
    copies: Cache, plain: dict[str, Run], tmp_path: Path
) -> None:
    run = plain["abmil"]
    calls: list[Callable[[], object]] = [
        lambda: run_training(copies, tmp_path / "new"),
        lambda: predict(run, copies),
        lambda: evaluate(run, copies, labels=LABELS),
        lambda: explain(run, copies, case_id="c00#1", out=tmp_path / "new"),
        lambda: segment(run, copies, out=tmp_path / "new"),
        lambda: build_index(copies.path, tmp_path / "new"),
        lambda: serve(copies.path, tmp_path / "new", []),
        lambda: probe_neighbours(copies, LABELS, target="ill"),
        lambda: few_shot(copies, LABELS, target="ill"),
        lambda: advise(copies, LABELS, target="ill", budget_s=1),
    ]
    for call in calls:
        with pytest.raises(CacheError, match="holds 3 altered copies of each case, which serve to train on beside"):
            call()
    assert not (tmp_path / "new").exists()
