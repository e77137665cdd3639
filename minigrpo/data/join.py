"""Join several JSONL files, some of them more than once.

    python -m minigrpo.data.join data/mimic/train.jsonl data/vindr/train.jsonl=3 \\
        --output_file data/sft/train.jsonl

`FILE=3` takes each of its lines three times, for a small data set that should be seen more often in
an epoch. Image paths are rewritten relative to the output; a line's second copy is named ID-2, and
an id that two files share is an error.
"""

from pathlib import Path

from minigrpo.run.files import write_jsonl
from minigrpo.run.terminal import Parser, fail, path_of

from .clean import lines_of


def parse_file(text: str) -> tuple[Path, int]:
    """ "data/train.jsonl=3" -> (its path, 3)."""
    name, equals, times = text.rpartition("=")
    if not equals or Path(path_of(text)).is_file():  # of a folder called split=train
        return Path(path_of(text)), 1
    if not times.isascii() or not times.isdigit() or int(times) < 1:
        raise ValueError(
            f"{text!r} is not a file; after a = comes how often each line is used, 1 or more"
        )
    return Path(path_of(name)), int(times)


def join(files: list[tuple[Path, int]], target: Path) -> list[dict]:
    """All records, repeated, in the order of the files."""
    joined, owner = [], {}
    for path, times in files:
        records = lines_of(path, target)
        for number in range(1, times + 1):
            for record in records:
                name = record["id"] if number == 1 else f"{record['id']}-{number}"
                if owner.setdefault(name, path) != path:
                    raise ValueError(
                        f"id {name!r} is in {owner[name]} and in {path}: rename it in one of them"
                    )
                joined.append(record | {"id": name})
    return joined


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="JSONL files, FILE or FILE=TIMES")
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL file to write")
    args = parser.parse_args()
    try:
        if args.output_file.exists():
            raise ValueError(
                f"{args.output_file} exists already: remove it, or give another --output_file"
            )
        records = join([parse_file(text) for text in args.files], args.output_file)
        write_jsonl(args.output_file, records)
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{args.output_file}: {len(records):,} lines of {len(args.files)} files")


if __name__ == "__main__":
    main()
