"""A whole merge: planned, shared out among workers, gone on with after an interruption, and put together."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.checks.unused import check_unused, require_all_used
from mergekit_ace.engine import parts
from mergekit_ace.engine.contents import require_each_once
from mergekit_ace.engine.disk_space import require_space
from mergekit_ace.engine.events import Noted, Planned, ShardMade, Warned, Watcher
from mergekit_ace.engine.files import write_files, write_index
from mergekit_ace.engine.part import Part
from mergekit_ace.engine.plan import MergePlan, plan_merge, treatments
from mergekit_ace.engine.provenance import write_record
from mergekit_ace.engine.receipt import Notice, Receipt, read_receipts, remove_unfinished
from mergekit_ace.engine.shard_maker import noticed
from mergekit_ace.engine.shards import Shard, arranged, by_cost, of_part
from mergekit_ace.engine.workers.protocol import Workers
from mergekit_ace.mergekit_internals import adapter_entry_name
from mergekit_ace.recipe.adapter_cache import adapter_folder
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import Recipe
from mergekit_ace.staging import Stage, staged_in_pieces


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to merge, and where to."""

    recipe: Recipe
    options: MergeOptions
    out: Path
    shard_size: int | None = None
    """Bytes in an output file; chosen by the size of the model if None."""
    patterns: Sequence[str] = ()
    """Make a part: the tensors that match these glob patterns."""
    part: Part | None = None
    """Make a part: one of several of equal cost."""
    overwrite: bool = False
    resume: bool | None = None
    """What to do with the shards of an earlier run: go on (True), start over (False), raise (None)."""
    check_space: bool = True
    strict: bool = False
    """Do not start where an input tensor would be lost."""

    @property
    def is_part(self) -> bool:
        """Whether the output is a part of a model."""
        return self.part is not None or bool(self.patterns)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a merge is being made: what workers need to know."""

    request: Request
    plan: Plan
    work: MergePlan
    folder: Path
    """Where the shards go."""
    stage: Stage
    watch: Watcher


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A merge that is done."""

    out: Path
    tensors: int
    nbytes: int
    files: int
    taken: int
    """How many of the files were there from an earlier run."""
    treatments: dict[str, int]
    warnings: tuple[Notice, ...]
    lost: tuple[Finding, ...]
    """Input tensors that no output tensor is made of, by model."""
    seconds: float
    work: float
    """Seconds of all workers together, of the files that this run made."""
    reading: float
    """Of these, waiting for inputs."""
    writing: float
    """Of these, waiting for output to be written."""
    is_part: bool


Employ = Callable[[Site], contextlib.AbstractContextManager[Workers]]
"""Gets the workers for a merge, once it is planned."""


def merge(request: Request, employ: Employ, watch: Watcher = lambda event: None) -> Outcome:
    """Make a merge, or a part of one; its folder appears when it is whole.

    Raises:
        FileExistsError, BlockingIOError, ValueError: as `staged_in_pieces`.
        RecipeError: mergekit cannot plan the recipe.
        Exception: what kept a tensor from being merged. Shards that were finished are kept, for `resume`.
    """
    started = time.perf_counter()
    recipe, options = request.recipe, request.options
    inputs = [Path(recipe.name), *_local_inputs(recipe)]
    with contextlib.ExitStack() as stack:
        stage = stack.enter_context(
            staged_in_pieces(request.out, overwrite=request.overwrite, inputs=inputs, resume=request.resume)
        )
        notices = stack.enter_context(noticed())
        _say_adapters(recipe, options, watch)
        plan = stack.enter_context(planned(recipe, options))
        lost = tuple(check_unused(plan))
        if request.strict:
            require_all_used(lost)
        whole = plan_merge(plan, options, shard_size=request.shard_size, patterns=request.patterns)
        work = whole if request.part is None else _part(whole, request.part)
        folder = stage.folder / parts.TENSORS if request.is_part else stage.folder
        folder.mkdir(exist_ok=True)
        stage.receipts.mkdir(exist_ok=True)
        taken = _take(work, folder, stage)
        todo = [shard for shard in work.shards if shard.file not in taken]
        if request.check_space:
            require_space(request.out, sum(shard.nbytes for shard in todo))
        _write_others(request, plan, stage.folder)
        early = tuple(notices)
        site = Site(request=request, plan=plan, work=work, folder=folder, stage=stage, watch=watch)
        made = stack.enter_context(contextlib.closing(_make(site, employ, by_cost(todo), list(taken.values()))))
        now = list(made)
        receipts = [*taken.values(), *now]
        remove_unfinished(folder)
        for receipt in receipts:
            _require_not_replaced(folder / receipt.file, receipt)
        _finish(request, work, receipts, stage.folder)
        counts = dict(treatments(plan))
    return Outcome(
        out=request.out,
        tensors=sum(len(receipt.tensors) for receipt in receipts),
        nbytes=sum(tensor.nbytes for receipt in receipts for tensor in receipt.tensors),
        files=sum(bool(receipt.tensors) for receipt in receipts),
        taken=len(taken),
        treatments=counts,
        warnings=first_of_each([*early, *(notice for receipt in receipts for notice in receipt.warnings)]),
        lost=lost,
        seconds=time.perf_counter() - started,
        work=sum(receipt.seconds for receipt in now),
        reading=sum(receipt.reading for receipt in now),
        writing=sum(receipt.writing for receipt in now),
        is_part=request.is_part,
    )


