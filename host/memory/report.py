"""Puts the session's ledger into a report, and its chart into ComfyUI's form of an image."""

from __future__ import annotations

import numpy as np
import torch

from ...memory.report import RunReport, make_report
from .session import session


def running_report() -> RunReport:
    """The running prompt's report."""
    ledger = session().begin()
    ledger.sample("report")
    return make_report(ledger.run, ledger.device)


def chart_image(report: RunReport) -> torch.Tensor:
    """The chart as (1, height, width, 3), float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(report.chart, dtype=np.float32) / 255.0)[None]
