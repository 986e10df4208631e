"""Numbers of bytes and seconds for people to read."""

import humanize


def readable_bytes(n_bytes: float) -> str:
    """Return a number of bytes in decimal units, to about three digits.

    >>> readable_bytes(999), readable_bytes(12_340), readable_bytes(201_700_000), readable_bytes(1.46e9)
    ('999 Bytes', '12.3 kB', '202 MB', '1.5 GB')
    """
    number, unit = humanize.naturalsize(n_bytes, format="%.1f").split()
    return f"{float(number):.0f} {unit}" if float(number) >= 100 else f"{number.removesuffix('.0')} {unit}"


def readable_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours; 1 s at least.

    >>> readable_duration(40), readable_duration(725), readable_duration(5400)
    ('40 s', '12 min', '1.5 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
