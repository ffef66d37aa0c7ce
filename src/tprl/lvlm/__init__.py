"""The only place that knows the model families of transformers: encode pictures, prune models, undo it."""
