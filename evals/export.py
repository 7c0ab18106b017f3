"""Export a trained model to a folder with all that it takes to use it, and publish the folder.

    python evals/export.py RUN DIR
    python evals/export.py latest my-model --dtype bfloat16 --push USER/NAME --private

RUN is a run_id, `latest`, or the folder of a checkpoint. DIR gets model.safetensors, state.json,
the source that trained it if that can be found, and README.md, a model card; the scripts beside
this one take it in the place of a run. --push creates the model repository on huggingface.co, or
adds to it; nothing is ever deleted there. It needs a login: `hf auth login`, or HF_TOKEN.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import safetensors.torch
from facts import find_log, find_source, find_verdict, public_settings, table, thin_out
from logs import Run, source_files

import train_gpt  # facts.py has told where it is, and where logs.py is
from train_gpt import MODEL_FILE, Checkpoint, Hyperparameters, RunError

LEFT_OUT = {"train_losses", "val_losses", "rng"}  # of the state: only training needs them
CURVE_ROWS = 8  # validations in the model card
FINEWEB = r"fineweb_(train|val)_\d{6}\.bin"
CARD = """\
---
license: mit
language:
- en
tags:
- language-model
- speedrun
{datasets}---

# {name}

A language model trained by a speedrun, with GPT-2's tokens. It has not been taught to answer, or to
be harmless.

{facts}

## Use

{use}

## Validation

{curve}

## Data

{data}

## Hyper-parameters

{settings}
"""

GOES_ON = """\
It goes on with texts. In the repository of the speedrun, with the path of this folder:

    python evals/sample.py FOLDER "Once upon a time"

From Python, with `train_gpt.py`:

    model, windows, state = train_gpt.load_run("FOLDER", torch.device("cpu"))
    tokens = train_gpt.generate(model, windows, prompt, count)

