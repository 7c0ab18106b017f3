"""CORE: the mean over 22 tasks of how far above chance the model is (Li et al. 2024, DCLM).

    python evals/core.py RUN
    python evals/core.py RUN --max_examples 100 --tasks copa,lambada_openai
    torchrun --standalone --nproc_per_node=8 evals/core.py RUN --json core.json
    python evals/core.py RUN --bundle evals/sample/core_bundle             # three made-up tasks

The score by which nanochat's "time to GPT-2" is claimed: with its evaluation, GPT-2 of 1.6B
parameters has 0.256525, and that of 124M about 0.11. The tasks are the bundle's: core.yaml names
them, eval_meta_data.csv their random baselines, and eval_data/ has their examples; the bundle is
downloaded, or given with --bundle. Accuracies are centred, (accuracy - baseline) / (1 - baseline),
and averaged. Prompts and the drawing of solved examples follow nanochat's, but for three things:
where a prompt is longer than the model's rows (see "cut"), what is left still begins with a
document's start; with --max_examples solved examples still come from the whole task; and of a
choice that is the beginning of another, one token is scored.
"""

import argparse
import csv
import json
import math
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from facts import GPT2
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

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ADVICE = "check the connection, or give the unpacked folder with --bundle FOLDER"
NUM_TASKS = 22
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),  # one beginning, several ends
    "schema": ("context_options", "continuation", "gold"),  # several beginnings, one end
    "language_modeling": ("context", "continuation"),  # an end to be found word by word
}


class Task(NamedTuple):
    label: str
    kind: str
    file: str  # below eval_data/
    shots: int  # solved examples before each
    delimiter: str  # between beginning and end
    baseline: float  # accuracy of chance


# -----------------------------------------------------------------------------
# The bundle


def find_bundle() -> Path:
    """The folder of the bundle, downloaded and unpacked if it is not there yet."""
    folder = DOWNLOADS / "eval_bundle"
    if not folder.exists():
        archive = download(URL, DOWNLOADS / "eval_bundle.zip", ADVICE)
        unpacked = DOWNLOADS / "eval_bundle.tmp"
        try:
            zipfile.ZipFile(archive).extractall(unpacked)
            (unpacked / "eval_bundle").rename(folder)
            shutil.rmtree(unpacked)
        except (OSError, zipfile.BadZipFile) as error:
            raise RunError(f"cannot unpack {archive} ({error}); remove it and try again, or give "
                           f"the unpacked folder with --bundle FOLDER") from None
        archive.unlink()
    return folder


def read_list(text: str) -> list[dict]:
    """The entries of `icl_tasks:`, a list of flat `key: value` lines, all of YAML that we need.

    Values are numbers in brackets, strings in double quotes, or plain. ValueError for others.
    """
    entries, is_inside = [], False
    for line in text.splitlines():
        content = line.strip()
        if re.match(r"\w", line):  # a key of the file itself
            is_inside = content.startswith("icl_tasks:")
        elif is_inside and content.startswith("-"):
            entries.append({})
            content = content[1:].lstrip()
        if not is_inside or re.match(r"\w", line) or not content or content.startswith("#"):
            continue
        key, colon, value = content.partition(":")
        value = value.strip()
        if not colon or not entries or value[:1] in ("", "'", "{", "|", ">", "&", "*"):
            raise ValueError(f"cannot read the line {line!r}")
        is_json = value[0] in '["'  # a comment may follow
        entries[-1][key] = (json.JSONDecoder().raw_decode(value)[0] if is_json
                            else value.split(" #")[0].strip())
    return entries


def read_tasks(bundle: Path) -> list[Task]:
    """The tasks of a bundle. RunError if it is not as expected."""
    try:
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100
                         for row in csv.DictReader(file) if row["Random baseline"]}
        tasks = [
            Task(entry["label"], entry["icl_task_type"], entry["dataset_uri"],
                 int(entry["num_fewshot"][0]), entry.get("continuation_delimiter", " "),
                 baselines[entry["label"]])
            for entry in read_list((bundle / "core.yaml").read_text(encoding="utf-8"))
        ]
        if unknown := {task.kind for task in tasks} - FIELDS.keys():
            raise ValueError(f"tasks of kind {', '.join(unknown)}, expected {', '.join(FIELDS)}")
        if not tasks:
            raise ValueError("core.yaml lists no tasks under icl_tasks")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{bundle} is no bundle of tasks ({type(error).__name__}: {error}); it "
                       f"should have core.yaml, eval_meta_data.csv and eval_data/") from None
    return tasks


def choose(tasks: list[Task], labels: str) -> list[Task]:
    """Those of the comma-separated labels, or all. RunError if one is unknown."""
    wanted, known = labels.split(",") if labels else [], [task.label for task in tasks]
    if unknown := set(wanted) - set(known):
        raise RunError(f"--tasks: the bundle has no {', '.join(sorted(unknown))}; it has "
                       f"{', '.join(known)}")
    return [task for task in tasks if not wanted or task.label in wanted]


