"""Make docs/clients.md from docs/reliability/clients.json, the list of clients with the tests of each.

python examples/reliability/clients.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "docs" / "reliability" / "clients.json"
PAGE = ROOT / "docs" / "clients.md"
HEAD = """# Clients

After this page you know what of the libraries around transformers works with a YAN model.
The rest raises an error, which names what to use instead.

Each row has its test: run it as `python -m pytest TEST`, with `-m slow` or `-m compiler` where the row says so.
This page is made from `docs/reliability/clients.json` by

```bash
python examples/reliability/clients.py
```
"""


def make_page() -> str:
    """The whole page."""
    lines = [HEAD]
    for section, rows in json.loads(LIST.read_text()).items():
        lines += [f"## {section}", "", "| client | result | test |", "| --- | --- | --- |"]
        lines += [f"| {row['client']} | {row['result']} | {_tests(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def _tests(row: dict) -> str:
    names = "<br>".join(f"`{name}`" for name in row["tests"])
    return f"{names} ({row['marker']})" if "marker" in row else names


if __name__ == "__main__":
    PAGE.write_text(make_page())
