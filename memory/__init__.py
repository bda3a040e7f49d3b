"""Memory ledger, policy and report. Imports no comfy."""
