"""What is each design choice worth? Train each against the same control: a table, and a plot.

    ./run.sh ablate                                          # all of records/ablation.plan
    ./run.sh ablate --only no-gate,swiglu --steps 100        # these lines of it, in 100 steps
    ./run.sh ablate --recipe modern --seeds 2 --per_gpu 3    # any option of train_gpt.py

The control is the recipe of this machine, or --recipe, with the options given; each line of the
plan changes one thing about it. Lines that change nothing there, or that do not fit its sizes, are
left out, and named. The runs share all GPUs, one each (of --per_gpu 3, two compile while one
trains). Schedules are fractions of the run, so that they scale with --steps; what pays in a short
run may not pay in a long one.

Logs, table.md and plot.png are in logs/ablation-RECIPE-STEPS. The same command goes on where it was
stopped, and other lines join the same table. Exit status: 0 if all runs ended well, 1 if not.
"""

import argparse
import dataclasses
import difflib
import re
import subprocess
import sys
from pathlib import Path

from ablation import plot, read_ablation, render
from logs import LogError
from screen import (
    ROOT,
    add_run_options,
    hyperparameters_of,
    names_of,
    parse_run_options,
    plan_jobs,
    read_plan,
    run_all,
    run_command,
)

PLAN = Path(__file__).with_name("ablation.plan")
MAX_STEPS = 240  # where no --steps are given, as in the ablation of README.md


def explicit(args):
    """The same hyper-parameters, but those that are 0 to be as large as another, as large."""
    return dataclasses.replace(args, attention_dim=args.attention_width, num_kv_heads=args.kv_heads)


def effective(args) -> frozenset:
    """(name, value) of the hyper-parameters that matter: two runs with equal ones are the same."""
    is_capped = args.logit_softcap > 0
    has_scalars = (args.embed_shortcut or args.skip_connections or args.value_embeddings
                   or args.attention_gate or args.bias or args.norm_gain or args.qk_norm == "l2")
    has_tables = not args.tied_head or args.value_embeddings or args.learned_positions
    needs = {
        "batch_lr_power": set(args.stage_batch_sizes) != {args.batch_size},
        "max_document_length document_rests": args.document_masking,
        "rotary_base": args.rotary_fraction > 0,
        "key_offset": args.rotary_fraction < 1,  # it is for what does not rotate
        "window_growth": args.window_start < args.window_end,
        "softcap_kind": is_capped,
        "triton_kernels": is_capped and args.softcap_kind == "tanh",
        "bigram_lr": args.bigram_rows,
        "embed_lr": has_tables,
        "scalar_lr": has_scalars,
        "muon_momentum muon_beta2 muon_nesterov muon_iteration muon_steps":
            args.optimizer == "muon",
        "cooldown_shape final_lr_frac": args.cooldown_frac,
        "fp8_gradients": args.fp8_blocks and args.activation == "relu2",
    }
    idle = {name for names, is_met in needs.items() if not is_met for name in names.split()}
    settings = dataclasses.asdict(explicit(args))
    return frozenset((name, value) for name, value in settings.items() if name not in idle)


def resolve(changes: list[str], control) -> list[str]:
    """The options of a line, with x0.5 as half of the control's value."""
    resolved = []
    for text in changes:
        if re.fullmatch(r"x[\d.]+", text):
            value = getattr(explicit(control), resolved[-1].removeprefix("--"))
            text = str(type(value)(round(value * float(text[1:]), 9)))
        resolved.append(text)
    return resolved


def choose_lines(plan: dict[str, list[str]], options: list[str]) -> tuple[dict, dict[str, str]]:
    """{name: (options, Hyperparameters)} of the lines that make a run of their own beside these
    options, and {name: reason} of the others.

    LogError if the control, the first line, cannot run.
    """
    first = next(iter(plan))
    control = hyperparameters_of([*options, *plan[first]])
    chosen, left_out = {first: (plan[first], control)}, {}
    seen = {effective(control): first}
    for name, changes in list(plan.items())[1:]:
        changes = resolve(changes, control)
        try:
            args = hyperparameters_of([*options, *changes])
        except LogError as error:
            left_out[name] = str(error)
            continue
        if (same := seen.setdefault(effective(args), name)) == name:
            chosen[name] = changes, args
        else:
            left_out[name] = f"the same as {same} here"
    return chosen, left_out


