"""The networks of two revisions side by side: measured, and as one report."""

from __future__ import annotations

__all__ = ["ModelDiff", "RevisionDiff", "diff"]

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketize.cli.common import UsageError
from pocketize.errors import ReportError
from pocketize.memory.isolate import run_child
from pocketize.report import METRICS, Measurement, Threshold, compare_measurements
from pocketize.report.blocks import Block, Code, Heading, Paragraph, Section, Table
from pocketize.report.gate import judge
from pocketize.report.layout import layout
from pocketize.report.page import html
from pocketize.report.render import markdown, text
from pocketize.review.child import top_levels
from pocketize.review.config import EXAMPLE, Configuration, WatchedModel, read_configuration
from pocketize.review.revisions import Repository, Revision
from pocketize.untrusted import read_json

#: Characters of a comment on GitHub, less some room.
_LONGEST = 60_000


@dataclass(frozen=True)
class ModelDiff:
    """One network in both revisions.

    Attributes:
        name: as configured.
        status: that of a :class:`~pocketize.report.Comparison`; or ``"added"``, ``"removed"``,
            ``"broken"`` if the second revision fails, ``"not compared"`` if the first does.
        verdict: the same as a sentence, with figures or the error.
        before: figures of the first revision, where there are any.
        after: figures of the second.
        limits: those that were checked.
        said: changes of the settings, and other remarks.
    """

    name: str
    status: str
    verdict: str
    before: Measurement | None = None
    after: Measurement | None = None
    limits: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a limit is exceeded, or the network is broken in the second revision."""
        return self.status in ("over the limit", "broken")

    def blocks(self, *, details: bool) -> Iterator[Block]:
        """Yield what a report says of the network, folded if there is nothing to see."""
        tone = "bad" if self.status == "broken" else ""
        blocks: list[Block] = [Paragraph(self.verdict, strong=True, tone=tone)]
        if self.before and self.after:
            checks = judge(self.before, self.after, self.limits)
            blocks = layout(self.before, self.after, checks=checks)[1:]
        elif alone := self.after or self.before:
            blocks += layout(alone)[1:]
        told = [blocks[0], *map(Paragraph, self.said), *(blocks[1:] if details else ())]
        title = f"{self.name}: {self.status}"
        if not self.said and self.status in ("ok", "unchanged"):
            yield Section(title, tuple(told))
        else:
            yield from (Heading(title), *told)

    def figures(self, metric: str) -> str:
        """Write a figure of the sides that have it; once if it is the same."""
        sides = [side for side in (self.before, self.after) if side is not None]
        values = [METRICS[metric].read(side) for side in sides]
        shown = [METRICS[metric].write(value) for value in values if value is not None]
        return " -> ".join(dict.fromkeys(shown)) or "-"


@dataclass(frozen=True)
class RevisionDiff:
    """All configured networks in two revisions."""

    base: str
    head: str
    models: tuple[ModelDiff, ...]

    def __str__(self) -> str:
        return text(list(self._blocks())).rstrip("\n")

    def to_markdown(self) -> str:
        """Draw the report as Markdown; without details where a comment could not hold them."""
        drawn = markdown(list(self._blocks()))
        return drawn if len(drawn) < _LONGEST else markdown(list(self._blocks(details=False)))

    def to_html(self) -> str:
        """Draw the report as one self-contained HTML page."""
        return html(list(self._blocks()))

    def to_json(self) -> str:
        """Write all figures as JSON: sorted keys, memory as integers in bytes."""
        data = {"kind": "diff", "schema": 1, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    def _blocks(self, *, details: bool = True) -> Iterator[Block]:
        yield Heading(f"pocketize diff: {self.base} to {self.head}", level=1)
        columns = ("peak", "inference-peak", "parameters")
        yield Table(
            ("model", "verdict", *(METRICS[name].label for name in columns)),
            tuple(
                (Code(model.name), model.status, *map(model.figures, columns))
                for model in self.models
            ),
            right=len(columns),
        )
        for model in self.models:
            yield from model.blocks(details=details)


def diff(
    repository: Repository,
    revisions: tuple[Revision, Revision],
    *,
    limits: tuple[str, ...] = (),
    estimate: bool = True,
    device: str | None = None,
    python: str = sys.executable,
    progress: Callable[[str], None] = lambda text: None,
) -> RevisionDiff:
    """Measure the networks that two revisions configure, each in a fresh process.

    Args:
        repository: where both are; nothing in it changes.
        revisions: before and after.
        limits: for every network, besides its own.
        estimate: count on fake tensors.
        device: where to measure; by default where the networks are.
        python: the interpreter; it has pocketize too.
        progress: called with what is measured next.

    Raises:
        UsageError: the second revision configures no network, or wrongly; or git fails.
    """
    with repository.checkouts(revisions) as (scratch, roots):
        folder = _configured(repository.folder, roots[1])
        new = read_configuration(roots[1] / folder) or Configuration()
        if not new.models:
            raise UsageError(
                f"no models are configured here or above; add to pyproject.toml:\n\n{EXAMPLE}"
            )
        for model in new.models:
            for limit in (*model.limits, *limits):
                _check_limit(limit, model, estimate=estimate)
        old, complaint = new, ""
        try:
            old = read_configuration(roots[0] / folder) or new
        except UsageError as error:
            complaint = f"Settings of {revisions[0].label} that are wrong were not used: {error}"
        # the first revision may not have the folder yet
        folders = [root / folder if (root / folder).is_dir() else root for root in roots]
        paths = [
            [str(place / entry) for entry in configuration.path]
            for place, configuration in zip(folders, (old, new), strict=True)
        ]
        request = {
            "own": top_levels([*paths[0], *paths[1]]),
            "tree": str(repository.root),
            "estimate": estimate,
            "device": device,
        }
        earlier = {model.name: model for model in old.models}
        models = []
        for number, model in enumerate(new.models, start=1):
            was = earlier.pop(model.name, model)
            # both are measured in one way, whatever the first revision's settings were
            like = replace(model, model=was.model, kwargs=was.kwargs, passes=was.passes)
            answers = []
            for side, asked in enumerate((like, model)):
                progress(f"{model.name} ({number} of {len(new.models)}): {revisions[side].label}")
                where = {"root": str(roots[side]), "folder": str(folders[side])}
                everything = request | dataclasses.asdict(asked) | where | {"path": paths[side]}
                answers.append(_run(python, scratch, everything))
            notes = [complaint] if complaint else []
            notes += _changes(was, model)
            models.append(_judged(model.name, answers, (*model.limits, *limits), notes))
        models += [ModelDiff(name, "removed", "Its settings were removed.") for name in earlier]
    return RevisionDiff(revisions[0].label, revisions[1].label, tuple(models))


def _configured(folder: Path, root: Path) -> Path:
    """Return the nearest folder, from the current one up, that has a configuration."""
    upwards = (folder, *folder.parents)
    return next((each for each in upwards if read_configuration(root / each)), folder)


def _check_limit(limit: str, model: WatchedModel, *, estimate: bool) -> None:
    metric = Threshold.parse(limit).metric
    if estimate and metric.endswith("time"):
        raise UsageError(f"the limit {limit!r} needs times, which estimates lack: add --measure")
    mode = "infer" if metric.startswith("inference") else "train"
    if metric not in ("parameters", "weights", "macs") and mode not in model.modes:
        raise UsageError(f"the limit {limit!r} needs {mode!r} in the modes of {model.name!r}")


def _changes(old: WatchedModel, new: WatchedModel) -> Iterator[str]:
    for each in dataclasses.fields(WatchedModel):
        was, now = getattr(old, each.name), getattr(new, each.name)
        if was != now:
            yield f"Setting {each.name}: {json.dumps(was)} became {json.dumps(now)}."


def _run(python: str, scratch: Path, request: dict[str, Any]) -> dict[str, str]:
    """Return what :mod:`pocketize.review.child` answers, or how its process died."""
    asked, answer = scratch / "request.json", scratch / "answer.json"
    answer.unlink(missing_ok=True)
    asked.write_text(json.dumps(request | {"answer": str(answer)}), encoding="utf-8")
    command = [python, "-m", "pocketize.review.child", str(asked)]
    # its own temporary files are in our folder, where they are removed also if it is killed
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch)}
    try:
        done = run_child(command, cwd=scratch, env=environment)
    except OSError as error:
        raise UsageError(f"cannot run {python}: {error.strerror}") from error
    try:
        read: dict[str, str] = read_json(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = " / ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
        if done.returncode < 0:
            last = f"ended by signal {-done.returncode}, perhaps for want of memory"
        read = {"error": f"the process broke off: {last}"}
    # the folder is another in each run
    return {key: text.replace(f"{request['root']}{os.sep}", "") for key, text in read.items()}


def _judged(
    name: str, answers: list[dict[str, str]], limits: tuple[str, ...], notes: list[str]
) -> ModelDiff:
    try:
        before, after = (
            Measurement.from_json(answer["measurement"]) if "measurement" in answer else None
            for answer in answers
        )
    except ReportError as error:
        raise UsageError(f"--python has another version of pocketize than this: {error}") from error
    old, new = answers
    if after is None:
        told = f"Broken: {new.get('error') or new['absent']}"
        return ModelDiff(name, "broken", told, before, said=tuple(notes))
    said = (*notes, *filter(None, [new["note"]]))
    if before is None and "absent" in old:
        return ModelDiff(name, "added", "It is new.", after=after, said=said)
    if before is None:
        told = f"Not compared, as the first revision fails: {old['error']}"
        return ModelDiff(name, "not compared", told, after=after, said=said)
    compared = compare_measurements(before, after, anyway=True).with_limits(limits)
    return ModelDiff(name, compared.status, compared.verdict, before, after, limits, said)
