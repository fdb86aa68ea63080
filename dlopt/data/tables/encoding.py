"""Guesses the encoding of a text that is not UTF-8, for messages: dlopt never converts a text on a guess."""

import re

_SEPARATORS = re.compile(r"[\s!-@\[-`{-~]+")  # white space, digits and punctuation of ASCII
_PLAUSIBLE = 0.8  # of the words that are not ASCII


def _latin(letters: str) -> str:
    """Returns the pattern of words with these letters, and of symbols beside them.

    In another encoding, words have symbols between letters, capitals after small letters, or accents only.
    """
    small = "".join(letter for letter in letters if letter.islower())
    capital = "".join(letter for letter in letters if letter.isupper())
    odd = (
        f"[a-zA-Z{letters}][^\x00-\x7f’–·{letters}][a-zA-Z{letters}]",
        f"[a-zA-Z{letters}][‚„ƒˆ†‡‰‹•˜˘›]",
        f"[a-z{small}][{capital}]",
        "[^\x00-\x7f]{4}",
    )
    return f"(?!.*({'|'.join(odd)})).*"


_WESTERN = _latin("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿŒœŠšŽž")
_CENTRAL = _latin("ÁÂĂÄĄĆÇČÉĘËĚÍÎĎĐŁŃŇÓÔŐÖŘŚŠŞŤŢŮÚŰÜÝŹŽŻßáâăäąćçčéęëěíîďđłńňóôőöřśšşťţůúűüýźžż")
_CYRILLIC = "[А-ЯЁ]?[а-яё]+|[А-ЯЁ]+"
_PUNCTUATION = "\u3000-\u303f\uff01-\uff60\u2010-\u2026・"
_JAPANESE = f"[\u3040-\u30ff\u4e00-\u9fff々{_PUNCTUATION}]+"
_CHINESE = f"[\u4e00-\u9fff{_PUNCTUATION}]+"
_WORDS = {
    "cp1252": _WESTERN,
    "cp1250": _CENTRAL,
    "cp1255": "[א-ת]+",
    "cp1251": _CYRILLIC,
    "koi8_r": _CYRILLIC,
    "cp1253": "[Α-ΩΆΈ-Ώ]?[ά-ρσ-ώ]*ς?|[Α-ΩΆΈ-Ώ]+",
    "euc_kr": f"[가-힣{_PUNCTUATION}]+",
    "gb2312": _CHINESE,
    "shift_jis": _JAPANESE,
    "euc_jp": _JAPANESE,
    "big5": _CHINESE,
    "macintosh": _WESTERN,
    "cp850": _WESTERN,
}
"""What the words of a text look like, by encoding. The first of several that fit equally well is named."""


def guess_encoding(text: bytes) -> tuple[str, str] | None:
    """Returns the encoding in which most words of a text look like words, and one of them; None if none fits."""
    best, found = _PLAUSIBLE, None
    for encoding, pattern in _WORDS.items():
        try:
            decoded = text.decode(encoding)
        except UnicodeDecodeError:
            continue
        words = [word for word in _SEPARATORS.split(decoded) if word and not word.isascii()]
        fitting = [word for word in words if re.fullmatch(pattern, word)]
        if words and len(fitting) / len(words) > best:
            best, found = len(fitting) / len(words), (encoding, max(fitting[:100], key=len)[:20])
    return found
