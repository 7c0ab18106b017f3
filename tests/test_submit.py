"""./run.sh submit: what it refuses, warns of, bundles, checks in a clone, and says."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

TABLE = """\
import sys
from pathlib import Path
print(*sorted(path.name for path in Path.cwd().iterdir()))
print("7 record folders in order")
"""
FAILING_TABLE = """\
import sys
print("sample/Ünsound: clock goes back", file=sys.stderr)
sys.exit(1)
"""
CHECK = """\
import sys
print(*sys.argv[1:], file=sys.stderr)
print("verdict: not a record of webmix: it has no target")
sys.exit(1)
"""
RECORD = {
    "name": "Fast", "track": "webmix", "date": "2026-11-21", "description": "A narrow head",
    "contributors": ["Ada Lovelace", "Žofie  Šafářová"], "mean_train_time": 100.5, "n": 3,
    "mean_val_loss": 3.123456, "p": None, "hardware": {"name": "NVIDIA H200", "count": 2},
    "versions": {"torch": "2.11.0"},
}
# In two parts, so that this file does not look as if it held keys.
KEYS = {
    "Hugging Face token": "hf" + "_aBcD" + "e1F2" * 8,
    "OpenAI-like key": "sk" + "-aBcD" + "e1F2" * 11,
    "Anthropic key": "sk" + "-ant-api03-" + "e1F2_" * 8,
    "GitHub token": "gh" + "p_" + "e1F2" * 9,
    "AWS key": "AK" + "IA" + "E1F2" * 4,
    "Google key": "AI" + "za" + "e1F-_" * 7,
    "Slack token": "xo" + "xb-" + "123456-" * 4,
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "Weights & Biases key": "e1f2" * 10,
}
IDENTITY = {f"GIT_{who}_{what}": text for who in ("AUTHOR", "COMMITTER")
            for what, text in (("NAME", "A"), ("EMAIL", "a@example.org"))}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **IDENTITY}


def git(folder: Path, *command) -> str:
    return subprocess.run(["git", *map(str, command)], cwd=folder, env=ENVIRONMENT, check=True,
                          capture_output=True, encoding="utf-8").stdout


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def commit(folder: Path, message: str = "A change") -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def repo(tmp_path) -> Path:
    """A repository with submit.py and stand-ins for table.py and check.py, all committed."""
    folder = tmp_path / "my repo"
    git(tmp_path, "init", "-q", "-b", "main", folder)
    write(folder / "records" / "table.py", TABLE)
    write(folder / "records" / "check.py", CHECK)
    write(folder / "records" / "webmix" / "2026-11-21_Fast" / "record.json", json.dumps(RECORD))
    shutil.copy(ROOT / "records" / "submit.py", folder / "records")
    shutil.copy(ROOT / ".gitignore", folder)
    commit(folder)
    return folder


def start(repo: Path, *argv, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(repo / "records" / "submit.py"), *argv], cwd=repo.parent,
        env=ENVIRONMENT | {"PYTHONUTF8": "1"} | variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)


def submit(repo: Path, *argv, **variables) -> subprocess.CompletedProcess:
    process = start(repo, *(argv or ["Ada Lovelace"]), **variables)
    out, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(argv, process.returncode, out, errors)


def assert_refused(repo: Path, done: subprocess.CompletedProcess, *words: str) -> None:
    """It said so, in words and status, and left nothing behind, finished or not."""
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.rstrip().endswith("no bundle was made") and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(repo.glob("*.bundle*")) and not list(repo.glob(".submit*"))


# -----------------------------------------------------------------------------
# The bundle and the summary


def test_the_bundle_holds_all_refs_and_clones_to_the_same_commit(repo, tmp_path):
    git(repo, "tag", "v1")
    git(repo, "branch", "other")
    head = commit_of_change = commit(repo / write(repo / "new.txt", "new").parent)
    done = submit(repo)
    assert done.returncode == 0, done.stderr
    git(tmp_path, "clone", "-q", repo / "ada-lovelace.bundle", "clone")
    assert git(tmp_path / "clone", "rev-parse", "HEAD").strip() == head == commit_of_change
    assert (tmp_path / "clone" / "new.txt").read_text() == "new"
    assert set(git(tmp_path / "clone", "branch", "-r").split()) >= {"origin/main", "origin/other"}
    assert git(tmp_path / "clone", "tag").strip() == "v1"
    assert not list(repo.glob(".submit*"))  # the clone that it made has gone
    assert git(repo, "status", "--porcelain") == ""


def test_the_summary_tells_what_is_sent_and_what_the_checks_said(repo):
    done = submit(repo)
    bundle, summary = repo / "ada-lovelace.bundle", done.stdout
    head = git(repo, "rev-parse", "HEAD").strip()
    assert f"Submission of Ada Lovelace, {date.today()}\n" in summary
    assert f"ada-lovelace.bundle, {bundle.stat().st_size / 1e6:.2f} MB\n" in summary
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() in summary
    assert f"{head} on main\n" in summary
    assert f"\n    {head} refs/heads/main\n" in summary and f"\n    {head} HEAD\n" in summary
    assert "7 record folders in order" in summary
    for words in ("records/webmix/2026-11-21_Fast\n", "A narrow head", "track webmix, n 3",
                  "val_loss 3.12346", "train_time 100.500 s", "no target", "2 x NVIDIA H200",
                  "verdict: not a record of webmix: it has no target"):
        assert words in summary
    assert "warning" not in summary + done.stderr
    assert "Nothing was sent" in summary and "maintainers" in summary


def test_the_checks_run_in_the_clone_with_the_folder_and_its_track(repo):
    write(repo / "logs" / "seen.png", "ignored, hence in no clone")
    write(repo / "records" / "check.py", CHECK.replace("verdict:", "verdict: {sys.argv[1:]}")
          .replace('print("', 'print(f"'))
    commit(repo)
    done = submit(repo)
    assert "clone of the bundle: .git .gitignore records\n" in done.stdout
    assert "['--track', 'webmix', 'records/webmix/2026-11-21_Fast']" in done.stdout


def test_folders_that_name_nobody_or_another_are_left_out_of_the_summary(repo):
    other = RECORD | {"name": "Other", "contributors": ["Ada Lovelace Jr"]}
    write(repo / "records" / "sample" / "2026-11-22_Other" / "record.json", json.dumps(other))
    mine = RECORD | {"track": "sample", "p": 0.00123, "contributors": ["ada  LOVELACE"],
                     "mean_core": 0.26}
    write(repo / "records" / "negative" / "2026-11-22_Mine" / "record.json", json.dumps(mine))
    commit(repo)
    done = submit(repo, "Ada Lovelace")
    assert "2026-11-22_Mine\n" in done.stdout and "2026-11-21_Fast\n" in done.stdout
    assert "p 0.00123" in done.stdout and "Other" not in done.stdout
    assert done.stdout.count("mean CORE 0.260000") == done.stdout.count("CORE") == 1


def test_a_person_whom_no_folder_names_is_warned_and_told_how_to_make_one(repo):
    done = submit(repo, "Conan O'Brien")
    assert done.returncode == 0 and (repo / "conan-o-brien.bundle").exists()
    assert "warning: no record.json names Conan O'Brien" in done.stderr
    assert "records/record.py" in done.stderr
    assert "warning   no record.json names Conan O'Brien" in done.stdout


@pytest.mark.parametrize("name, file", [
    ("Žofie Šafářová", "zofie-safarova"), ("Z\u030cofie   S\u030cafářová\n", "zofie-safarova"),
    ('Conan "The" O\'Brien', "conan-the-o-brien"), ("王小明", "王小明"), ("김 민수", "김-민수"),
    ("हिन्दी", "हिन्दी"), ("../a/b.c", "a-b-c"), ("R2 D2", "r2-d2"), ("$(id)_x;", "id-x"),
])
def test_any_name_makes_a_file_name(repo, name, file):
    done = submit(repo, name)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in repo.glob("*.bundle")] == [f"{file}.bundle"]
    assert f"Submission of {' '.join(name.split())}," in done.stdout
    if "zofie" in file:
        assert "2026-11-21_Fast" in done.stdout  # which spells it with another space


def test_words_without_quotes_are_one_name(repo):
    assert submit(repo, "Ada", "Lovelace").returncode == 0
    assert (repo / "ada-lovelace.bundle").exists()


def test_a_very_long_name_is_no_file_name_too_long(repo):
    assert submit(repo, "明" * 300).returncode == 0


def test_a_terminal_that_cannot_show_a_name_gets_it_escaped(repo):
    write(repo / "žába.txt", "which the check in the clone prints")
    commit(repo)
    done = submit(repo, "Žofie Šafářová", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Submission of \\u017dofie " in done.stdout


@pytest.mark.parametrize("argv", [[""], ["--leave_logs"], ["!!! -"], ["\u0301"]])
def test_without_a_name_there_is_the_usage(repo, argv):
    done = submit(repo, *argv)
    assert done.returncode == 2 and not list(repo.glob("*.bundle*"))
    assert './run.sh submit "First Last"' in done.stderr and "expected your name" in done.stderr


def test_an_older_bundle_is_replaced_and_that_is_said(repo):
    old = write(repo / "ada-lovelace.bundle", "old")
    done = submit(repo)
    assert done.returncode == 0 and old.read_bytes().startswith(b"# v2 git bundle")
    assert "replacing the ada-lovelace.bundle" in done.stderr
    (repo / "ada-lovelace.bundle").unlink()
    assert "replacing" not in submit(repo).stderr


@pytest.mark.parametrize("with_branch", [True, False])
def test_a_detached_head_is_what_the_clone_holds(repo, tmp_path, with_branch):
    git(repo, "checkout", "-q", "--detach")
    write(repo / "later.txt", "later")
    head = commit(repo)
    if not with_branch:
        git(repo, "branch", "-q", "-D", "main")
    done = submit(repo)
    assert done.returncode == 0, done.stderr
    assert f"{head} on no branch (detached HEAD)" in done.stdout
    assert "later.txt" in done.stdout  # by the stand-in for table.py, which lists the clone
    git(tmp_path, "clone", "-q", repo / "ada-lovelace.bundle", "clone")
    git(tmp_path / "clone", "checkout", "-q", head)
    assert (tmp_path / "clone" / "later.txt").exists()


def test_a_git_hook_s_environment_does_not_lead_to_another_repository(repo, tmp_path):
    git(tmp_path, "init", "-q", "other")
    done = submit(repo, GIT_DIR=str(tmp_path / "other" / ".git"), GIT_INDEX_FILE="none")
    assert done.returncode == 0, done.stderr
    assert git(repo, "rev-parse", "HEAD").strip() in done.stdout


# -----------------------------------------------------------------------------
# Refusals


def test_uncommitted_changes_are_refused_and_listed(repo):
    for name in ("changed.txt", "gone.txt", "staged.txt", "old name.txt"):
        write(repo / name, f"{name} " * 20)
    commit(repo)
    write(repo / "changed.txt", "edited")
    (repo / "gone.txt").unlink()
    write(repo / "staged.txt", "edited")
    git(repo, "mv", "old name.txt", "moved.txt")
    git(repo, "add", "staged.txt")
    write(repo / "žluťoučký \"kůň\".txt", "new")
    write(repo / "folder" / "in it.py", "new")
    git(repo, "config", "status.showUntrackedFiles", "no")  # would hide them
    done = submit(repo)
    assert_refused(repo, done, "7 paths not committed", "changed  changed.txt\n",
                   "deleted  gone.txt\n", "changed  staged.txt\n", "deleted  old name.txt\n",
                   "new      moved.txt\n", "new      žluťoučký \"kůň\".txt\n",
                   "new      folder/in it.py\n", "git commit")


def test_of_many_uncommitted_changes_twenty_are_listed(repo):
    for index in range(23):
        write(repo / f"new{index:02d}.py", "")
    done = submit(repo)
    assert_refused(repo, done, "23 paths", "new19.py\n", "... and 3 more\n")
    assert "new20.py" not in done.stderr


def test_a_shallow_clone_is_refused(repo, tmp_path):
    write(repo / "later.txt", "later")
    commit(repo)
    git(tmp_path, "clone", "-q", "--depth", "1", repo.as_uri(), "shallow")
    assert_refused(tmp_path / "shallow", submit(tmp_path / "shallow"), "shallow",
                   "git fetch --unshallow")
    git(tmp_path / "shallow", "fetch", "-q", "--unshallow")
    assert submit(tmp_path / "shallow").returncode == 0


def test_logs_that_git_ignores_are_refused_unless_left(repo):
    write(repo / ".git" / "info" / "exclude", "*.log\n")
    write(repo / "logs" / "run 1.txt", "step:1/1")
    write(repo / "logs" / "old" / "běh.log", "step:2/2")
    write(repo / "records" / "webmix" / "2026-11-21_Fast" / "seed1.log", "step:3/3")
    write(repo / "logs" / "run.png", "no log")
    write(repo / "wandb" / "debug.log", "not of a run")
    done = submit(repo, "Conan O'Brien")
    assert_refused(repo, done, "3 logs", "\n    logs/run 1.txt\n", "\n    logs/old/běh.log\n",
                   "2026-11-21_Fast/seed1.log\n", "python records/record.py LOG...", "--leave_logs",
                   """--by 'Conan O'"'"'Brien'""")
    assert "run.png" not in done.stderr and "debug.log" not in done.stderr
    for option in ("--leave_logs", "--leave-logs"):
        done = submit(repo, "Ada Lovelace", option)
        assert done.returncode == 0 and "3 logs that git ignores" in done.stdout


def test_an_ignored_log_whose_content_is_committed_is_fine(repo):
    text = "step:1/1 val_loss:3.0\r\n"
    write(repo / ".gitattributes", "records/**/*.txt -text\n")
    git(repo, "config", "core.autocrlf", "input")  # counts for logs/, and not for records/
    write(repo / "logs" / "run.txt", text)
    write(repo / "records" / "webmix" / "2026-11-21_Fast" / "log0.txt", text)
    commit(repo)
    done = submit(repo)
    assert done.returncode == 0 and "left out" not in done.stdout
    (repo / "ada-lovelace.bundle").unlink()
    write(repo / "logs" / "run.txt", text + "one more line")
    assert_refused(repo, submit(repo), "git ignores 1 log,", "logs/run.txt")


def test_all_refusals_come_at_once(repo):
    write(repo / "logs" / "run.txt", "step:1/1")
    write(repo / "new.py", "")
    assert_refused(repo, submit(repo), "logs/run.txt", "new.py")


def test_without_a_repository_or_a_commit_there_is_a_clear_error(repo, tmp_path):
    bare = tmp_path / "download"
    shutil.copytree(repo, bare, ignore=shutil.ignore_patterns(".git"))
    alone = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    assert_refused(bare, submit(bare, **alone), "not a git repository", "git clone")
    git(tmp_path, "init", "-q")
    assert_refused(bare, submit(bare), "only lies in one", str(tmp_path))
    git(bare, "init", "-q")
    assert_refused(bare, submit(bare), "no commit yet", "git commit")


def test_without_git_it_says_so(repo, tmp_path):
    assert_refused(repo, submit(repo, PATH=str(tmp_path)), "git was not found", "install")


def test_a_failing_check_in_the_clone_keeps_no_bundle(repo):
    write(repo / "records" / "table.py", FAILING_TABLE)
    commit(repo)
    assert_refused(repo, submit(repo), "table.py --check fails", "sample/Ünsound: clock goes back")
    write(repo / "ada-lovelace.bundle", "old")
    done = submit(repo)
    assert done.returncode == 1 and (repo / "ada-lovelace.bundle").read_text() == "old"
    assert "the ada-lovelace.bundle that is there is an older one" in done.stderr


def test_what_is_only_here_does_not_pass_the_check_in_the_clone(repo):
    """A script that git ignores is on this machine, but in no clone."""
    git(repo, "rm", "-q", "--cached", "records/table.py")
    write(repo / ".git" / "info" / "exclude", "table.py\n")
    commit(repo)
    assert_refused(repo, submit(repo), "table.py --check fails", "No such file")


@pytest.mark.parametrize("script, words", [
    ("print('nothing to check')", "gave no verdict:\nnothing to check"), ("1 / 0", "ZeroDivision")])
def test_a_check_without_a_verdict_keeps_no_bundle(repo, script, words):
    write(repo / "records" / "check.py", script)
    commit(repo)
    done = submit(repo)
    assert done.returncode == 1 and words in done.stderr and not list(repo.glob("*.bundle*"))


@pytest.mark.parametrize("text", ["{", "[]", '{"contributors": ["Ada Lovelace"]}'])
def test_a_damaged_record_keeps_no_bundle(repo, text):
    write(repo / "records" / "webmix" / "2026-11-21_Fast" / "record.json", text)
    commit(repo)
    assert_refused(repo, submit(repo), "2026-11-21_Fast/record.json is not in order")


def test_ctrl_c_leaves_nothing_behind(repo, tmp_path):
    write(repo / "records" / "table.py", "import pathlib, time\n"
          f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(60)\n")
    commit(repo)
    process = start(repo, "Ada Lovelace")
    wait_for(process, (tmp_path / "begun").exists, 30)
    assert list(repo.glob(".submit*"))
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "stopped; no bundle was made" in errors
    assert not list(repo.glob("*.bundle*")) and not list(repo.glob(".submit*"))


# -----------------------------------------------------------------------------
# Warnings


def test_stashes_are_listed_and_what_goes_along_is_told(repo):
    for text in ("one", "two"):
        write(repo / ".gitignore", text)
        git(repo, "stash", "push", "-q", "-m", f"idea {text}")
    done = submit(repo)
    assert done.returncode == 0
    assert "warning: stashed changes; the newest of these goes along" in done.stderr
    assert "stash@{0}: On main: idea two\n" in done.stderr and "idea one" in done.stderr
    assert "git stash drop" in done.stderr and "refs/stash" in done.stdout
    assert "warning   stashed changes" in done.stdout
    git(repo, "stash", "clear")
    done = submit(repo)
    assert "stash" not in done.stderr + done.stdout


def assert_warned_of(done: subprocess.CompletedProcess, path: str, kind: str, key: str) -> None:
    """With its beginning, never whole, whatever else is listed, and without a failure."""
    assert done.returncode == 0, done.stderr
    assert f"\n    {path}: {kind} {key[:6]}... in " in done.stderr
    assert key[:12] not in done.stderr + done.stdout


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("form", ['{}', 'k = "{}"\n', "name_{0} {0}\n"])
def test_each_kind_of_key_is_found(repo, kind, form):
    key = KEYS[kind]
    beside = "{}" if kind != "Weights & Biases key" else (
        'wandb_api_key: "{}"' if form == "{}" else 'os.environ["WANDB_API_KEY"] = \'{}\'')
    write(repo / "a b.env", form.format(beside.format(key)))
    commit(repo)
    done = submit(repo)
    assert_warned_of(done, "a b.env", kind, key)
    assert "warning: 1 string like a key" in done.stderr
    assert "warning   1 string like a key" in done.stdout
    blob = git(repo, "rev-parse", "HEAD:a b.env").strip()
    assert f"in blob {blob[:10]}\n" in done.stderr


def test_a_key_of_an_old_commit_another_branch_a_stash_or_a_message_is_found(repo):
    places = dict(zip(("old.py", "branch.py", "stash.py"), list(KEYS.items())[:3], strict=True))
    (old, (_, key)), (branch, (_, branch_key)), (stash, (_, stash_key)) = places.items()
    write(repo / old, key)
    commit(repo)
    write(repo / old, f"{key}\n")
    commit(repo)
    (repo / old).unlink()
    kind, message_key = "GitHub token", KEYS["GitHub token"]
    commit(repo, f"Remove it, and name {message_key}")
    git(repo, "checkout", "-q", "-b", "other")
    write(repo / branch, branch_key)
    commit(repo)
    git(repo, "checkout", "-q", "main")
    write(repo / stash, stash_key)
    git(repo, "stash", "push", "-q", "--include-untracked")
    done = submit(repo)
    for path, (kind_of_key, secret) in places.items():
        assert_warned_of(done, path, kind_of_key, secret)
    assert_warned_of(done, "(message of a commit)", kind, message_key)
    assert f"and name {message_key[:6]}...\n" in done.stderr  # in the list of stashes
    assert "warning: 4 strings like a key" in done.stderr
    assert "and 1 other version\n" in done.stderr


def test_what_only_resembles_a_key_raises_no_warning(repo):
    some = "\n".join([
        "a1b2c3d4" * 5, "commit " + "e1f2" * 10, "WANDB_API_KEY=${KEY}", "half_" + "of" * 30,
        "task-" + "a1b2" * 12, "sk-learn-estimator-documentation-link", "x" + KEYS["AWS key"],
        "hf_" + "hub_download_with_many_words_in_it", "-----BEGIN PUBLIC KEY-----", "ghp_short"])
    write(repo / "some.txt", some)
    write(repo / "data.bin", KEYS["GitHub token"].encode() + b" \0 binary")
    shutil.copy(__file__, repo)
    commit(repo)
    done = submit(repo)
    assert done.returncode == 0 and "warning" not in done.stderr + done.stdout


def test_a_file_of_data_is_not_searched_and_the_next_one_is(repo):
    key = KEYS["GitHub token"]
    write(repo / "a.txt", f"{key}\n".encode() + b"a" * 50_000_000)
    write(repo / "b.txt", b"\xff\n" + KEYS["AWS key"].encode())
    commit(repo)
    done = submit(repo)
    assert_warned_of(done, "b.txt", "AWS key", KEYS["AWS key"])
    assert "a.txt" not in done.stderr


def test_a_file_name_beyond_ascii_is_named_beside_its_key(repo):
    key = KEYS["Slack token"]
    names = "klíče \"x\".txt", f"of {key}.txt"
    for name in names:
        write(repo / "more" / name, f"{name} token={key}")
    commit(repo)
    done = submit(repo)
    for name in names:
        assert_warned_of(done, f"more/{name.replace(key, key[:6] + '...')}", "Slack token", key)


# -----------------------------------------------------------------------------
# With the scripts of this repository


def test_a_real_folder_passes_and_one_that_lies_does_not(tmp_path):
    folders = [path.parent for path in sorted((ROOT / "records").glob("*/*/record.json"))]
    if not folders:
        pytest.skip("there is no record folder yet")
    record = json.loads((folders[0] / "record.json").read_text(encoding="utf-8"))
    repo, place = tmp_path / "repo", folders[0].relative_to(ROOT)
    git(tmp_path, "init", "-q", "repo")
    for path in (ROOT / "records").iterdir():
        if path.is_file():
            write(repo / "records" / path.name, path.read_bytes())
    shutil.copytree(folders[0], repo / place)
    for name in ("README.md", ".gitignore", ".gitattributes"):
        shutil.copy(ROOT / name, repo)
    subprocess.run([sys.executable, "records/table.py"], cwd=repo, check=True, capture_output=True)
    commit(repo)
    name = record["contributors"][0]
    done = submit(repo, name.upper())
    assert done.returncode == 0, done.stderr
    assert "1 record folders in order" in done.stdout and f"\n{place.as_posix()}\n" in done.stdout
    assert f"verdict: {'a sound' if record['p'] is None else 'a record'}" in done.stdout

    path = repo / place / "record.json"
    write(path, json.dumps(record | {"mean_val_loss": record["mean_val_loss"] - 0.5}))
    commit(repo)
    for bundle in repo.glob("*.bundle"):
        bundle.unlink()
    assert_refused(repo, submit(repo, name), "table.py --check fails", "mean_val_loss")
