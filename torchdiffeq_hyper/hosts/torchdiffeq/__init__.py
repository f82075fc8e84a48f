"""The torchdiffeq host: methods for `odeint`, `odeint_adjoint` and `odeint_event`."""
