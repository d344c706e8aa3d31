"""These tests need Triton's interpreter, which is chosen when a kernel file is first imported.

``tests/kernels/test_interpreter.py`` runs this folder in a process of its own; the variable is
set there before anything is imported. Elsewhere nothing here is collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
