"""The encoding that a message names for a file that is not UTF-8."""

import pytest

from dlopt.data.tables.encoding import guess_encoding

TEXTS = {
    "cp1252": "Grüße 1.5 schön, Straße; 5 €, °C, m², café, été, où, là, año, ¿qué?, smørrebrød – “x”",
    "macintosh": "Grüße 1.5 schön, Straße; café, été, où, là, año, niño",
    "cp850": "Grüße 1.5 schön, Straße; café, été, où, là, año, niño",
    "cp1250": "książka 1.5 był, łódź, żółw, Paweł",
    "cp1251": "Привет мир, и да, Москва",
    "koi8_r": "Привет мир, и да, Москва",
    "cp1253": "Καλημέρα 1.5 κόσμος",
    "cp1255": "שלום עולם",
    "shift_jis": "日本語のテキスト, 東京。 カタカナ",
    "euc_jp": "日本語のテキスト, ひらがな, カタカナ",
    "gb2312": "北京, 中文数据, 上海市, 温度, 湿度",
    "big5": "臺北, 溫度, 中文資料",
    "euc_kr": "서울, 한국어 텍스트",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_names_the_encoding_of_a_text(encoding: str) -> None:
    found = guess_encoding(("x,y\n" + TEXTS[encoding]).encode(encoding))
    assert found is not None and found[0] == encoding and found[1] in TEXTS[encoding]


def test_names_none_for_other_bytes() -> None:
    assert guess_encoding(bytes(range(128, 256)) * 3) is None and guess_encoding(b"ascii") is None
