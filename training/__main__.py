"""The command line `semblance-train`: one subcommand per method, plus evaluate, analyze, export and their like."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models.checkpoint import load_model, save_checkpoint
from models.errors import CheckpointError, SemblanceError
from training.distributed import rank
from training.method import discover, unkept
from training.options import EncoderOptions
from training.reconstruction import STATISTICS

_EPILOG = {
    "clip": """examples:
  semblance-train clip --preset tiny-cpu --data scenes          five minutes on two cores
  semblance-train clip --data ./photos --out checkpoints/mine   a folder whose subfolders are labels
  semblance-train clip --data captions.csv=3 scenes=1           two data sets, by weight
  torchrun --nproc-per-node 4 -m training clip --data big.csv   four processes
A run that was interrupted goes on when it is started again with the same options.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit codes: 0 done, 1 an error said in a sentence, 2 wrong usage, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        result: int = options.run_command(options)
        return result
    except KeyboardInterrupt:
        print("interrupted; the state is saved, start again with the same options to go on", file=sys.stderr)  # noqa: T201
        return 130
    except (SemblanceError, ValueError, OSError) as error:
        print(f"semblance-train: {error}", file=sys.stderr)  # noqa: T201
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; options come from the option dataclasses of each method."""
    parser = argparse.ArgumentParser("semblance-train", description="Train and measure models; see SUBCOMMAND --help.")
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, method in discover().items():
        sub = subcommands.add_parser(
            name, help=method.Options.__doc__, description=method.Options.__doc__, epilog=_EPILOG.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--preset", choices=sorted(method.presets()), help="settings to start from; options given win")
        _add_options(sub, method.Options())
        sub.set_defaults(run_command=_train, method=name)
    _add_measuring(subcommands)
    _add_checkpoints(subcommands)
    _add_pictures(subcommands)
    return parser


def _add_measuring(subcommands: Any) -> None:
    evaluate = subcommands.add_parser("evaluate", help="Measure a checkpoint on data sets")
    evaluate.add_argument("model", help="checkpoint folder, open_clip:ARCH/TAG or hf-hub:REPO")
    evaluate.add_argument("--data", nargs="+", default=["scenes"], help="data sets, as in training")
    _add_data_root(evaluate)
    evaluate.add_argument(
        "--fine-tune",
        nargs="+",
        type=_bounded(float, above=0, most=1),
        default=[],
        metavar="SHARE",
        help="shares of the labels to fine-tune on too",
    )
    evaluate.add_argument(
        "--baselines", action="store_true", help="measure untrained weights and raw pixels beside an image encoder too"
    )
    evaluate.add_argument("--judge", help="a model that embeds both, to judge drawn pictures by")
    evaluate.add_argument("--oracle", help="what `semblance-train oracle` wrote, to read drawn scenes by")
    evaluate.add_argument(
        "--statistics",
        default=STATISTICS,
        help="folder where the judge's view of the real pictures is kept, to compare with the same again "
        f"(default: {STATISTICS})",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the scenes that are drawn")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    evaluate.add_argument("--json", action="store_true", help="print JSON in place of a table")
    evaluate.add_argument("--write", action="store_true", help="put the figures into the checkpoint and its card")
    evaluate.set_defaults(run_command=_evaluate)
    analyze = subcommands.add_parser("analyze", help="Figures, maps and neighbours of a model's features")
    analyze.add_argument("model", help="checkpoint folder, open_clip:ARCH/TAG or hf-hub:REPO")
    analyze.add_argument("--data", required=True, help="a data set, as in training")
    _add_data_root(analyze)
    analyze.add_argument("--out", default="analysis", help="folder to write (default: analysis)")
    analyze.add_argument("--maps", nargs="*", choices=("pca", "tsne", "umap"), default=["pca"], help="(default: pca)")
    analyze.add_argument(
        "--limit", type=_bounded(int, least=1), default=2000, help="pictures, drawn at random (default: 2000)"
    )
    analyze.set_defaults(run_command=_analyze)
    oracle = subcommands.add_parser("oracle", help="Train the detector that judges what generators draw of scenes")
    oracle.add_argument("--out", default="runs/oracle", help="folder to write (default: runs/oracle)")
    oracle.add_argument("--steps", type=_bounded(int, least=1), default=3000, help="of 128 scenes each (default: 3000)")
    oracle.add_argument("--threads", type=int, default=0, help="of torch on the CPU, 0 for its own choice")
    oracle.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    oracle.set_defaults(run_command=_oracle)


def _add_checkpoints(subcommands: Any) -> None:
    export = subcommands.add_parser("export", help="Make a checkpoint folder of a run's saved state")
    export.add_argument("run", help="folder of the run, with its state.pt (its --run-dir)")
    export.add_argument("--out", required=True, help="checkpoint folder to write")
    export.add_argument("--dtype", choices=("fp32", "fp16"), default="fp16", help="of the weights (default: fp16)")
    export.set_defaults(run_command=_export)
    average = subcommands.add_parser("average", help="Average the weights of checkpoints trained one from the other")
    average.add_argument("models", nargs="+", help="checkpoint folders")
    average.add_argument("--out", required=True, help="checkpoint folder to write")
    average.set_defaults(run_command=_average)


def _add_pictures(subcommands: Any) -> None:
    views = subcommands.add_parser(
        "views", help="A contact sheet of what a method's augmentation does to your pictures"
    )
    views.add_argument("method", choices=[name for name, method in discover().items() if hasattr(method, "Transform")])
    views.add_argument("--data", default="scenes", help="a data set, as in training (default: scenes)")
    _add_data_root(views)
    views.add_argument("--out", default="views.png", help="file to write (default: views.png)")
    views.add_argument("--image-size", type=_bounded(int, least=1), default=96, help="side of the views (default: 96)")
    views.add_argument("--count", type=_bounded(int, least=1), default=8, help="pictures (default: 8)")
    views.add_argument("--draws", type=_bounded(int, least=1), default=4, help="pairs of views of each (default: 4)")
    views.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    views.set_defaults(run_command=_views)
    samples = subcommands.add_parser("samples", help="A sheet of what a generator draws: a row of pictures a prompt")
    samples.add_argument("model", help="checkpoint folder")
    samples.add_argument("prompts", nargs="*", help="what to draw (default: captions of --data not trained on)")
    samples.add_argument("--data", default="scenes", help="a data set, as in training (default: scenes)")
    _add_data_root(samples)
    samples.add_argument("--out", default="samples.png", help="file to write (default: samples.png)")
    samples.add_argument("--count", type=_bounded(int, least=1), default=8, help="captions (default: 8)")
    samples.add_argument("--columns", type=_bounded(int, least=1), default=8, help="pictures of each (default: 8)")
    samples.add_argument(
        "--guidance-scale", type=_bounded(float, least=0), default=2.0, help="1 for the text's own (default: 2)"
    )
    samples.add_argument("--judge", help="a model that ends each row with the training picture nearest to its first")
    samples.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    samples.set_defaults(run_command=_samples)
    shard = subcommands.add_parser("scenes", help="Write captioned scenes as a shard, to look at or to index")
    shard.add_argument("--out", default="scenes.tar.gz", help="file to write (default: scenes.tar.gz)")
    shard.add_argument(
        "--each", type=_bounded(int, least=0), default=10, help="single objects of each colour and shape (default: 10)"
    )
    shard.add_argument(
        "--others", type=_bounded(int, least=0), default=200, help="scenes of several objects (default: 200)"
    )
    shard.add_argument("--size", type=_bounded(int, least=1), default=96, help="side in pixels (default: 96)")
    shard.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    shard.set_defaults(run_command=_scenes)


def _add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", help="folder of the named data sets (default: SEMBLANCE_DATA)")


def _add_options(parser: argparse.ArgumentParser, defaults: Any) -> None:
    hints = get_type_hints(type(defaults))
    for item in fields(defaults):
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            _add_options(parser, value)
            continue
        shown = "" if value is None else f" (default: {_shown(value)})"
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            default=MISSING,
            help=f"{item.metadata['help']}{shown}".replace("%", "%%"),
            **_kind(item.name, hints[item.name], value),
        )


def _kind(name: str, hint: Any, value: Any) -> dict[str, Any]:
    """How argparse takes an option, by its type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if isinstance(value, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(value, tuple):
        number = get_args(hint)[0]
        return {"nargs": "+", "type": number, "metavar": name.upper()}
    if isinstance(value, dict):
        return {"type": _json_object, "metavar": "JSON"}
    numeric = next(kind for kind in (int, float, str) if kind in (hint, *get_args(hint)))
    return {"type": numeric, "metavar": {int: "N", float: "X", str: "NAME"}[numeric]}


def _bounded(kind: type[int] | type[float], **bounds: float) -> Callable[[str], float]:
    """A number for argparse; bounds as `option` takes them."""

    def number(text: str) -> float:
        given = kind(text)
        if wanted := unkept(given, bounds):
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return given

    number.__name__ = kind.__name__  # which argparse says of what is no number
    return number


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"channels\": 48}}'") from None


