"""Bundle the repository as a submission, and check what is in the bundle. Sends nothing.

    ./run.sh submit "First Last"

writes first-last.bundle (`git bundle create --all`), clones it, checks the logs in the clone, and
prints a summary to send along with it. It refuses what a bundle would silently leave out or break:
uncommitted changes, logs that git ignores, a shallow clone. Of what a bundle holds unseen, stashes
and strings that look like keys, it warns. The summary goes to stdout, all else to stderr.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 50_000_000  # bytes of a file that is searched for keys; larger ones are data
SHOWN = 6  # characters of a key that are shown
# Without what makes git look at another repository, as inside of a git hook.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_NAMESPACE", "GIT_PREFIX",
)} | {"PYTHONIOENCODING": "utf-8"}

# How keys begin and go on, where no letter or digit comes before. The group is the secret.
KEY_FORMS = {
    "Hugging Face token": rb"(hf_[A-Za-z0-9]{30,})",
    "OpenAI-like key": rb"(sk-(?:(?:proj|svcacct|admin)-[\w-]{20,}|(?:or-v1-)?[A-Za-z0-9]{32,}))",
    "Anthropic key": rb"(sk-ant-[\w-]{20,})",
    "GitHub token": rb"(gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "AWS key": rb"(A[KS]IA[0-9A-Z]{16})",
    "Google key": rb"(AIza[\w-]{35})",
    "Slack token": rb"(xox[a-z]-[\w-]{10,})",
    "private key": rb"(-----BEGIN [A-Z ]*PRIVATE KEY)",
    "Weights & Biases key":
        rb"(?:wandb_api_key|WANDB_API_KEY)[\"'\]]*\s*[=:]\s*[\"']?([0-9a-f]{40})",
}


class SubmitError(RuntimeError):
    """Why there is no submission; the message is for a person."""


def git(*command: str, cwd: Path = ROOT, text: str = "") -> str:
    """The output of a git command that reads `text`; SubmitError with what git says if it fails."""
    done = subprocess.run(["git", *command], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                          input=os.fsencode(text))
    if done.returncode:
        raise SubmitError(f"git {command[0]} failed: {os.fsdecode(done.stderr).strip()}")
    return os.fsdecode(done.stdout)


def split(output: str, separator: str = "\0") -> list[str]:
    """The items of an output in which each ends with a separator."""
    return [item for item in output.split(separator) if item]


def listed(items: Iterable[str], most: int = 20) -> str:
    """Indented lines, and the number of those beyond `most`."""
    items = list(items)
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n    {item}" for item in items[:most] + more)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bundle_name(name: str) -> str:
    """A file name from a person's: "Zoë O'Brien" gives zoe-o-brien. Empty without any letter."""
    letters = [letter for letter in unicodedata.normalize("NFKD", name).lower()
               if not "\u0300" <= letter <= "\u036f"]  # accents; other scripts need their marks
    text = "".join(letter if unicodedata.category(letter)[0] in "LMN" else "-"
                   for letter in letters)
    return re.sub("-+", "-", unicodedata.normalize("NFC", text)).strip("-")[:60]


# -----------------------------------------------------------------------------
# What is refused


def require_repository() -> None:
    """SubmitError unless ROOT is a repository of its own, with a commit, and git is there."""
    if shutil.which("git") is None:
        raise SubmitError("git was not found; on Debian and Ubuntu: sudo apt install git")
    try:
        top = git("rev-parse", "--show-toplevel").removesuffix("\n")
    except SubmitError as error:
        raise SubmitError(f"{ROOT} cannot be bundled: {error}\n"
                          f"work in a clone, made with: git clone") from None
    if Path(top).resolve() != ROOT:
        raise SubmitError(f"{ROOT} is no git repository, it only lies in one, {top}\n"
                          f"work in a clone, made with: git clone")
    try:
        git("rev-parse", "--verify", "HEAD^{commit}")
    except SubmitError:
        raise SubmitError("there is no commit yet, so there is nothing to bundle; make one: "
                          "git add -A && git commit") from None


