"""Predicts rows of a table with the ONNX file beside this one: predict(InferenceSession(FILE), csv.DictReader(...))."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

GAPS = {"", "-", ".", "?", "na", "n/a", "#n/a", "nan", "null", "nil"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PARTS: Any = re.compile(r"(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})(?:,?[T ]+(\d{1,2}):(\d\d):?(\d\d)?(?: ?([AaPp])[Mm])?)?")


def seconds(text: str, form: str) -> float:  # since 1970; form: 2024-01-31, 31/1/2024, 1/31/2024, 2024-01-31T14:05Z
    if re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?", text):
        return (datetime.fromisoformat(text) - EPOCH.replace(tzinfo=UTC if form[-1] == "Z" else None)).total_seconds()
    a, mark, b, c, hour, minute, second, half = PARTS.fullmatch(text).groups("0")
    date = (a, b, c) if len(a) == 4 else (c, a, b) if form == "1/31/2024" and mark != "." else (c, b, a)
    hours = int(hour) if half == "0" else int(hour) % 12 + 12 * (half in "Pp")
    return datetime.strptime(f"{'-'.join(date)} {hours}:{minute}:{second}Z", "%Y-%m-%d %H:%M:%S%z").timestamp()


def features(column: dict[str, Any], text: str) -> list[float]:
    is_gap = text.lower() in GAPS
    found = [float(text) if column["kind"] == "number" and not is_gap else column["fill"] or 0.0]
    if column["kind"] == "category":
        plain = column["fill"] if is_gap else re.sub(r"^([+-]?[0-9]+)\.0*$", r"\1", text)
        found = [plain == value for value in column["values"]]
    elif column["kind"] == "date":
        moment = found[0] if is_gap else seconds(text, column["form"])
        date = EPOCH + timedelta(seconds=moment)
        found = [date.year, date.month, date.day, date.weekday(), moment % 86400 / 3600][: 4 + column["has_times"]]
    return [*found, is_gap] if column["has_gaps"] else found


def predict(session: Any, rows: Any) -> Any:  # the outputs of the file; rows: texts by column
    columns = json.loads(session.get_modelmeta().custom_metadata_map["columns"])["encoding"]
    inputs = np.array([[x for each in columns for x in features(each, row[each["name"]].strip())] for row in rows])
    return session.run(None, {"features": inputs.astype(np.float32)})
