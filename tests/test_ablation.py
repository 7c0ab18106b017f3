"""records/ablation.py: rows by hyper-parameters, the control, refusals, the plot, and README.md."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT
from record_logs import SOURCE, our_log, public_log, shard_lines, step_lines, write_logs

# records/ is on the path from here on.
from ablation import plot, read_ablation, read_series, render  # isort: skip
from logs import LogError, read_log  # isort: skip

SCREENING = ROOT / "records" / "measurements" / "2026-11-21_Screening"
# Two switches. A run with the one differs from a run with the other in both, and from one with
# neither in one, so that the last is the control.
LOW_RATE, NO_SWITCH = dict(matrix_lr=0.03), dict(batch_size=65_536)


def log(loss: float, seed: int = 1, step_time: float = 0.5, **header) -> str:
    return our_log(seed, lines=step_lines(final=loss, step_time=step_time), **header)


def three(folder: Path) -> list[Path]:
    """A control at 3.4, a switch that costs 0.1, and one that gains 0.2."""
    return write_logs(folder, log(3.2, **LOW_RATE), log(3.4), log(3.5, **NO_SWITCH))


def command(*argv, name="ablation.py", root=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "records" / name), *map(str, argv)],
                          capture_output=True, text=True, timeout=60)


def table_of(markdown: str) -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    lines = [line for line in markdown.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def problem_of(*paths, control: str | None = None) -> str:
    with pytest.raises(LogError) as error:
        read_ablation(paths, control)
    return str(error.value)


# -----------------------------------------------------------------------------
# Rows


def test_the_command_prints_a_row_for_the_control_and_each_change_what_costs_most_first(tmp_path):
    done = command(*three(tmp_path))
    assert done.returncode == 0, done.stderr
    assert table_of(done.stdout) == [
        ["none: the control, log1.txt", "1", "3.40000", "", "20.2 s", "778,646", "27,351"],
        ["`batch_size`: 393216 -> 65536", "1", "3.50000", "+0.1000", "20.2 s (+0.0%)", "129,774",
         "27,351"],
        ["`matrix_lr`: 0.05 -> 0.03", "1", "3.20000", "-0.2000", "20.2 s (+0.0%)", "778,646",
         "27,351"]]


def test_seeds_share_a_row_with_mean_deviation_and_welchs_interval(tmp_path):
    paths = write_logs(
        tmp_path, log(3.0, seed=1), log(3.1, seed=2, end="peak memory: 27400 MiB allocated"),
        log(3.2, seed=3), log(3.4, seed=1, step_time=0.65, **LOW_RATE), log(3.5, 2, **LOW_RATE),
        log(3.6, seed=3, **LOW_RATE))
    control, other = table_of(render(read_ablation(paths, "log0")))
    assert control == ["none: the control, log0.txt", "3", "3.10000 ± 0.10000", "", "20.2 s",
                       "778,646", "27,400"]
    # The standard error is sqrt(0.02 / 3), with 4 degrees of freedom; t(0.975, 4) = 2.776445.
    assert other[1:5] == ["3", "3.50000 ± 0.10000", "+0.4000 (95%: +0.1733 to +0.6267)",
                          "22.2 s (+10.0%)"]


def test_chance_is_judged_by_all_rows_without_what_a_seed_does_to_each_of_them(tmp_path):
    """Seed 2 is 0.1 higher everywhere; on top of that the two seeds of a row differ by 2e or -2e.
    """
    e = 0.004
    rows = [(3.0, e), (3.1, -e), (3.2, e), (3.3, -e), (9.0, 400 * e)]  # the last does not train
    paths = write_logs(tmp_path, *(
        log(loss + 0.1 * (seed - 1) + (2 * seed - 3) * extra, seed, matrix_lr=loss)
        for loss, extra in rows for seed in (1, 2)))
    ablation = read_ablation(paths, "log0")
    noise = ablation.noise()
    assert e / 2 < noise < 5 * e  # 400 e would be a hundred times as much
    assert f"rows of 2 seeds differ by ±{1.96 * noise:.4f} by chance" in render(ablation)
    assert "(95%:" not in "".join(cells[3] for cells in table_of(render(ablation)))
    for few in (paths[:6], paths[::2]):  # three rows, and one seed
        assert read_ablation(few, "log0").noise() is None


def test_a_time_is_that_of_steps_which_nothing_disturbed(tmp_path):
    """Two stages, of 500 and of 1,000 ms a step, and five steps that took 3 s more."""
    times = [0.5 * step if step <= 20 else 10 + step - 20 for step in range(41)]
    hindered = [time + 3 * min(5, max(0, step - 30)) for step, time in enumerate(times)]
    for seconds in (times, hindered):
        lines = [f"step:{step}/40 train_time:{1000 * time:.0f}ms step_avg:1.00ms"
                 for step, time in enumerate(seconds) if step]
        lines.append(lines[-1].replace("train", "val_loss:3.10000 train"))
        [path] = write_logs(tmp_path, our_log(lines=lines, batch_stages="65536,131072"))
        [run] = read_log(path)
        assert run.steady_time == pytest.approx(30)
    assert run.train_time == 45
    [path] = write_logs(tmp_path, our_log(lines=lines[-1:]))
    assert read_log(path)[0].steady_time == 45


def test_one_seed_on_a_side_has_a_difference_without_an_interval(tmp_path):
    paths = write_logs(tmp_path, log(3.0, seed=1), log(3.2, seed=2), log(3.4, seed=3, **LOW_RATE))
    _, other = table_of(render(read_ablation(paths, "log0")))
    assert other[1:4] == ["1", "3.40000", "+0.3000"]


def test_a_row_is_compared_with_the_control_of_its_own_seeds_if_there_are_all(tmp_path):
    control = [log(3.0, seed=1), log(3.2, seed=2), log(3.7, seed=3)]
    for seeds, gap in (((2,), "+0.2000"), ((1, 2), "+0.3000"), ((1, 4), "+0.1000")):
        mine = [log(3.4 + step / 10, seed=seed, **LOW_RATE)
                for seed, step in zip(seeds, (0,) if len(seeds) == 1 else (-1, 1), strict=True)]
        paths = write_logs(tmp_path / gap, *control, *mine)
        ablation = read_ablation(paths, "log0")
        assert table_of(render(ablation))[1][3] == gap
    mine = [log(3.4 + seed / 10, seed=seed, **LOW_RATE) for seed in (1, 2, 3)]
    paths = write_logs(tmp_path / "more", *control, log(9.0, seed=4), *mine)
    ablation = read_ablation(paths, "log0")
    gap, test = ablation.loss_gap(ablation.others[0])
    assert gap == pytest.approx(0.3) and test.low < gap < test.high


def test_seeds_names_folders_and_reports_make_no_row(tmp_path):
    paths = write_logs(tmp_path, log(3.0, **LOW_RATE), *(
        log(3.0 + seed / 10, seed, **{name: f"other {seed}"}) for seed, name in enumerate(
            ("run_id", "log_dir", "log_every", "data_path", "recipe", "wandb_name",
             "val_loss_every", "target", "sample_every", "save_every"), start=1)))
    rows = table_of(render(read_ablation(paths, "log1")))
    assert [row[1] for row in rows] == ["10", "1"]


def test_switches_that_change_together_stand_in_one_row_with_absent_and_empty_values(tmp_path):
    paths = write_logs(tmp_path, log(3.0, batch_stages=""), log(
        3.1, batch_stages="65536,393216", **LOW_RATE, extra="a|b"))
    _, other = table_of(render(read_ablation(paths, "log0")))
    assert other[0] == ("`matrix_lr`: 0.05 -> 0.03; `batch_stages`: empty -> 65536,393216; "
                        "`extra`: absent -> a\\|b")


def test_tokens_are_those_that_the_log_states_and_stages_are_not_guessed_at(tmp_path):
    staged = dict(batch_stages="4,8")  # in another unit, as in the first logs with stages
    stated = dict(batch_stages="65536,393216", marks="training tokens: 9,175,040")
    paths = write_logs(tmp_path, log(3.0), log(3.1, **staged), log(3.2, **stated))
    text = render(read_ablation(paths, "log0"))
    assert [row[5] for row in table_of(text)] == ["778,646", "454,210", "-"]
    assert "training tokens not in all of the logs" in text
    del paths[1]
    assert "9,175,040 to 15,728,640 training tokens" in render(read_ablation(paths, "log0"))


# -----------------------------------------------------------------------------
# The line above the table


def test_the_line_above_states_data_machine_length_and_seeds(tmp_path):
    first = render(read_ablation(three(tmp_path))).split("\n")[0]
    assert first == (
        "On FineWeb; NVIDIA H200; torch 2.11.0+cu130; 40 steps; 2,621,440 to 15,728,640 training "
        "tokens; val_loss on 1,048,576 tokens; one seed each, so that small differences may be "
        "noise.")


def test_several_gpus_seeds_and_scripts_are_told(tmp_path):
    paths = write_logs(tmp_path, log(3.0, ranks=2), log(3.1, seed=2, ranks=2),
                       log(3.2, ranks=2, source=SOURCE + "faster = True\n", **LOW_RATE))
    first = render(read_ablation(paths, "log0")).split("\n")[0]
    assert "; 2 x NVIDIA H200;" in first and "one seed" not in first
    assert "the logs are of 2 different scripts" in first


@pytest.mark.parametrize("header, words", [
    (dict(shards=shard_lines(data="webmix")), "**data that is not known to be FineWeb**"),
    (dict(shards=shard_lines(num_bytes=5)), "**data that is not known to be FineWeb**"),
])
def test_data_is_known_by_names_sizes_and_hashes(tmp_path, header, words):
    paths = write_logs(tmp_path, log(3.0, **header), log(3.1, **LOW_RATE, **header))
    assert f"On {words}" in render(read_ablation(paths, "log0"))


# -----------------------------------------------------------------------------
# The control


def test_the_control_is_that_from_which_the_others_differ_least_or_the_one_named(tmp_path):
    paths = three(tmp_path)
    assert read_ablation(paths).control.runs[0].name == "log1.txt"
    for name in ("log0", "log0.txt", paths[0]):
        rows = table_of(command(*paths, "--control", name).stdout)
        assert [row[0] for row in rows] == [
            "none: the control, log0.txt",
            "`batch_size`: 393216 -> 65536; `matrix_lr`: 0.03 -> 0.05", "`matrix_lr`: 0.03 -> 0.05"]
        assert rows[1][3] == "+0.3000"


def test_a_log_called_control_is_one(tmp_path):
    paths = three(tmp_path)
    paths[0] = paths[0].rename(tmp_path / "control-seed1.txt")
    assert read_ablation(paths).control.runs[0].path == paths[0]


def test_an_ambiguous_or_unknown_control_is_refused_with_the_choice(tmp_path):
    paths = write_logs(tmp_path, log(3.0), log(3.1, **LOW_RATE))
    done = command(tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert "ambiguous" in done.stderr and "--control" in done.stderr
    assert "log0.txt, log1.txt" in done.stderr
    assert "--control nobody has to name a log" in problem_of(*paths, control="nobody")
    others = [Path(shutil.copytree(tmp_path, tmp_path / "b")) / "log0.txt", paths[1]]
    others[0].write_text(log(3.2, seed=2, **LOW_RATE))
    assert "not of 2" in problem_of(*paths, *others, control="log0.txt")


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("spoil, problem", [
    (lambda text: text.replace("step:40/40 val_loss", "# val_loss"), "without a validation"),
    (lambda text: text.split("step:21/40")[0], "it ends at step 20 of 40"),
    (lambda text: text + "error: out of memory\n", "error: out of memory"),
    (lambda text: text.replace("val_loss:3.10000", "val_loss:nan"), "val_loss nan at step 40"),
])
def test_runs_that_did_not_end_well_are_refused_by_name(tmp_path, spoil, problem):
    write_logs(tmp_path, log(3.0), log(3.05, **NO_SWITCH), spoil(log(3.1, **LOW_RATE)))
    done = command(tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert "log2.txt: " in done.stderr and problem in done.stderr
    assert "run it again, to its end, or name the other logs only" in done.stderr


@pytest.mark.parametrize("header, problem", [
    (dict(shards=shard_lines(data="other")), "validation data"),
    (dict(shards=[line.replace("sha256 ", "sha256 0000")[:-4] if line.startswith("train") else line
                  for line in shard_lines()]), "training data: other shards, by their hashes"),
    (dict(shards=[]), "validation data: not in all of the logs"),
    (dict(val_tokens=10_485_760), "val_tokens: 1048576 against 10485760"),
    (dict(gpu="NVIDIA H100"), "hardware: NVIDIA H200 against NVIDIA H100"),
    (dict(torch="2.12.0"), "torch: 2.11.0+cu130 against 2.12.0"),
])
def test_runs_that_cannot_be_compared_with_the_control_are_refused(tmp_path, header, problem):
    paths = write_logs(tmp_path, log(3.0), log(3.05, **NO_SWITCH),
                       log(3.1, **LOW_RATE | header))
    found = problem_of(*paths, control="log0")
    assert "log2.txt cannot be compared with the control, log0.txt" in found and problem in found


def test_more_shards_of_the_same_data_are_comparable(tmp_path):
    paths = write_logs(tmp_path, log(3.0), log(3.1, **LOW_RATE, shards=shard_lines(train=5)))
    assert len(read_ablation(paths, "log0").others) == 1


def test_less_than_two_settings_are_no_ablation(tmp_path):
    paths = write_logs(tmp_path, log(3.0, seed=1), log(3.1, seed=2))
    assert "the same hyper-parameters" in problem_of(*paths)


def test_a_seed_counts_once_in_a_row(tmp_path):
    paths = write_logs(tmp_path, log(3.0), log(3.1), log(3.2, **LOW_RATE))
    assert problem_of(*paths) == ("seed 1 was used 2 times; leave one of these out: log0.txt, "
                                  "log1.txt")


def test_logs_without_hyperparameters_and_folders_without_logs_are_refused(tmp_path):
    paths = write_logs(tmp_path / "logs", log(3.0), public_log(step_lines()))
    assert "log1.txt does not list its hyper-parameters" in problem_of(*paths)
    (tmp_path / "empty").mkdir()
    assert "holds no logs" in problem_of(tmp_path / "empty")


# -----------------------------------------------------------------------------
# The plot


def test_the_plot_has_a_bar_for_each_change_with_its_interval(tmp_path, monkeypatch):
    """Reads the figure before it is saved: what is drawn, not what a picture looks like."""
    from matplotlib import figure as figures

    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig",
                        lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    paths = write_logs(tmp_path, *(log(3.0 + seed / 10, seed) for seed in (0, 1, 2)),
                       log(2.9, **NO_SWITCH),
                       *(log(3.4 + seed / 10, seed, **LOW_RATE) for seed in (0, 1, 2)))
    plot(tmp_path / "it.png", read_ablation(paths, "log0"))
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    [axis] = drawn[0].axes
    bars, errors = sorted(axis.containers, key=lambda container: hasattr(container, "has_xerr"))
    assert [bar.get_width() for bar in bars] == pytest.approx([0.4, -0.2])
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "matrix_lr: 0.05 -> 0.03", "batch_size: 393216 -> 65536"]
    assert axis.yaxis_inverted()
    [lines] = errors.lines[2]
    [first, *second] = lines.get_segments()
    assert first[:, 0] == pytest.approx([0.1733, 0.6267], abs=1e-4)
    assert not any(len(segment) and segment[0, 0] == segment[0, 0] for segment in second)


def test_the_command_plots_or_says_why_not(tmp_path):
    paths = three(tmp_path)
    done = command(*paths, "--plot", tmp_path / "it.png")
    assert done.returncode == 0 and (tmp_path / "it.png").stat().st_size > 10_000
    done = command(*paths, "--plot", tmp_path / "nowhere" / "it.png")
    assert done.returncode == 1 and "cannot write" in done.stderr


# -----------------------------------------------------------------------------
# The page, and this repository's logs


@pytest.fixture
def checkout(tmp_path) -> Path:
    """records/ without its runs, beside a page with a place for the ablation."""
    shutil.copytree(ROOT / "records", tmp_path / "checkout" / "records",
                    ignore=shutil.ignore_patterns("20*", "__pycache__"))
    page = tmp_path / "checkout" / "README.md"
    page.write_text("# Page\n\n<!-- ablation -->\nold\n<!-- end of ablation -->\n\nMore.\n")
    (tmp_path / "checkout" / "records" / "measurements").mkdir(exist_ok=True)
    return tmp_path / "checkout"


def pack(folder: Path, name: str, *texts: str) -> Path:
    """An archive of logs called control-seed1.txt, log1.txt and so on."""
    paths = write_logs(folder / name, *texts, script=None)
    paths[0] = paths[0].rename(paths[0].with_name("control-seed1.txt"))
    archive = folder / f"{name}.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        for path in paths:
            file.add(path, f"{name}/{path.name}")
    shutil.rmtree(folder / name)
    return archive


def test_archives_are_series_that_share_a_table_each_with_its_control(tmp_path):
    """The second, of a slower GPU whose losses are 0.3 higher, has one change of the first."""
    pack(tmp_path, "a", log(3.4), log(3.5, **NO_SWITCH), log(3.9, **LOW_RATE))
    slow = dict(gpu="NVIDIA H100", step_time=1.0)
    pack(tmp_path, "b", log(3.7, **slow), log(3.75, **LOW_RATE, **slow),
         log(3.5, beta=0.9, gpu="NVIDIA H100", step_time=1.1))
    text = render(*read_series([tmp_path]))
    rows = [(row[0], row[1], row[3], row[4], row[5]) for row in table_of(text)]
    assert rows == [
        ("none: the control, control-seed1.txt, on NVIDIA H200", "1", "3.40000", "", "20.2 s"),
        ("none: the control, control-seed1.txt, on NVIDIA H100", "2", "3.70000", "", "40.4 s"),
        ("`batch_size`: 393216 -> 65536", "1", "3.50000", "+0.1000", "20.2 s (+0.0%)"),
        ("`matrix_lr`: 0.05 -> 0.03", "2", "3.75000", "+0.0500", "40.4 s (+0.0%)"),
        ("`beta`: absent -> 0.9", "2", "3.50000", "-0.2000", "44.4 s (+10.0%)")]
    first = text.split("\n")[0]
    assert "; NVIDIA H200 and NVIDIA H100; torch" in first
    assert "2 series, each row compared with the control of its own" in first
    assert command(tmp_path).stdout == text


@pytest.mark.parametrize("header, problem", [
    (dict(val_tokens=10_485_760), "val_tokens: 1048576 against 10485760"),
    (dict(torch="2.12.0"), "torch: 2.11.0+cu130 against 2.12.0"),
    (dict(lines=step_lines(steps=20)), "steps: 40 against 20"),
])
def test_series_of_other_runs_share_no_table(tmp_path, header, problem):
    pack(tmp_path, "a", log(3.4), log(3.5, **NO_SWITCH))
    pack(tmp_path, "b", *(our_log(**{"lines": step_lines()} | header | change)
                          for change in ({}, LOW_RATE)))
    done = command(tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert "control-seed1.txt cannot share a table" in done.stderr and problem in done.stderr
    assert command(tmp_path / "b.tar.xz").returncode == 0


def test_all_folders_fill_the_page_and_a_stale_table_is_noticed(checkout):
    assert "there is no folder" in command(root=checkout).stderr
    command(name="table.py", root=checkout)
    assert "\nold\n" in (checkout / "README.md").read_text()
    places = [f"records/measurements/2026-12-0{day}_Ablation" for day in (1, 2)]
    for place, loss in zip(places, (3.9, 3.4), strict=True):
        pack(checkout / place, "logs", log(loss), log(3.5, **NO_SWITCH), log(3.2, **LOW_RATE))
    assert command("--check", name="table.py", root=checkout).returncode == 1
    done = command(name="table.py", root=checkout)
    assert done.returncode == 0 and "wrote README.md" in done.stdout
    assert command("--check", name="table.py", root=checkout).returncode == 0
    printed = command(root=checkout).stdout
    assert [row[4] for row in table_of(printed)] == ["", "", "+0.1000", "-0.2000"]
    assert (checkout / "README.md").read_text() == (
        f"# Page\n\n<!-- ablation -->\n{printed}\nMade from the logs in "
        f"[{places[0]}]({places[0]}) and [{places[1]}]({places[1]}).\n"
        f"<!-- end of ablation -->\n\nMore.\n")
    pack(checkout / places[1], "more", log(3.41), log(3.6, **LOW_RATE))
    done = command("--check", name="table.py", root=checkout)
    assert done.returncode == 1 and "stale: README.md" in done.stderr


def test_bad_logs_are_told_only_where_the_page_has_a_place_for_them(checkout):
    folder = checkout / "records" / "measurements" / "2026-12-01_Ablation"
    write_logs(folder, log(3.4), script=None)
    command(name="table.py", root=checkout)
    done = command(name="table.py", root=checkout)
    assert done.returncode == 1 and "old" in (checkout / "README.md").read_text()
    assert "measurements/2026-12-01_Ablation: all of the logs have the same" in done.stderr
    (checkout / "README.md").write_text("# Page\n")
    assert command(name="table.py", root=checkout).returncode == 0


def test_the_screening_says_what_its_page_says():
    ablation = read_ablation([SCREENING])
    assert ablation.control.runs[0].name == "control.txt" and len(ablation.others) == 15
    assert "On **webmix, which is not FineWeb**; NVIDIA H200;" in render(ablation)
    told = dict(re.findall(r"^\| (\w+) \|.*\| \**([+-]\d\.\d{3})\** \|",
                           (SCREENING / "README.md").read_text(), re.MULTILINE))
    assert len(told) == 15
    for group in ablation.others:
        gap, test = ablation.loss_gap(group)
        assert gap == pytest.approx(float(told[group.runs[0].path.stem]), abs=6e-4) and test is None
