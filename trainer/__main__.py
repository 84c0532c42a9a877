"""`python -m trainer` and `torchrun -m trainer`."""

import os
import signal
import sys

if __name__ == "__main__":
    if "RANK" in os.environ:
        # Control-C reaches every process of the terminal: workers end without a word, the launcher has one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from trainer.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
