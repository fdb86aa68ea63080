"""The table of the features that exclude each other."""

from markup import code, table, text

from dlopt.config.conflicts import CONFLICTS


def table_of_conflicts() -> str:
    rows = [(code(row.one.name), code(row.other.name), text(row.why), text(row.use)) for row in CONFLICTS]
    return table(("Feature", "Excludes", "Because", "Use"), rows)
