"""The curves of several runs in one picture.

    # curves.png, labelled a and b
    python -m minigrpo.curves runs/a runs/b
    python -m minigrpo.curves runs/*/report --output report.png
    python -m minigrpo.curves runs/a runs/b --labels "lr 1e-6" "lr 1e-5"

The picture of a single run is RUN/curves.png, redrawn while it trains.
"""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from minigrpo.run.args import input_errors
from minigrpo.run.terminal import Parser


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        help="a name for each run; default: the part in which their paths differ",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("curves.png"),
        help="the picture to write; default: curves.png",
    )
    args = parser.parse_args()
    from minigrpo.run.plots import draw_runs, read_log  # a second for matplotlib

    with input_errors():
        folders = [
            Path(run).parent if Path(run).name == "metrics.jsonl" else Path(run)
            for run in args.runs
        ]
        for label, given in (
            ("RUN", [folder.resolve() for folder in folders]),
            ("--labels", args.labels or []),
        ):
            if twice := [str(name) for number, name in enumerate(given) if name in given[:number]]:
                raise ValueError(f"{label} {twice[0]} is given twice")
        labels = args.labels or shortest_names(folders)
        if len(labels) != len(folders):
            raise ValueError(f"{len(labels)} --labels for {len(folders)} runs: give one to each")
        check_output(args.output)
        try:
            draw_runs(dict(zip(labels, map(read_log, folders))), args.output)
        except OSError as error:
            why = error.strerror
            raise ValueError(f"--output {args.output} cannot be written ({why})") from None
    print(f"wrote {args.output}")


def shortest_names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as are needed to distinguish them: [a/report, b/report]
    rather than [report, report].
    """
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def check_output(path: Path) -> None:
    """ValueError for a name that is not a PNG's, or a file that this program did not write."""
    if path.suffix != ".png":
        raise ValueError(
            f"--output {path}: the picture is a PNG, so give it a name that ends in .png"
        )
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: no folder {path.parent}")
    if path.exists():
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                ours = picture.info.get("Software") == "minigrpo.curves"
        except (OSError, UnidentifiedImageError):
            ours = False
        if not ours:
            raise ValueError(f"--output {path} is a file without curves: give another name")


if __name__ == "__main__":
    main()
