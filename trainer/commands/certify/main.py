"""`python -m trainer certify`: writes a key and a certificate for each member of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.commands.exit_codes import FINISHED
from trainer.commands.options import Parser

USAGE = """\
python -m trainer certify FOLDER NAME ... [--days 365] [--renew]     keys and certificates of a federation's members

Writes NAME.key and NAME.pem for each member into FOLDER, and ca.key and ca.pem, the authority that signs them, if it
has none. Each member gets ca.pem and its own two files, over a channel that nobody else can read. ca.key stays here:
whoever has it can make a member of any name.

  --days DAYS      how long the members' certificates are valid, 1 to 825; default: 365
  --renew          replace certificates that exist, and their keys; the others stay as they are

  python -m trainer certify certs coordinator berlin paris
  python -m trainer certify certs berlin --renew

Exit codes: 0 finished, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code. Raises ValueError for bad input."""
    from trainer.federation.certificates import certify, load_credentials

    parser = Parser("python -m trainer certify")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--renew", action="store_true")
    options = parser.parse_args(arguments)
    certify(options.folder.expanduser(), options.names, options.days, options.renew)
    for name in options.names:
        expires = load_credentials(options.folder.expanduser(), name).expires
        print(f"{options.folder / name}.pem, {options.folder / name}.key: valid until {expires:%Y-%m-%d}")
    return FINISHED