def _shown(value: Any) -> str:
    if value in (None, (), {}):
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _given(options: Any, arguments: argparse.Namespace) -> Any:
    """The options with whatever was given on the command line put over them."""
    changes: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if is_dataclass(value):
            changes[item.name] = _given(value, arguments)
        elif getattr(arguments, item.name) is not MISSING:
            given = getattr(arguments, item.name)
            changes[item.name] = tuple(given) if isinstance(value, tuple) else given
    return replace(options, **changes)


def _train(arguments: argparse.Namespace) -> int:
    method = discover()[arguments.method]
    options = _given(method.presets()[arguments.preset] if arguments.preset else method.Options(), arguments)
    folder = method.train(options)
    if rank() == 0:
        served = isinstance(options, EncoderOptions)
        hint = f": serve it with `semblance serve --checkpoints {Path(folder).parent}`" if served else ""
        print(f"wrote {folder}{hint}")  # noqa: T201
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from training.export import export_run

    folder = export_run(arguments.run, arguments.out, torch.float16 if arguments.dtype == "fp16" else torch.float32)
    print(f"wrote {folder}")  # noqa: T201
    return 0


def _average(arguments: argparse.Namespace) -> int:
    from training.export import average_checkpoints

    print(f"wrote {average_checkpoints(arguments.models, arguments.out)}; measure it with evaluate --write")  # noqa: T201
    return 0


