"""Small tables of the embedding study as fixtures."""

from small_tables import facts, run_folder, small_run, tables

__all__ = ["facts", "run_folder", "small_run", "tables"]
