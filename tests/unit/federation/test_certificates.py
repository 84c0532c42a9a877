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
from trainer.federation.certificates import certify, load_credentials


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", "berlin", "paris"])
    return folder


def copy(certs, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
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


def test_an_expired_certificate_is_refused(certs, tmp_path, monkeypatch):
    from trainer.federation import certificates

    class Later(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.datetime.now(zone) + datetime.timedelta(days=400)

    monkeypatch.setattr(certificates, "datetime", Later)
    with pytest.raises(ValueError, match=r"berlin\.pem expired on"):
        load_credentials(certs, "berlin")


def test_the_command_prints_what_it_wrote(tmp_path, capsys):
    assert main(["certify", str(tmp_path / "c"), "coordinator", "berlin", "--days", "10"]) == 0
    assert capsys.readouterr().out.count("valid until") == 2
    assert main(["certify", str(tmp_path / "c"), "berlin", "--days", "1000"]) == 2
    assert "--days 1000\n  valid: 1 to 825\nberlin has a certificate" in capsys.readouterr().err