def first_of_each(notices: Sequence[Notice]) -> tuple[Notice, ...]:
    """The first warning of every cause."""
    found: dict[str, Notice] = {}
    for notice in notices:
        found.setdefault(notice.cause, notice)
    return tuple(found.values())


def _local_inputs(recipe: Recipe) -> list[Path]:
    models = recipe.config.referenced_models()
    paths = [Path(path.path) for model in models for path in (model.model, model.lora) if path is not None]
    return [path for path in paths if path.exists()]


def _say_adapters(recipe: Recipe, options: MergeOptions, watch: Watcher) -> None:
    for model in recipe.config.referenced_models():
        if model.lora is not None and options.lora_merge_cache:
            entry = adapter_folder(model, options) / adapter_entry_name(model)
            if entry.is_dir():
                watch(Noted(f"Taking {model} from the adapter cache, where it was merged before: {entry}"))


def _part(work: MergePlan, part: Part) -> MergePlan:
    chosen = of_part(work.shards, part)
    return work.model_copy(update={"shards": tuple(chosen)})


def _take(work: MergePlan, folder: Path, stage: Stage) -> dict[str, Receipt]:
    """The shards of an earlier run that are what this one would make; all else of it is removed."""
    found = read_receipts(stage.receipts)
    taken = {}
    for shard in work.shards:
        receipt = found.get(shard.file)
        if (
            receipt is not None
            and receipt.key == work.key(shard)
            and receipt.inputs == work.sources(shard)
            and _is_as_written(folder / shard.file, receipt)
        ):
            taken[shard.file] = receipt
    if folder != stage.folder:
        _remove_all_but({folder.name}, stage.folder)
    _remove_all_but(set(taken), folder)
    _remove_all_but({f"{file}.json" for file in taken}, stage.receipts)
    return taken


def _remove_all_but(names: Collection[str], folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in names:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _is_as_written(file: Path, receipt: Receipt) -> bool:
    if not receipt.sha256:
        return not receipt.tensors
    return file.is_file() and file_digest(file) == receipt.sha256


def _require_not_replaced(file: Path, receipt: Receipt) -> None:
    """Raise if a worker that was taken for lost has written a file again, with other content, after another one had."""
    is_same = file.is_file() and file.stat().st_mtime_ns == receipt.changed
    if not is_same and not _is_as_written(file, receipt):
        raise RuntimeError(
            f"an output file must stay as its receipt says; {file} was replaced after it was made. "
            "--resume makes it again"
        )


def _write_others(request: Request, plan: Plan, folder: Path) -> None:
    if request.is_part:
        (folder / parts.FILES).mkdir()
        write_files(plan, request.recipe.text, folder / parts.FILES, parts.CARD_NAME)
    else:
        write_files(plan, request.recipe.text, folder, folder.name)


def _make(
    site: Site, employ: Employ, todo: Sequence[Shard], taken: Sequence[Receipt]
) -> Generator[Receipt, None, None]:
    known: set[str] = set()

    def warn(notices: Sequence[Notice]) -> None:
        for notice in notices:
            if notice.cause not in known:
                known.add(notice.cause)
                site.watch(Warned(notice))

    with employ(site) as workers:
        site.watch(Planned(site.work, tuple(todo), tuple(taken), workers.description, workers.elsewhere))
        # Closed at once where anything fails: no worker must write into a folder that is being removed.
        with contextlib.closing(workers.make(todo)) as receipts:
            for receipt in receipts:
                warn(receipt.warnings)
                site.watch(ShardMade(receipt))
                yield receipt


def _finish(request: Request, work: MergePlan, receipts: Sequence[Receipt], folder: Path) -> None:
    """Put together what the shards make up, and check it by the files' own headers."""
    absent = {name for receipt in receipts for name in receipt.absent}
    written = [receipt for receipt in receipts if receipt.sha256]
    planned_here = [tensor for shard in work.shards for tensor in shard.tensors]
    if request.is_part:
        require_each_once(planned_here, [folder / parts.TENSORS / r.file for r in written], absent)
        parts.seal(folder, work, receipts)
        return
    safetensors = request.options.safe_serialization
    layout = arranged(work.merge.plan, work.merge.shard_size, absent, safetensors=safetensors)
    # A shard of which nothing was there shifts the numbers of those after it.
    for receipt, name in zip(sorted(written, key=lambda receipt: receipt.file), layout, strict=True):
        if receipt.file != name:
            (folder / receipt.file).rename(folder / name)
    require_each_once(work.merge.plan, [folder / name for name in layout], absent)
    if len(layout) > 1:
        weights = {tensor.name: tensor for tensors in layout.values() for tensor in tensors}
        files = {tensor.name: name for name, tensors in layout.items() for tensor in tensors}
        write_index(weights, files, folder, safetensors=safetensors)
    digests = dict(zip(layout, (receipt.sha256 for receipt in sorted(written, key=lambda r: r.file)), strict=True))
    write_record(work.merge, work.inputs, digests, folder)
