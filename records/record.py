"""Make the folder of a record from its logs, and read it back.

    python records/record.py logs/a.txt logs/b.txt logs/c.txt --name NarrowHead \\
        --description "Head of half the width" --by "First Last"

writes records/<track>/<date>_NarrowHead/ with the logs, the train_gpt.py that they start with, on
time-to-gpt2 the CORE scores that lie beside them, record.json, and a README.md in which the idea is
left for you to tell. `--negative` puts it under records/negative/, the home of ideas that did not
work.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

from check import CLAIM, PASS, TRACKS, Report, check, core_file, describe_runs
from logs import LogError, Run, read_logs, source_files

RECORDS = Path(__file__).resolve().parent
SCHEMA = json.loads((RECORDS / "record.schema.json").read_text(encoding="utf-8"))
UNTOLD = "(to be told: "  # stands in a README.md until its author has told it
JSON_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
              "null": type(None)}


class RecordError(ValueError):
    """A record folder that is not as it should be; the message is for a person."""


def violations(value, schema: dict, place: str = "record.json") -> list[str]:
    """Where a JSON value departs from a schema, as sentences.

    Knows the part of JSON Schema that record.schema.json uses.
    """
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and (isinstance(value, bool) or
                  not any(isinstance(value, JSON_TYPES[name]) for name in types)):
        return [f"{place} is {json.dumps(value)[:60]}, expected {' or '.join(types)}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place} is {value!r}, expected one of {', '.join(schema['enum'])}")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{place} is {value!r}, expected the form {schema['pattern']}")
    if isinstance(value, (int, float)):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            found.append(f"{place} is {value}, expected at least {schema.get('minimum', '-inf')} "
                         f"and at most {schema.get('maximum', 'inf')}")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append(f"{place} is empty")
        for index, item in enumerate(value):
            found += violations(item, schema.get("items", {}), f"{place}[{index}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{place} lacks {name!r}" for name in schema.get("required", [])
                  if name not in value]
        found += [f"{place} has {name!r}, which the schema does not know"
                  for name in value if name not in properties]
        for name in value.keys() & properties.keys():
            found += violations(value[name], properties[name], f"{place}: {name}")
    return sorted(found)


def from_logs(report: Report) -> dict:
    """The part of record.json that the logs determine, and the CORE scores beside them.

    RecordError if they do not say enough.
    """
    run, summary = report.runs[0], report.as_json()
    versions = {"python": run.fact(r"\bPython (\d[\w.+]*)"), "torch": run.torch,
                "cuda": run.cuda}
    if run.source is None or None in versions.values() or not run.shards or not run.hardware:
        raise RecordError(f"{run.name} does not start with its source, versions, hardware and "
                          f"data, as logs of train_gpt.py do")
    return {
        "train_times": [item["train_time"] for item in summary["runs"]],
        "mean_train_time": summary["mean_train_time"],
        "val_losses": [item["val_loss"] for item in summary["runs"]],
        "mean_val_loss": summary["mean_val_loss"],
        "std_val_loss": summary["std_val_loss"],
        "n": summary["n"],
        "p": summary["p"],
        "mean_core": summary["mean_core"],
        "train_steps": run.train_steps,
        "train_tokens": run.train_tokens,
        "val_tokens": run.number("val_tokens"),
        "hardware": {"name": run.hardware, "count": run.world_size},
        "versions": versions,
        "data": {"name": report.track.data,
                 "train_shards": sum(shard.kind == "train" for shard in run.shards),
                 "val_sha256": [shard.sha256 for shard in run.shards if shard.kind == "val"]},
        "logs": [item.path.name for item in report.runs],
    }


def differs(stated, derived) -> bool:
    """Whether two JSON values differ by more than the rounding of their last digits."""
    if isinstance(stated, float) and isinstance(derived, (int, float)):
        return abs(stated - derived) > 1e-9 * max(1, abs(derived))
    if isinstance(stated, list) and isinstance(derived, list):
        return len(stated) != len(derived) or any(map(differs, stated, derived))
    return stated != derived


def load(folder: Path) -> tuple[dict, Report]:
    """record.json of a folder and what check.py finds in its logs.

    RecordError, naming the folder, unless the folder is whole, record.json follows the schema and
    says what the logs say, and check.py passes the logs: as a record, or, where the track has no
    claim or the folder is a negative result, as a sound measurement.
    """
    place = folder.relative_to(folder.parents[1])
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        readme = (folder / "README.md").read_text(encoding="utf-8")
        runs = read_logs([folder])
    except (OSError, json.JSONDecodeError, LogError) as error:
        raise RecordError(f"{place}: {error}") from None
    problems = violations(record, SCHEMA)
    if not problems:
        negative = folder.parent.name == "negative"
        if f"{record['date']}_{record['name']}" != folder.name:
            problems.append(f"the folder should be called {record['date']}_{record['name']}")
        if not negative and record["track"] != folder.parent.name:
            problems.append(f"record.json says track {record['track']}, so it belongs into "
                            f"{record['track']}/")
        if UNTOLD in readme:
            problems.append(f"README.md still says '{UNTOLD}...'; tell it")
        problems += [f"{name}, as it ran, is missing" for name in source_files(runs[0].source or "")
                     if not (folder / name).is_file()]
        report = check(runs, record["track"])
        if failed := failures(report, negative):
            problems += [f"check.py does not pass it: {report.verdict}", *failed]
        else:
            problems += [f"record.json says {name} is {record.get(name)}, but the logs say {value}"
                         for name, value in from_logs(report).items()
                         if differs(record.get(name), value)]
        if record["runs_attempted"] < record["n"]:
            problems.append(f"runs_attempted is {record['runs_attempted']}, fewer than the "
                            f"{record['n']} logs")
    if problems:
        raise RecordError(f"{place}: " + "\n    ".join(problems))
    return record, report


def failures(report: Report, negative: bool) -> list[str]:
    """The rules that keep the runs from a folder; an idea that failed may fail those of the claim.
    """
    wants_record = report.track.claim and not negative
    return [f"{rule}: {finding.reason}" for rule, finding in report.findings.items()
            if finding.status != PASS and (wants_record or rule not in CLAIM)]


def find_commit(run: Run) -> str | None:
    """The newest commit of this repository whose files are the run's source."""
    def git(*command: str, **options) -> str:
        return subprocess.run(["git", *command], cwd=RECORDS.parent, check=True, text=True,
                              capture_output=True, **options).stdout

    try:
        files = source_files(run.source or "")
        for commit in git("rev-list", "HEAD", "--", *files).split():
            if all(git("show", f"{commit}:{name}").strip() == text.strip()
                   for name, text in files.items()):
                return commit
    except (OSError, subprocess.CalledProcessError):
        pass
    return None


