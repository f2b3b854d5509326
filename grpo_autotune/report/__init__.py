"""The report of one probe: built once, saved as `report.json`, and enough to print everything again."""
