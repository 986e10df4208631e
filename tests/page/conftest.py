"""Small tables for the tests of the page."""

from small_tables import facts, run_folder, small_run, tables

__all__ = ["facts", "run_folder", "small_run", "tables"]