def _scenes(arguments: argparse.Namespace) -> int:
    from training.scene_shard import write_shard

    options = {name: getattr(arguments, name) for name in ("each", "others", "size", "seed")}
    print(f"wrote {write_shard(arguments.out, **options)}")  # noqa: T201
    return 0


def _oracle(arguments: argparse.Namespace) -> int:
    from training.oracle import CONFIG, train_oracle

    config = replace(CONFIG, **{name: getattr(arguments, name) for name in ("steps", "threads", "seed")})
    print(f"wrote {train_oracle(arguments.out, config=config)}")  # noqa: T201
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from models.dalle import DALLETransformer
    from models.generation import Sampling
    from training.figures import training_pictures, unseen_texts
    from training.methods.dalle import samples_sheet

    model, judge = load_model(arguments.model), load_model(arguments.judge) if arguments.judge else None
    if not isinstance(model, DALLETransformer):
        raise CheckpointError(f"{arguments.model} draws no pictures; train a generator with `semblance-train dalle`")
    data, root = arguments.data, arguments.data_root
    prompts = arguments.prompts or unseen_texts(model, data, root, arguments.seed, arguments.count)
    samples_sheet(
        model,
        prompts,
        arguments.out,
        columns=arguments.columns,
        seed=arguments.seed,
        sampling=Sampling(guidance_scale=arguments.guidance_scale),
        judge=judge,
        seen=None if judge is None else training_pictures(judge, data, root),
    )
    print(f"wrote {arguments.out}")  # noqa: T201
    return 0


def _views(arguments: argparse.Namespace) -> int:
    from training.pretraining import views_sheet

    options = {name: getattr(arguments, name) for name in ("data_root", "image_size", "count", "draws", "seed")}
    print(f"wrote {views_sheet(arguments.method, arguments.data, arguments.out, **options)}")  # noqa: T201
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    from training.analysis import analyze_model

    found = analyze_model(
        load_model(arguments.model),
        arguments.data,
        arguments.out,
        data_root=arguments.data_root,
        maps=arguments.maps,
        limit=arguments.limit,
    )
    _table({name: value for name, value in found.items() if isinstance(value, float)})
    print(f"wrote {arguments.out}")  # noqa: T201
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from training.baselines import baseline_figures
    from training.figures import evaluate_model, fine_tuned
    from training.oracle import load_oracle
    from training.trainer import choose_device

    device = choose_device(arguments.device)
    model = load_model(arguments.model).to(device)
    judge = load_model(arguments.judge).to(device) if arguments.judge else None
    oracle = load_oracle(arguments.oracle).to(device) if arguments.oracle else None
    metrics = evaluate_model(
        model, arguments.data, arguments.data_root, arguments.seed, judge, oracle, arguments.statistics
    )
    for name in arguments.data:
        for share in arguments.fine_tune:
            metrics |= fine_tuned(model, name, arguments.data_root, share, arguments.seed)
    if arguments.baselines:
        metrics |= baseline_figures(model, arguments.data, arguments.data_root, arguments.seed)
    if arguments.write:
        model.provenance["metrics"] = model.provenance.get("metrics", {}) | metrics
        save_checkpoint(model.cpu(), arguments.model, dtype=model.stored_dtype)
    if arguments.json:
        print(json.dumps(metrics, indent=2))  # noqa: T201
        return 0
    _table(metrics)
    return 0


def _table(figures: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
