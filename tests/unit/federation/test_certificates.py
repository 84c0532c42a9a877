"""Certificates of members: what they say, what is refused, and that others' TLS takes them."""

import datetime
import os
import socket
import ssl
import subprocess
import threading

import pytest
from cryptography import x509

from trainer.commands.main import main
from trainer.federation import certificates
from trainer.federation.certificates import certify, load_credentials


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", "berlin", "paris"])
    return folder


def at(monkeypatch, days):
    """Move the clock of certificates by some days."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Then)


def copy(certs, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir(mode=0o700)
    for file in certs.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o600)
    return folder


def test_openssl_verifies_the_chain_and_the_purposes(certs):
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", certs / "ca.pem"]
        result = subprocess.run([*command, certs / "berlin.pem"], capture_output=True, text=True)
        assert result.stdout.endswith(": OK\n"), result.stderr


def test_a_certificate_holds_its_name_and_its_days(certs):
    certificate = x509.load_pem_x509_certificate((certs / "berlin.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["berlin"]
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=364) < left <= datetime.timedelta(days=365)
    assert load_credentials(certs, "berlin").expires == certificate.not_valid_after_utc


def test_nobody_else_can_read_the_files(certs):
    assert certs.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in certs.iterdir()} == {0o600}
    assert {file.name for file in certs.iterdir()} == {
        f"{name}.{end}" for name in ("ca", "coordinator", "berlin", "paris") for end in ("pem", "key")
    }


def test_two_members_shake_hands(certs):
    def context(purpose, name):
        made = ssl.create_default_context(purpose, cafile=certs / "ca.pem")
        made.load_cert_chain(certs / f"{name}.pem", certs / f"{name}.key")
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    server, client = socket.socketpair()
    seen = []

    def answer():
        with context(ssl.Purpose.CLIENT_AUTH, "coordinator").wrap_socket(server, server_side=True) as connection:
            seen.append(connection.getpeercert()["subject"])
            connection.sendall(b"welcome")

    thread = threading.Thread(target=answer)
    thread.start()
    wrapped = context(ssl.Purpose.SERVER_AUTH, "berlin").wrap_socket(client, server_hostname="coordinator")
    with wrapped:
        assert wrapped.recv(7) == b"welcome"
    thread.join()
    assert seen == [((("commonName", "berlin"),),)]


def test_a_member_is_added_and_renewed_by_the_same_authority(certs, tmp_path):
    folder = copy(certs, tmp_path)
    authority, old = (folder / "ca.pem").read_bytes(), (folder / "paris.key").read_bytes()
    certify(folder, ["madrid"])
    certify(folder, ["paris"], days=30, renew=True)
    assert (folder / "ca.pem").read_bytes() == authority
    assert (folder / "paris.key").read_bytes() != old
    assert load_credentials(folder, "madrid").name == "madrid"
    assert load_credentials(folder, "paris").expires < load_credentials(folder, "berlin").expires


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Berlin"], "Berlin is no name"),
        (["ca"], "ca is no name"),
        (["../x"], "../x is no name"),
        (["-a"], "-a is no name"),
        (["a" * 64], "is no name"),
        (["rome", "rome"], "rome is named twice"),
        (["berlin", "rome"], "berlin has a certificate"),
    ],
)
def test_names_that_are_refused_change_nothing(certs, names, message):
    before = {file.name: file.read_bytes() for file in certs.iterdir()}
    with pytest.raises(ValueError, match=message):
        certify(certs, names)
    assert {file.name: file.read_bytes() for file in certs.iterdir()} == before


def test_damaged_exchanged_and_expired_files_are_named(certs, tmp_path, monkeypatch):
    folder = copy(certs, tmp_path)
    (folder / "paris.key").write_bytes((folder / "berlin.key").read_bytes())
    with pytest.raises(ValueError, match=r"paris\.key is not the key of"):
        load_credentials(folder, "paris")
    (folder / "paris.pem").write_bytes(b"-----BEGIN")
    with pytest.raises(ValueError, match=r"paris\.pem is damaged"):
        load_credentials(folder, "paris")
    (folder / "berlin.key").chmod(0o644)
    with pytest.raises(ValueError, match=r"berlin\.key can be read by others\n  chmod 600"):
        load_credentials(folder, "berlin")
    for name in ("pem", "key"):
        os.replace(folder / f"coordinator.{name}", folder / f"rome.{name}")
    with pytest.raises(ValueError, match=r"rome\.pem is the certificate of coordinator, not of rome"):
        load_credentials(folder, "rome")
    with pytest.raises(ValueError, match=r"(?s)london\.pem cannot be read.*london\.key cannot be read"):
        load_credentials(folder, "london")


def test_another_authority_is_refused(certs, tmp_path):
    folder = copy(certs, tmp_path)
    certify(tmp_path / "other", ["x"])
    (folder / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    with pytest.raises(ValueError, match=r"berlin\.pem is not signed by .*ca\.pem"):
        load_credentials(folder, "berlin")
    with pytest.raises(ValueError, match=r"ca\.key is not the key of"):
        certify(folder, ["rome"])


def test_an_expired_certificate_is_refused(certs, monkeypatch):
    at(monkeypatch, days=400)
    with pytest.raises(ValueError, match=r"berlin\.pem expired on"):
        load_credentials(certs, "berlin")


def test_a_certificate_of_a_clock_that_is_ahead_is_refused(certs, monkeypatch):
    at(monkeypatch, days=-1)
    with pytest.raises(ValueError, match=r"berlin\.pem is valid from .* UTC: is this clock right\?"):
        load_credentials(certs, "berlin")


def test_two_weeks_before_the_end_there_is_a_warning(certs, monkeypatch):
    at(monkeypatch, days=350)
    assert load_credentials(certs, "berlin").expiry_warning() == ""
    at(monkeypatch, days=352)
    warning = load_credentials(certs, "berlin").expiry_warning()
    assert (
        warning.startswith("the certificates of berlin are valid until 20") and "certify ... berlin --renew" in warning
    )


def test_an_authority_signs_for_no_longer_than_it_lasts(certs, tmp_path, monkeypatch):
    folder = copy(certs, tmp_path)
    at(monkeypatch, days=3600)
    with pytest.raises(
        ValueError, match=r"ca\.pem expires on .*, before --days 365 are over\n  valid: --days of at most 4"
    ):
        certify(folder, ["rome"])
    certify(folder, ["rome"], days=49)
    at(monkeypatch, days=3700)
    with pytest.raises(ValueError, match="at most 0; or another folder"):
        certify(folder, ["rome"], days=1, renew=True)


def test_only_what_there_is_can_be_renewed(certs, tmp_path):
    folder = copy(certs, tmp_path)
    with pytest.raises(ValueError, match=r"berlni has no certificate in .* that could be renewed\n  without --renew"):
        certify(folder, ["paris", "berlni"], renew=True)
    assert (folder / "paris.pem").read_bytes() == (certs / "paris.pem").read_bytes()


def test_what_others_can_look_into_is_refused(certs, tmp_path):
    folder = copy(certs, tmp_path)
    folder.chmod(0o755)
    with pytest.raises(ValueError, match=r"others can look into .*\n  chmod 700 "):
        certify(folder, ["rome"])
    folder.chmod(0o700)
    (folder / "ca.key").chmod(0o644)
    with pytest.raises(ValueError, match=r"ca\.key can be read by others\n  chmod 600 "):
        certify(folder, ["rome"])
    with pytest.raises(ValueError, match=r"ca\.pem is a file\n  valid: a new folder"):
        certify(folder / "ca.pem", ["rome"])


def test_a_key_is_lent_to_a_group_by_root_alone(certs, tmp_path):
    """Kubernetes does so with the files of a secret."""
    key = copy(certs, tmp_path) / "berlin.key"
    key.chmod(0o640)
    if key.stat().st_uid == 0:
        assert load_credentials(key.parent, "berlin")
    else:
        with pytest.raises(ValueError, match="can be read by others"):
            load_credentials(key.parent, "berlin")


def test_private_keys_are_in_the_folder_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    old = os.umask(0)
    try:
        assert main(["certify", "certs", "coordinator", "berlin"]) == 0
        assert main(["certify", "certs", "berlin", "--renew"]) == 0
    finally:
        os.umask(old)
    printed = capsys.readouterr()
    assert "PRIVATE" not in printed.out + printed.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    keys = {path for path in files if b"PRIVATE KEY" in path.read_bytes()}
    assert keys == {tmp_path / "certs" / f"{name}.key" for name in ("ca", "coordinator", "berlin")}
    assert {path.parent for path in files} == {tmp_path / "certs"}
    assert (tmp_path / "certs").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_the_command_prints_what_it_wrote(tmp_path, capsys):
    assert main(["certify", str(tmp_path / "c"), "coordinator", "berlin", "--days", "10"]) == 0
    assert capsys.readouterr().out.count("valid until") == 2
    assert main(["certify", str(tmp_path / "c"), "berlin", "--days", "1000"]) == 2
    assert "--days 1000\n  valid: 1 to 825\nberlin has a certificate" in capsys.readouterr().err
