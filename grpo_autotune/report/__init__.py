"""The report of one probe: built once, saved as `report.json`, and enough to print everything again."""

from grpo_autotune.records.report import SCHEMA, Report
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import REPORT_FILE, load_report, save_report

__all__ = ["REPORT_FILE", "SCHEMA", "Report", "build_report", "load_report", "save_report"]
