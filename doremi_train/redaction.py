"""What is secret, decided in one place: all that is written or printed passes `redact`.

Secret are, in URLs, the user and password before the host, and what a query signs or authorises
with; in `pipe:` commands also what their options, headers and variables say of it; and the values
of environment variables whose names say so.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

T = TypeVar("T")

# Names of what is secret.
_WORDS = (
    r"sig|signature|hmac|tokens?|bearer|secret|pass|passw(?:or)?d|passphrase|passcode|pwd?|otp"
    r"|credentials?|auth|authorization|jwt|sas|api[_-]?key|key(?:[_-]?id)?|session(?:[_-]?id)?"
    r"|cookie"
)
# A password may hold a slash; a port does not make one.
_LOGIN = re.compile(
    r"""((?:\b[a-z][a-z\d+.-]*)?://)([^/\s'"]*|[^/\s'"@:]*:(?!\d+(?:/|$)|//)[^\s'"@]*)(?=@)""",
    re.IGNORECASE,
)
_CONTAINER = re.compile(r"(?:abfss?|wasbs?|az|adl)://", re.IGNORECASE)  # CONTAINER@ACCOUNT follows
_NAME = re.compile(
    rf"x-(?:amz|goog)-[\w-]+|[\w.-]*(?:{_WORDS})|(?:[\w.-]*[_.-])?code", re.IGNORECASE
)
_QUERY = re.compile(
    r"""([?&;#]([\w.%-]+)=)(\$\{[^}]*\}|(?:(?!,\w+://)[^&;#\s'"\]}])*)""",
)
# What is quoted may hold spaces; so may a header, up to the quote that was open before it.
_VALUE = r"""[ =:]*['"]?)((?<=")[^"]+|(?<=')[^']+|(?:(?:basic|bearer|token)\s+)?[^\s'"]+)"""
_COMMAND = [
    *(
        re.compile(rf"({quote}[\w-]*(?:{_WORDS}):\s*)([^{quote}]+)", re.IGNORECASE)
        for quote in "'\""
    ),
    *(
        re.compile(pattern + _VALUE, re.IGNORECASE)
        for pattern in (
            r"((?<!\S)(?:-u|--user|--proxy-user)(?=[ =\w'\"][^\s:]*[:$])",
            rf"((?<!\S)--?[\w-]*(?:{_WORDS})(?=[ =])",
            rf"((?<![\w?&;#-])[\w-]*(?:{_WORDS})(?=[:=])",  # a header or a variable
        )
    ),
    # What some programs call it.
    *(
        re.compile(rf"(\b{program}\s(?:[^|;&\s]+\s+)*?{option}" + _VALUE)
        for program, option in (
            ("sshpass", "-p"),
            ("curl", "-b(?= )"),
            ("lftp", "-u(?= )"),
            ("smbclient", "-U(?= )"),
            ("unzip", "-P(?= )"),
            ("openssl", "-k(?= )"),
            (r"7z[az]?", r"-p(?=[\w'\"])"),
            (r"mysql(?:dump)?", r"-p(?=[\w'\"])"),
        )
    ),
]
_VARIABLE = re.compile(rf"(?:.*_)?(?:{_WORDS})", re.IGNORECASE)
_NO_SECRETS = ("PWD", "OLDPWD")  # the working directory
_SHORTEST = 8  # characters of a variable that is looked for: a shorter one is a word of others too
_OWN = re.compile(r"\$\{oc\.env:(DOREMI_TRAIN_\d+_SECRET)\}")


def redact(value: T) -> T:
    """The same text or JSON value without secrets: what may be written and shown.

    >>> redact("https://ann:1234@host/x?key=5678&part=2")
    'https://***@host/x?key=***&part=2'
    """
    hidden = sorted(_of_environment(), key=len, reverse=True)

    def text(value: str) -> str:
        for secret in hidden:
            value = value.replace(secret, "***")
        return _replaced(value, lambda _: "***")

    return _mapped(value, text)


def veil(value: T) -> T:
    """The same text or JSON value with its secrets as `${oc.env:…}` of variables that this process
    and its children have in their environment: what may be kept in files, and still be used."""
    return _mapped(value, lambda text: _replaced(text, _kept_in_environment))


def unveil(value: T) -> T:
    """What `veil` made, as it was. Raises KeyError where the environment is another."""
    return _mapped(value, lambda text: _OWN.sub(lambda found: os.environ[found[1]], text))


def _mapped(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, text) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, text) for entry in value)
    return value


def _replaced(text: str, by: Callable[[str], str]) -> str:
    def login(found: re.Match[str]) -> str:
        if _CONTAINER.fullmatch(found[1]) and ":" not in found[2]:
            return found[0]
        return found[1] + by(found[2])

    def asked(found: re.Match[str]) -> str:
        return found[1] + by(found[3]) if _NAME.fullmatch(unquote(found[2])) else found[0]

    def named(found: re.Match[str]) -> str:
        return found[1] + by(found[2])

    text = _QUERY.sub(asked, _LOGIN.sub(login, text))
    before, pipe, command = text.partition("pipe:")
    for pattern in _COMMAND * bool(pipe):
        command = pattern.sub(named, command)
    return before + pipe + command


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and name not in _NO_SECRETS and _VARIABLE.fullmatch(name):
            yield value


def _kept_in_environment(secret: str) -> str:
    if not secret or secret == "***" or secret.startswith("${"):
        return secret
    number = 1
    while os.environ.get(f"DOREMI_TRAIN_{number}_SECRET", secret) != secret:
        number += 1
    os.environ[f"DOREMI_TRAIN_{number}_SECRET"] = secret
    return f"${{oc.env:DOREMI_TRAIN_{number}_SECRET}}"
