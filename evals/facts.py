"""What the model card and the report both tell of a run, from its log and its checkpoint."""

import hashlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "records"))
from check import TRACKS, cell, check
from logs import LogError, Run, read_log

import train_gpt
from train_gpt import FREE_TO_DIFFER, Hyperparameters

GPT2 = TRACKS["time-to-gpt2"].core  # the CORE score of GPT-2 with 1.6B parameters
# What may mean something to Markdown or HTML; of underscores those that are not inside of a word.
MARKUP = re.compile(r"[!\"#$&*<>?@\[\\\]^`{|}~\x00-\x1f\x7f]|(?<![^\W_])_|_(?![^\W_])")


def find_log(folder: Path) -> tuple[list[Run], str]:
    """The runs in the log of a checkpoint's run, or none and why."""
    folder = folder.resolve()
    path = folder.parent.with_name(f"{folder.parent.name}.txt")
    if not folder.name.startswith("step_") or not path.is_file():
        return [], "there is no log of the run beside its checkpoints"
    try:
        return read_log(path), ""
    except LogError as error:
        return [], str(error).replace(str(path), path.name)


def find_source(state: dict, runs: list[Run]) -> str | None:
    """The source that the checkpoint names by its hash: the one here, or that in the log."""
    sources = [train_gpt.read_source(Hyperparameters(**train_gpt.saved_hyperparameters(state)))]
    sources += [run.source.removesuffix("\n") for run in runs[:1] if run.source]
    return next((source for source in sources
                 if hashlib.sha256(source.encode()).hexdigest() == state["source"]), None)


def find_verdict(step: int, runs: list[Run], problem: str, source: str | None) -> str:
    """What records/check.py says of the run that ended at `step`, or why it was not asked."""
    if problem:
        return f"not checked: {problem}"
    if (last := runs[-1].steps[-1]) != step:
        return f"not checked: the log ends at step {last}, the checkpoint is of {step}"
    try:
        return check(runs, script=source).verdict
    except LogError as error:
        return f"not checked: {error}"


def public_settings(settings: dict) -> dict:
    """Hyper-parameters without where things are on this machine, which is nobody's business."""
    public = {name: value for name, value in settings.items()
              if name not in FREE_TO_DIFFER or name in ("run_id", "data_path")}
    known = {track["data_path"] for track in train_gpt.TRACKS.values()}
    if public.get("data_path") and public["data_path"] not in known:
        public["data_path"] = re.split(r"[/\\]", public["data_path"].rstrip("/\\"))[-1]
    return public


def thin_out(items: list, most: int) -> list:
    """At most so many of the items, evenly, the first and the last among them."""
    count = min(len(items), most)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def escape(text: str) -> str:
    """Text of others in one line, in which nothing means anything to Markdown or HTML."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def table(*rows: tuple) -> str:
    """A table of Markdown; the first row is its head."""
    lines = ["| " + " | ".join(cell(str(value)) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
