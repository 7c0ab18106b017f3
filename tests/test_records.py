"""Record folders: made from logs, validated, and written into the tables."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from record_logs import (
    BY_CORE,
    SOURCE,
    our_log,
    public_log,
    step_lines,
    write_core,
    write_logs,
)

from check import TRACKS, check  # isort: skip  records/ is on the path from here on
from logs import read_logs  # isort: skip
from record import RecordError, load, make_folder, violations  # isort: skip

SCHEMA = json.loads((ROOT / "records" / "record.schema.json").read_text())


def script(name: str, *argv, root: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "records" / name), *map(str, argv)],
                          capture_output=True, text=True, timeout=120, cwd=root)


def made(folder: Path, seeds=(1, 2, 3, 4), negative=False, **header) -> Path:
    """A record folder as record.py makes it, its README.md told."""
    runs = read_logs(write_logs(folder / "logs", *(our_log(seed, **header) for seed in seeds)))
    place = make_folder(check(runs), "Idea", "A better idea", ["Ada Lovelace"], root=folder,
                        negative=negative)
    (place / "README.md").write_text("# Told\n")
    return place


@pytest.fixture(scope="module")
def four_runs(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("four_runs"))


@pytest.fixture
def folder(four_runs, tmp_path) -> Path:
    """A record folder to write to: a copy, since making one looks through all commits."""
    return Path(shutil.copytree(four_runs, tmp_path / four_runs.parent.name / four_runs.name))


def edit(folder: Path, **values) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """README.md and records/ of this repository, without the folders of runs."""
    (tmp_path / "checkout").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "checkout")
    shutil.copytree(ROOT / "records", tmp_path / "checkout" / "records",
                    ignore=shutil.ignore_patterns("20*", "__pycache__"))
    return tmp_path / "checkout"


def test_the_folders_and_tables_of_this_repository_are_in_order():
    done = script("table.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_says_what_its_logs_say(tmp_path):
    folder = made(tmp_path)
    record, report = load(folder)
    assert folder == tmp_path / "single-gpu" / "2026-11-21_Idea"
    assert report.is_record and record["n"] == 4 and record["runs_attempted"] == 4
    assert record["val_losses"] == [3.3751, 3.3752, 3.3753, 3.3754]
    assert record["mean_val_loss"] == pytest.approx(3.37525)
    assert record["std_val_loss"] == pytest.approx(0.000129099, rel=1e-5)
    assert record["p"] == pytest.approx(report.as_json()["p"]) and 0 < record["p"] < 1e-5
    assert record["mean_train_time"] == pytest.approx(20.2) and len(record["train_times"]) == 4
    assert record["train_tokens"] == 40 * 393_216 and record["val_tokens"] == 1_048_576
    assert record["hardware"] == {"name": "NVIDIA H200", "count": 1}
    assert record["versions"] == {"python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0"}
    assert record["data"]["name"] == "fineweb" and record["data"]["train_shards"] == 2
    assert record["commit"] is None  # no commit holds this source
    assert (folder / "train_gpt.py").read_text() == SOURCE
    assert violations(record, SCHEMA) == []


def test_a_folder_holds_the_kernels_that_ran_too(tmp_path):
    source = SOURCE + "\n# file: triton_kernels.py\nimport triton\n"
    logs = write_logs(tmp_path / "logs", *(our_log(seed, source=source) for seed in (1, 2, 3)))
    report = check(read_logs(logs), "single-gpu", source)
    folder = make_folder(report, "Kernels", "Faster", ["Ada"], root=tmp_path / "records")
    assert (folder / "train_gpt.py").read_text() == SOURCE
    assert (folder / "triton_kernels.py").read_text() == "import triton\n"
    assert check(read_logs([folder])).is_record


def test_the_commit_is_one_that_holds_the_source_that_ran():
    for folder in (ROOT / "records" / "webmix").iterdir():
        record = json.loads((folder / "record.json").read_text())
        shown = subprocess.run(["git", "show", f"{record['commit']}:train_gpt.py"], cwd=ROOT,
                               capture_output=True, text=True)
        if shown.returncode:
            pytest.skip("this checkout lacks the history")
        assert shown.stdout == (folder / "train_gpt.py").read_text()


def test_the_command_makes_a_folder_and_refuses_to_write_over_it(checkout, tmp_path):
    logs = write_logs(tmp_path / "logs", *(our_log(seed) for seed in (1, 2, 3)))
    argv = (*logs, "--name=New", "--description=Something new", "--by=Ada", "--by=Žofie",
            "--attempted=5")
    done = script("record.py", *argv, root=checkout)
    assert done.returncode == 0, done.stderr
    folder = checkout / "records" / "single-gpu" / "2026-11-21_New"
    record = json.loads((folder / "record.json").read_text())
    assert record["contributors"] == ["Ada", "Žofie"] and record["runs_attempted"] == 5
    assert "a record of single-gpu" in done.stdout
    again = script("record.py", *argv, root=checkout)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_logs_in_an_archive_are_to_be_unpacked_and_leave_no_folder(checkout, tmp_path):
    [log] = write_logs(tmp_path / "logs", our_log())
    with tarfile.open(tmp_path / "logs.tar.xz", "w:xz") as archive:
        archive.add(log, log.name)
    done = script("record.py", tmp_path / "logs.tar.xz", "--name=Packed", "--by=Ada",
                  "--description=Something new", root=checkout)
    assert done.returncode == 1 and "logs.tar.xz is an archive: unpack it" in done.stderr
    assert not list((checkout / "records").glob("*/*_Packed"))


def test_logs_that_say_too_little_make_no_folder(checkout, tmp_path):
    logs = write_logs(tmp_path / "logs", public_log(step_lines()))
    done = script("record.py", *logs, "--name=A", "--description=An idea", "--by=Ada",
                  "--track=gpt2-small", root=checkout)
    assert done.returncode == 1 and "does not start with its source, versions" in done.stderr
    assert not (checkout / "records" / "gpt2-small").exists()


def test_logs_that_prove_no_claim_make_no_folder(checkout, tmp_path):
    logs = write_logs(tmp_path / "logs", *(our_log(seed, val_tokens=524_288) for seed in (1, 2)))
    done = script("record.py", *logs, "--name=A", "--description=An idea", "--by=Ada", "--negative",
                  root=checkout)
    assert done.returncode == 1 and "val tokens: val_tokens: 524288 instead of" in done.stderr
    assert not list((checkout / "records").glob("*/*_A"))
    logs = write_logs(tmp_path / "high", *(
        our_log(seed, lines=step_lines(steps=40, final=4 + seed / 10)) for seed in (1, 2)))
    done = script("record.py", *logs, "--name=A", "--description=An idea", "--by=Ada",
                  root=checkout)
    assert done.returncode == 1 and "failed it goes on with --negative:\n    target:" in done.stderr


@pytest.mark.parametrize("name", ["two words", "a/b", "../up", ""])
def test_a_name_that_is_no_folder_name_is_refused(checkout, tmp_path, name):
    logs = write_logs(tmp_path / "logs", our_log())
    done = script("record.py", *logs, f"--name={name}", "--description=An idea", "--by=Ada",
                  root=checkout)
    assert done.returncode == 1 and "record.json: name is" in done.stderr


@pytest.mark.parametrize("change, problem", [
    (dict(n="4"), "n is \"4\", expected integer"),
    (dict(n=True), "n is true, expected integer"),
    (dict(n=0), "n is 0, expected at least 1"),
    (dict(p=1.5), "p is 1.5"),
    (dict(date="21.11.2026"), "date is '21.11.2026', expected the form"),
    (dict(track="single_gpu"), "track is 'single_gpu', expected one of"),
    (dict(contributors=[]), "contributors is empty"),
    (dict(contributors=["Ada", 5]), "contributors[1] is 5, expected string"),
    (dict(hardware={"name": "NVIDIA H200"}), "hardware lacks 'count'"),
    (dict(colour="red"), "has 'colour', which the schema does not know"),
    (dict(commit="abc"), "commit is 'abc', expected the form"),
    (dict(logs=["../log.txt"]), "logs[0] is '../log.txt', expected the form"),
])
def test_record_json_has_to_follow_the_schema(folder, change, problem):
    edit(folder, **change)
    with pytest.raises(RecordError) as error:
        load(folder)
    assert problem in str(error.value) and "single-gpu/2026-11-21_Idea" in str(error.value)


@pytest.mark.parametrize("name", SCHEMA["required"])
def test_record_json_lacks_nothing(folder, name):
    record = json.loads((folder / "record.json").read_text())
    del record[name]
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match=f"record.json lacks '{name}'"):
        load(folder)


@pytest.mark.parametrize("change", [
    dict(mean_train_time=19.9), dict(val_losses=[3.37, 3.37, 3.37, 3.37]), dict(n=3),
    dict(train_tokens=1), dict(p=1e-9), dict(std_val_loss=None), dict(logs=["log0.txt"]),
    dict(hardware={"name": "NVIDIA H200", "count": 8}),
    dict(versions={"python": "3.12.3", "torch": "2.12", "cuda": "13.0"}),
])
def test_record_json_says_what_the_logs_say(folder, change):
    edit(folder, **change)
    [name] = change
    with pytest.raises(RecordError, match=f"record.json says {name} is .*, but the logs say"):
        load(folder)


def spoil_readme(folder):
    (folder / "README.md").write_text("**Idea.** (to be told: what)")


def without_readme(folder):
    (folder / "README.md").unlink()


def without_script(folder):
    (folder / "train_gpt.py").unlink()


def other_script(folder):
    (folder / "train_gpt.py").write_text(SOURCE + "\nfaster = True\n")


def broken_json(folder):
    (folder / "record.json").write_text("{")


def missed_target(folder):
    write_logs(folder, our_log(1, lines=step_lines(final=3.4)))


def without_logs(folder):
    for log in folder.glob("*.txt"):
        log.unlink()


@pytest.mark.parametrize("spoil, problem", [
    (spoil_readme, "README.md still says '(to be told: ...'"),
    (without_readme, "README.md"),
    (without_script, "train_gpt.py, as it ran, is missing"),
    (other_script, "check.py does not pass it: not a record of single-gpu: source"),
    (broken_json, "Expecting property name"),
    (missed_target, "check.py does not pass it: not a record of single-gpu: "),
    (without_logs, "holds no logs"),
])
def test_a_folder_that_is_not_in_order_is_refused_by_name(folder, spoil, problem):
    load(folder)
    spoil(folder)
    with pytest.raises(RecordError) as error:
        load(folder)
    assert problem in str(error.value) and "2026-11-21_Idea" in str(error.value)


def test_a_folder_has_to_be_called_what_it_is_and_stand_under_its_track(folder, tmp_path):
    moved = folder.rename(folder.with_name("2026-11-22_Idea"))
    with pytest.raises(RecordError, match="should be called 2026-11-21_Idea"):
        load(moved)
    other = tmp_path / "gpt2-small" / "2026-11-21_Idea"
    shutil.copytree(moved, other)
    with pytest.raises(RecordError, match="it belongs into single-gpu/"):
        load(other)


def test_a_negative_result_may_miss_the_target_but_not_the_other_rules(tmp_path):
    folder = made(tmp_path, negative=True, lines=None, seeds=(1, 2, 3))
    assert folder.parent.name == "negative"
    load(folder)
    missed = made(tmp_path / "missed", negative=True, seeds=(1,), lines=step_lines(final=3.5))
    record, report = load(missed)
    assert not report.is_record and record["mean_val_loss"] == 3.5
    log = missed / "log0.txt"
    log.write_text(log.read_text().replace("warm-up: undone after 67.2s\n", ""))
    with pytest.raises(RecordError, match="warm-up"):
        load(missed)


def test_a_record_by_core_keeps_the_scores_and_stands_among_the_records(checkout, tmp_path):
    for name, step_time, scores in (("Slow", 0.5, (0.28, 0.25)), ("Fast", 0.25, (0.27, 0.26))):
        lines = [step_lines(step_time=step_time, final=3.1 + score) for score in scores]
        logs = write_logs(tmp_path / name, *(our_log(seed, some, **BY_CORE)
                                             for seed, some in enumerate(lines)))
        files = [write_core(log, mean) for log, mean in zip(logs, scores, strict=True)]
        done = script("record.py", *logs, f"--name={name}", "--description=An idea", "--by=Ada",
                      root=checkout)
        assert done.returncode == 0, done.stderr
        folder = checkout / "records" / "time-to-gpt2" / f"2026-11-21_{name}"
        for file in files:
            assert (folder / file.name).read_bytes() == file.read_bytes()
        assert json.loads((folder / "record.json").read_text())["mean_core"] == 0.265
        (folder / "README.md").write_text("# Told\n")
    done = script("table.py", root=checkout)
    assert done.returncode == 0, done.stderr
    text = (checkout / "README.md").read_text()
    records = text.split("<!-- records -->")[1].split("<!-- end of records -->")[0]
    section = records.split("**`time-to-gpt2`**: CORE above 0.256525.\n")[1]
    slow, fast = re.findall(r"^\| \d .*", section, re.MULTILINE)  # ranked by time
    assert slow.startswith("| 1 | 20.2 s | 3.36500 ± 0.02121 (n 2), CORE 0.265000 | [An idea]")
    assert fast.startswith("| 2 | 10.1 s | 3.36500 ± 0.00707 (n 2), CORE 0.265000 | [An idea]")
    assert "No record yet on `single-gpu`, `gpt2-small`, `gpt2-medium`" in records
    assert "`time-to-gpt2`" not in records.split("No record yet on")[1]
    assert "CORE" not in text.split("<!-- measurements -->")[1].split("<!-- end of meas")[0]
    (folder / "log1.core.json").unlink()
    done = script("table.py", root=checkout)
    assert done.returncode == 1 and "log1.txt has no CORE score: measure it with" in done.stderr


def test_a_score_that_record_json_makes_up_is_refused(tmp_path):
    folder = made(tmp_path)
    edit(folder, mean_core=0.3)
    with pytest.raises(RecordError, match="says mean_core is 0.3, but the logs say None"):
        load(folder)


def test_runs_without_their_core_score_make_no_folder_but_a_low_one_is_a_negative_result(tmp_path):
    logs = write_logs(tmp_path / "logs", our_log(**BY_CORE))
    make = partial(make_folder, name="Idea", description="An idea", contributors=["Ada"],
                   root=tmp_path)
    with pytest.raises(RecordError, match="pass the logs:\n    target: .* `python evals/core.py "):
        make(check(read_logs(logs)))
    write_core(logs[0], 0.2)
    with pytest.raises(RecordError, match="goes on with --negative:\n    target: .*CORE 0.200"):
        make(check(read_logs(logs)))
    folder = make(check(read_logs(logs)), negative=True)
    (folder / "README.md").write_text("# Told\n")
    record, report = load(folder)
    assert record["mean_core"] == 0.2 and not report.is_record


def test_the_table_has_a_row_for_each_record_oldest_first(checkout, tmp_path):
    for day, name, step_time in (("21", "Day21", 0.5), ("22", "Day22", 0.25), ("22", "Also", 0.2)):
        logs = write_logs(tmp_path / name, *(
            our_log(seed, lines=step_lines(step_time=step_time, final=3.37 + seed * 1e-4))
            .replace("date: 2026-11-21", f"date: 2026-11-{day}") for seed in (1, 2, 3)))
        done = script("record.py", *logs, f"--name={name}", "--description=Halve | it",
                      "--by=Ada", root=checkout)
        assert done.returncode == 0, done.stderr
        for readme in (checkout / "records" / "single-gpu").glob("*/README.md"):
            readme.write_text("# Told\n")
    assert script("table.py", "--check", root=checkout).returncode == 1  # stale
    done = script("table.py", root=checkout)
    assert done.returncode == 0, done.stderr
    assert script("table.py", "--check", root=checkout).returncode == 0
    text = (checkout / "README.md").read_text()
    records = text.split("<!-- records -->")[1].split("<!-- end of records -->")[0]
    rows = [line for line in records.split("\n") if re.match(r"\| \d", line)]
    assert len(rows) == 3 and "2026-11-22_Also" in rows[2]  # later on the same day, so faster
    assert rows[1] == (
        "| 2 | 10.1 s | 3.37020 ± 0.00010 (n 3) | [Halve \\| it]"
        "(records/single-gpu/2026-11-22_Day22/README.md) | 2026-11-22 | "
        "[log](records/single-gpu/2026-11-22_Day22/log0.txt) | Ada | NVIDIA H200, torch "
        "2.11.0+cu130 | fineweb, 15.7M tokens |")
    assert "No record yet on `gpt2-small`, `gpt2-medium`, `time-to-gpt2`" in records
    measurements = text.split("<!-- measurements -->")[1].split("<!-- end of measurements -->")[0]
    assert "Day2" not in measurements


def test_the_rest_of_the_page_stays_as_it_is(checkout):
    before = (checkout / "README.md").read_text()
    script("table.py", root=checkout)
    after = (checkout / "README.md").read_text()

    def rest(text: str) -> str:
        return re.sub(r"(?s)<!-- (\w+) -->.*?<!-- end of \1 -->", "", text)

    assert rest(before) == rest(after) and "<!--" not in rest(before)
    assert "<!-- records -->" in before and "<!-- measurements -->" in before


def test_a_bad_folder_keeps_the_table_from_being_written(checkout, tmp_path):
    logs = write_logs(tmp_path / "logs", *(our_log(seed) for seed in (1, 2, 3)))
    script("record.py", *logs, "--name=Untold", "--description=An idea", "--by=Ada", root=checkout)
    before = (checkout / "README.md").read_bytes()
    done = script("table.py", root=checkout)
    assert done.returncode == 1 and "single-gpu/2026-11-21_Untold" in done.stderr
    assert "to be told" in done.stderr and (checkout / "README.md").read_bytes() == before


def test_a_folder_of_no_track_is_refused(checkout):
    (checkout / "records" / "my-track").mkdir()
    done = script("table.py", root=checkout)
    assert done.returncode == 1 and "my-track: no track" in done.stderr


def test_webmix_never_stands_among_the_records():
    text = (ROOT / "README.md").read_text()
    records = text.split("<!-- records -->")[1].split("<!-- end of records -->")[0]
    measurements = text.split("<!-- measurements -->")[1].split("<!-- end of measurements -->")[0]
    assert "webmix" not in records
    assert measurements.count("| webmix, ") == len(list((ROOT / "records/webmix").iterdir()))
    assert TRACKS["webmix"].target is None


def test_the_baselines_wandb_run_holds_the_losses_of_its_log():
    folder = ROOT / "records" / "webmix" / "2026-11-21_Baseline"
    [run] = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = run.read_bytes()
    assert content.startswith(b":W&B")
    [log] = folder.glob("*.txt")
    losses = re.findall(r"^step:\d+/380 val_loss:(\S+)", log.read_text(), re.MULTILINE)
    reported = {f"{float(found):.5f}"
                for found in re.findall(rb"val_loss[^0-9]{0,6}(\d+\.\d{6,})", content)}
    assert len(losses) == 20 and set(losses) <= reported


def test_links_between_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "records").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
