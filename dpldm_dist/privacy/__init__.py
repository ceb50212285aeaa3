"""All of the differential-privacy mathematics: no Ray, no files but the ledger's, no config."""