def parse_names(text: str, plan: dict[str, list[str]]) -> list[str]:
    """The lines that --only names, all if it is empty. LogError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text and not names:
        raise LogError(f"--only {text!r} names no line of {PLAN.name}; leave it out for all")
    if unknown := [name for name in names if name not in plan]:
        near = difflib.get_close_matches(unknown[0], plan, n=1)
        raise LogError(f"--only {', '.join(unknown)}: "
                       + (f"did you mean {near[0]}? " if near else "")
                       + f"The lines of {PLAN.name} are: {', '.join(plan)}")
    return names or list(plan)


def describe_left_out(left_out: dict[str, str]) -> str:
    """A line for each reason, with all that it is the reason for."""
    names = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "".join(f"left out, {reason}: {', '.join(some)}\n" for reason, some in names.items())


def fit_memory(options: list[str]) -> list[str]:
    """The options, after those with which the control fits the memory of this GPU, as in run.sh."""
    import torch

    if not torch.cuda.is_available():
        return options
    advice = subprocess.run([sys.executable, "data/check.py", "--advise", *options], cwd=ROOT,
                            stdout=subprocess.PIPE, text=True).stdout.split()
    if advice:
        print(f"to fit these GPUs: {' '.join(advice)}")
    return [*advice, *options]


def fetch_data(runs: list) -> None:
    """Download what the largest of the runs reads, if it is FineWeb. LogError if that fails."""
    import train_gpt

    if runs[0].data_path != train_gpt.TRACKS["single-gpu"]["data_path"]:
        return
    shards = max(map(train_gpt.estimate_shards, runs))
    if subprocess.run([sys.executable, "data/cached_fineweb10B.py", str(shards)],
                      cwd=ROOT).returncode:
        raise LogError("there is no data to train on; see above")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh ablate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options go to train_gpt.py.")
    parser.add_argument("--only", default="", metavar="NAMES",
                        help="lines of the plan, with commas between them (default: all)")
    parser.add_argument("--steps", "--train_steps", "--train-steps", type=int, metavar="N",
                        help=f"of each run (default: those of the recipe, {MAX_STEPS} at most)")
    add_run_options(parser, "logs/ablation-RECIPE-STEPS")
    given, options = parse_run_options(parser)
    plan = read_plan(PLAN.read_text(encoding="utf-8"))
    first, names = next(iter(plan)), parse_names(given.only, plan)
    options = ["--val_loss_every", "0", *options]  # the end is what is compared
    if "depth" in names_of(options):
        raise LogError("the rules of --depth would change more than a line says; name the "
                       "sizes instead, as --num_layers 8 --model_dim 512 --num_heads 4")
    control = hyperparameters_of(options)
    steps = min(MAX_STEPS, control.train_steps) if given.steps is None else given.steps
    log_dir = given.log_dir or ROOT / "logs" / f"ablation-{control.recipe}-{steps}"
    log_dir = log_dir.resolve()
    options = fit_memory([*options, "--train_steps", str(steps)])
    here = [name for name in plan if any(log_dir.glob(f"{name}-seed*.txt"))]
    chosen, left_out = choose_lines(
        {name: plan[name] for name in plan if name in [first, *names, *here]}, options)
    print(describe_left_out({name: left_out[name] for name in names if name in left_out}),
          end="", flush=True)
    wanted = [name for name in chosen if name in [first, *names]]
    if wanted == [first]:
        raise LogError(f"there is nothing to compare {first} with")
    fetch_data([chosen[name][1] for name in wanted])
    jobs, others = (
        plan_jobs({name: chosen[name][0] for name in some}, options, given.seeds, log_dir)
        for some in (wanted, [name for name in chosen if name not in wanted]))
    done = run_all(jobs, PLAN, log_dir, given.per_gpu, others)
    if jobs[0] not in done:
        raise LogError(f"no table: {jobs[0].name}, the control, has not ended well")
    ablation = read_ablation([job.log for job in done], f"{first}-seed{given.seed}")
    text, table, picture = render(ablation), log_dir / "table.md", log_dir / "plot.png"
    table.write_text(text, encoding="utf-8")
    plot(picture, ablation)
    print(f"\n{text}\ntable: {table}\nplot: {picture}")
    return 0 if all(job in done for job in jobs) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
