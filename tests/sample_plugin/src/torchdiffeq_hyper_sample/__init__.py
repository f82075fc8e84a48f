"""A sample plugin; its hook is in `torchdiffeq_hyper_sample.methods`."""