def find_uncommitted() -> str | None:
    """Why a tree with uncommitted changes cannot be bundled; None if there are none."""
    entries = split(git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all"))
    if not entries:
        return None

    def kind(state: str) -> str:
        return "new    " if state[0] in "?A" else "deleted" if "D" in state else "changed"

    return (f"{counted(len(entries), 'path')} not committed; a bundle holds only what is committed:"
            + listed(f"{kind(entry[:2])}  {entry[3:]}" for entry in entries)
            + "\n  commit what belongs to the submission (git add -A && git commit), and remove "
              "the rest,\n  or name it in .git/info/exclude")


def find_ignored_logs() -> list[str]:
    """Logs that git ignores, and whose content is in no file of HEAD either."""
    ignored = split(git("ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--",
                        "logs", "records"))
    logs = [path for path in ignored if path.endswith((".txt", ".log"))]
    if not logs:
        return []
    ids = git("hash-object", "--no-filters", "--", *logs).split()
    committed = {entry.split()[2] for entry in split(git("ls-tree", "-r", "-z", "HEAD"))}
    return [log for log, blob in zip(logs, ids, strict=True) if blob not in committed]


# -----------------------------------------------------------------------------
# What is warned of


def conceal(text: str) -> str:
    """Text without all but the beginnings of the keys in it."""
    content = os.fsencode(text)
    for form in KEY_FORMS.values():
        content = re.sub(form, lambda m: m[0].replace(m[1], m[1][:SHOWN] + b"..."), content)
    return os.fsdecode(content)


def find_stashes() -> str | None:
    """A warning of stashes: the newest goes along, unseen; those below it stay behind."""
    stashes = split(git("stash", "list"), "\n")
    if not stashes:
        return None
    return ("stashed changes; the newest of these goes along, with all that is in it:"
            + listed(map(conceal, stashes))
            + "\n  git stash show -p shows it; git stash drop removes it, git stash clear all")


def read_objects() -> Iterator[tuple[str, str, bytes]]:
    """(kind and id, path, content) of the texts in a bundle of all refs, commits' own included."""
    paths = dict(line.partition(" ")[::2]
                 for line in split(git("rev-list", "--objects", "--all"), "\n"))
    facts = git("cat-file", "--batch-check", text="".join(f"{name}\n" for name in paths))
    with subprocess.Popen(["git", "cat-file", "--batch"], cwd=ROOT, env=ENVIRONMENT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for name, kind, size in map(str.split, facts.splitlines()):
            if kind == "tree" or int(size) > LARGEST:
                continue
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            process.stdout.readline()
            content = process.stdout.read(int(size) + 1)[:-1]  # a newline follows it
            if b"\0" not in content[:8192]:
                yield f"{kind} {name[:10]}", paths[name] or f"(message of a {kind})", content


def find_keys() -> str | None:
    """A warning of strings in any version of any file that look like keys, none of them whole."""
    found: dict[tuple[str, str, bytes], list[str]] = {}
    for name, path, content in read_objects():
        for kind, form in KEY_FORMS.items():
            for match in re.finditer(form, content):
                if not content[max(0, match.start() - 1) : match.start()].isalnum():
                    versions = found.setdefault((path, kind, match[1]), [])
                    versions += [name] * (name not in versions)
    if not found:
        return None
    return (f"{counted(len(found), 'string')} like a key or token:"
            + listed(f"{conceal(path)}: {kind} {key[:SHOWN].decode()}... in {versions[0]}"
                     + (f" and {counted(len(versions) - 1, 'other version')}"
                        if versions[1:] else "")
                     for (path, kind, key), versions in found.items())
            + "\n  if it is one, revoke it where you got it: whoever gets the bundle can read it."
              "\n  git log --all --find-object=BLOB shows the commits that a blob came with")


# -----------------------------------------------------------------------------
# The clone


def run_script(clone: Path, *command: str) -> subprocess.CompletedProcess:
    """A Python script of the clone, run in it; its output and errors as one text."""
    return subprocess.run([sys.executable, *command], cwd=clone, env=ENVIRONMENT, text=True,
                          encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def same_name(name: str, other: str) -> bool:
    """Whether two names differ in nothing but spaces, case and how accents are encoded."""
    first, second = (unicodedata.normalize("NFKC", " ".join(text.split())).casefold()
                     for text in (name, other))
    return first == second


def describe_folder(clone: Path, folder: Path, record: dict) -> str:
    """A record folder for the summary. SubmitError if check.py comes to no verdict."""
    place = folder.relative_to(clone).as_posix()
    done = run_script(clone, "records/check.py", "--track", record["track"], place)
    verdict = re.findall("^verdict: .*$", done.stdout, re.MULTILINE)
    if not verdict:
        raise SubmitError(f"records/check.py {place} gave no verdict:\n{done.stdout.strip()}")
    score = record.get("mean_core")  # which older folders lack
    core = "" if score is None else f"mean CORE {score:.6f}, "
    p = "none, val_loss has no target" if record["p"] is None else f"{record['p']:.3g}"
    return (f"{place}\n    {record['description']}\n"
            f"    track {record['track']}, n {record['n']}, mean val_loss "
            f"{record['mean_val_loss']:.5f}, {core}mean train_time "
            f"{record['mean_train_time']:.3f} s\n"
            f"    p {p}; {record['hardware']['count']} x {record['hardware']['name']}, "
            f"torch {record['versions']['torch']}\n    {verdict[-1]}\n")


def check_clone(bundle: Path, clone: Path, head: str, name: str) -> tuple[str, list[str]]:
    """What table.py says in a clone of the bundle, and the folders that name the person.

    SubmitError, with what was said, if the clone fails, or a check in it.
    """
    git("clone", "-q", str(bundle), str(clone))
    if git("rev-parse", "HEAD", cwd=clone).strip() != head:  # on another branch, or on none
        git("checkout", "-q", "--detach", head, cwd=clone)
    table = run_script(clone, "records/table.py", "--check")
    if table.returncode:
        raise SubmitError("in a clone of the bundle, python records/table.py --check fails:\n"
                          f"{table.stdout.strip()}\nmend it, commit, and submit again")
    folders = []
    for path in sorted(clone.glob("records/*/*/record.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if any(same_name(name, other) for other in record["contributors"]):
                folders.append(describe_folder(clone, path.parent, record))
        except (ValueError, TypeError, KeyError) as error:
            raise SubmitError(f"{path.relative_to(clone)} is not in order: {error!r}") from None
    return table.stdout.strip(), folders


def warn(warnings: list[str], warning: str | None) -> None:
    """Tell a warning in full; its first line goes into the summary."""
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
        warnings.append(warning.splitlines()[0].rstrip(":"))


def refuse_incomplete(name: str, leave_logs: bool) -> int:
    """SubmitError if the bundle would lack something; the number of logs that it leaves out."""
    require_repository()
    logs, refusals = find_ignored_logs(), []
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        refusals.append("this clone is shallow: it lacks old commits, and its bundle could not be "
                        "cloned\n  get them: git fetch --unshallow")
    if uncommitted := find_uncommitted():
        refusals.append(uncommitted)
    if logs and not leave_logs:
        refusals.append(
            f"git ignores {counted(len(logs), 'log')}, which would not be in the bundle:"
            + listed(logs) + "\n  put those that belong to the submission into a record folder, and"
            " commit it:\n    python records/record.py LOG... --name Name --description \"...\" "
            f"--by {shlex.quote(name)}\n  or go without them: --leave_logs")
    if refusals:
        raise SubmitError("\n".join(refusals))
    return len(logs)


def submit(name: str, leave_logs: bool) -> str:
    """Make the bundle and check it; the summary to send with it. SubmitError if it cannot be."""
    left = refuse_incomplete(name, leave_logs)
    warnings: list[str] = []
    print("looking for keys in all versions of all files", file=sys.stderr)
    warn(warnings, find_stashes())
    warn(warnings, find_keys())
    head, final = git("rev-parse", "HEAD").strip(), ROOT / f"{bundle_name(name)}.bundle"
    with tempfile.TemporaryDirectory(prefix=".submit-", suffix=".tmp", dir=ROOT) as folder:
        bundle = Path(folder, final.name)
        git("bundle", "create", str(bundle), "--all")
        refs = split(git("bundle", "list-heads", str(bundle)), "\n")
        print("cloning the bundle and checking the logs in it", file=sys.stderr)
        table, folders = check_clone(bundle, Path(folder, "clone"), head, name)
        if not folders:
            warn(warnings, f"no record.json names {name} as a contributor\n  make a record folder: "
                           f"python records/record.py LOG... --by {shlex.quote(name)}; -h for more")
        with open(bundle, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if final.exists():
            print(f"replacing the {final.name} that was there", file=sys.stderr)
        os.replace(bundle, final)
    branch = git("branch", "--show-current").strip() or "no branch (detached HEAD)"
    ignored = f"\nleft out  {counted(left, 'log')} that git ignores (--leave_logs)" if left else ""
    return (f"\nSubmission of {name}, {date.today()}\n\n"
            f"bundle    {final.name}, {final.stat().st_size / 1e6:,.2f} MB\nsha256    {sha256}\n"
            f"commit    {head} on {branch}\nrefs      {len(refs)} in the bundle:{listed(refs)}\n"
            f"checked   in a clone of the bundle: {table}{ignored}\n"
            + "".join(f"warning   {warning}\n" for warning in warnings)
            + "".join(f"\n{text}" for text in folders)
            + f"\nNothing was sent. Send the file {final.name} and this summary to the maintainers."
              f"\nTo look into it: git clone {final.name} FOLDER\n")


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # no terminal is too old for a name
        stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        usage='./run.sh submit "First Last" [--leave_logs]', description=__doc__.split("\n\n")[0],
        prog="submit")
    parser.add_argument("name", nargs="*", metavar='"First Last"', help="your name")
    parser.add_argument("--leave_logs", "--leave-logs", action="store_true",
                        help="go without the logs that git ignores")
    args = parser.parse_args()
    name = " ".join(" ".join(args.name).split())
    if not any(map(str.isalnum, bundle_name(name))):
        parser.error(f'expected your name, as in ./run.sh submit "First Last"; got "{name}"')
    try:
        print(submit(name, args.leave_logs), end="")
        return 0
    except (SubmitError, OSError) as error:
        status, reason = 1, f"error: {error}\n"
    except KeyboardInterrupt:
        status, reason = 130, "stopped; "
    final = ROOT / f"{bundle_name(name)}.bundle"
    older = f"; the {final.name} that is there is an older one" if final.exists() else ""
    print(f"{reason}no bundle was made{older}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
