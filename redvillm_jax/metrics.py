"""metrics.jsonl: one JSON line per logged step; the file is the database."""

import json
from pathlib import Path

from data_pipeline.files import write_text


def open_metrics(path: str | Path, last_step: int) -> "MetricsFile":
    """Opens the file for appending; lines of steps after `last_step`, which will be run again, are dropped."""
    path = Path(path)
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, KeyError):  # the half line of a killed run
                continue
    write_text(path, "".join(line + "\n" for line in kept))
    return MetricsFile(path)


class MetricsFile:
    """Appends lines, each flushed at once."""

    def __init__(self, path: Path):
        self.file = path.open("a")

    def write(self, step: int, **values: float) -> None:
        """One line: {"step": step, **values}."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
