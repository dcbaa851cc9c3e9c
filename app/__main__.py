"""The command line `semblance`; what an operator does beside serving is in operations.py."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.commandline import MODEL, add_command, add_settings, run_to_end, settings_of
from app.operations import operator_commands
from models.errors import SemblanceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit codes: 0 done, 1 an error said in a sentence, 2 wrong usage, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        result: int = options.run_command(options)
        return result
    except KeyboardInterrupt:
        return 130
    except SemblanceError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        return _fail(f"setting {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        "semblance",
        description="Serve trained models, fill collections with pictures and search them.",
        epilog="settings can also be given in the environment: SEMBLANCE_PORT, SEMBLANCE_API_KEYS, ... (app/README.md)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = add_command(commands, "serve", _serve, "Serve the API on http://127.0.0.1:8000, its pages under /docs")
    add_settings(serve, "host", "port", "store", "checkpoints", "device", "backend", "threads")
    serve.add_argument("--model", action="append", metavar="NAME=REFERENCE", help=MODEL)
    serve.add_argument("--demo", action="store_true", help="fill the default collection with scenes on first start")
    serve.add_argument("--insecure", action="store_true", help="serve other machines without an API key")

    text = "Serve the API on a cluster of Ray: replicas of each model, and a router before them"
    on_ray = add_command(commands, "ray-serve", _ray_serve, text)
    add_settings(on_ray, "host", "port", "store", "checkpoints", "device", "backend", "threads")
    on_ray.add_argument("--model", action="append", metavar="NAME=REFERENCE", help=MODEL)
    on_ray.add_argument("--demo", action="store_true", help="fill the default collection with scenes on first start")
    on_ray.add_argument("--insecure", action="store_true", help="serve other machines without an API key")
    on_ray.add_argument("--address", help="of the cluster; auto: the one of this host (default: one of its own)")
    on_ray.add_argument(
        "--replicas",
        action="append",
        metavar="[NAME=]N[-M]",
        help="of a model, or of each; may be repeated (default: 1)",
    )
    on_ray.add_argument(
        "--gpus",
        action="append",
        metavar="[NAME=]SHARE",
        help="of a GPU, for each replica (default: 0.25, if there are)",
    )
    on_ray.add_argument(
        "--wait-ms", type=float, default=250, help="more replicas where inputs wait longer than this (default: 250)"
    )

    of_collections = _collection_commands(commands)
    operator_commands(commands)

    embed = add_command(commands, "embed", _embed, "Print embeddings as JSON lines")
    embed.add_argument("inputs", nargs="+", help="texts, or paths of pictures with --image")
    embed.add_argument("--image", action="store_true", help="the inputs are pictures' paths")
    embed.add_argument("--embedder", metavar="NAME", help="model (default: the first that can do it)")
    embed.add_argument("--dimensions", type=int, help="cut the vectors to this length")

    generate = add_command(commands, "generate", _generate, "Make pictures from a text, on a server that can")
    generate.add_argument("prompt", help="what to show")
    generate.add_argument(
        "--out", default="generated.png", help="file, or folder for files named by seed (default: generated.png)"
    )
    generate.add_argument("-n", type=int, default=1, help="pictures (default: 1)")
    generate.add_argument("--seed", type=int, help="for the same pictures again")
    generate.add_argument("--style", help="one of the model's, as `semblance models --json` lists them")

    models = add_command(commands, "models", _models, "List the models, what they take and what they measured")
    models.add_argument("--json", action="store_true", help="print the answer as JSON")
    for command in (*of_collections, embed, generate, models):
        command.add_argument("--server", metavar="URL", help="a running server (default: the one that holds --data)")
        command.add_argument("--model", action="append", metavar="NAME=REFERENCE", help=MODEL)
        add_settings(command, "store", "checkpoints", "device", "threads")
    return parser


def _collection_commands(commands: Any) -> list[argparse.ArgumentParser]:
    index = add_command(commands, "index", _index, "Put pictures into a collection; run it again to go on or to update")
    index.add_argument(
        "source",
        help="a folder, a caption table (.csv .tsv .jsonl .parquet), or .tar(.gz); or embeddings: what `dump` wrote, a "
        ".parquet with a column `embedding`, .npy files, or a folder of clip-retrieval",
    )
    index.add_argument("--collection", default="default", help="its name; it is made if need be (default: default)")
    index.add_argument("--embedder", metavar="NAME", help="the model of a new collection (default: the first loaded)")
    index.add_argument(
        "--in-place", action="store_true", help="refer to the files where they are (below SEMBLANCE_PICTURE_ROOT)"
    )
    index.add_argument("--to", metavar="FOLDER", help="embed into Parquet and safetensors there, not into a collection")
    index.add_argument("--engine", choices=["processes", "ray"], default="processes", help="what embeds, with --to")
    index.add_argument("--workers", type=int, default=0, help="processes, with --to (default: one a GPU, or one)")
    index.add_argument("--max-bad", type=int, default=-1, help="exit with 1 if more files are unreadable")

    search = add_command(commands, "search", _search, "Search a collection by a text or a picture")
    search.add_argument("query", help="a text, or the path of a picture with --image")
    search.add_argument("--image", action="store_true", help="the query is a picture's path")
    search.add_argument("--collection", help="its name (default: default)")
    search.add_argument("-k", type=int, default=10, help="hits (default: 10)")
    search.add_argument("--json", action="store_true", help="print the answer as JSON")

    dump = add_command(commands, "dump", _dump, "Write a collection's items with their embeddings to a Parquet file")
    dump.add_argument("out", help="the file to write")
    dump.add_argument("--collection", default="default", help="its name (default: default)")
    dump.add_argument("--pictures", action="store_true", help="put the pictures into it too")

    reindex = add_command(
        commands, "reindex", _reindex, "Make a collection again with another model, while the old serves"
    )
    reindex.add_argument("embedder", metavar="NAME", help="the model")
    reindex.add_argument("--collection", default="default", help="its name (default: default)")
    return [index, search, dump, reindex]


def _serve(options: argparse.Namespace) -> int:
    # Imported here: `--help` and the other commands need none of it.
    from app import logs, tracing
    from app.address import bound, listen
    from app.demo import fill_demo
    from app.keys import keys_to_serve
    from app.loading import load_engines, load_generators, settle
    from app.main import create_app
    from app.protocol import DrainingServer, config_of
    from app.stores import open_collections

    settings = settings_of(options)
    keys = keys_to_serve(settings)
    logs.configure(settings.log)
    tracing.configure()
    log = logging.getLogger("semblance")
    started = time.monotonic()
    with (
        bound(settings.host, settings.port) as (address, sockets),
        open_collections(settings, note=address) as collections,
    ):
        engines, generators = load_engines(settings), load_generators(settings)
        if not engines and not generators:
            raise SemblanceError(
                f"no model to serve in {settings.checkpoints}: train one, or give --checkpoints or --model"
            )
        if settings.demo:
            added = asyncio.run(fill_demo(settings, engines, collections))
            if added is not None:
                log.info("filled the collection %r with %d pictures", settings.default_collection, added)
        listen(address, sockets)
        log.info("%s ready on %s after %.1f s", ", ".join((*engines, *generators)), address, time.monotonic() - started)
        # uvicorn raises the signal again when it has drained, and the default handler would make that a failure.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        app = create_app(settings, engines, collections, generators, keys)
        settle()
        DrainingServer(config_of(app, settings), app.state.service.drain).run(sockets)
    return 0


def _ray_serve(options: argparse.Namespace) -> int:
    from app.ray_serve import run

    return run(options)


def _with_client(options: argparse.Namespace, work: Callable[..., Coroutine[Any, Any, int]]) -> int:
    from app.connection import connect

    async def run() -> int:
        async with connect(settings_of(options), options.server) as client:
            return await work(client)

    return run_to_end(run())


def _index(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from app.ingest import Report, count, ingest
    from app.vectors import holds_vectors, load_vectors

    console, vectors = Console(stderr=True), holds_vectors(options.source)

    @contextmanager
    def shown(name: str) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _rate(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=None)
            progress.update(task, total=None if vectors else count(options.source))  # which may take minutes
            yield lambda done: progress.advance(task, done)

    def ended(report: Report) -> int:
        for line in report.bad:
            shown_line = f"not read: {line}".encode(errors="backslashreplace").decode()  # names may be no Unicode
            console.out(shown_line, style="yellow", highlight=False)  # print() takes a name's [/x] for markup
        print(f"{report.added} added, {report.present} there already, {len(report.bad)} not read")  # noqa: T201
        return 1 if 0 <= options.max_bad < len(report.bad) else 0

    async def work(client: Any) -> int:
        fill = load_vectors if vectors else partial(ingest, in_place=options.in_place)
        with shown(options.collection) as progress:
            to = options.collection
            report = await fill(client, to, options.source, model=options.embedder, progress=progress)
        return ended(report)

    if not options.to:
        return _with_client(options, work)
    from app.bulk import embed_source  # brings torch and the models with it, which no other indexing needs

    with shown(options.to) as progress:
        report = embed_source(
            options.source, options.to, settings_of(options),
            embedder=options.embedder, engine=options.engine, workers=options.workers, progress=progress,
        )  # fmt: skip
    return ended(report)


def _rate() -> Any:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        """Pictures a second."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.0f}/s")

    return Rate()


