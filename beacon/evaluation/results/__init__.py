"""Results of a suite on disk: a folder with a line of JSON for every item, and what it was measured with."""

from beacon.evaluation.results.folder import Results, TaskHead
from beacon.evaluation.results.records import Record, Status, append_record, best_records, read_records
from beacon.evaluation.results.stamps import files_fingerprint, model_fingerprint, stamp, tokenizer_fingerprint

__all__ = [
    "Record",
    "Results",
    "Status",
    "TaskHead",
    "append_record",
    "best_records",
    "files_fingerprint",
    "model_fingerprint",
    "read_records",
    "stamp",
    "tokenizer_fingerprint",
]
