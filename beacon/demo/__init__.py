"""The shipped model on a long real text: what `beacon demo` measures and writes."""

from beacon.demo.measure import Demo, Settings, load_default, run
from beacon.demo.report import machine_stamp, write_report

__all__ = ["Demo", "Settings", "load_default", "machine_stamp", "run", "write_report"]
