"""Owns `embedkit index`: parses, calls `build_index`, `add_cases` or `remove_cases`, says what the index holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedkit.cli.console import parse_size, print_json, split_list

from embedkit.errors import RecallWarning

if TYPE_CHECKING:
    from embedkit.index import Index

__all__ = ["run"]


def index_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index to write, or to change.")],
    embedding: Annotated[
        str | None,
        typer.Option(
            help="mean:cls, mean:patch@4, grid:patch@4 (keeps places), aligned:patch@4 (also places along the stack),"
            " optionally with :LAYER; several with +. Default: aligned, of the coarsest patches cached."
        ),
    ] = None,
    level: Annotated[str | None, typer.Option(help="case (default), or slice for a vector per slice.")] = None,
    slices: Annotated[
        str | None, typer.Option(help="What slices are compared by, as --embedding; default: grid of patches.")
    ] = None,
    whiten: Annotated[
        int | None, typer.Option(help="Keep so many whitened components of the vectors; 0 whitens nothing.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="flat, hnsw, ivf, sq or ivfpq; default: chosen by size and --memory.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the open index may take in memory, tables included: 8GB.")
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Share of the ten nearest that an index which does not compare all is to find, default .95; one that"
            " is asked for and cannot be promised makes the exit code 1."
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Use the pooled vector of this run instead.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Table by case_id whose columns can be filtered by.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Take the cases of the cache that the index lacks.")] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="With --add: cases may lack the labels that the index has.")
    ] = False,
    remove: Annotated[str | None, typer.Option(help="Withdraw these cases from the index: ID,ID,...")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a search index of the cases of a cache, or bring one up to date."""
    from embedkit import add_cases, build_index, remove_cases

    if add and remove is not None:
        raise typer.BadParameter("add and remove are two steps; give one of them", param_hint="--remove")
    if add or remove is not None:
        given = {"embedding": embedding, "slices": slices, "whiten": whiten, "kind": kind, "memory": memory, "run": run}
        given |= {"level": level, "recall": recall}
        _refuse_options("an index that exists keeps how it was made", **given)
    if unlabelled and not add:
        raise typer.BadParameter("only cases that are added to an index can lack its labels", param_hint="--unlabelled")
    if remove is not None:
        _refuse_options("cases are withdrawn with all that is known of them", labels=labels)
    withdrawn = list(dict.fromkeys(split_list(remove or "")))
    if remove is not None and not withdrawn:
        raise typer.BadParameter(f"{remove!r} names no case; give ID,ID,...", param_hint="--remove")
    changed: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecallWarning)  # said below
            if add:
                index, taken = add_cases(out, cache=cache, labels=labels, unlabelled=unlabelled)
                changed = {"added": taken}
            elif remove is not None:
                index = remove_cases(out, withdrawn, cache=cache)
                changed = {"removed": withdrawn}
            else:
                index = build_index(
                    cache,
                    out,
                    embedding=embedding,
                    level=level or "case",
                    run=run,
                    slices=slices,
                    labels=labels,
                    whiten=whiten,
                    kind=kind,
                    memory_bytes=None if memory is None else parse_size(memory, option="--memory"),
                    recall=0.95 if recall is None else recall,
                )
    except KeyboardInterrupt:
        typer.echo(f"stopped; {out} is as it was before, or complete", err=True)
        raise typer.Exit(130) from None
    _report(index, changed, json=json, asked=recall is not None)


run = index_command


def _refuse_options(reason: str, **options: object) -> None:
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"{reason}; leave out {', '.join(given)}")


def _report(index: Index, changed: dict[str, Any], *, json: bool, asked: bool) -> None:
    """Says what the index holds, and what it lacks; exit code 1 where a recall was asked for that is not promised."""
    from embedkit.indexlabels import list_unlabelled

    if json:
        print_json(_as_fields(index) | changed)
    else:
        for word, cases in changed.items():
            typer.echo(f"{word} {len(cases)} cases{': ' + ', '.join(cases[:5]) if cases else ''}")
        typer.echo(_describe(index))
    if lacking := list_unlabelled(index.cases):
        shown = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        typer.echo(f"{len(lacking)} of {len(index)} cases have no label: {shown}; filters leave them out", err=True)
    if blank := index.details.get("without_usable_slice", []):
        shown = ", ".join(blank[:5]) + (" ..." if len(blank) > 5 else "")
        typer.echo(f"{len(blank)} cases show nothing, every slice is blank, and are left out: {shown}", err=True)
    if index.shortfall is not None:
        typer.echo(index.shortfall, err=True)
        if asked:
            raise typer.Exit(1)


def _as_fields(index: Index) -> dict[str, Any]:
    return {
        "index": index.path,
        "cases": len(index),
        "vectors": index.count,
        "level": index.level,
        "embedding": index.embedding,
        "slices": index.details["slices"],
        "dim": index.dim,
        "whitened": None if index.whitening is None else index.whitening.shape[1],
        "kind": index.kind,
        "effort": index.tuning.effort,
        "refine": index.tuning.refine,
        "recall_asked": index.options.recall,
        "recall": index.tuning.recall,
        "recall_low": index.tuning.recall_low,
        "recall_high": index.tuning.recall_high,
        "recall_queries": index.tuning.queries,
        "recall_reached": index.tuning.reached,
        "changed_since_tuned": index.tuning.changed,
        "without_usable_slice": index.details.get("without_usable_slice", []),
        "built_on": index.built_on,
        "searched_on": index.searched_on,
        "fingerprint": index.fingerprint,
        "columns": index.cases.columns,
    }


def _describe(index: Index) -> str:
    whitened = "" if index.whitening is None else f", whitened to {index.whitening.shape[1]}"
    found = "every vector compared"
    if index.kind != "flat":
        reached = index.tuning
        interval = f"[{reached.recall_low:.3f}, {reached.recall_high:.3f}]"
        found = f"recall {reached.recall:.3f} {interval} on {reached.queries} queries held out"
        if reached.changed:
            found += f" before {reached.changed} vectors were added or withdrawn"
    return (
        f"{index.path}: {len(index)} cases, {index.embedding}, {index.dim} dims{whitened};"
        f" {index.kind} of {index.count} {index.level} vectors, {found}; columns {', '.join(index.cases.columns)}"
    )
