"""Write the record tables of README.md and records/README.md from the record folders.

    python records/table.py            # write them
    python records/table.py --check    # exit with status 1 if a folder or a table is not in order

Refuses a folder whose record.json departs from record.schema.json or from its own logs, and one
that records/check.py does not pass. Where README.md has a place for it, the table of ablations is
written from their logs too.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from ablation import ablation_folders, read_series
from ablation import render as render_ablation
from check import TRACKS, cell
from logs import LogError
from record import RECORDS, RecordError, load

NEGATIVE = "negative"
NOT_RECORD_FOLDERS = ("measurements",)  # logs and a README.md, without a claim
HEADER = """\
| # | time | val_loss | description | date | log | contributors | hardware | data |
| ---: | ---: | --- | --- | --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    folder: Path  # relative to records/
    record: dict


def collect(root: Path) -> dict[str, list[Row]]:
    """{folder of records/: its rows, oldest first, and slowest first among those of one day}.

    RecordError with all that is wrong.
    """
    rows: dict[str, list[Row]] = {}
    problems = []
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        if group.name in NOT_RECORD_FOLDERS or group.name.startswith(("__", ".")):
            continue
        if group.name not in (*TRACKS, NEGATIVE):
            problems.append(f"{group.name}: no track; the tracks are {', '.join(TRACKS)}")
            continue
        for folder in sorted(path for path in group.iterdir() if path.is_dir()):
            try:
                record, _ = load(folder)
                rows.setdefault(group.name, []).append(Row(folder.relative_to(root), record))
            except RecordError as error:
                problems.append(str(error))
    if problems:
        raise RecordError("\n".join(problems))
    for group in rows.values():
        group.sort(key=lambda row: (row.record["date"], -row.record["mean_train_time"]))
    return rows


def show_time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.3f} h"


def show_tokens(tokens: int) -> str:
    """157_286_400 -> "157.3M tokens"; less than a million, in thousands."""
    return f"{tokens / 1e6:,.1f}M tokens" if tokens >= 1e6 else f"{tokens / 1e3:,.0f}k tokens"


def table(rows: list[Row], prefix: str) -> str:
    """A Markdown table; `prefix` leads from its file to records/."""
    lines = []
    for number, (folder, record) in enumerate(rows, start=1):
        spread = "" if record["std_val_loss"] is None else f" ± {record['std_val_loss']:.5f}"
        score = record.get("mean_core")  # which older folders lack
        core = "" if score is None else f", CORE {score:.6f}"
        place = prefix + folder.as_posix()
        count = record["hardware"]["count"]
        hardware = record["hardware"]["name"] if count == 1 else (
            f"{count} x {record['hardware']['name']}")
        cells = (
            str(number), show_time(record["mean_train_time"]),
            f"{record['mean_val_loss']:.5f}{spread} (n {record['n']}){core}",
            f"[{cell(record['description'])}]({place}/README.md)", record["date"],
            f"[log]({place}/{record['logs'][0]})", cell(", ".join(record["contributors"])),
            f"{cell(hardware)}, torch {cell(record['versions']['torch'])}",
            f"{record['data']['name']}, {show_tokens(record['train_tokens'])}")
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEADER + "".join(lines)


def render(rows: dict[str, list[Row]]) -> dict[str, str]:
    """{name of a section: its Markdown}."""
    claims = [name for name, track in TRACKS.items() if track.claim]
    records = "".join(
        f"**`{name}`**: {TRACKS[name].claim}.\n\n"
        f"{table(rows[name], 'records/')}\n"
        for name in claims if name in rows)
    if empty := [f"`{name}`" for name in claims if name not in rows]:
        records += f"No record yet on {', '.join(empty)}.\n"
    measured = [row for name in TRACKS if name not in claims for row in rows.get(name, [])]
    return {
        "records": records,
        "measurements": table(measured, "records/") if measured else "None yet.\n",
        NEGATIVE: table(rows[NEGATIVE], "") if NEGATIVE in rows else "None yet.\n",
    }


def ablation_section(page: str) -> dict[str, str]:
    """{"ablation": the ablations}, if the page has a place for them and there are any.

    RecordError if their logs make no fair table.
    """
    folders = ablation_folders()
    if not folders or "<!-- ablation -->" not in page:
        return {}
    places = [folder.relative_to(RECORDS.parent).as_posix() for folder in folders]
    try:
        content = render_ablation(*read_series(folders))
    except LogError as error:
        raise RecordError(f"{' and '.join(places)}: {error}") from None
    links = " and ".join(f"[{place}]({place})" for place in places)
    return {"ablation": f"{content}\nMade from the logs in {links}.\n"}


def fill(text: str, sections: dict[str, str]) -> str:
    """`text` with each `<!-- name -->...<!-- end of name -->` that it holds filled anew."""
    for name, content in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, marker, rest = text.partition(begin)
        if marker and end in rest:
            text = before + begin + content + rest[rest.index(end) :]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    args = parser.parse_args()
    try:
        rows = collect(RECORDS)
        page = (RECORDS.parent / "README.md").read_text(encoding="utf-8")
        sections = render(rows) | ablation_section(page)
    except RecordError as error:
        print(f"error: these folders cannot stand in the table:\n{error}", file=sys.stderr)
        return 1
    stale = []
    for path in (RECORDS.parent / "README.md", RECORDS / "README.md"):
        text = path.read_text(encoding="utf-8")
        filled = fill(text, sections)
        if filled != text:
            stale.append(path.relative_to(RECORDS.parent).as_posix())
            if not args.check:
                path.write_text(filled, encoding="utf-8")
    if args.check and stale:
        print(f"error: stale: {', '.join(stale)}; run: python records/table.py", file=sys.stderr)
        return 1
    count = sum(map(len, rows.values()))
    print(f"{count} record folders in order; "
          + (f"wrote {', '.join(stale)}" if stale else "the tables are fresh"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