A prompt is a list of tokens, the first of which is 50256, <|endoftext|>."""

FILLS_IN = """\
It fills in hidden tokens, most of which are shown to it as the vocabulary's last, and does not go
on with texts. From Python, with `train_gpt.py` of the speedrun:

    model, windows, state = train_gpt.load_run("FOLDER", torch.device("cpu"))
    hidden_BTD = model.hidden(batch, windows)"""


def write_model(checkpoint: Checkpoint, dtype: str, path: Path) -> None:
    """The weights as they were saved, or with 16 bits for each number of a matrix or a table."""
    if dtype == "float32":
        shutil.copyfile(checkpoint.folder / MODEL_FILE, path)
        return
    tensors = {name: x.bfloat16() if x.is_floating_point() and x.ndim > 1 else x
               for name, x in checkpoint.model.items()}
    safetensors.torch.save_file(tensors, path)


def model_card(
    checkpoint: Checkpoint, runs: list[Run], verdict: str, dtype: str, has_source: bool
) -> dict[str, str]:
    """What stands in the gaps of CARD, but for the name."""
    state, curve = checkpoint.state, checkpoint.state["val_losses"]
    args = Hyperparameters(**train_gpt.saved_hyperparameters(state))
    numbers = sum(x.numel() for x in checkpoint.model.values())
    val_loss = "not measured"
    if curve:
        val_loss = f"{curve[-1][1]:.5f} nats per token, at step {curve[-1][0]:,}"
    hardware = "unknown"
    if runs and runs[0].hardware:
        hardware = f"{runs[0].world_size or '?'} x {runs[0].hardware}, torch {runs[0].torch}"
    resumed = ", resumed" if runs and runs[0].lines("resumed: ") else ""
    is_fineweb = all(re.fullmatch(FINEWEB, shard) for shard, _, _ in state["data"])
    return dict(
        datasets="datasets:\n- HuggingFaceFW/fineweb\n" if is_fineweb else "",
        facts=table(
            ("fact", "value"), ("track, recipe", f"{args.track}, {args.recipe}"),
            ("step", f"{state['step']:,} of {args.train_steps:,}"), ("val_loss", val_loss),
            ("train_time", f"{state['train_time']:.1f} s{resumed}"), ("hardware", hardware),
            ("training tokens", f"{state['tokens']:,}"),
            ("validation tokens", f"{args.val_tokens:,}"),
            ("weights", f"{numbers:,} numbers, {dtype}"),
            ("source", "train_gpt.py" if has_source else "not here: it could not be found"),
            ("records/check.py", verdict)),
        use=FILLS_IN if args.masked_share else GOES_ON,
        curve=table(("step", "val_loss"), *((f"{step:,}", f"{loss:.5f}")
                                            for step, loss in thin_out(curve, CURVE_ROWS))),
        data=table(("shard", "bytes", "SHA-256"), *state["data"]),
        settings=table(("name", "value"), *state["hyperparameters"].items()))


def export(run: str, folder: Path, dtype: str, log_dir: str) -> str:
    """Fill the folder, which is to be new or empty; returns the verdict. ValueError for people."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder; choose another")
    checkpoint = train_gpt.open_checkpoint(run, log_dir, model_only=True)
    for note in checkpoint.notes:
        print(note, file=sys.stderr)
    state = checkpoint.state
    if "val_losses" not in state:
        raise RunError(f"{checkpoint.folder} is an exported model already; copy the folder")
    runs, problem = find_log(checkpoint.folder)
    source = find_source(state, runs)
    state["hyperparameters"] = public_settings(state["hyperparameters"])
    verdict = find_verdict(state["step"], runs, problem, source)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_model(checkpoint, dtype, folder / MODEL_FILE)
        for name, text in source_files(source).items() if source else ():
            (folder / name).write_text(text, encoding="utf-8")
        if not source:
            print("the source that trained the model is neither the one here nor in its log; it "
                  "is left out", file=sys.stderr)
        card = model_card(checkpoint, runs, verdict, dtype, bool(source))
        (folder / "README.md").write_text(CARD.format(name=folder.resolve().name, **card), "utf-8")
        path = folder / MODEL_FILE
        file = dict(bytes=path.stat().st_size, sha256=train_gpt.hash_file(path))
        exported = {name: value for name, value in state.items() if name not in LEFT_OUT}
        exported["files"] = {MODEL_FILE: file}
        train_gpt.write_state(folder, exported)
    except BaseException:  # half a model would be in the way of the next try
        for path in folder.iterdir():
            path.unlink()
        raise
    return verdict


def push(folder: Path, repository: str, private: bool) -> None:
    """Add the folder's files to the repository; RunError if that fails."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise RunError("it is there already, and public")
        api.upload_folder(repo_id=repository, folder_path=folder,
                          commit_message=f"Add {folder.resolve().name}")
    except Exception as error:  # its class depends on the hub's version
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = reason.replace(huggingface_hub.get_token() or "\n", "[token]")
        raise RunError(f"cannot push to {repository} ({reason}); {folder} is whole: once that is "
                       f"put right, do `hf upload {repository} {folder} .`"
                       f"{' --private' * private}") from None


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN")
    add("dir", type=Path, metavar="DIR", help="a new or empty folder")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrices and "
        "tables (default: %(default)s, as they were saved)")
    add("--push", metavar="USER/NAME", help="publish it on huggingface.co")
    add("--private", action="store_true", help="with --push: for nobody else to see")
    add("--log_dir", default="logs", help="folder of the runs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        parser.error(f"--push: got {args.push!r}, expected USER/NAME")
    if args.private and not args.push:
        parser.error("--private needs --push USER/NAME")
    try:
        if args.push and not huggingface_hub.get_token():
            raise RunError("--push needs a login on huggingface.co: do `hf auth login`, or set "
                           "HF_TOKEN")
        verdict = export(args.run, args.dir, args.dtype, args.log_dir)
        print(f"{args.dir}: {', '.join(sorted(path.name for path in args.dir.iterdir()))}")
        print(f"record: {verdict}")
        if args.push:
            push(args.dir, args.push, args.private)
            print(f"https://huggingface.co/{args.push}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
