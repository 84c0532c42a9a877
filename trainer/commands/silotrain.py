"""The command `silotrain`: runs this package `trainer`, whatever else is called `trainer`.

`python -m trainer` prefers a trainer.py or trainer/ in the working directory. Workers are started by the path of this
file, so they always run the package that started them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the command line, or a worker; return the exit code."""
    if "RANK" not in os.environ and not _check_other_distributions():
        return 2
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of the script
    sys.path.insert(0, str(ROOT))
    import trainer.__main__

    # A user's own modules are found as by `python -m trainer`: first in the working directory.
    sys.path[:1] = [] if sys.flags.safe_path else [os.getcwd()]
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return trainer.__main__.run()


def _check_other_distributions() -> bool:
    """Print which other distributions install a package `trainer`; return whether this one is still intact."""
    from importlib.metadata import distributions

    is_intact, messages = True, {}
    for other in distributions():
        name, files = other.metadata["Name"], f"\n{other.read_text('RECORD') or ''}"
        if name == "silotrain" or "\ntrainer/__init__.py," not in files:
            continue
        if Path(str(other.locate_file("trainer"))).resolve() == ROOT / "trainer":
            is_intact = False
            message = "has been installed over silotrain's\n  install silotrain in an environment without it"
        else:
            message = "is installed too: silotrain does not use it, but python -m trainer may"
        messages[f"the package trainer of {name} {message}"] = None  # once, however often its folder is in sys.path
    for message in messages:
        print(message, file=sys.stderr, flush=True)
    return is_intact


if __name__ == "__main__":
    sys.exit(main())
