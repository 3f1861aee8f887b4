"""The values of `format` that are checked: dates and times (RFC 3339), UUIDs, IP addresses."""

import datetime
import ipaddress
import re
from collections.abc import Callable

TIME = re.compile(
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]{1,9})?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_date(text: str) -> bool:
    """2026-02-28, of a day that there is."""
    try:
        return bool(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text)) and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def is_address(text: str, kind: type) -> bool:
    """Of this kind of IP address."""
    try:
        return len(text) < 64 and text.isascii() and "%" not in text and bool(kind(text))
    except ValueError:
        return False


FORMATS: dict[str, Callable[[str], bool]] = {
    "date": is_date,
    "time": lambda text: TIME.fullmatch(text) is not None,
    "date-time": lambda text: text[10:11] in ("T", "t") and is_date(text[:10]) and bool(TIME.fullmatch(text[11:])),
    "uuid": lambda text: UUID.fullmatch(text) is not None,
    "ipv4": lambda text: is_address(text, ipaddress.IPv4Address),
    "ipv6": lambda text: is_address(text, ipaddress.IPv6Address),
}
