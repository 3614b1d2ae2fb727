"""Tables, figures and one page, all read from the records of runs. Loads no torch."""

from fedmllm.report.write import write_report

__all__ = ["write_report"]
