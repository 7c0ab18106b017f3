"""Print documents of a shard as text, each under a line with its index, offset and length.

    python data/decode.py data/sample/sample_val_000000.bin --start 10 --documents 2
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from fineweb import load_encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import SHARD_HEADER_INTS, check_shard


def decode(shard: Path, start: int, documents: int, vocab_dir: Path | None) -> None:
    """Print `documents` documents from number `start` on; ValueError for people."""
    check_shard(shard)
    encoding = load_encoding(vocab_dir)
    tokens = np.memmap(shard, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)
    begins = np.flatnonzero(tokens == encoding.eot_token)
    if tokens[0] != encoding.eot_token:  # the end of a document that the shard before began
        begins = np.insert(begins, 0, 0)
    if not 0 <= start < len(begins):
        raise ValueError(f"--start is {start}, but {shard} has documents 0 to {len(begins) - 1}")
    ends = np.append(begins[1:], len(tokens))
    for index in range(start, min(start + documents, len(begins))):
        begin, end = int(begins[index]), int(ends[index])
        whole = tokens[begin] == encoding.eot_token
        if (largest := int(tokens[begin:end].max())) > encoding.max_token_value:
            raise ValueError(f"{shard} has token {largest}, but the vocabulary ends at "
                             f"{encoding.max_token_value}; give its own --vocab_dir")
        note = "" if whole else " (continued from the shard before)"
        print(f"--- document {index}, token offset {begin}, {end - begin} tokens{note}")
        print(encoding.decode(tokens[begin + whole : end].tolist()))


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shard", type=Path, metavar="SHARD")
    add("--start", type=int, default=0, help="first document (default: %(default)s)")
    add("--documents", type=int, default=3, help="how many (default: %(default)s)")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    args = parser.parse_args(argv)
    if args.documents < 1:
        parser.error(f"--documents: got {args.documents}, expected 1 or more")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # texts are in any language
    try:
        decode(args.shard, args.start, args.documents, args.vocab_dir)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
