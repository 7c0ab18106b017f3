"""Write the report of a run: what was trained, on what, to which loss and scores, and how.

    python evals/report.py RUN
    python evals/report.py RUN --json core.json bpb.json --samples 0 --out report.md

RUN is a run_id, `latest`, a log, or the folder of a checkpoint or of an exported model. Scores are
read from the files that bpb.py, core.py and hellaswag.py write with --json: from those beside the
log, logs/RUN.bpb.json and so on, or from those that are named. One that is of another run or step
is not taken; what is not there is "not measured", with the command that measures it. The report is
Markdown, for a submission: logs/RUN.report.md, or what --out says. Only the samples are made anew.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from core import NUM_TASKS
from facts import (
    GPT2,
    escape,
    find_log,
    find_source,
    find_verdict,
    public_settings,
    table,
    thin_out,
)
from logs import Run, read_log
from sample import encode_prompt, load_encoding, open_device, stream_text

import train_gpt  # facts.py has told where it is, and where logs.py is
from train_gpt import FREE_TO_DIFFER, Checkpoint, RunError

TASKS = ("bpb", "core", "hellaswag")  # scripts beside this one, and "task" in what they write
MISSING = "not measured"
CURVE_ROWS = 20
FACTS = {  # in the log of a run
    "date": r"^date: (.*)$",
    "hardware": r"^(?:GPU: |(?=CPU: ))(.*)$",
    "versions": r"^(Python \d.*)$",
    "platform": r"^Python \d.*\n(.*)$",
    "driver": r"Driver Version: (\S+)",
    "environment": r"^environment: (.*)$",
    "git commit": r"^git commit: (.*)$",
    "attention": r"^attention: (.*)$",
    "peak memory": r"^peak memory: (.*)$",
    "graphs compiled on the clock": r"^graphs compiled while the clock ran: (.*)$",
}
PROMPTS = ("", "The capital of Italy is", "Once upon a time", "Water boils when")
SAMPLE_TOKENS, TEMPERATURE = 64, 0.8
REPORT = """\
# {title}

{summary}

## System

{system}

## Settings

{settings}

## Losses

{losses}

## Evaluations

{evaluations}

## Samples

{samples}

## Data

{data}

## Do it again

