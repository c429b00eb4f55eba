"""``attnrewrite cache``: look into tuning records, and share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, VerbGroup, check_out, overwrite_option
from attnrewrite.kernels.diagnostics import AttnRewriteError, error
from attnrewrite.kernels.places import without_credentials

if TYPE_CHECKING:
    from attnrewrite.kernels.store.local import Folder
    from attnrewrite.kernels.store.place import Place
    from attnrewrite.kernels.store.upkeep import Copied, Tick

EXIT_REFUSED = 4
_EXAMPLES = ("cache ls", "cache why", "cache push s3://our-bucket/attnrewrite --dry-run")
_url = click.argument("url", required=False, envvar="ATTNREWRITE_CACHE_URL")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")


@click.group(cls=VerbGroup, examples=_EXAMPLES)
def command() -> None:
    """Look into tuning records, and share them.

    Records say which configuration of a kernel is fastest on a device. They lie in the user's cache, or below
    ATTNREWRITE_CACHE_DIR, and merge by union: nothing that is copied replaces anything.
    """


@command.command(cls=Verb, examples=("cache ls", "cache ls --keys --format json"))
@click.option("--keys", "each", is_flag=True, help="List every key with its fastest configuration.")
@click.pass_obj
def ls(output: Output, each: bool) -> None:
    """List what is stored, by family and device."""
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import keys, rows
    from attnrewrite.render.records import key_rows, rows_view

    folder = _folder()
    if each:
        found = [record for record, _ in keys(folder, "", secret())]
        listed = [{"digest": record.key.digest, **record.to_json()} for record in found]
        output.result({"folder": str(folder.root), "keys": listed}, lambda: key_rows(found))
        return
    counted = rows(folder)
    data = {"folder": str(folder.root), "rows": [row._asdict() for row in counted]}
    output.result(data, lambda: rows_view(counted, folder.root))


@command.command(cls=Verb, examples=("cache show 3f2a", "cache show 3f2a --format json"))
@click.argument("key")
@click.pass_obj
def show(output: Output, key: str) -> None:
    """Show what is known about KEY, the first characters of its digest."""
    from attnrewrite.kernels.store.record import union
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import keys
    from attnrewrite.render.records import record_page

    found = list(keys(_folder(), key, secret()))
    if len(found) != 1:
        raise error("AR515", f"{len(found)} keys begin with {key!r}")
    record, records = found[0]
    timings = list(union(records).values())
    data = {"digest": record.key.digest, **record.to_json(), "timings": [each.to_json() for each in timings]}
    output.result(data, lambda: record_page(record, timings))


@command.command(cls=Verb, examples=("cache why", "cache why 3f2a --format json"))
@click.argument("key", default="")
@click.pass_obj
def why(output: Output, key: str) -> None:
    """Say why keys were not found: which fields differ from the nearest records.

    KEY is the beginning of the digest of a key that was looked for; without it all of them are explained.
    """
    from attnrewrite.kernels.store.misses import missed
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import closest
    from attnrewrite.render.records import misses_view

    folder = _folder()
    found = [wanted for wanted in missed(folder.root) if wanted.digest.startswith(key)]
    if key and not found:
        raise error("AR515", f"no key that was looked for in vain begins with {key!r}")
    explained = [(wanted, closest(folder, wanted, secret())) for wanted in found]
    data = [
        {
            "digest": wanted.digest,
            "key": wanted.to_json(),
            "nearest": [
                {"digest": record.key.digest, "differences": [each._asdict() for each in fields]}
                for record, fields in nearest
            ],
        }
        for wanted, nearest in explained
    ]
    output.result({"missed": data}, lambda: misses_view(explained))


@command.command(cls=Verb, examples=("cache export tuned.jsonl", "cache export dense.jsonl --family dense"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--family", help="Only the records of this family of kernels. [default: all]")
@overwrite_option
@click.pass_obj
def export(output: Output, file: Path, family: str | None, overwrite: bool) -> None:
    """Write the latest records of every key as a pack: one JSON line for each, sorted."""
    from attnrewrite.kernels.store.local import put_file
    from attnrewrite.kernels.store.pack import pack
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import keys

    check_out(output, file, overwrite)
    found = [
        record
        for latest, records in keys(_folder(), "", secret())
        for record in records
        if record.revision == latest.revision and family in (None, record.key.family)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    put_file(file, pack(found))
    _say(output, {"file": str(file), "records": len(found)}, f"wrote {_records(len(found))} to {file}")


@command.command("import", cls=Verb, examples=("cache import tuned.jsonl", "cache import https://host/h200.jsonl"))
@click.argument("file")
@_dry_run
@click.pass_obj
def import_(output: Output, file: str, dry_run: bool) -> int:
    """Add the records of a pack, a file or a URL, to those that are here."""
    from attnrewrite.kernels.store.pack import unpack
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import copy

    found = unpack(_content(file), secret())
    what = f"imported from {without_credentials(file)}"
    with _ticking(output, what) as tick:
        done = copy(found, _folder(), dry_run=dry_run, tick=tick)
    return _report(output, done, what, dry_run)


@command.command(cls=Verb, examples=("cache push s3://our-bucket/attnrewrite", "cache push redis://host --dry-run"))
@_url
@_dry_run
@click.pass_obj
def push(output: Output, url: str | None, dry_run: bool) -> int:
    """Send the records that are here to the shared store at URL, by default ATTNREWRITE_CACHE_URL."""
    with _shared(url) as place:
        return _transfer(output, _folder(), place, f"sent to {without_credentials(str(url))}", dry_run)


@command.command(cls=Verb, examples=("cache pull", "cache pull /net/team/attnrewrite --dry-run"))
@_url
@_dry_run
@click.pass_obj
def pull(output: Output, url: str | None, dry_run: bool) -> int:
    """Fetch the records of the shared store at URL, by default ATTNREWRITE_CACHE_URL."""
    with _shared(url) as place:
        return _transfer(output, place, _folder(), f"fetched from {without_credentials(str(url))}", dry_run)


@command.command(cls=Verb, examples=("cache verify", "cache verify --format json"))
@click.pass_obj
def verify(output: Output) -> int:
    """Read every record, and list those that are refused with their reasons: exit code 4 where there are any."""
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import broken
    from attnrewrite.render.records import paths_view

    checked: Counter[str] = Counter()
    with _ticking(output, "verifying") as tick:

        def count() -> None:
            checked["records"] += 1
            tick()

        found = [(path, str(refusal)) for path, refusal in broken(_folder(), secret(), count)]
    total = checked["records"]
    data = {"records": total, "refused": [{"path": path, "reason": reason} for path, reason in found]}
    output.result(data, lambda: paths_view(found, f"{_records(total)}, {len(found)} refused"))
    return EXIT_REFUSED if found else 0


@command.command(cls=Verb, examples=("cache prune --dry-run", "cache prune --older-than 90"))
@click.option("--older-than", type=click.IntRange(min=1), metavar="DAYS", help="Remove older records, too.")
@_dry_run
@click.pass_obj
def prune(output: Output, older_than: int | None, dry_run: bool) -> None:
    """Remove what is broken or was replaced by a later record."""
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import removable
    from attnrewrite.render.records import paths_view

    folder = _folder()
    with _ticking(output, "looking") as tick:
        found = list(removable(folder, older_than, secret(), tick))
    if not dry_run:
        for path, _ in found:
            folder.delete(path)
    done = "would be removed" if dry_run else "removed"
    data = {"removed": [{"path": path, "reason": reason} for path, reason in found], "dry_run": dry_run}
    output.result(data, lambda: paths_view(found, f"{_records(len(found))} {done}"))


def _folder() -> Folder:
    from attnrewrite.kernels.store import settings
    from attnrewrite.kernels.store.local import Folder

    return Folder(settings.folder())


@contextmanager
def _shared(url: str | None) -> Iterator[Place]:
    """Open the shared store. Whatever it raises is TuningError AR514."""
    from attnrewrite.kernels.store.place import open_place

    if not url:
        raise click.UsageError("Name a URL, or set ATTNREWRITE_CACHE_URL.")
    place = open_place(url)
    try:
        yield place
    except (AttnRewriteError, click.ClickException):
        raise
    except Exception as cause:  # the errors of every package that stores are reached with
        shown = without_credentials(url)
        raise error("AR514", f"{shown}: {type(cause).__name__}: {str(cause).replace(url, shown)}") from cause


def _content(file: str) -> bytes:
    """Return what a file or a URL holds."""
    import fsspec

    try:
        with fsspec.open(file, "rb") as source:
            data: bytes = source.read()
    except Exception as cause:  # the errors of every package that files are reached with
        raise error("AR602", f"{without_credentials(file)}: {cause}") from cause
    return data


def _transfer(output: Output, source: Place, target: Place, what: str, dry_run: bool) -> int:
    from attnrewrite.kernels.store.settings import secret
    from attnrewrite.kernels.store.upkeep import transfer

    with _ticking(output, what) as tick:
        done = transfer(source, target, secret(), dry_run=dry_run, tick=tick)
    return _report(output, done, what, dry_run)


def _report(output: Output, done: Copied, what: str, dry_run: bool) -> int:
    """Say what a copy did; the exit code is that of a failed comparison where all of it was refused."""
    refused = {str(refusal): count for refusal, count in sorted(done.refused.items())}
    data = {"new": done.new, "present": done.present, "refused": refused, "dry_run": dry_run}
    parts = [f"{_records(len(done.new))} {'to be ' * dry_run}{what}", f"{done.present} present already"]
    parts += [f"{count} refused ({refusal})" for refusal, count in refused.items()]
    _say(output, data, ", ".join(parts))
    return EXIT_REFUSED if done.refused and not done.new and not done.present else 0


def _records(count: int) -> str:
    return f"{count} record{'' if count == 1 else 's'}"


def _say(output: Output, data: dict[str, Any], text: str) -> None:
    from rich.text import Text

    output.result(data, lambda: Text(text))


@contextmanager
def _ticking(output: Output, text: str) -> Iterator[Tick]:
    """Show how many records were looked at."""
    with output.progress() as progress:
        task = progress.add_task(text, total=None)
        yield partial(progress.advance, task)