def read_examples(bundle: Path, task: Task) -> list[dict]:
    """The examples of a task in the order in which solved ones are drawn."""
    examples = read_jsonl(bundle / "eval_data" / task.file, *FIELDS[task.kind])
    for example in examples if task.kind != "language_modeling" else ():
        count = len(example[FIELDS[task.kind][0 if task.kind == "schema" else 1]])
        if example["gold"] not in range(count):
            raise RunError(f"{bundle / 'eval_data' / task.file}: gold is {example['gold']!r}, "
                           f"expected one of 0 to {count - 1}")
    random.Random(1337).shuffle(examples)
    return examples


# -----------------------------------------------------------------------------
# The examples


def texts(task: Task, example: dict) -> tuple[list[str], int]:
    """The texts that are compared, without solved examples, and which of them is right."""
    if task.kind == "multiple_choice":
        start = f"{example['query']}{task.delimiter}"
        return [f"{start}{choice}" for choice in example["choices"]], example["gold"]
    if task.kind == "schema":
        end = f"{task.delimiter}{example['continuation']}"
        return [f"{option}{end}" for option in example["context_options"]], example["gold"]
    start = f"{example['context'].strip()}{task.delimiter}"
    # Without the space that the first token of the end takes along.
    return [start.rstrip(), f"{start}{example['continuation']}"], 1


def common_length(arrays: list[np.ndarray]) -> int:
    """How many first tokens are the same in all arrays."""
    shortest = min(map(len, arrays))
    differ = np.any([array[:shortest] != arrays[0][:shortest] for array in arrays], axis=0)
    return int(differ.argmax()) if differ.any() else shortest


def sequences(task: Task, examples: list[dict], index: int, encoding) -> list[Sequence]:
    """What is scored: the end after the common beginning, or the common end, one token at least."""
    before = ""
    for i in few_shot(index, task.shots, len(examples), task.label):
        solved, right = texts(task, examples[i])
        before += f"{solved[right]}\n\n"
    tokens = [encode(encoding, before + text) for text in texts(task, examples[index])[0]]
    if task.kind == "schema":
        count = max(1, common_length([array[::-1] for array in tokens]))
        return [Sequence(array, count) for array in tokens]
    if task.kind == "language_modeling":
        start = min(common_length(tokens), len(tokens[1]) - 1)
        return [Sequence(tokens[1], len(tokens[1]) - start)]
    start = min(common_length(tokens), min(map(len, tokens)) - 1)
    return [Sequence(array, len(array) - start) for array in tokens]


def is_right(task: Task, example: dict, scores: list) -> bool:
    """Whether the right text has the smallest loss per token, or every token was the likeliest."""
    if task.kind == "language_modeling":
        return bool(scores[0].likeliest.all())
    means = [score.losses.mean() for score in scores]
    return means.index(min(means)) == example["gold"]


def measure(task: Task, examples: list[dict], count: int, encoding, judged) -> dict:
    """The accuracy of a task, over the first `count` examples."""
    def judge(i: int, scores: list) -> tuple[bool, bool]:
        return is_right(task, examples[i], scores), any(score.is_cut for score in scores)

    verdicts = judged(count, lambda i: sequences(task, examples, i, encoding), judge, task.label)
    right, cut = map(sum, zip(*verdicts, strict=True))
    accuracy, error, above = right / count, standard_error(right / count, count), 1 - task.baseline
    return dict(
        examples=count, shots=task.shots, cut=cut, accuracy=accuracy, accuracy_error=error,
        baseline=task.baseline, centered=(accuracy - task.baseline) / above,
        centered_error=error / above)


def evaluate(args: argparse.Namespace, encoding, judged, ranks) -> tuple[list[str], dict]:
    """See scoring.main."""
    bundle = args.bundle or on_first_rank(find_bundle, ranks)
    tasks = on_first_rank(lambda: read_tasks(bundle), ranks)
    chosen, results = choose(tasks, args.tasks), {}
    lines = [f"{'task':<33} examples  shots     cut  accuracy          centred"]
    for task in chosen:
        examples = on_first_rank(lambda task=task: read_examples(bundle, task), ranks)
        count = min(args.max_examples or len(examples), len(examples))
        results[task.label] = found = measure(task, examples, count, encoding, judged)
        lines.append(f"{task.label:<33} {count:8,} {task.shots:6} {found['cut']:7,}  "
                     f"{found['accuracy']:.4f} ± {found['accuracy_error']:.4f}  "
                     f"{found['centered']:7.4f}")
    mean = sum(found["centered"] for found in results.values()) / len(results)
    error = math.hypot(*(found["centered_error"] for found in results.values())) / len(results)
    is_core = len(chosen) == len(tasks) == NUM_TASKS and not args.max_examples
    lines.append(f"CORE {mean:.4f} ± {error:.4f}; GPT-2 has {GPT2}" if is_core else
                 f"mean {mean:.4f} ± {error:.4f}; not CORE, which is {NUM_TASKS} whole tasks")
    return lines, dict(task="core", is_core=is_core, mean=mean, mean_error=error, tasks=results)


def command_line(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, metavar="FOLDER", help="the unpacked bundle (default: download it)")
    add("--tasks", default="", metavar="A,B", help="only these tasks (default: all)")
    main(parser, argv, evaluate)


if __name__ == "__main__":
    command_line()
