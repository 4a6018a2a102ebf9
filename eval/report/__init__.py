"""The report of one or several runs: one HTML file that opens without a server, and its numbers as JSON and CSV.

runs.py     what a folder holds          scores.py   tables by dimension      curves.py   learning and probes
plane.py    learning against forgetting  changes.py  row by row, paired       clips.py    sound to play
costs.py    time, tokens, parameters     tables.py   results.json, .csv       page.html   how it looks
judged.py   a judge beside the rules
"""

from eval.report.write import write_report

__all__ = ["write_report"]
