"""embedkit: a frozen 2D backbone reads every 3D scan once; heads and search then work on its cached tokens.

Every public name is loaded when it is first used, so that importing embedkit costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.advice import advise as advise
    from embedkit.backbones import list_backbones as list_backbones
    from embedkit.backbones import load_backbone as load_backbone
    from embedkit.benching import bench as bench
    from embedkit.benchpage import write_bench as write_bench
    from embedkit.cache import open_cache as open_cache
    from embedkit.comparison import compare_runs as compare_runs
    from embedkit.comparisonpage import write_comparison as write_comparison
    from embedkit.errors import EmbedkitError as EmbedkitError
    from embedkit.estimate import estimate_extraction as estimate_extraction
    from embedkit.evaluation import evaluate as evaluate
    from embedkit.evaluationpage import write_evaluation as write_evaluation
    from embedkit.explanation import explain as explain
    from embedkit.exporting import export_run as export_run
    from embedkit.extraction import extract as extract
    from embedkit.indexbuilding import build_index as build_index
    from embedkit.indexchanging import add_cases as add_cases
    from embedkit.indexchanging import remove_cases as remove_cases
    from embedkit.indexinspection import verify_index as verify_index
    from embedkit.inspection import describe_cache as describe_cache
    from embedkit.inspection import verify_cache as verify_cache
    from embedkit.manifest import read_labels as read_labels
    from embedkit.manifest import read_manifest as read_manifest
    from embedkit.manifest import write_manifest as write_manifest
    from embedkit.neighbours import probe_neighbours as probe_neighbours
    from embedkit.packing import pack_cache as pack_cache
    from embedkit.phantoms import make_phantoms as make_phantoms
    from embedkit.plugins import list_heads as list_heads
    from embedkit.prompts import Click as Click
    from embedkit.recipe import Recipe as Recipe
    from embedkit.retrieval import match_cases as match_cases
    from embedkit.retrieval import open_index as open_index
    from embedkit.retrieval import search as search
    from embedkit.retrieval import search_manifest as search_manifest
    from embedkit.retrieval import search_texts as search_texts
    from embedkit.runs import open_run as open_run
    from embedkit.runs import predict as predict
    from embedkit.scanning import scan_folder as scan_folder
    from embedkit.searchevaluation import evaluate_search as evaluate_search
    from embedkit.segmentation import segment as segment
    from embedkit.serving import serve as serve
    from embedkit.shots import few_shot as few_shot
    from embedkit.suitefile import list_suites as list_suites
    from embedkit.suitefile import read_suite as read_suite
    from embedkit.training import train as train
    from embedkit.volumes import read_volume as read_volume

_HOMES = {
    "advice": ("advise",),
    "backbones": ("list_backbones", "load_backbone"),
    "benching": ("bench",),
    "benchpage": ("write_bench",),
    "cache": ("open_cache",),
    "prompts": ("Click",),
    "comparison": ("compare_runs",),
    "comparisonpage": ("write_comparison",),
    "errors": ("EmbedkitError",),
    "estimate": ("estimate_extraction",),
    "evaluation": ("evaluate",),
    "evaluationpage": ("write_evaluation",),
    "explanation": ("explain",),
    "exporting": ("export_run",),
    "extraction": ("extract",),
    "indexbuilding": ("build_index",),
    "indexchanging": ("add_cases", "remove_cases"),
    "indexinspection": ("verify_index",),
    "inspection": ("describe_cache", "verify_cache"),
    "manifest": ("read_labels", "read_manifest", "write_manifest"),
    "neighbours": ("probe_neighbours",),
    "packing": ("pack_cache",),
    "phantoms": ("make_phantoms",),
    "plugins": ("list_heads",),
    "recipe": ("Recipe",),
    "retrieval": ("match_cases", "open_index", "search", "search_manifest", "search_texts"),
    "runs": ("open_run", "predict"),
    "scanning": ("scan_folder",),
    "searchevaluation": ("evaluate_search",),
    "segmentation": ("segment",),
    "serving": ("serve",),
    "shots": ("few_shot",),
    "training": ("train",),
    "suitefile": ("list_suites", "read_suite"),
    "volumes": ("read_volume",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 - the names are those of the table above
    *_HOME_OF,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    value = getattr(import_module(f"embedkit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME_OF.keys())
