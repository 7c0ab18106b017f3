"""Bits per byte of a trained model on its validation tokens.

    python evals/bpb.py RUN
    python evals/bpb.py latest --data_path data/fineweb10B --val_tokens 10485760 --json bpb.json
    torchrun --standalone --nproc_per_node=8 evals/bpb.py RUN

The total loss in bits over the bytes of the text that is predicted: unlike a loss per token, it can
be compared between vocabularies. <|endoftext|> is predicted too, and has no bytes; where its loss
is left out, as in nanochat, the figure is a little lower. RUN is a run_id,
`latest`, or the folder of a checkpoint or of an exported model. The model is evaluated without
8-bit floats, so the loss of a run that used them may differ from its log in the fourth digit.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tiktoken import Encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import load_encoding

import train_gpt
from train_gpt import Hyperparameters, Ranks, RunError, TokenRows, print_error


def read_validation(args: Hyperparameters) -> dict[str, TokenRows]:
    """The shards that hold the validation tokens, by name; RunError if they hold too few."""
    shards, tokens, folder = {}, 0, train_gpt.data_folder(args)
    for path in train_gpt.find_shards(folder)[1]:
        rows = shards[path.name] = TokenRows(path, args, training=False)
        tokens += rows.num_rows * rows.row_length
        if tokens >= args.val_tokens:
            return shards
    raise RunError(f"validation needs {args.val_tokens:,} tokens and one more, but the "
                   f"{len(shards)} val shards (*_val_*.bin) in {folder} hold {tokens:,} in whole "
                   f"rows; name another folder with --data_path, or lower --val_tokens")


def count_bytes(shards: list[TokenRows], args: Hyperparameters, encoding: Encoding) -> int:
    """Bytes of the text of the first `val_tokens` targets; RunError if the vocabulary lacks one."""
    lengths = np.array([len(encoding.decode_single_token_bytes(token))
                        for token in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0
    total, rows_left = 0, args.val_tokens // args.max_val_length
    for rows in shards:
        usable = min(rows.num_rows, rows_left)
        rows_left -= usable
        if not usable:
            continue
        targets = rows.micro_batch(0, usable).targets_BT.numpy()
        if (largest := targets.max()) >= encoding.n_vocab:
            raise RunError(f"the data hold token {largest}, but the vocabulary {encoding.name} "
                           f"ends at {encoding.n_vocab - 1}; give its own --vocab_dir")
        total += int(lengths[targets].sum())
    return total


def bits_per_byte(options: argparse.Namespace, ranks: Ranks) -> dict:
    """What is measured, by name; the same on all ranks. ValueError for people."""
    encoding = load_encoding(options.vocab_dir)
    model, windows, state = train_gpt.load_run(options.run, ranks.device, options.log_dir)
    if model.args.masked_share:
        raise RunError("bits per byte want a model that predicts the next token, not a "
                       "--masked_share of them")
    given = {name: getattr(options, name) for name in ("data_path", "val_tokens")}
    args = dataclasses.replace(model.args, **{k: v for k, v in given.items() if v is not None})
    if problem := train_gpt.find_problem(args):
        raise RunError(problem)
    shards = read_validation(args)
    num_bytes = count_bytes(list(shards.values()), args, encoding)
    val_loss = train_gpt.evaluate(model, list(shards.values()), args, windows, ranks)
    bits = val_loss * args.val_tokens / math.log(2)
    return dict(task="bpb", run=state["run"], step=state["step"], shards=list(shards),
                bpb=bits / num_bytes, val_loss=val_loss, tokens=args.val_tokens, bytes=num_bytes,
                bytes_per_token=num_bytes / args.val_tokens)


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN")
    add("--data_path", help="folder of the val shards (default: the run's)")
    add("--val_tokens", type=int, help="the first so many of them (default: as the run)")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    add("--log_dir", default="logs", help="folder of the runs (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    options = parser.parse_args(argv)
    ranks = None
    try:
        ranks = train_gpt.join_ranks()
        result = bits_per_byte(options, ranks)
        if ranks.rank == 0:
            print(f"bpb {result['bpb']:.5f}, val_loss {result['val_loss']:.5f} nats per token, "
                  f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, "
                  f"{result['bytes_per_token']:.4f} bytes per token")
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if ranks.world_size > 1:
            dist.barrier()  # gloo has been seen to abort at the end; by now all is written
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print_error(error, ranks)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
