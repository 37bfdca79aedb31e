"""The data that is trained on: sources, mixed, tokenized, cut and packed by ``datasets``."""

from beacon.training.data.config import DataConfig, SourceConfig
from beacon.training.data.pipeline import build_dataset
from beacon.training.data.report import Counts, Report

__all__ = ["Counts", "DataConfig", "Report", "SourceConfig", "build_dataset"]
