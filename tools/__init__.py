"""What makes files of this repository: the bundled workflows and the demo's trained model. Not installed."""
