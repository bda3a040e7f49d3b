"""What makes files of this repository: the workflows' thumbnails, the demo's trained model, the table of versions. Not installed."""
