"""./run.sh ablate: its plan, what it leaves out, and runs with their table and plot."""

import dataclasses
import re
import sys

import pytest
import torch
from conftest import ONE_RANK, ROOT, build, random_batch, tiny_args
from test_attempt import SHORT
from test_commands import run

sys.path.insert(0, str(ROOT / "records"))

from ablate import PLAN, choose_lines, describe_left_out, effective  # noqa: E402
from logs import LogError  # noqa: E402
from screen import read_plan  # noqa: E402

import train_gpt  # noqa: E402  needs the path above

LINES = read_plan(PLAN.read_text())

# Of the hyper-parameters, all that is no choice of architecture, optimizer or schedule.
NO_CHOICE = set("""
    track recipe seed run_id data_path target val_tokens token_budget vocab_size
    depth target_param_data_ratio
    batch_size batch_stages device_batch_size val_batch_size row_length val_row_length train_steps
    masked_share dtype loss_chunk_size attention compile kernel_warmup
    save_every save_on_exit resume resume_anyway stop_at_target
    val_loss_every log_every log_dir sample_every log_wandb wandb_project wandb_name
""".split())


def choose(recipe: str, plan=LINES, *options):
    track = "sample" if recipe.startswith("sample") else "single-gpu"
    return choose_lines(plan, ["--track", track, "--recipe", recipe, "--train_steps", "40",
                               *options])


# -----------------------------------------------------------------------------
# The plan


def test_every_design_choice_has_a_line_in_the_plan():
    fields = {field.name for field in dataclasses.fields(train_gpt.Hyperparameters)}
    changed = {option.removeprefix("--") for line in LINES.values() for option in line[::2]}
    missing = fields - changed - NO_CHOICE
    assert not missing, f"add a line for {missing} to {PLAN}, or a word to NO_CHOICE"
    assert changed <= fields and not changed & NO_CHOICE and NO_CHOICE <= fields


def test_every_line_is_a_run_with_some_recipe_or_left_out_for_a_reason(monkeypatch):
    monkeypatch.setattr(train_gpt, "switch_off", lambda args, device: (args, []))  # as on a Hopper
    used = set()
    for recipe in ("modern", "record", "sample", "baseline"):
        chosen, left_out = choose(recipe)
        assert sorted([*chosen, *left_out]) == sorted(LINES)
        assert next(iter(chosen)) == "control" and len(chosen) > 60
        refused = {name for name, reason in left_out.items() if "the same as" not in reason}
        assert refused == ({"value-embeddings"} if recipe == "sample" else set())
        used |= set(chosen)
    assert used == set(LINES)


def test_a_line_that_changes_nothing_or_is_refused_is_left_out_with_the_reason():
    plan = read_plan("""
        control:
        again: --activation relu2
        gelu: --activation gelu
        gelu-again: --activation gelu
        two: --num_kv_heads 2
        three: --num_kv_heads 3
        growth: --window_growth geometric
    """)
    chosen, left_out = choose("sample", plan, "--window_start", "512")
    assert list(chosen) == ["control", "gelu"]
    assert describe_left_out(left_out) == (
        "left out, the same as control here: again, two, growth\n"
        "left out, the same as gelu here: gelu-again\n"
        "left out, --num_kv_heads 3 must divide --num_heads 2: three\n")
    chosen, left_out = choose("sample", plan, "--activation", "gelu")
    assert list(chosen) == ["control", "again", "growth"]
    with pytest.raises(LogError, match="num_heads 5"):
        choose("sample", plan, "--num_heads", "5")


def test_x_and_a_number_is_that_much_of_the_controls_value():
    plan = read_plan("""
        control: --head_lr 0.01
        lr: --matrix_lr x0.5 --head_lr x2
        attention: --attention_dim x0.5 --num_heads x2
        layers: --num_layers x1.25
    """)
    chosen, left_out = choose("modern", plan, "--num_layers", "8")
    _, lr = chosen["lr"]
    assert (lr.matrix_lr, lr.head_lr) == (0.025, 0.02) and not left_out
    _, attention = chosen["attention"]
    assert (attention.attention_dim, attention.num_heads) == (384, 12)  # of 0, which is model_dim
    assert chosen["layers"][1].num_layers == 10


