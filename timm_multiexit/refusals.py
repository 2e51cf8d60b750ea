"""What other libraries raise, and what they say in one line."""

# Of timm and torch, for keywords and numbers that they do not take, and for weights that are not to be had.
REFUSALS = (TypeError, ValueError, AssertionError, IndexError, RuntimeError, OSError)


def one_line(error: object, limit: int | None = 200) -> str:
    r"""Return an error's words on one printable line without a stop at its end, its type where it has none.

    Args:
        error: The error, or somebody's words.
        limit: Characters, None for all.

    >>> one_line(OSError('No space left\non device.')), one_line(KeyError()), one_line('')
    ('No space left on device', 'KeyError', '')
    """
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror  # without its number and the path, which the message has
    words = ' '.join(''.join(sign if sign.isprintable() else ' ' for sign in str(error)).split())
    return words[:limit].rstrip('.: ') or (type(error).__name__ if isinstance(error, BaseException) else '')
