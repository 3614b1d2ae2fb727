"""Certificates for TLS and the sites' P-384 keys.

For a trial, or for a consortium without a certificate authority. Private files are readable by their owner only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import writing

YEARS = 2
CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.crt", "server.key"


def make_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Write `ca.crt`, `ca.key`, `server.crt` and `server.key`.

    Args:
        folder: Created, for its owner only, if it does not exist.
        hosts: Names and addresses by which sites reach the server; the first one is the certificate's common name.

    Raises:
        FedmllmError: One of the files exists.
    """
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmllm federation")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    ca = (
        _certificate(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    server = (
        _certificate(name, ca_name, server_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    for file, content in {CA: ca, SERVER: server}.items():
        _write(folder / file, content.public_bytes(serialization.Encoding.PEM), 0o644)
    for file, key in {CA_KEY: ca_key, SERVER_KEY: server_key}.items():
        _write(folder / file, _private(key, serialization.PrivateFormat.PKCS8), 0o600)


def make_site_key(path: Path) -> Path:
    """Write a site's private key.

    Args:
        path: Of the private key; the public one gets the suffix `.pub`.

    Returns:
        The path of the public key, which the server operator registers.

    Raises:
        FedmllmError: One of the files exists.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    _write(path, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    public = path.with_name(f"{path.name}.pub")
    openssh = serialization.PublicFormat.OpenSSH
    _write(public, key.public_key().public_bytes(serialization.Encoding.OpenSSH, openssh) + b"\n", 0o644)
    return public


def replace_site_key(path: Path) -> Path:
    """Replace a site's key, whose files are kept with the suffix `.old`.

    Args:
        path: Of the private key.

    Returns:
        The path of the new public key.

    Raises:
        FedmllmError: An older key has the suffix already, or the folder cannot be written.
    """
    pair = [path, path.with_name(f"{path.name}.pub")]
    for old in (file.with_name(f"{file.name}.old") for file in pair):
        if old.exists():
            raise FedmllmError(f"{old} exists; move it away first")
    for file in pair:
        if file.exists():
            file.rename(file.with_name(f"{file.name}.old"))
    return make_site_key(path)


def refuse_open_key(path: Path) -> None:
    """Check the mode of a private key.

    Raises:
        FedmllmError: Others than its owner may read or write it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name != "nt" and mode & 0o077:
        raise FedmllmError(f"{path}: has mode {mode:04o}; only its owner may read a private key: chmod 600 {path}")


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file; an existing one is not replaced, because a key in use would be lost."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    except FileExistsError:
        if not path.parent.is_dir():
            raise FedmllmError(f"{path}: cannot be written: {path.parent} is not a folder") from None
        raise FedmllmError(f"{path} exists; a key in use would be lost; delete it first to replace it") from None
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from None
    with writing(path), open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(content)
