"""The demo: a trained model and tiny ones in every format, as clips and a table. Not installed."""
