"""``python tools/models_table.py``: write ``docs/models.md`` from the registries."""

import sys

if __name__ == "__main__":  # tools/tokenize.py must not shadow the standard library's tokenize
    sys.path.pop(0)

from pathlib import Path

from squall.model_list import markdown

if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("docs", "models.md").write_text(markdown())
