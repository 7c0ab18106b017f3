"""Write text with a trained model.

    python evals/sample.py RUN "Once upon a time"
    python evals/sample.py latest --tokens 500 --temperature 0.8 --top_p 0.9 -n 3

RUN is a run_id, `latest`, or the folder of a checkpoint or of an exported model. The prompt and
what follows it go to stdout as they are written, the speed to stderr; a text ends at <|endoftext|>.
Without a prompt the model begins by itself. Sample n has the n-th seed from --seed on.
"""

import argparse
import codecs
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import load_encoding

from train_gpt import DOCUMENT_START, generate, load_run


def stream_text(tokens: Iterable[int], encoding: tiktoken.Encoding) -> Iterator[str]:
    """For each token the characters that it completes, and then what is left.

    <|endoftext|>, and tokens that only fill up the model's vocabulary, are no text. Bytes that are
    not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        is_text = token < encoding.n_vocab and token != encoding.eot_token
        yield decoder.decode(encoding.decode_single_token_bytes(token) if is_text else b"")
    yield decoder.decode(b"", final=True)


def open_device(name: str | None) -> torch.device:
    """The device of this name, by default the GPU if there is one; ValueError if it is not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); try --device cpu"
                         ) from None


def encode_prompt(prompt: str, encoding: tiktoken.Encoding, vocab_size: int) -> list[int]:
    """The tokens of a document that begins so; ValueError if the model does not know them."""
    tokens = [DOCUMENT_START, *encoding.encode_ordinary(prompt)]
    if encoding.eot_token != DOCUMENT_START or max(tokens) >= vocab_size:
        raise ValueError(f"<|endoftext|> is token {encoding.eot_token:,} of the vocabulary "
                         f"{encoding.name}, but should be {DOCUMENT_START:,}, and the model knows "
                         f"{vocab_size:,} tokens; give a --vocab_dir that fits")
    return tokens


def describe_speed(times: list[float]) -> str:
    """For a person: `times` are the start, in seconds, and when each token was there.

    What is used for the first time, and recorded on a GPU, makes the first two tokens slow.
    """
    count, seconds = len(times) - 1, times[-1] - times[0]
    text = f"{count:,} tokens in {seconds:.2f} s"
    if count > 2 and times[-1] > times[2]:
        text += (f", {times[2] - times[0]:.2f} s of them for the first two; then "
                 f"{(count - 2) / (times[-1] - times[2]):,.0f} tokens per second")
    return text


def sample(args: argparse.Namespace) -> None:
    """Print the samples that the command line asks for; ValueError for people."""
    device, encoding = open_device(args.device), load_encoding(args.vocab_dir)
    model, windows, _ = load_run(args.run, device, args.log_dir)
    prompt = encode_prompt(args.prompt, encoding, model.args.vocab_size)
    for seed in range(args.seed, args.seed + args.n):
        tokens = generate(model, windows, prompt, args.tokens, args.temperature, args.top_k,
                          args.top_p, seed)
        if args.n > 1:
            print(f"--- sample {seed - args.seed + 1}, seed {seed}")
        print(args.prompt, end="", flush=True)
        times = [time.perf_counter()]
        for text in stream_text(tokens, encoding):
            print(text, end="", flush=True)
            times.append(time.perf_counter())
        print(flush=True)
        print(describe_speed(times[:-1]), file=sys.stderr)  # the last text is of no token


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN")
    add("prompt", nargs="?", default="", help="default: none, the model begins by itself")
    add("--tokens", type=int, default=200, help="at most (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    add("--top_k", type=int, default=0, help="draw from so many tokens only (default: 0, from all)")
    add("--top_p", type=float, default=1.0,
        help="draw from the likeliest tokens that have this probability together (default: 1)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("-n", type=int, default=1, help="samples (default: %(default)s)")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add("--log_dir", default="logs", help="folder of the runs (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)  # the prompt may come last
    for name, low, high in (("tokens", 1, 2**31), ("temperature", 0, 1e9), ("top_k", 0, 2**31),
                            ("top_p", 0, 1), ("seed", 0, 2**62), ("n", 1, 2**31)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"{name} is {getattr(args, name)}, expected {low} to {high}")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # texts are in any language
    try:
        sample(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
