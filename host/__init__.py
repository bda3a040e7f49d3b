"""The only folder besides nodes that imports comfy: operations, loading and sampling hooks."""
