"""Where every gigabyte is: a ledger that measures, policies that decide, a sentinel for growth, and reports. No ComfyUI here."""