def weights_after(args) -> dict[str, torch.Tensor]:
    model = build(args)
    optimizers = train_gpt.build_optimizers(model, args)
    for step in range(2):
        batch = random_batch(args, rows=args.batch_size_at(step) // args.row_length, seed=step)
        train_gpt.train_step(model, optimizers, [batch], step, args, ONE_RANK)
    return model.state_dict()


@pytest.mark.parametrize("where, change", [
    ({}, dict(batch_lr_power=0.1)),
    ({}, dict(bigram_lr=0.1)),
    ({}, dict(num_kv_heads=2, attention_dim=32)),
    (dict(rotary_fraction=0), dict(rotary_base=77)),
    (dict(rotary_fraction=1), dict(key_offset=True)),
    (dict(window_start=128, window_end=128), dict(window_growth="stepwise")),
    (dict(logit_softcap=0), dict(softcap_kind="isru")),
    (dict(tied_head=True, value_embeddings=0), dict(embed_lr=0.1)),
    (dict(embed_shortcut=False, skip_connections=False, value_embeddings=0), dict(scalar_lr=0.1)),
    (dict(optimizer="adam"), dict(muon_momentum=0.5, muon_beta2=0.9, muon_nesterov=False,
                                  muon_iteration="newton-schulz", muon_steps=3)),
    (dict(cooldown_frac=0), dict(cooldown_shape="sqrt", final_lr_frac=0.5)),
], ids=lambda value: ",".join(value) or "tiny")
def test_what_is_taken_for_the_same_run_is_the_same_to_the_last_bit(where, change):
    control, other = tiny_args(**where), tiny_args(**where | change)
    assert control != other and effective(control) == effective(other)
    after, after_other = weights_after(control), weights_after(other)
    assert all(torch.equal(weight, after_other[name]) for name, weight in after.items())


def test_where_a_switch_does_something_it_is_another_run():
    for where, change in [
        (dict(batch_stages="256,512"), dict(batch_lr_power=0.1)),
        (dict(bigram_rows=99), dict(bigram_lr=0.1)), ({}, dict(rotary_base=77)),
        ({}, dict(key_offset=True)), ({}, dict(num_kv_heads=1)),
        (dict(window_start=64, window_end=128), dict(window_growth="stepwise")),
        ({}, dict(softcap_kind="isru")), (dict(tied_head=True), dict(head_lr=0.1)),
        ({}, dict(scalar_lr=0.1)), ({}, dict(muon_steps=3)), ({}, dict(cooldown_shape="sqrt")),
        ({}, dict(document_rests=True)), ({}, dict(max_document_length=9)),
    ]:
        assert effective(tiny_args(**where)) != effective(tiny_args(**where | change)), change


# -----------------------------------------------------------------------------
# The command


def test_unknown_names_are_refused_with_those_there_are_and_nothing_runs():
    done = run("ablate", "--only", "swiglu,no-gaet", *SHORT)
    assert done.returncode == 1 and not done.stdout
    assert "--only no-gaet: did you mean no-gate?" in done.stderr
    assert ", ".join(LINES) in done.stderr
    done = run("ablate", "--only", ",", *SHORT)
    assert done.returncode == 1 and not done.stdout and "names no line" in done.stderr


@pytest.mark.parametrize("ratio", [["--target_param_data_ratio", "0.001"], []])
def test_the_dial_is_refused_whose_rules_would_change_more_than_a_line_says(ratio):
    done = run("ablate", "--only", "gelu", "--depth", "2", *ratio, *SHORT)
    assert done.returncode == 1 and "--num_layers" in done.stderr and not done.stdout


def test_without_a_line_that_changes_something_there_is_nothing_to_compare(tmp_path):
    done = run("ablate", "--only", "relu2", "--log_dir", tmp_path / "logs", *SHORT)
    assert done.returncode == 1 and "nothing to compare control with" in done.stderr
    assert done.stdout == "left out, the same as control here: relu2\n"
    assert not (tmp_path / "logs").exists()


def test_the_command_runs_what_is_missing_and_writes_the_table_and_the_plot(tmp_path):
    def ablate(names: str) -> tuple[str, list[str]]:
        done = run("ablate", "--only", names, "--log_dir", tmp_path, *SHORT, "--steps", 3)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith(f"table: {tmp_path}/table.md\nplot: {tmp_path}/plot.png\n")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        table = (tmp_path / "table.md").read_text()
        assert table in done.stdout and "; 3 steps; " in table
        return done.stdout, sorted(re.findall(r"^\| (\S.*?) \| 1 \|", table, re.MULTILINE))

    printed, rows = ablate("gelu,relu2")
    assert printed.startswith("left out, the same as control here: relu2\n2 runs, 0 of them done")
    assert rows == ["`activation`: relu2 -> gelu", "none: the control, control-seed1337.txt"]
    before = {path: path.read_text() for path in tmp_path.glob("*.txt")}
    (tmp_path / "plot.png").unlink()

    printed, more = ablate("half-matrix-lr,gelu")
    assert "3 runs, 2 of them done" in printed
    assert more == [rows[0], "`matrix_lr`: 0.05 -> 0.025", rows[1]]
    assert {path: path.read_text() for path in before} == before

    printed, same = ablate("half-matrix-lr")  # gelu's row stays
    assert "2 runs, 2 of them done" in printed and same == more
