"""The paper's tables and figures: a matrix of cells, each made once, and what is drawn of them."""

from __future__ import annotations

from pbe_fast.reproduce.cells import Cell, Request, Subject, cells_of
from pbe_fast.reproduce.scales import SCALES, Plan, Scale, find_scale
from pbe_fast.reproduce.store import Store
from pbe_fast.reproduce.tables import make_table
from pbe_fast.reproduce.work import Job, make_cells

__all__ = [
    "SCALES",
    "Cell",
    "Job",
    "Plan",
    "Request",
    "Scale",
    "Store",
    "Subject",
    "cells_of",
    "find_scale",
    "make_cells",
    "make_table",
]