def _search(options: argparse.Namespace) -> int:
    from app.calls import call

    async def work(client: Any) -> int:
        body: dict[str, Any] = {"query": _input(options.query, options.image), "k": options.k}
        if options.collection:
            body["collection"] = options.collection
        answer = await call(client, "POST", "/search", json=body)
        if options.json:
            print(json.dumps(answer, indent=2))  # noqa: T201
            return 0
        from rich.console import Console
        from rich.table import Table

        table = Table("score", "id", "caption")
        for hit in answer["hits"]:
            table.add_row(f"{hit['score']:.3f}", hit["id"], hit["caption"] or "")
        Console().print(table)
        return 0

    return _with_client(options, work)


def _dump(options: argparse.Namespace) -> int:
    from rich.console import Console

    from app.vectors import dump_vectors

    console = Console(stderr=True)

    def lost(line: str) -> None:
        console.out(f"not written: {line}", style="yellow", highlight=False)

    async def work(client: Any) -> int:
        name, pictures = options.collection, options.pictures
        with console.status(name) as status:
            async for count in dump_vectors(client, name, options.out, pictures=pictures, lost=lost):
                status.update(f"{name}: {count:,} items")
        print(f"{options.out}: {count:,} items")  # noqa: T201
        return 0

    return _with_client(options, work)


