"""Steps to target with everything tuned at every batch size: search, race, driver, summary."""