def find_date(run: Run) -> str:
    """The day of the run, by its log. RecordError if it does not say."""
    date = run.fact(r"^date: (\d{4}-\d{2}-\d{2})")
    if date is None:
        raise RecordError(f"{run.name} has no date; name it: --date YYYY-MM-DD")
    return date


def write_readme(folder: Path, record: dict, report: Report, negative: bool) -> None:
    title = record["description"].rstrip(".")
    gain = "why it did not work" if negative else "measured gain over a control, same machine"
    (folder / "README.md").write_text(
        f"# {title}\n\n"
        f"**Idea.** {UNTOLD}what should make it faster, and why)\n\n"
        f"**What changed.** {UNTOLD}against which earlier folder or commit)\n\n"
        f"**Measured.** {UNTOLD}{gain})\n\n"
        f"**Who.** {', '.join(record['contributors'])}\n\n"
        f"**Data.** {record['data']['name']}. Runs started: {record['runs_attempted']}; logs "
        f"here: {record['n']}.\n\n```\n{describe_runs(report.runs, most=100)}\n```\n",
        encoding="utf-8")


def make_folder(
    report: Report, name: str, description: str, contributors: list[str], date: str | None = None,
    runs_attempted: int | None = None, negative: bool = False, root: Path = RECORDS,
) -> Path:
    """Write the folder of these runs, and return it. RecordError if it cannot be filled in, or if
    the logs do not prove what they say."""
    first, derived = report.runs[0], from_logs(report)
    record = {
        "name": name, "track": report.track_name, "date": date or find_date(first),
        "description": description, "contributors": contributors,
        "runs_attempted": runs_attempted or len(report.runs), "commit": find_commit(first),
        **derived,
    }
    if problems := violations(record, SCHEMA):
        raise RecordError("\n".join(problems))
    paths = {run.path.name: run.path for run in report.runs}
    if len(paths) < len({run.path for run in report.runs}):
        raise RecordError("two of the logs have the same file name; rename one")
    folder = root / ("negative" if negative else report.track_name) / f"{record['date']}_{name}"
    if packed := [path for path in paths.values() if path.parent.is_file()]:
        raise RecordError(f"{packed[0].parent} is an archive: unpack it, and name its logs")
    if folder.exists():
        raise RecordError(f"{folder} exists already; choose another --name")
    if failed := failures(report, negative):
        has_failed = report.is_sound and not report.lacks_core
        advice = "; as an idea that failed it goes on with --negative" if has_failed else ""
        raise RecordError("\n    ".join([f"check.py does not pass the logs{advice}:", *failed]))
    folder.mkdir(parents=True)
    scores = [core_file(run) for run, core in zip(report.runs, report.cores, strict=True)
              if not math.isnan(core)]  # an idea that failed may lack one
    for file in (*paths.values(), *scores):
        shutil.copy(file, folder)
    for file, text in source_files(first.source).items():
        (folder / file).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    (folder / "record.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n",
                                        encoding="utf-8")
    write_readme(folder, record, report, negative)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("logs", nargs="+", metavar="LOG", help="logs, or folders of logs")
    parser.add_argument("--name", required=True, help="letters and digits, as in WiderHead")
    parser.add_argument("--description", required=True, help="the idea, in a line for the table")
    parser.add_argument("--by", action="append", required=True, metavar="NAME",
                        help="a contributor; once for each")
    parser.add_argument("--track", choices=TRACKS, help="whose rules; default: the logs' own")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="of the runs; default: the logs' own")
    parser.add_argument("--attempted", type=int, metavar="N",
                        help="runs of this source that were started; default: the logs given")
    parser.add_argument("--negative", action="store_true", help="an idea that did not work")
    args = parser.parse_args()
    try:
        runs = read_logs(args.logs)
        # The folder's train_gpt.py will be the source that the logs start with.
        report = check(runs, args.track, runs[0].source)
        folder = make_folder(report, args.name, args.description, args.by, args.date,
                             args.attempted, args.negative)
    except (LogError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {report.verdict}")
    print(f"now tell the idea in {folder / 'README.md'}, and run: python records/table.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
