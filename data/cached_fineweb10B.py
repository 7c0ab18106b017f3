"""Download FineWeb as GPT-2 tokens, made by others, in shards of 100M tokens (0.2 GB) each.

    python data/cached_fineweb10B.py                      # what the default run reads
    python data/cached_fineweb10B.py --recipe baseline    # what a run with these options reads
    python data/cached_fineweb10B.py 9                    # the val shard and 9 train shards

Whole files are kept and partial ones resumed: after an interruption, just run it again.
"""

import argparse
import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import check_shard, estimate_shards, parse_hyperparameters

REPOSITORY = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
MAX_SHARDS = 103  # train shards in the repository
SHARD_BYTES = 200_001_024  # 100M tokens of 2 bytes, and the header
ATTEMPTS = 4  # the hub's client retries too, so that each attempt is patient already


def fetch(filename: str, folder: Path) -> None:
    """Download one file of the repository into `folder`, resuming a partial download."""
    hf_hub_download(REPOSITORY, filename, repo_type="dataset", local_dir=folder)


def retry(call: Callable, *args, **kwargs):
    """The result of a call to the Hugging Face hub, tried up to ATTEMPTS times.

    Waits 2, 4, 8 s after 408, 429, 5xx and connection errors; then raises ConnectionError with a
    message for people. Errors of the local disk pass through at once.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call(*args, **kwargs)
        except Exception as error:  # its class depends on the hub's version: requests, httpx, xet
            if isinstance(error, PermissionError) or getattr(error, "errno", 0) == errno.ENOSPC:
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if attempt == ATTEMPTS or (status and status < 500 and status not in (408, 429)):
                raise ConnectionError(
                    f"could not download from huggingface.co\n  {reason}\n"
                    "Check the connection and run this again: it goes on where it stopped. Without "
                    "a connection,\nmake shards from your own text: python data/fineweb.py --help"
                ) from error
            print(f"{reason}\ntrying again in {2**attempt} s", file=sys.stderr)
            time.sleep(2**attempt)


def is_valid(path: Path) -> bool:
    """Whether `path` is a whole shard."""
    try:
        return check_shard(path) > 0
    except ValueError:
        return False


def obtain(filename: str, folder: Path) -> int:
    """Download and verify one shard and return its tokens; ValueError if it is broken twice."""
    for _ in range(2):
        (folder / filename).unlink(missing_ok=True)  # or the hub's client may take it for whole
        retry(fetch, filename, folder)
        try:
            return check_shard(folder / filename)
        except ValueError as error:
            problem = error
            print(f"broken download: {error}", file=sys.stderr)
    (folder / filename).unlink(missing_ok=True)
    raise ValueError(f"{filename} was broken twice in a row ({problem}); try again later")


def download(num_shards: int, folder: Path) -> None:
    """Make `folder` hold the val shard and the first `num_shards` train shards."""
    if not 1 <= num_shards <= MAX_SHARDS:
        raise ValueError(f"got {num_shards} train shards, expected 1 to {MAX_SHARDS}")
    filenames = [f"fineweb_train_{number:06d}.bin" for number in range(1, num_shards + 1)]
    filenames.insert(0, "fineweb_val_000000.bin")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [filename for filename in filenames if not is_valid(folder / filename)]
    size = len(missing) * SHARD_BYTES
    print(f"{num_shards} train shards and the val shard of {REPOSITORY} into {folder}")
    print(f"{len(missing)} files to fetch, {size / 1e9:.1f} GB; "
          f"{len(filenames) - len(missing)} are there already", flush=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"the disk of {folder} has {free / 1e9:.1f} GB free, but {size / 1e9:.1f} "
                         "GB are needed; free some space or ask for fewer shards")
    for done, filename in enumerate(missing, 1):
        tokens = obtain(filename, folder)
        print(f"[{done}/{len(missing)}] {filename}: {tokens:,} tokens", flush=True)


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> None:
    """Command line: [N] [any option of train_gpt.py]; exits with a message on any failure."""
    argv = sys.argv[1:] if argv is None else argv
    # N comes first, because an option that only train_gpt.py knows may be followed by a number.
    own = argv[:1] if argv and (argv[0] == "--help" or not argv[0].startswith("--")) else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [N] [any option of train_gpt.py]",
    )
    parser.add_argument("N", type=int, nargs="?", help="train shards, 1 to 103 (default: as many "
                        "as the single-gpu run with the options reads)")
    num_shards = parser.parse_args(own).N
    run = parse_hyperparameters(["--track", "single-gpu", *argv[len(own) :]])
    try:
        download(estimate_shards(run) if num_shards is None else num_shards, folder)
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
