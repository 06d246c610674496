"""Make docs/clients.md from docs/reliability/clients.json, the list of clients with the tests of each.

python examples/reliability/clients.py
"""

import ast
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
    return "<br>".join(f"`{name}`{_marker(name)}" for name in row["tests"])


def _marker(test: str) -> str:
    """ " (slow)" or " (compiler)" for a test with this marker, as its decorators say."""
    path, *_, name = test.split("::")
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    function = next(each for each in nodes if isinstance(each, ast.FunctionDef) and each.name == name)
    marks = {ast.unparse(each).removeprefix("pytest.mark.") for each in function.decorator_list}
    return "".join(f" ({marker})" for marker in ("slow", "compiler") if marker in marks)


if __name__ == "__main__":
    PAGE.write_text(make_page())