{again}
"""


class Subject(NamedTuple):
    """What a report is on: a run with checkpoints or a log or both, at one step."""

    place: Path  # logs/<run_id>, or an exported model; other files of the run are beside it
    checkpoint: Checkpoint | None
    runs: list[Run]  # the log; a run that was resumed with other --train_steps has several parts
    problem: str  # why there is no log

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def state(self) -> dict:
        return self.checkpoint.state if self.checkpoint else {}

    @property
    def is_exported(self) -> bool:
        return bool(self.checkpoint) and self.checkpoint.folder.resolve() == self.place

    @property
    def step(self) -> int:
        return self.state["step"] if self.checkpoint else int(self.runs[-1].steps[-1])

    @property
    def settings(self) -> dict:
        """Hyper-parameters by name; as text if they come from the log."""
        found = self.state["hyperparameters"] if self.checkpoint else self.runs[0].hyperparameters
        return public_settings(found)

    @property
    def resumed(self) -> list[tuple[str, str]]:
        """(step, ranks) of each time that the run was resumed."""
        pattern = r"^resumed: step (\d+) .*, on (\d+) ranks$"
        notes = self.runs[0].notes if self.runs else ""
        return re.findall(pattern, notes, re.MULTILINE)

    def file(self, kind: str) -> Path:
        return self.place.with_name(f"{self.place.name}.{kind}")

    def fact(self, pattern: str) -> str | None:
        return self.runs[0].fact(pattern) if self.runs else None

    @property
    def commit(self) -> str:
        """Of the source that ran at the end."""
        return next((machine["git commit"] for machine in machines(self)[-1:]), "")


def find_run(run: str, log_dir: str) -> Subject:
    """The run with what there is of it. ValueError for people if that is nothing."""
    stem = run.removesuffix(".txt") if Path(run).is_file() else run
    if train_gpt.checkpoint_folders(stem, log_dir):
        checkpoint = train_gpt.open_checkpoint(stem, log_dir, model_only=True)
        for note in checkpoint.notes:
            print(note, file=sys.stderr)
        folder = checkpoint.folder.resolve()
        place = folder.parent if folder.name.startswith("step_") else folder
        return Subject(place, checkpoint, *find_log(folder))
    for path in (Path(f"{stem}.txt"), Path(log_dir, f"{stem}.txt")):
        if path.is_file():
            subject = Subject(path.resolve().with_suffix(""), None, read_log(path), "")
            if len(subject.runs) > 1 and not subject.resumed:
                raise RunError(f"{path} holds {len(subject.runs)} runs; a report is on one")
            return subject
    raise RunError(f"{train_gpt.no_checkpoint(run, log_dir)}; and there is no log of it")


# -----------------------------------------------------------------------------
# Evaluations


def read_result(path: Path, subject: Subject) -> dict:
    """What an evaluation has written. RunError if it did not, or if it is of another run or step.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        task, run, step = (result[name] for name in ("task", "run", "step"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        task = None
    if task not in TASKS:
        raise RunError(f"{path} is not what {', '.join(TASKS)} write with --json")
    if (run, step) != (subject.name, subject.step):
        raise RunError(f"{path} is of run {run}, step {step}, but the report of run "
                       f"{subject.name}, step {subject.step}")
    return result


def find_results(subject: Subject, given: list[Path]) -> dict[str, dict]:
    """Results by task: those of the files given, then what lies beside the log and fits."""
    results = {}
    for path in given:
        result = read_result(path, subject)
        if result["task"] in results:
            raise RunError(f"--json names two results of {result['task']}; give one")
        results[result["task"]] = result
    for task in TASKS:
        if task not in results and (path := subject.file(f"{task}.json")).exists():
            try:
                results[task] = read_result(path, subject)
            except RunError as error:
                print(f"left out: {error}", file=sys.stderr)
    return results


def command(subject: Subject, task: str) -> str:
    """What measures it, from the repository, if the runs are in logs/."""
    if subject.is_exported:
        run, folder = subject.name, ""
    else:
        run, folder = f"logs/{subject.name}/{subject.checkpoint.folder.resolve().name}", "logs/"
    return shlex.join(["python", f"evals/{task}.py", run, "--json",
                       f"{folder}{subject.name}.{task}.json"])


def core_score(core: dict) -> str:
    if not core["is_core"] or len(core["tasks"]) != NUM_TASKS:
        return f"{MISSING} in full: only {NUM_TASKS} whole tasks make a score"
    difference = core["mean"] - GPT2
    return (f"{core['mean']:.6f} ± {core['mean_error']:.4f}, {abs(difference):.6f} "
            f"{'above' if difference > 0 else 'below'} GPT-2's {GPT2}")


def core_table(core: dict) -> str:
    return table(
        ("task", "examples", "shots", "cut", "accuracy", "centred"),
        *((escape(name), f"{task['examples']:,}", task["shots"], f"{task['cut']:,}",
           f"{task['accuracy']:.4f} ± {task['accuracy_error']:.4f}", f"{task['centered']:.4f}")
          for name, task in core["tasks"].items()),
        ("mean", "", "", "", "", f"{core['mean']:.4f} ± {core['mean_error']:.4f}"))


def describe_results(subject: Subject, results: dict[str, dict]) -> tuple[dict[str, str], str]:
    """A line for each task of TASKS, and the section. RunError if a file lacks something."""
    lines, parts = dict.fromkeys(TASKS, MISSING), []
    for task, found in results.items():
        try:
            if task == "bpb":
                lines[task] = f"{found['bpb']:.5f} on {found['tokens']:,} tokens"
                parts.append(f"Bits per byte: {found['bpb']:.5f}, from val_loss "
                             f"{found['val_loss']:.5f} on {found['tokens']:,} tokens of "
                             f"{found['bytes']:,} bytes, in {', '.join(found['shards'])}.")
            elif task == "core":
                lines[task] = core_score(found)
                parts.append(f"CORE: {lines[task]}.\n\n{core_table(found)}")
            else:
                lines[task] = (f"{found['accuracy']:.4f} ± {found['accuracy_error']:.4f}, "
                               f"{found['examples']:,} examples, {found['shots']} shots")
                parts.append(f"HellaSwag: {lines[task]}, by the loss per token; "
                             f"{found['accuracy_sum']:.4f} ± {found['accuracy_sum_error']:.4f} by "
                             f"the sum of losses; chance 0.25.")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"the result of {task} is not as evals/{task}.py writes it "
                           f"({type(error).__name__}: {error}); measure it again") from None
    if missing := [task for task in TASKS if task not in results]:
        title = f"{MISSING.capitalize()}: {', '.join(missing)}"
        parts.append(f"{title}. It takes a checkpoint: `--save_every -1`." if not
                     subject.checkpoint else f"{title}. To measure:\n\n"
                     + fenced("\n".join(command(subject, task) for task in missing)))
    return lines, "\n\n".join(parts)


# -----------------------------------------------------------------------------
# The other sections


def fenced(text: str) -> str:
    """Text of others as a block, in which nothing means anything to Markdown or HTML."""
    text = re.sub(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f]", "\ufffd", text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def known(value: float | None, form: str) -> str:
    return "unknown" if value is None or math.isnan(value) else form.format(value)


def find_curve(subject: Subject) -> list[tuple[int, float, float | None]]:
    """(step, val_loss, train_time or None) of the validations."""
    logged = {int(step): (float(loss), float(time)) for run in subject.runs
              for step, time, loss in zip(*run.val_curve, strict=True)}
    in_log = [(step, loss) for step, (loss, _) in logged.items()] if not subject.state else []
    return [(step, loss, logged.get(step, (None, None))[1])
            for step, loss in subject.state.get("val_losses", in_log)]


def machines(subject: Subject) -> list[dict[str, str]]:
    """FACTS from the log, "" if unknown, at the start and after each time that it was resumed."""
    notes, found = subject.runs[0].notes if subject.runs else "", []
    for part in re.split(r"^(?=date: )", notes, flags=re.MULTILINE)[1:]:
        matches = {name: re.search(pattern, part, re.MULTILINE) for name, pattern in FACTS.items()}
        found.append({name: match[1] if match else "" for name, match in matches.items()})
        words = found[-1]["environment"].split()
        found[-1]["environment"] = " ".join(word for word in words if "/" not in word)  # no paths
    return found


def describe_system(subject: Subject) -> str:
    found = machines(subject)
    if not found:
        return f"Unknown: {escape(subject.problem or 'the log does not say')}."
    head = ("fact", "at the start", *(f"from step {int(step):,} on" for step, _ in subject.resumed))
    return table(head, *((name, *(escape(machine[name]) for machine in found)) for name in FACTS
                         if any(machine[name] for machine in found)))


def total_time(subject: Subject, seconds: float) -> str:
    """The log has no time of its end, so it is what can be added up."""
    warmups = re.findall(r"^warm-up: (?:undone after ([\d.]+)s|none)",
                         subject.runs[0].notes if subject.runs else "", re.MULTILINE)
    if not warmups or math.isnan(seconds):
        return "unknown"
    extra = sum(float(text or 0) for text in warmups)
    return (f"at least {seconds + extra:,.1f} s: train_time, and {extra:,.1f} s of compilation and "
            f"warm-up; the log does not time validations")


def count_tokens(subject: Subject) -> int | None:
    """Training tokens up to the step of the report."""
    if subject.checkpoint:
        return subject.state["tokens"]
    return subject.runs[-1].tokens_at(subject.step)


def count_processes(subject: Subject) -> list[str]:
    """Ranks at the start and each time that the run was resumed; empty if unknown."""
    first = subject.fact(r"^tokens per step: .* = (\d+) ranks")
    return [first, *(ranks for _, ranks in subject.resumed)] if first else []


def describe_source(subject: Subject) -> str:
    sha256, source = subject.state.get("source"), subject.runs[0].source if subject.runs else None
    if not sha256 and source:
        sha256 = hashlib.sha256(source.removesuffix("\n").encode()).hexdigest()
    return f"SHA-256 {sha256 or 'unknown'}; commit {subject.commit or 'unknown'}"


def describe_target(subject: Subject, curve: list) -> str:
    target = subject.settings.get("target")
    if target is None or not curve:
        return str(target or "unknown")
    if not float(target):
        return "none of val_loss"
    reached = next((step for step, loss, _ in curve if loss <= float(target)), None)
    return f"{target}, " + ("not reached" if reached is None else f"reached at step {reached:,}")


def describe_summary(subject: Subject, scores: dict[str, str], curve: list) -> str:
    settings, state, runs = subject.settings, subject.state, subject.runs
    source = find_source(state, runs) if state else None
    seconds = state["train_time"] if state else runs[-1].train_time
    tokens, steps = count_tokens(subject), settings.get("train_steps", "unknown")
    hardware = [machine["hardware"] for machine in machines(subject)] or [
        runs[0].hardware if runs else ""]
    hardware = list(filter(None, dict.fromkeys(hardware)))
    is_cpu = bool(hardware) and hardware[0].startswith("CPU")
    parameters = subject.fact(r"^parameters: (.*)$")
    if not parameters and state:
        count = sum(x.numel() for x in subject.checkpoint.model.values())
        parameters = f"{count:,} numbers in the checkpoint"
    rows = [
        ("track, recipe", ", ".join(settings.get(name, "unknown") for name in ("track", "recipe"))),
        ("step", f"{subject.step:,} of {int(steps):,}" if str(steps).isdecimal() else steps),
        ("val_loss", f"{curve[-1][1]:.5f} at step {curve[-1][0]:,}" if curve else MISSING),
        ("target", describe_target(subject, curve)),
        ("records/check.py", find_verdict(subject.step, runs, subject.problem, source)),
        ("bits per byte", scores["bpb"]),
        ("CORE", scores["core"]),
        ("HellaSwag", scores["hellaswag"]),
        ("train_time", known(seconds, "{:,.3f} s")),
        ("total time", total_time(subject, seconds)),
        ("hardware", ", then ".join(hardware) or "unknown"),
        ("processes, on a CPU" if is_cpu else "GPUs",
         ", then ".join(dict.fromkeys(count_processes(subject))) or "unknown"),
        ("training tokens", known(tokens, "{:,}")),
        ("tokens per second", known(tokens / seconds if tokens and seconds else None, "{:,.0f}")),
        ("parameters", parameters or "unknown"),
        ("source", describe_source(subject)),
    ]
    if subject.resumed:
        steps = ", ".join(f"{int(step):,}" for step, _ in subject.resumed)
        differences = [line.partition(", ")[2] for line in runs[0].lines("resumed, although ")]
        rows.insert(2, ("resumed", "; ".join([f"at step {steps}", *differences])))
    return table(("fact", "value"), *((name, escape(value)) for name, value in rows))


def find_changed(settings: dict) -> dict | None:
    """Hyper-parameters other than the track's and the recipe's here; None if they are not here.

    The micro-batch follows from the GPUs, and changes no training.
    """
    track, recipe, dialled = settings.get("track"), settings.get("recipe"), {}
    if track not in train_gpt.TRACKS or recipe not in train_gpt.RECIPES:
        return None
    if depth := int(settings.get("depth", 0)):  # its rules make the defaults
        ratio = float(settings["target_param_data_ratio"])
        dialled = dict(depth=depth, target_param_data_ratio=ratio)
    defaults = dataclasses.asdict(
        train_gpt.new_hyperparameters(dict(track=track, recipe=recipe) | dialled))
    return dialled | {name: value for name, value in settings.items()
                      if name not in ("run_id", "device_batch_size")
                      and str(value) != str(defaults.get(name))}


def describe_settings(settings: dict) -> str:
    if not settings:
        return "Unknown: the log does not list them."
    changed, rows = find_changed(settings), [("name", "value")]
    if changed is None:
        intro = "Track or recipe are not in the train_gpt.py here, so there are no defaults."
    elif changed:
        intro = ("Other than the recipe's defaults, as train_gpt.py has them now:\n\n"
                 + table(*rows, *((escape(k), escape(str(v))) for k, v in changed.items())))
    else:
        intro = "All are the recipe's defaults, as train_gpt.py has them now."
    rows += [(escape(name), escape(str(value))) for name, value in settings.items()]
    return f"{intro}\n\n{folded(f'All {len(settings)} that shape the training', table(*rows))}"


def describe_losses(subject: Subject, curve: list) -> str:
    if not curve:
        return (f"{MISSING.capitalize()}." if not subject.is_exported
                else "Not known: an exported model does not keep them.")
    rows = [(f"{step:,}", f"{loss:.5f}", "" if time is None else known(time, "{:,.3f}"))
            for step, loss, time in thin_out(curve, CURVE_ROWS)]
    return table(("step", "val_loss", "train_time, s"), *rows)


def describe_samples(subject: Subject, args: argparse.Namespace) -> str:
    if not args.samples:
        return "None were asked for."
    if not subject.checkpoint:
        return "None: the run has no checkpoint; `--save_every -1` saves the end of a run."
    if subject.settings.get("masked_share"):
        return "None: the model fills in hidden tokens, and does not go on with texts."
    device = open_device(args.device)
    try:
        encoding = load_encoding(args.vocab_dir)
    except ValueError as error:
        if args.vocab_dir:
            raise
        return f"None: {error}."  # the rest of the report does without
    model, windows, _ = train_gpt.load_run(str(subject.checkpoint.folder), device)
    parts = [f"With temperature {TEMPERATURE}, at most {SAMPLE_TOKENS} tokens; each begins with "
             f"its prompt."]
    for prompt in PROMPTS:
        tokens = encode_prompt(prompt, encoding, model.args.vocab_size)
        count = max(1, min(SAMPLE_TOKENS, len(model.rotary.cos) - len(tokens)))
        for seed in range(args.samples):
            text = "".join(stream_text(train_gpt.generate(
                model, windows, tokens, count, TEMPERATURE, seed=seed), encoding))
            parts.append(f"{escape(prompt) or '(no prompt)'}, seed {seed}:\n\n"
                         + fenced(prompt + text))
    return "\n\n".join(parts)


def describe_data(subject: Subject) -> str:
    shards = subject.state.get("data") or [
        shard[1:] for run in subject.runs[:1] for shard in run.shards]
    if not shards:
        return "Unknown: the log does not name its shards."
    total = sum(size for _, size, _ in shards)
    return folded(f"{len(shards)} shards of {total:,} bytes together", table(
        ("shard", "bytes", "SHA-256"),
        *((escape(name), f"{size:,}", escape(sha256)) for name, size, sha256 in shards)))


def describe_again(subject: Subject) -> str:
    settings = subject.settings
    changed = find_changed(settings)
    if changed is None:
        return "Unknown: track or recipe are not in the train_gpt.py here."
    changed = {name: value for name, value in changed.items()
               if name not in FREE_TO_DIFFER or name == "data_path"}
    if "batch_size" in changed:  # or it would take the place of the recipe's stages
        changed.setdefault("batch_stages", settings.get("batch_stages", ""))
    shown = dict(track=settings["track"], recipe=settings["recipe"]) | changed | dict(
        run_id=subject.name, save_every=-1)
    count = next(iter(count_processes(subject)), "1")
    start = ["python"] if count == "1" else [
        "torchrun", "--standalone", f"--nproc_per_node={count}"]
    text = " \\\n    ".join([shlex.join([*start, "train_gpt.py"]),
                            *(shlex.join([f"--{k}", str(v)]) for k, v in shown.items())])
    commit = re.fullmatch(r"(\w+) \(clean\)", subject.commit)
    notes = [fenced((f"git checkout {commit[1]}\n" if commit else "") + text)]
    if not commit:
        notes.append("There is no commit with the source of the run, so far as is known; its log "
                     "begins with that source.")
    if subject.resumed:
        notes.append("The run was resumed; this one is trained in one go, with the settings that "
                     "it had at its end.")
    return "\n\n".join(notes)


def make_report(subject: Subject, args: argparse.Namespace) -> str:
    """The Markdown. ValueError for people."""
    scores, evaluations = describe_results(subject, find_results(subject, args.json))
    curve = find_curve(subject)
    kind = "Exported model" if subject.is_exported else "Run"
    return REPORT.format(
        title=f"{kind} {escape(subject.name)}",
        summary=describe_summary(subject, scores, curve),
        system=describe_system(subject),
        settings=describe_settings(subject.settings),
        losses=describe_losses(subject, curve),
        evaluations=evaluations,
        samples=describe_samples(subject, args),
        data=describe_data(subject),
        again=describe_again(subject))


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN")
    add("--json", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="what evaluations have written (default: what lies beside the log)")
    add("--samples", type=int, default=1, metavar="N",
        help="texts for each prompt, 0: none (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="default: beside the log; it is written anew")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    add("--device", help="cpu, cuda, cuda:1, ..., for the samples (default: the GPU if there is)")
    add("--log_dir", default="logs", help="folder of the runs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.samples < 0:
        parser.error(f"--samples: got {args.samples}, expected 0 or more")
    try:
        subject = find_run(args.run, args.log_dir)
        report = make_report(subject, args)
        out = args.out or subject.file("report.md")
        out.write_text(report, encoding="utf-8")
        print(out)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
