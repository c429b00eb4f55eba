"""Tuning records: what was measured, kept in files that merge by union and are shared without locks."""
