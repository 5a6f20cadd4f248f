"""Owns `embedkit train`: parses, calls `embedkit.train`, prints the table of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedkit.cli.console import parse_number, print_json, print_table, show_progress, split_list, tell_strays

if TYPE_CHECKING:
    import polars as pl

__all__ = ["run"]

_SHOWN = {
    "c_index": "C-index",
    "integrated_brier": "integrated Brier",
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "spearman": "Spearman",
    "r2": "R2",
    "dice": "Dice",
}


def train_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs, one per target and head.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV or Parquet with case_id; any other column can be a target. None with --masks alone."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Column to learn; give it again for more targets.")] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Manifest with a column mask of some cases, for heads that learn it (grid, tail, segment)."),
    ] = None,
    copies: Annotated[
        Path | None,
        typer.Option(
            help="Cache of altered copies (extract --augment), which heads trained by gradient see beside the cases;"
            " flipped ones not for a target that asks for a side."
        ),
    ] = None,
    mask_weight: Annotated[float, typer.Option(help="What the mask's loss counts beside the label's.")] = 1.0,
    head: Annotated[list[str] | None, typer.Option(help="Head to train; again for more. See `embedkit heads`.")] = None,
    head_option: Annotated[
        list[str] | None, typer.Option(help="HEAD.NAME=VALUE, an option of a head, as grid.width=32; again for more.")
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="Token sets that a head reads together, as patch@4:4,patch@4:8; default: the head's own choice of one."
            " With --sweep each is tried alone as well."
        ),
    ] = "",
    views: Annotated[
        str, typer.Option(help="Views that heads see, as flair,post or flair/axial; default: all of the cache.")
    ] = "",
    view_dropout: Annotated[
        float, typer.Option(help="Chance of each view to be masked in training, for cases that will lack one.")
    ] = 0.0,
    kind: Annotated[
        str | None, typer.Option(help="binary, multiclass, multilabel, regression or survival; default: inferred.")
    ] = None,
    classes: Annotated[
        str, typer.Option(help="Classes to learn, the last one positive: 1,3. Cases of others are left out.")
    ] = "",
    event: Annotated[
        list[str] | None,
        typer.Option(help="Column that is 1 where the time in --target ended with the event; or TARGET=COLUMN, again."),
    ] = None,
    times: Annotated[str, typer.Option(help="Times to state survival at: 12,24,60; default: deciles of events.")] = "",
    folds: Annotated[int, typer.Option(help="Patient-grouped folds.")] = 5,
    repeats: Annotated[
        int, typer.Option(help="Times the folds are dealt anew; each metric is the mean over them.")
    ] = 1,
    split: Annotated[str | None, typer.Option(help="Label column that holds the folds instead.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Label column, each value of which is left out in turn: a site, a scanner.")
    ] = None,
    same_folds: Annotated[
        bool, typer.Option("--same-folds", help="Deal the cases once for all targets: one partition, and faster.")
    ] = False,
    loss: Annotated[str, typer.Option(help="cross_entropy or focal, of heads trained by gradient.")] = "cross_entropy",
    gamma: Annotated[float, typer.Option(help="Of the focal loss: how little well answered cases count.")] = 2.0,
    sampling: Annotated[
        str, typer.Option(help="shuffled, or balanced: batches hold each class alike, instead of class weights.")
    ] = "shuffled",
    inner_splits: Annotated[
        int,
        typer.Option(
            help="Times that a fold's training cases are split to choose how long to train, of gradient heads."
        ),
    ] = 1,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="small or large: dozens or hundreds of candidates per head, chosen in each fold by inner splits."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of folds, initial weights, batches and dropout.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="Members per fold, from other initial weights; scores are their mean.")
    ] = 1,
    storage: Annotated[
        str, typer.Option(help="Where tokens lie: device, memory, stream (from the cache); auto takes what fits.")
    ] = "auto",
    start: Annotated[
        Path | None, typer.Option("--from", help="Run whose head the new one starts from; its last layer begins anew.")
    ] = None,
    keep_old: Annotated[
        int | None,
        typer.Option(
            help="With --from: hold the head to that run's answers on this many exemplars per fold, and write that run"
            " anew beside the new one."
        ),
    ] = None,
    keep_weight: Annotated[float, typer.Option(help="What --keep-old counts beside the new target's loss.")] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs that exist, if they are the same, and train the others.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs of the same target and head.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Train heads on cached tokens; both baselines always run beside them."""
    from embedkit import train
    from embedkit.allocator import keep_freed_memory
    from embedkit.headoptions import parse_head_options

    keep_freed_memory()
    try:
        with tell_strays(), show_progress("train", "fits") as meter:
            trained = train(
                cache,
                labels,
                targets=target or (),
                out=out,
                masks=masks,
                copies=copies,
                heads=head or None,
                head_options=parse_head_options(head_option or ()),
                token_sets=split_list(tokens) or None,
                views=split_list(views) or None,
                kind=kind,  # type: ignore[arg-type]  # refused with the known kinds by make_task
                classes=split_list(classes) or None,
                event=_parse_events(event or []),
                times=[parse_number(each, "--times") for each in split_list(times)] or None,
                folds=folds,
                repeats=repeats,
                split=split,
                group_by=group_by,
                same_folds=same_folds,
                fit_options={
                    "loss": loss,
                    "gamma": gamma,
                    "sampling": sampling,
                    "view_dropout": view_dropout,
                    "mask_weight": mask_weight,
                    "inner_splits": inner_splits,
                },
                sweep=sweep,
                seed=seed,
                seeds=seeds,
                storage=storage,  # type: ignore[arg-type]  # refused with the known ones by train
                start=start,
                keep_old=keep_old,
                keep_weight=keep_weight,
                device=device,
                overwrite=overwrite,
                resume=resume,
                on_progress=lambda at: meter(at.done, at.total, f"{at.target}.{at.head}"),
            )
    except KeyboardInterrupt:
        typer.echo("interrupted; finished runs are kept, and the same command with --resume goes on", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(trained.table.to_dicts())
        return
    _print_left_aside({run.record.target: run.record.cases for run in trained.runs})
    _print_scores(trained.table)
    for note in dict.fromkeys(note for each in trained.runs for note in each.record.notes):
        typer.echo(f"note: {note}")


run = train_command


def _parse_events(given: Sequence[str]) -> str | dict[str, str] | None:
    """One column for all targets, or ``TARGET=COLUMN`` for some."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [each.partition("=") for each in given]
    if bad := [each for each, (target, _, column) in zip(given, pairs, strict=True) if not (target and column)]:
        raise typer.BadParameter(
            f"{bad[0]!r} among several event columns; give one column, or TARGET=COLUMN for each survival target",
            param_hint="--event",
        )
    return {target: column for target, _, column in pairs} or None


def _print_left_aside(cases_by_target: Mapping[str, Mapping[str, Any]]) -> None:
    """Which cases a target could not use, and why; nothing is dropped without a word."""
    for target, cases in cases_by_target.items():
        for why, ids in cases.items():
            if isinstance(ids, list) and ids:
                shown = ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
                typer.echo(f"{target}: {len(ids)} cases {why.replace('_', ' ')}: {shown}", err=True)


def _print_scores(table: pl.DataFrame) -> None:
    metrics = [name for name in _SHOWN if name in table.columns]
    rows = []
    for row in table.iter_rows(named=True):
        scores = [_interval(row, name) for name in metrics]
        rows.append(
            [row["target"], row["head"], row["tokens"], *scores, str(row["parameters"]), f"{row['seconds']:.1f}"]
        )
    print_table(["target", "head", "tokens", *(_SHOWN[name] for name in metrics), "parameters", "seconds"], rows)


def _interval(row: dict[str, float | None], metric: str) -> str:
    value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
    return "" if value is None or low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
