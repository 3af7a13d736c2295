"""Writes docs/options.md, which lists every option of the server with its flag, environment variable, YAML key, default
and meaning.

python -m tools.options_page            writes the page
python -m tools.options_page --check    fails where the page and the options differ
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jamba_server.server.cli.settings import LOCAL
from jamba_server.server.config import OPTIONS
from jamba_server.server.config_sources import CONFIG_VARIABLE
from jamba_server.server.options import PANELS, Option, Panel

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
TITLES: dict[Panel, tuple[str, str]] = {
    "server": ("Server", "The address, access and the handling of requests."),
    "model": ("Model", "Which model is loaded, on which device and in which number format."),
    "memory": ("Memory", "The sizes that decide how many sequences of which length fit."),
    "expert": ("Expert", "The defaults suit almost every server."),
}
INTRODUCTION = f"""# Options

<!-- `python -m tools.options_page` writes this page. -->

Every option of `jamba serve` can be given in three ways. A flag wins over a variable, and a variable over the file.

| way | example |
| --- | --- |
| flag | `jamba serve --max-num-seqs 8`; `--max_num_seqs 8` means the same |
| variable | `JAMBA_MAX_NUM_SEQS=8` |
| key of a YAML file | `max_num_seqs: 8` in the file that `--config PATH` or `{CONFIG_VARIABLE}` names |

- Sizes are upper bounds: the server shrinks them to what fits and logs one warning. A choice that it cannot meet is an
  error.
- Numbers may be written `32K`, `1.5M` or `4GiB` (powers of 1024), or `4GB` (powers of 1000).
- An option that is on or off has two flags (`--enforce-eager` and `--no-enforce-eager`). In a variable or a file its
  value is `true` or `false`.
- An option that may be repeated is a list in a YAML file, and separated by commas in a variable.
- `jamba run`, `jamba chat` and `jamba run-batch` take the options marked with \\* when they load a model.
"""


def row(option: Option) -> str:
    """Returns one option's line in the Markdown table of the option's group."""
    name = "`MODEL`, the argument" if option.name == "model" else f"`{option.flag}`"
    mark = " \\*" if option.name in ("model", *LOCAL) else ""
    choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
    aliases = ", ".join(f"`{alias}` ({value})" for alias, value in option.help.aliases)
    meaning = f"{option.help.text}.{choices}{f' Also understood: {aliases}.' if aliases else ''}"
    return f"| {name}{mark} | `{option.variable}` | `{option.name}` | {option.shown_default} | {meaning} |"


def rendered() -> str:
    """Returns the text of docs/options.md: an introduction, then one table for each group of options."""
    parts = [INTRODUCTION]
    for panel in PANELS:
        title, purpose = TITLES[panel]
        rows = [row(option) for option in OPTIONS.values() if option.help.panel == panel]
        head = "| flag | variable | YAML key | default | meaning |\n| --- | --- | --- | --- | --- |"
        parts.append("\n".join([f"## {title}", "", purpose, "", head, *rows, ""]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(rendered(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != rendered():
        sys.exit("docs/options.md is out of date: run python -m tools.options_page")


if __name__ == "__main__":
    main()