def _reindex(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from app.calls import call, collection_url

    async def work(client: Any) -> int:
        url = f"{collection_url(options.collection)}/reindex"
        found = await call(client, "POST", url, json={"model": options.embedder})
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(options.collection, total=found["total"])
            while found["state"] == "running":
                await asyncio.sleep(0.2)
                found = await call(client, "GET", url)
                progress.update(task, total=found["total"], completed=found["done"])
        if found["state"] != "done":
            raise SemblanceError(f"{options.collection}: {found['error'] or found['state']}; run it again to go on")
        print(f"{options.collection}: {found['done']:,} items of model {found['model']!r}")  # noqa: T201
        return 0

    return _with_client(options, work)


def _embed(options: argparse.Namespace) -> int:
    from app.calls import call

    async def work(client: Any) -> int:
        for start in range(0, len(options.inputs), 16):
            part = options.inputs[start : start + 16]
            body: dict[str, Any] = {"input": [_input(value, options.image) for value in part]}
            if options.embedder:
                body["model"] = options.embedder
            if options.dimensions:
                body["dimensions"] = options.dimensions
            answer = await call(client, "POST", "/embed", json=body)
            for value, row in zip(part, answer["data"], strict=True):
                print(json.dumps({"input": value, "embedding": row["embedding"]}))  # noqa: T201
        return 0

    return _with_client(options, work)


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from app.calls import events

    async def work(client: Any) -> int:
        body = {"prompt": options.prompt, "n": options.n, "stream": True, "partial_images": 16}
        body |= {name: value for name in ("seed", "style") if (value := getattr(options, name)) is not None}
        made = []
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(options.prompt[:40], total=None)
            async for event in events(client, "/generate", body):
                if event["type"] == "image_generation.completed":
                    made.append(event)
                else:
                    progress.update(task, total=event["steps"], completed=event["step"])
        out = Path(options.out)
        for number, event in enumerate(made):
            if out.is_dir():
                file = out / f"{event['seed']}.png"
            else:
                file = out if not number else out.with_stem(f"{out.stem}-{number + 1}")
            file.write_bytes(base64.b64decode(event["b64_json"]))
            score = "" if event["score"] is None else f", score {event['score']:.3f}"
            print(f"{file}: seed {event['seed']}{score}")  # noqa: T201
        return 0

    return _with_client(options, work)


def _models(options: argparse.Namespace) -> int:
    from app.calls import call

    async def work(client: Any) -> int:
        answer = await call(client, "GET", "/models")
        if options.json:
            print(json.dumps(answer, indent=2))  # noqa: T201
            return 0
        from rich.console import Console
        from rich.table import Table

        table = Table("model", "takes", "makes", "dimensions", "pixels", "figures")
        for model in answer["data"]:
            figures = ", ".join(f"{name} {value:.3g}" for name, value in list(model["metrics"].items())[:4])
            row = (", ".join(model["takes"]), ", ".join(model["makes"]), str(model["dimensions"] or ""))
            table.add_row(model["id"], *row, str(model["size"]), figures)
        Console().print(table)
        return 0

    return _with_client(options, work)


def _input(value: str, image: bool) -> dict[str, str]:
    if not image:
        return {"text": value}
    return {"image": base64.b64encode(Path(value).read_bytes()).decode()}


def _fail(message: str) -> int:
    print(f"semblance: {message}", file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
