"""A folder of records as one page with figures, and the figures as files.

    write_report(folder, page) -> Written

Needs the package matplotlib; nothing outside this folder imports it.
"""

from layerskip.errors import RequestError

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise RequestError("figures need matplotlib; pip install 'layerskip[plot]'") from error

from layerskip.evaluate.report.folder import Written, write_report

__all__ = ["Written", "write_report"]
