"""HellaSwag: of four ends of a story, does the model find the true one the likeliest?

    python evals/hellaswag.py RUN
    python evals/hellaswag.py RUN --shots 1 --json hellaswag.json
    python evals/hellaswag.py RUN --max_examples 500          # all would take long on a CPU
    torchrun --standalone --nproc_per_node=8 evals/hellaswag.py RUN
    python evals/hellaswag.py RUN --data evals/sample/hellaswag.jsonl      # a few made-up stories

A story is its "ctx" and, after a space, each of its "endings"; the two are cut into tokens apart.
"accuracy" takes the end with the smallest loss per token, as is usual; "accuracy_sum" the one with
the smallest sum of losses. With --shots N, so many solved stories come before each, others for
each but always the same. The 10,042 of the validation set (Zellers et al. 2019) are the authors'
own file; Hugging Face's copy, Rowan/hellaswag, is parquet, which would take pyarrow to read.
"""

import argparse
from pathlib import Path

import numpy as np
from scoring import (
    DOWNLOADS,
    Sequence,
    download,
    encode,
    few_shot,
    main,
    read_jsonl,
    standard_error,
)

from train_gpt import RunError, on_first_rank  # scoring.py has told where it is

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ADVICE = "check the connection, or give the file with --data FILE.jsonl"


def read_stories(path: Path | None) -> list[dict]:
    """The stories in a file of the original format, or in the authors' own. RunError if it is bad.

    The "label" of each becomes an int.
    """
    if path is None:
        path = download(URL, DOWNLOADS / "hellaswag_val.jsonl", ADVICE)
    stories = read_jsonl(path, "ctx", "endings", "label")
    for number, story in enumerate(stories, 1):
        label, choices = str(story["label"]), range(len(story["endings"]))
        if label not in map(str, choices):
            raise RunError(f"{path}: story {number} has the label {label!r}, expected one of 0 to "
                           f"{len(choices) - 1}; the test set has no labels")
        story["label"] = int(label)
    return stories


def sequences(stories: list[dict], index: int, shots: int, encoding) -> list[Sequence]:
    """A story with each of its ends, of which the end is scored, after so many solved ones."""
    solved = [stories[i] for i in few_shot(index, shots, len(stories), "the file")]
    before = "".join(f"{s['ctx']} {s['endings'][s['label']]}\n\n" for s in solved)
    context = encode(encoding, before + stories[index]["ctx"])
    endings = [encode(encoding, f" {ending}") for ending in stories[index]["endings"]]
    return [Sequence(np.append(context, ending), len(ending)) for ending in endings]


def evaluate(args: argparse.Namespace, encoding, judged, ranks) -> tuple[list[str], dict]:
    """See scoring.main."""
    stories = on_first_rank(lambda: read_stories(args.data), ranks)
    count = min(args.max_examples or len(stories), len(stories))

    def judge(i: int, scores: list) -> tuple[bool, bool]:
        means, sums = [s.losses.mean() for s in scores], [s.losses.sum() for s in scores]
        return tuple(losses.index(min(losses)) == stories[i]["label"] for losses in (means, sums))

    verdicts = judged(count, lambda i: sequences(stories, i, args.shots, encoding), judge,
                      "hellaswag")
    by_mean, by_sum = (sum(column) / count for column in zip(*verdicts, strict=True))
    errors = [standard_error(accuracy, count) for accuracy in (by_mean, by_sum)]
    lines = [
        f"HellaSwag, {count:,} examples, {args.shots} shots, chance 0.25",
        f"accuracy     {by_mean:.4f} ± {errors[0]:.4f}   by the loss per token",
        f"accuracy_sum {by_sum:.4f} ± {errors[1]:.4f}   by the sum of losses",
    ]
    return lines, dict(
        task="hellaswag", examples=count, shots=args.shots, accuracy=by_mean,
        accuracy_error=errors[0], accuracy_sum=by_sum, accuracy_sum_error=errors[1])


def command_line(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="JSON lines in the original format (default: "
        "download the validation set)")
    add("--shots", type=int, default=0, help="solved stories before each (default: %(default)s)")
    main(parser, argv, evaluate)


if __name__ == "__main__":
    command_line()
